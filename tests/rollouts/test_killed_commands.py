"""The real commands, killed with SIGKILL several times at different moments and started again until they finish."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.rollouts.collecting import rows_of, save_model, save_prompts
from trl_blend.rollouts.store import RolloutStore


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "student": save_model(folder / "student"),
        "teacher": save_model(folder / "teacher", seed=1),
        "prompts": save_prompts(folder / "prompts.jsonl", count=16),
    }


def rollouts_command(inputs, folder):
    command = ["rollouts", "--model_name_or_path", inputs["student"], "--dataset_name", inputs["prompts"]]
    settings = ["--max_completion_length", "6", "--rows_per_shard", "2", "--batch_size", "1", "--disable_tqdm"]
    return [*command, "--output_dir", str(folder), *settings]


def score_command(inputs, rollouts, folder):
    command = ["score", "--teacher_model_name_or_path", inputs["teacher"], "--rollouts", str(rollouts)]
    return [*command, "--output_dir", str(folder), "--tokens_per_batch", "30", "--top_k", "3", "--disable_tqdm"]


@pytest.fixture(scope="module")
def server():
    """See `command_server`."""
    command = [sys.executable, str(Path(__file__).with_name("command_server.py"))]
    # Ctrl-C is ignored in what a shell without job control starts in the background, and in all that this starts
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def start(server, command):
    print(json.dumps(command), file=server.stdin, flush=True)
    return int(next(line for line in server.stdout if line.startswith("pid ")).split()[1])


def status_of(server):
    return int(next(line for line in server.stdout if line.startswith("exit ")).split()[1])


def run(server, command):
    start(server, command)
    assert status_of(server) == 0


def shards_in(folder):
    return sorted((folder / "data").glob("part-*.parquet"))


def kill_and_finish(server, command, folder, moments):
    """Starts the command and kills it after so many shards and so many seconds more, then lets it finish."""
    for shards, seconds in moments:
        pid = start(server, command)
        for line in server.stdout:
            assert not line.startswith("exit "), "the command was to be killed, but has ended"
            if line.startswith("at ") and len(shards_in(folder)) >= shards:
                break
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        assert status_of(server) == signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in shards_in(folder)}
    assert 0 < len(before) < 8
    run(server, command)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was there is not made again
    assert not list(folder.rglob("*.tmp"))
    return RolloutStore.open(folder, verify=True)


MOMENTS = [(0, 0.01), (1, 0.02), (3, 0.09), (5, 0.0)]


def test_both_commands(server, inputs, tmp_path):
    run(server, rollouts_command(inputs, tmp_path / "whole"))
    whole = RolloutStore.open(tmp_path / "whole")
    killed = kill_and_finish(server, rollouts_command(inputs, tmp_path / "killed"), tmp_path / "killed", MOMENTS)
    assert rows_of(killed) == rows_of(whole) and len(rows_of(whole)) == 16
    assert len({row["key"] for row in rows_of(killed)}) == 16
    assert killed.digest == whole.digest and len(killed.manifest.shards) == 8

    run(server, score_command(inputs, tmp_path / "whole", tmp_path / "scored"))
    scored = RolloutStore.open(tmp_path / "scored")
    command = score_command(inputs, tmp_path / "killed", tmp_path / "scored_killed")
    again = kill_and_finish(server, command, tmp_path / "scored_killed", MOMENTS)
    assert rows_of(again) == rows_of(scored) and len(rows_of(scored)) == 16
    assert again.digest == scored.digest


def test_ctrl_c_says_how_to_go_on(server, inputs, tmp_path):
    pid = start(server, rollouts_command(inputs, tmp_path / "store"))
    assert any(line.startswith("at sample") for line in server.stdout)
    os.kill(pid, signal.SIGINT)
    assert os.waitstatus_to_exitcode(status_of(server)) == 130
    assert (tmp_path / "store" / "manifest.json").exists()

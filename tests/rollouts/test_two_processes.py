"""Two processes split the shards of both commands, and what they write is what one process writes."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.rollouts.collecting import collect, rows_of, save_model, save_prompts, score
from trl_blend.rollouts.store import RolloutStore
from trl_blend.scripts.messages import say


pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("two_process_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    save_model(folder / "student")
    save_model(folder / "teacher", seed=1)
    save_prompts(folder / "prompts.jsonl", count=9)
    return folder


@pytest.fixture(scope="module")
def launched(folder):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(WORKER), str(folder)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_each_process_writes_its_shards(launched):
    _, ranks = launched
    assert [found["num_processes"] for found in ranks] == [2, 2]
    for rank, found in enumerate(ranks):
        expected = [[name, index] for name in ("rollouts", "scored") for index in range(rank, 5, 2)]
        assert found["written"] == expected


def test_the_stores_are_those_of_one_process(folder, launched, tmp_path):
    settings = {"max_completion_length": 6, "rows_per_shard": 2}
    one = collect(str(folder / "student"), str(folder / "prompts.jsonl"), tmp_path / "rollouts", **settings)
    two = RolloutStore.open(folder / "rollouts", verify=True)
    assert rows_of(two) == rows_of(one) and two.digest == one.digest and len(rows_of(two)) == 9
    scored_by_one = score(one, str(folder / "teacher"), tmp_path / "scored")
    scored = RolloutStore.open(folder / "scored", verify=True)
    assert rows_of(scored) == rows_of(scored_by_one) and scored.digest == scored_by_one.digest


def test_a_message_is_one_write(monkeypatch):
    """Two processes have one standard error, which torchrun leaves unbuffered."""
    written = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    say("gone")
    assert written == ["trl-blend: gone\n"]


def test_an_error_ends_all_processes(launched):
    done, ranks = launched
    assert [found["statuses"] for found in ranks] == [[0, 0, 2], [0, 0, 2]]
    lines = [line for line in done.stderr.splitlines() if line.startswith("trl-blend")]
    assert len(lines) == 2 and all("seed: 0 -> 7" in line for line in lines)
    assert any(line.startswith("trl-blend (process 1): error: ") for line in lines)
    assert done.stdout.count("rollouts with") == 2  # one line per command, from the main process

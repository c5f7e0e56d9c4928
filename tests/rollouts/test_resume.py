"""A writer that is killed and started again leaves exactly what an uninterrupted one does."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.rollouts.killed_writer import job
from tests.rollouts.stores import contents, make_manifest
from trl_blend.errors import StoreError
from trl_blend.rollouts.format import Manifest
from trl_blend.rollouts.store import RolloutStore
from trl_blend.rollouts.writer import ShardWriter


ROOT = Path(__file__).resolve().parents[2]


def start(*arguments, stderr=None):
    command = [sys.executable, "-m", "tests.rollouts.killed_writer", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)


def uninterrupted(folder, num_shards):
    job(folder, num_shards)
    return contents(folder), RolloutStore.open(folder)


def require_equal(folder, expected, store):
    assert contents(folder) == expected
    found = RolloutStore.open(folder, verify=True)
    without_time = {**store.manifest.to_dict(), "created_at": found.manifest.created_at}
    assert found.manifest.to_dict() == without_time
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in store.folder.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_before_every_change_of_the_folder(tmp_path):
    expected, store = uninterrupted(tmp_path / "whole", 2)
    process = start("everywhere", tmp_path, 2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    deaths = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    for death in deaths:
        first, last = death["codes"]
        assert first == -signal.SIGKILL or death is deaths[-1]
        assert last == 0
        require_equal(tmp_path / str(death["number"]), expected, store)
    assert deaths[-1]["codes"][0] == 0  # every change of the folder was reached
    assert len(deaths) > 20
    left = [set(death["left"]) for death in deaths]
    # Half-written files were left behind, and a shard that no manifest names: see the changes before and after it
    assert any(".parquet." in name for names in left for name in names)
    between = [n for n, names in enumerate(left) if "data/part-00000.parquet" in names][0]
    assert Manifest.load(tmp_path / str(between)).num_rows > 0
    assert not any("part-00000" in name and name.endswith(".tmp") for name in left[between])


def test_killed_at_random_times(tmp_path):
    expected, store = uninterrupted(tmp_path / "whole", 30)
    folder, delays, codes = tmp_path / "killed", random.Random(0), []
    for _ in range(4):
        process = start("run", folder, 30)
        assert process.stdout.readline() == "started\n"
        time.sleep(delays.uniform(0.0, 0.06))
        process.kill()
        process.communicate()
        codes.append(process.returncode)
    assert codes.count(-signal.SIGKILL) >= 3
    job(folder, 30)
    require_equal(folder, expected, store)


def test_processes_write_different_shards_and_one_of_them_dies(tmp_path):
    expected, store = uninterrupted(tmp_path / "whole", 9)
    folder = tmp_path / "shared"
    main = start("run", folder, 9, 0, 3)
    assert main.stdout.readline() == "started\n"
    others = [start("run", folder, 9, rank, 3) for rank in (1, 2)]
    assert others[0].stdout.readline() == "started\n"
    others[0].stdout.readline()  # one shard of its own
    others[0].kill()
    for process in (main, *others):
        process.communicate(timeout=60)
    assert [main.returncode, others[1].returncode] == [0, 0]
    # Its shards are missing unless it was quicker than the kill; the others' are there, and nobody claims to be done
    found = ShardWriter(folder, make_manifest(num_shards=9))
    assert {f"data/part-0000{index}.parquet" for index in (0, 3, 6, 2, 5, 8, 1)} <= {
        record["file"] for record in found.manifest.shards
    }
    assert not found.manifest.complete
    job(folder, 9)
    require_equal(folder, expected, store)


@pytest.mark.parametrize("end", ["complete", "dropped"])
def test_two_jobs_on_one_folder_are_refused(tmp_path, end):
    process = start("run", tmp_path, 1, 0, 2)  # of two processes: it never closes the store
    assert process.stdout.readline() == "started\n"
    process.communicate(timeout=60)
    writer = ShardWriter(tmp_path, make_manifest(num_shards=1))  # it has ended: no lock is left
    again = ShardWriter(tmp_path, make_manifest(num_shards=1))  # the same process may, and takes over
    if end == "dropped":
        del writer
    refused = start("run", tmp_path, 1, stderr=subprocess.PIPE)
    _, message = refused.communicate(timeout=60)
    assert refused.returncode == 1
    assert f"StoreError: Another process is writing {tmp_path}" in message
    with pytest.raises(StoreError, match="half-written: 1 of 1"):
        RolloutStore.open(tmp_path)
    if end == "complete":
        again.update_manifest(complete=True)
    else:
        del again
    allowed = start("run", tmp_path, 1)
    allowed.communicate(timeout=60)
    assert allowed.returncode == 0

"""A push that ends in the middle is completed by the next one, which sends nothing a second time."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.hub.repositories import Refused
from tests.hub.server import hub_endpoint, running_hub  # noqa: F401
from tests.hub.test_server import impatient  # noqa: F401
from tests.rollouts.stores import write_store
from tests.trainers.pushing.pushing import assert_same_weights, build, models  # noqa: F401
from trl_blend import RolloutStore, load_scored_rollouts


ROOT = Path(__file__).resolve().parents[3]
PUSH_STORE = """
import sys
from trl_blend import RolloutStore
RolloutStore.open(sys.argv[1]).push_to_hub("me/scored")
"""
PUSH_RUN = """
import sys
from pathlib import Path
from tests.trainers.pushing.pushing import build
trainer = build("logit_mix", Path(sys.argv[1]), Path(sys.argv[2]), push_to_hub=True, hub_model_id="me/run",
                save_strategy="no", max_steps=1)
trainer.train()
trainer.push_to_hub()
"""


@pytest.fixture
def hub(hub_endpoint):  # noqa: F811
    return hub_endpoint


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def killed(hub, code, *arguments, home, sends):
    """Run `code` in a process that is killed when it has sent that many LFS files and begins with another."""
    started = threading.Event()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=hub.environment(home),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def kill(index):
        if index >= sends:
            wait_for(lambda: len(hub.arrived()) == sends)
            os.kill(process.pid, signal.SIGKILL)
            process.wait(timeout=60)
            started.set()
            raise Refused(None, "killed")

    hub.before["lfs_upload"] = kill
    try:
        assert process.wait(timeout=300) == -signal.SIGKILL
        assert started.wait(timeout=10)
    finally:
        process.kill()
    hub.before.clear()


def test_a_killed_push_of_a_store_is_resumed(tmp_path):
    store = write_store(tmp_path / "scored", 6, scored=True)
    with running_hub() as (hub, _):
        killed(hub, PUSH_STORE, store.folder, home=tmp_path / "home", sends=2)
        repository = hub.dataset("me/scored")
        first = hub.arrived()
        assert len(first) == 2 and repository.commits == []
        done = subprocess.run(
            [sys.executable, "-c", PUSH_STORE, str(store.folder)],
            env=hub.environment(tmp_path / "home"),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        shards = [record["sha256"] for record in store.manifest.shards]
        assert Counter(hub.arrived()) == Counter(shards)  # each of them once, in both pushes together
        assert set(repository.files()) == {
            ".gitattributes",
            "README.md",
            "manifest.json",
            *(record["file"] for record in store.manifest.shards),
        }


def test_a_killed_push_of_a_run_is_resumed(hub, models, tmp_path):  # noqa: F811
    killed(hub, PUSH_RUN, models, tmp_path / "out", home=tmp_path / "home", sends=1)
    first = hub.arrived()
    assert len(first) == 1 and hub.model("me/run").commits == []
    # A new process goes on from what the killed one has saved
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    trainer = build("logit_mix", models, tmp_path / "out", student=student, push_to_hub=True, hub_model_id="me/run")
    trainer.push_to_hub()
    # The weights are those of before; `training_args.bin` is of a new run
    repository = hub.model("me/run")
    weights = repository.snapshots[repository.sha()]["model.safetensors"].oid
    assert hub.arrived().count(weights) == 1
    assert max(Counter(hub.arrived()).values()) == 1
    assert_same_weights(AutoModelForCausalLM.from_pretrained("me/run", dtype=torch.float32), student)


def test_a_connection_that_drops_is_taken_up_again(hub, tmp_path, impatient):  # noqa: F811
    store = write_store(tmp_path / "scored", 5, scored=True)
    hub.fail("lfs_upload", None, after=2, times=99)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        store.push_to_hub("me/scored")
    first = hub.arrived()
    assert len(first) == 2 and hub.dataset("me/scored").commits == []
    with pytest.raises(Exception, match="no dataset of that name|manifest"):
        RolloutStore.open("me/scored")
    hub.before.clear()
    store.push_to_hub("me/scored")
    assert Counter(hub.arrived()) == Counter(record["sha256"] for record in store.manifest.shards)
    assert load_scored_rollouts("me/scored", verify=True).digest == store.digest
    # Nothing has changed: nothing is sent, and there is no empty commit
    store.push_to_hub("me/scored")
    assert len(hub.arrived()) == 5 and len(hub.dataset("me/scored").commits) == 1

"""Of two processes the main one talks to the Hub, and a refusal reaches both: neither waits for the other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from tests.hub.server import running_hub
from tests.tiny import tiny_model
from tests.trainers.pushing.pushing import models  # noqa: F401


ROOT = Path(__file__).resolve().parents[3]
WORKER = Path(__file__).with_name("push_worker.py")


@pytest.mark.distributed
def test_the_main_process_pushes_and_a_refusal_reaches_both(models, tmp_path):  # noqa: F811
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with running_hub() as (hub, _):
        done = subprocess.run(
            [sys.executable, *torchrun, str(WORKER), str(models), str(tmp_path)],
            env=hub.environment(tmp_path / "home"),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
        assert first["world_size"] == second["world_size"] == 2
        # Uploads of LFS files, to signed addresses, name nobody; only who was given the address can send them
        named = [request.user_agent for request in hub.requests if request.kind not in ("unknown", "lfs_upload")]
        assert len(named) > 10 and {agent.split("origin/")[-1] for agent in named} == {"rank0"}
        messages = [message for _, message in hub.model("me/run").commits]
        assert messages[:2] == ["Training in progress, step 1", "Training in progress, step 2"]
        assert list(hub.repositories) == [("model", "me/run")]
        weights = load(hub.model("me/run").files()["model.safetensors"])
    start = tiny_model(seed=0).state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in weights.items())
    assert first["pushed"] is None and second["pushed"] is None
    assert "403" in first["refused_early"] and first["refused_early"] == second["refused_early"]
    # The other process has nothing to push: it has saved with the main one, which says what went wrong
    assert "403" in first["refused_late"] and second["refused_late"] is None
    assert (tmp_path / "unannounced" / "model.safetensors").is_file()

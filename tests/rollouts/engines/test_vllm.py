"""What an engine of vLLM in this process records; what it draws is in `tests/vllm/test_offline_rollouts.py`."""

import importlib.util
import json

import pytest

from tests.rollouts.collecting import collect, save_model
from tests.tiny import EOS_ID
from trl_blend.errors import ConfigError
from trl_blend.rollouts.engines import vllm
from trl_blend.rollouts.engines.base import Rollout
from trl_blend.rollouts.store import RolloutStore


SETTINGS = {"max_completion_length": 4, "rows_per_shard": 1, "use_vllm": True}
DECIDING = {"quantization": "fp8", "hf_overrides": {"rope_theta": 2.0}}
MACHINE = {"gpu_memory_utilization": 0.5, "max_model_len": 64}


@pytest.fixture
def engine(monkeypatch):
    """Ends after the first shard, the second time it goes on. It draws the end of a sequence."""

    def sample(self, prompt_ids, seeds, on_rows=None):
        if drawn:
            raise drawn.pop()
        drawn.append(KeyboardInterrupt())
        return [Rollout([EOS_ID], [-1.0], [-1.0], truncated=False) for _ in prompt_ids]

    drawn, find_spec = [], importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: name == "vllm" or find_spec(name, *args))
    monkeypatch.setattr(vllm, "version", lambda name: "0.31.0")
    monkeypatch.setattr(vllm.VllmEngine, "load", lambda self, device, sampling: None)
    monkeypatch.setattr(vllm.VllmEngine, "sample", sample)


def test_a_collection_is_continued_with_what_decides_its_rows(engine, tmp_path):
    student, folder = save_model(tmp_path / "student"), tmp_path / "store"
    secret = {"hf_token": "hf_secret", "download_dir": str(tmp_path)}
    with pytest.raises(KeyboardInterrupt):
        collect(student, ["a", "b"], folder, vllm_kwargs={**DECIDING, **MACHINE, **secret}, **SETTINGS)
    assert "hf_secret" not in (folder / "manifest.json").read_text()
    with pytest.raises(ConfigError, match=r"vllm_kwargs: \{'quantization': 'fp8', .*\} -> not set"):
        collect(student, ["a", "b"], folder, **SETTINGS)
    with pytest.raises(ConfigError, match="vllm_kwargs: .* -> "):
        collect(student, ["a", "b"], folder, vllm_kwargs={"quantization": "fp8"}, **SETTINGS)
    store = collect(student, ["a", "b"], folder, vllm_kwargs={**DECIDING, "max_num_seqs": 8}, **SETTINGS)
    assert store.manifest.num_rows == 2
    found = RolloutStore.open(folder).manifest.engine
    assert json.loads(found["vllm_kwargs"]) == {**DECIDING, **MACHINE} and found["vllm"] == "0.31.0"


def test_without_any_nothing_is_recorded(engine, tmp_path):
    store = collect(save_model(tmp_path / "student"), ["a"], tmp_path / "store", vllm_kwargs=None, **SETTINGS)
    assert store.manifest.engine == {"name": "vllm", "vllm": "0.31.0"} and "vllm_kwargs" not in store.manifest.settings


def test_what_is_no_json_is_recorded_as_text(engine, tmp_path):
    student, given = save_model(tmp_path / "student"), {"hf_overrides": {"kind": SETTINGS.keys}}
    store = collect(student, ["a"], tmp_path / "store", vllm_kwargs=given, **SETTINGS)
    assert "built-in method keys" in store.manifest.settings["vllm_kwargs"]["hf_overrides"]["kind"]

"""What the tests of pushing share: tiny trainers of each kind, and comparisons with what the Hub then holds."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from tests.tiny import tiny_model
from tests.trainers import runs
from tests.trainers.conftest import models  # noqa: F401
from tests.trainers.scored import build_offline, load, scored_rollouts


KINDS = ("logit_mix", "trust_region", "offline")
TAGS = {"logit_mix": "logit-mix-grpo", "trust_region": "trust-region-opd", "offline": "offline-opd"}
PUSHING = {
    "push_to_hub": True,
    "hub_model_id": "me/run",
    "hub_strategy": "every_save",
    "hub_always_push": True,  # no push is left out because the one before it has not ended
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 2,
}


def build(kind: str, folder: Path, output_dir: Path, lora: bool = False, **settings: Any) -> Any:
    """A trainer of the tiny models in `folder`; the student is what logit mixing leaves, unless `objective` is set."""
    kwargs: dict[str, Any] = {}
    if lora:
        peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        kwargs["trainer_kwargs"] = {"peft_config": peft_config}
        kwargs |= {"teacher": None} if kind == "logit_mix" else {}
    if kind == "offline":
        rows = settings.pop("train_dataset", None)
        if rows is None:
            rows = scored_rollouts(load(folder, "student"), load(folder, "teacher"))
        return build_offline(folder, output_dir, train_dataset=rows, **kwargs, **settings)
    if kind == "logit_mix":
        settings = {"objective": "student", "teacher_weight": 0.3, **settings}
        return runs.build(folder, output_dir, **kwargs, **settings)
    return runs.build_opd(folder, output_dir, **kwargs, **settings)


def assert_same_weights(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Bit for bit, and not those that training started from."""
    found, wanted = actual.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys() and wanted
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    start = tiny_model(seed=0).state_dict()
    assert any("lora" in name or not torch.equal(start[name], tensor) for name, tensor in wanted.items())

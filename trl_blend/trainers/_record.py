"""
What a run is made of: in the line that it starts with, in the record that each checkpoint carries, and in what a
resumed run says of a checkpoint that was trained otherwise.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import nn

from trl_blend._files import write_atomically
from trl_blend.errors import ConfigError


RECORD_FILE = "trl_blend_run.json"
# transformers restores the optimizer and the schedule with these from the checkpoint, whatever is given now
_OF_THE_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2")
SETTINGS = (*_OF_THE_OPTIMIZER, "lr_scheduler_type", "max_grad_norm")
"""Settings of every trainer that a record holds, beside those of the method."""
_ROWS = 64


class RunParts(NamedTuple):
    """
    What a run is made of, in words.

    Args:
        teacher (`str`): Who it is, or why there is none.
        reward (`str`): What is maximised or measured; empty where there is none.
        method (`str`): Objective or policy, and its setting.
        deployed (`str`): What the trained model is decoded as.
    """

    teacher: str
    reward: str
    method: str
    deployed: str


class Difference(NamedTuple):
    """What a checkpoint was trained with, and what the run that goes on from it has instead."""

    what: str
    before: str
    now: str

    def __str__(self) -> str:
        kept = " (the checkpoint's optimizer keeps the former)" if self.what in _OF_THE_OPTIMIZER else ""
        return f"`{self.what}={self.before}`, now `{self.what}={self.now}`{kept}"

    @property
    def credit(self) -> str:
        """What a card says of it."""
        if self.what in _OF_THE_OPTIMIZER:
            return f"{self.what} {self.before}, which the optimizer keeps ({self.now} was given)"
        return f"{self.what} {self.before}, later {self.now}"


class Stage(NamedTuple):
    """The steps of a run up to `last_step`, as far as they were made with other settings than the later ones."""

    last_step: int
    differences: list[Difference]

    @property
    def text(self) -> str:
        if not self.differences:
            return "from a checkpoint without a record of its settings"
        return "; ".join(one.credit for one in self.differences)


def write_record(folder: Path, parts: Mapping[str, Any], stages: Iterable[Stage], state: Mapping[str, Any]) -> None:
    """Write the record of a checkpoint: what the run is made of, its former stages, and the method's own state."""
    former = [{"last_step": stage.last_step, "differences": stage.differences} for stage in stages]
    text = json.dumps({**parts, "former": former, "state": state}, indent=2) + "\n"
    write_atomically(folder / RECORD_FILE, text.encode())


def read_record(checkpoint: Path) -> dict[str, Any] | None:
    """The record of a checkpoint; `None` where there is none, as in one of the TRL parent."""
    path = checkpoint / RECORD_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def former_stages(record: Mapping[str, Any]) -> list[Stage]:
    """The stages that a checkpoint's own run had gone on from."""
    return [
        Stage(stage["last_step"], [Difference(*one) for one in stage["differences"]]) for stage in record["former"]
    ]


def kept_by_the_optimizer(stages: Iterable[Stage]) -> dict[str, float]:
    """Settings of which a resumed run uses those of its first checkpoint, whatever it is given."""
    kept: dict[str, float] = {}
    for one in (one for stage in stages for one in stage.differences if one.what in _OF_THE_OPTIMIZER):
        kept.setdefault(one.what, float(one.before))
    return kept


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """
    What two records tell apart.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the weights of the checkpoint would be put where they do not belong: it
            is of another trainer, or its adapter of another base.
    """
    for name, remedy in (("trainer", "that trainer"), ("base", "that base")):
        if before.get(name) and now.get(name) and not _same(before[name], now[name]):
            raise ConfigError(
                f"`resume_from_checkpoint`: the checkpoint was trained with {name} {_shown(before[name])}, this run "
                f"has {name} {_shown(now[name])}. Go on with {remedy}, or start a new run from the checkpoint's model."
            )
    found = []
    for name in ("teacher", "data", "reward"):
        if not _same(before.get(name), now.get(name)):
            found.append(Difference(name, _shown(before.get(name)), _shown(now.get(name))))
    settings = now["settings"]
    for name, value in before["settings"].items():
        if name in settings and value != settings[name]:
            found.append(Difference(name, repr(value), repr(settings[name])))
    return found


def model_part(name: str, digest: str | None) -> dict[str, Any]:
    """A model in a record: a name without folders, and a digest of some of its weights."""
    return {"name": name, "weights": digest}


def data_part(dataset: Any) -> dict[str, Any]:
    """Rows of a dataset in a record: how many there are, and a digest of 64 of them, in their order."""
    if not isinstance(dataset, Dataset) or not len(dataset):
        return {"rows": None, "sample": None}
    rows, digest = len(dataset), hashlib.sha256()
    for index in sorted({step * (rows - 1) // max(_ROWS - 1, 1) for step in range(_ROWS)}):
        row = json.dumps(dataset[index], sort_keys=True, default=lambda value: type(value).__name__)
        digest.update(row.encode())
    return {"rows": rows, "sample": digest.hexdigest()[:12]}


def weights_sample(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """
    A digest of the first numbers of every parameter: enough to tell two models apart, at no cost.

    `None` where a parameter is sharded or on no device, or where there is none.
    """
    digest, found = hashlib.sha256(), False
    for name, parameter in sorted(parameters):
        is_sharded = hasattr(parameter, "ds_id") or isinstance(parameter, torch.distributed.tensor.DTensor)
        if parameter.is_meta or is_sharded:
            return None
        numbers = parameter.detach().reshape(-1)[:8].contiguous().view(torch.uint8).cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + numbers.numpy().tobytes())
        found = True
    return digest.hexdigest()[:12] if found else None


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_same, before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        if before.get("weights") and now.get("weights"):  # whatever folder they are in
            return before["weights"] == now["weights"]
        # A stream, and a sharded model, have no digest: then the rest is compared
        return all(None in (value, now.get(name)) or value == now.get(name) for name, value in before.items())
    return before == now


def _shown(part: Any) -> str:
    if isinstance(part, list):
        return ", ".join(map(_shown, part)) or "none"
    if isinstance(part, dict):
        if "rows" in part:
            return "a stream" if part["rows"] is None else f"{part['rows']} rows (sample {part['sample']})"
        return f"{part['name']} (weights {part['weights']})" if part.get("weights") else str(part["name"])
    return str(part)

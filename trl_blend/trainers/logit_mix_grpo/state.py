"""What a checkpoint of [`LogitMixGRPOTrainer`] holds beyond its parent's."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.logging import get_logger


if TYPE_CHECKING:
    from .trainer import LogitMixGRPOTrainer

logger = get_logger(__name__)

_FILE = "logit_mix_state.json"
# A resumed run with other values of these does not continue the interrupted one
_FIELDS = (
    "teacher_weight",
    "teacher_weight_schedule",
    "teacher_weight_decay_steps",
    "mixing_space",
    "objective",
    "adaptive_interval",
    "adaptive_scale",
    "adaptive_offset",
)


def save_state(trainer: "LogitMixGRPOTrainer", checkpoint: Path) -> None:
    """Write the adaptive weight, and the settings that decide the weight of a step, into the checkpoint's folder."""
    state = {name: getattr(trainer.args, name) for name in _FIELDS}
    state["adaptive_weights"] = trainer.adaptive_weights
    (checkpoint / _FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def load_state(trainer: "LogitMixGRPOTrainer", checkpoint: Path) -> None:
    """Restore the adaptive weight; warn, with both values, of settings that differ. GRPO checkpoints hold neither."""
    path = checkpoint / _FILE
    if not path.is_file():
        return
    state = json.loads(path.read_text(encoding="utf-8"))
    trainer.adaptive_weights = tuple(state["adaptive_weights"])
    for name in _FIELDS:
        if state[name] != getattr(trainer.args, name):
            logger.warning(
                f"Resuming with `{name}={getattr(trainer.args, name)!r}`, but the checkpoint was trained with "
                f"`{name}={state[name]!r}`. The value given now is used from here on."
            )

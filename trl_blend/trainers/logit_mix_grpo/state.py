"""What a checkpoint of [`LogitMixGRPOTrainer`] holds beyond its parent's."""

from pathlib import Path
from typing import Any

from trl_blend.trainers._settings import read_settings, write_settings


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


def save_state(trainer: Any, checkpoint: Path) -> None:
    """Write the adaptive weight, and the settings that decide the weight of a step, into the checkpoint's folder."""
    write_settings(checkpoint / _FILE, trainer.args, _FIELDS, adaptive_weights=trainer.adaptive_weights)


def load_state(trainer: Any, checkpoint: Path) -> None:
    """Restore the adaptive weight; warn, with both values, of settings that differ. GRPO checkpoints hold neither."""
    state = read_settings(checkpoint / _FILE, trainer.args, _FIELDS)
    if state is not None:
        trainer.adaptive_weights = tuple(state["adaptive_weights"])

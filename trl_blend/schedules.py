"""
Schedules: functions of the optimizer step, as floats.

Each factory returns `schedule(step) -> float`. A schedule is pure, so a run that resumes at step `s` continues exactly
where it stopped.

Example:

```python
>>> from trl_blend.schedules import linear
>>> teacher_weight = linear(0.5, decay_steps=1000)
>>> teacher_weight(0), teacher_weight(500), teacher_weight(2000)
(0.5, 0.25, 0.0)
```
"""

import math
from collections.abc import Callable

from trl_blend.errors import ConfigError


Schedule = Callable[[int], float]

DECAYING_SCHEDULES = ("linear", "cosine")
"""Names of the schedules that need a number of decay steps."""


def constant(initial: float) -> Schedule:
    """`initial` at every step. Example: `constant(0.3)(10_000) == 0.3`."""
    return lambda step: initial


def linear(initial: float, decay_steps: int) -> Schedule:
    """
    `initial · (1 − min(s, D) / D)` at step `s` of `D = decay_steps`, exactly 0 from step `D` on.

    Example: `linear(0.5, 1000)(250) == 0.375`. Source: logit fusion, reference code.
    """
    _require_decay_steps(decay_steps)
    return lambda step: initial * (1 - min(step, decay_steps) / decay_steps)


def cosine(initial: float, decay_steps: int) -> Schedule:
    """
    `initial · ½(1 + cos(π · min(s, D) / D))` at step `s` of `D = decay_steps`, exactly 0 from step `D` on.

    Example: `cosine(0.5, 1000)(500) == 0.25`. Source: logit fusion, reference code.
    """
    _require_decay_steps(decay_steps)

    def schedule(step: int) -> float:
        # cos(pi) is not exactly -1 in floating point: the end is written out so that it is exactly 0
        return initial * 0.5 * (1 + math.cos(math.pi * step / decay_steps)) if step < decay_steps else 0.0

    return schedule


def make_schedule(name: str, initial: float, decay_steps: int | None = None) -> Schedule:
    """
    Schedule by name: `"constant"`, `"linear"` or `"cosine"`; the latter two reach 0 in `decay_steps` optimizer steps.

    Raises:
        [`~trl_blend.errors.ConfigError`]:
            If the name is unknown, or a decaying schedule has no positive number of steps.
    """
    if name == "constant":
        return constant(initial)
    if name in DECAYING_SCHEDULES:
        return {"linear": linear, "cosine": cosine}[name](initial, decay_steps)  # type: ignore[arg-type]
    raise ConfigError(f"Unknown schedule {name!r}. Choose one of 'constant', 'linear', 'cosine'.")


def _require_decay_steps(decay_steps: int | None) -> None:
    if decay_steps is None or decay_steps <= 0:
        raise ConfigError(f"A decaying schedule needs a positive number of decay steps, got {decay_steps!r}.")

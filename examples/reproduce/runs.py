"""The finished runs of `logit_mixing.py`, read back, and the statistics of their comparison."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reproduce.arms import KINDS, Arm, make_arms


class Estimate(NamedTuple):
    """A value and its standard error (NaN where it cannot be estimated)."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}" if math.isfinite(self.error) else f"{self.value:.3f}"

    def signed(self) -> str:
        return f"{self.value:+.3f} ± {self.error:.3f}"


def over_seeds(values: list[float]) -> Estimate:
    """Mean over seeds and its standard error; NaN for a single seed."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(np.mean(values)), float(error))


def difference(first: np.ndarray, second: np.ndarray) -> Estimate:
    """
    Mean of `first - second` and a conservative standard error.

    The variance of the seeds (the two sets of seeds taken as independent) is added to the variance of the test prompts
    (paired: the same prompts). The prompts' part guards against three seeds that agree by chance.

    Args:
        first, second (`numpy.ndarray` of shape `(S, N)`):
            0/1 scores of each seed on the same `N` prompts; a policy that was not trained has `S = 1`.
    """
    per_prompt = first.mean(axis=0) - second.mean(axis=0)
    variance = per_prompt.var(ddof=1) / per_prompt.size
    for scores in (first, second):
        if len(scores) > 1:
            variance += scores.mean(axis=1).var(ddof=1) / len(scores)
    return Estimate(float(per_prompt.mean()), math.sqrt(variance))


def as_scores(bits: str) -> np.ndarray:
    """A string of zeros and ones as floats of shape `(N,)`."""
    return np.array([float(bit) for bit in bits])


@dataclass(frozen=True)
class Runs:
    """
    Finished runs.

    Args:
        start (`dict`):
            Scores before training, see [`~reproduce.arms.run_start`].
        by_arm (`dict[str, list[dict]]`):
            Runs of each arm, by seed, see [`~reproduce.arms.run_arm`]. Only arms with a finished run.
    """

    start: dict[str, Any]
    by_arm: dict[str, list[dict[str, Any]]]

    @cached_property
    def arms(self) -> dict[str, Arm]:
        return make_arms(self.steps)

    @property
    def steps(self) -> int:
        return next(iter(self.by_arm.values()))[0]["steps"]

    @property
    def n_test(self) -> int:
        return self.start["n_test"]

    def final(self, name: str, policy: str, kind: str = "solve") -> np.ndarray:
        """Scores after training, of shape `(S, N)`. `policy` is `student`, `mixed` or `deployed`."""
        policy = self.arms[name].deployed if policy == "deployed" else policy
        return np.stack([as_scores(run["final"][policy][kind]) for run in self.by_arm[name]])

    def alone(self, checkpoint: str, kind: str = "solve") -> np.ndarray:
        """Scores of a checkpoint before training, of shape `(1, N)`."""
        return as_scores(self.start["alone"][checkpoint][kind])[None]

    def before(self, name: str, policy: str, kind: str = "solve") -> np.ndarray:
        """Scores of an arm's policy at step 0, of shape `(1, N)`."""
        if policy == "mixed":
            return as_scores(self.start["mixed"][name][kind])[None]
        return self.alone(self.arms[name].student, kind)

    def rate(self, name: str, policy: str, kind: str = "solve") -> Estimate:
        """Rate after training, mean over seeds."""
        return over_seeds(list(self.final(name, policy, kind).mean(axis=1)))

    def cost(self, name: str, field: str) -> float:
        """Mean of a field of the runs, such as `rollout_tokens`."""
        return float(np.mean([run[field] for run in self.by_arm[name]]))

    def curve(self, name: str, policy: str, kind: str = "solve") -> tuple[list[int], np.ndarray]:
        """Steps, and the rates on the first `n_curve` test prompts at each, of shape `(S, points)`."""
        runs = self.by_arm[name]
        n = runs[0]["n_curve"]
        middle = sorted(map(int, runs[0]["curve"]))
        first = float(self.before(name, policy, kind)[0, :n].mean())
        last = self.final(name, policy, kind)[:, :n].mean(axis=1)
        rows = [
            [first, *(run["curve"][str(step)][policy][kind] for step in middle), end]
            for run, end in zip(runs, last, strict=True)
        ]
        return [0, *middle, self.steps], np.array(rows)


def load_runs(folder: Path) -> Runs:
    """Read every finished run of `folder`, arms in their order of definition."""
    start_path = folder / "start.json"
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-seed*.json"))]
    if not start_path.exists() or not found:
        raise SystemExit(f"No finished runs in {folder}: start without `--report` first.")
    names = list(make_arms(found[0]["steps"]))
    by_arm = {name: [run for run in found if run["arm"] == name] for name in names}
    return Runs(json.loads(start_path.read_text(encoding="utf-8")), {n: runs for n, runs in by_arm.items() if runs})


__all__ = ["KINDS", "Estimate", "Runs", "difference", "load_runs", "over_seeds"]

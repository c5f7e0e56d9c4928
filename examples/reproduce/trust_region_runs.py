"""The finished runs of `trust_region.py`, read back, and the statistics of their comparison."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from reproduce.runs import Estimate, difference, over_seeds
from reproduce.trust_region_arms import SAMPLES, Arm, make_arms, warmup_steps


DECODINGS = ("sampled", "greedy")  # temperature 1 is the paper's evaluation
CHECKPOINTS = ("best", "last")  # the best over training is the paper's protocol


def as_rates(digits: str, decoding: str) -> np.ndarray:
    """Success rate of each prompt, of shape `(N,)`, from one digit per prompt (see `measure`)."""
    return np.array([int(digit) for digit in digits]) / (SAMPLES if decoding == "sampled" else 1)


def paired_over_prompts(first: np.ndarray, second: np.ndarray) -> Estimate:
    """Mean of `first - second` over the same `(N,)` prompts and its standard error."""
    gaps = first - second
    return Estimate(float(gaps.mean()), float(gaps.std(ddof=1) / math.sqrt(gaps.size)))


@dataclass(frozen=True)
class Runs:
    """
    Finished runs.

    Args:
        start (`dict`):
            Scores before training, see [`~reproduce.trust_region_arms.run_start`].
        by_arm (`dict[str, list[dict]]`):
            Runs of each arm, by seed, see [`~reproduce.trust_region_arms.run_arm`]. Only arms with a finished run.
        probes (`list[dict]`):
            Probes, by seed, see [`~reproduce.trust_region_probes.run_probe`].
    """

    start: dict[str, Any]
    by_arm: dict[str, list[dict[str, Any]]]
    probes: list[dict[str, Any]]

    @property
    def steps(self) -> int:
        return next(iter(self.by_arm.values()))[0]["steps"] if self.by_arm else 0

    @cached_property
    def arms(self) -> dict[str, Arm]:
        return make_arms(self.steps)

    @property
    def warmup(self) -> int:
        """Steps of every warmup."""
        return warmup_steps(self.steps)

    @property
    def points(self) -> list[int]:
        """Steps at which the runs were measured, without step 0."""
        return sorted(map(int, next(iter(self.by_arm.values()))[0]["curve"]))

    def trust_regions(self) -> list[str]:
        """Arms of the annealed trust region, by budget."""
        return [name for name in self.by_arm if name.startswith("trust_")]

    def before(self, decoding: str, model: str = "student") -> np.ndarray:
        """Rates of each prompt before training, of shape `(1, N)`."""
        return as_rates(self.start[model][decoding], decoding)[None]

    def scores(self, name: str, decoding: str, step: int) -> np.ndarray:
        """Rates of each prompt after `step` steps, of shape `(S, N)`."""
        if step == 0:
            return np.repeat(self.before(decoding), len(self.by_arm[name]), axis=0)
        return np.stack([as_rates(run["curve"][str(step)][decoding], decoding) for run in self.by_arm[name]])

    def curve(self, name: str, decoding: str) -> tuple[list[int], np.ndarray]:
        """Steps from 0, and the rate at each, of shape `(S, points)`."""
        steps = [0, *self.points]
        return steps, np.stack([self.scores(name, decoding, step).mean(axis=1) for step in steps], axis=1)

    def best_step(self, name: str, decoding: str) -> int:
        """The measured step of the highest rate, mean over seeds: one checkpoint per arm, as in the paper."""
        steps, rates = self.curve(name, decoding)
        return steps[int(rates.mean(axis=0).argmax())]

    def at(self, name: str, decoding: str, checkpoint: str) -> np.ndarray:
        """Rates of each prompt at the `best` or the `last` checkpoint, of shape `(S, N)`."""
        step = self.points[-1] if checkpoint == "last" else self.best_step(name, decoding)
        return self.scores(name, decoding, step)

    def rate(self, name: str, decoding: str, checkpoint: str) -> Estimate:
        """Rate at a checkpoint, mean over seeds."""
        return over_seeds(list(self.at(name, decoding, checkpoint).mean(axis=1)))

    def gap(self, first: str, second: str, decoding: str, checkpoint: str) -> Estimate:
        """Rate of one arm minus that of another, with the variance of seeds and prompts."""
        return difference(self.at(first, decoding, checkpoint), self.at(second, decoding, checkpoint))

    def best_trust_region(self, decoding: str, checkpoint: str) -> str:
        """The budget of the highest rate."""
        return max(self.trust_regions(), key=lambda name: self.rate(name, decoding, checkpoint).value)

    def metric(self, name: str, key: str) -> np.ndarray:
        """A logged metric at every step, of shape `(S, steps)`; NaN where it was not logged."""
        return np.array([run["metrics"][key] for run in self.by_arm[name]], dtype=float)

    def metric_gap(self, first: str, second: str, key: str, steps: slice) -> Estimate:
        """Mean of a logged metric over some steps, one arm minus another, paired by the seeds that both have."""
        means = [
            {run["seed"]: float(np.nanmean(np.array(run["metrics"][key], dtype=float)[steps])) for run in runs}
            for runs in (self.by_arm[first], self.by_arm[second])
        ]
        return over_seeds([means[0][seed] - means[1][seed] for seed in means[0] if seed in means[1]])

    def cost(self, name: str, field: str) -> float:
        """Mean of a field of the runs, such as `train_seconds`."""
        return float(np.mean([run[field] for run in self.by_arm[name]]))

    # Probes

    @property
    def policies(self) -> list[str]:
        """Policies of the support probe: budgets in ascending order, then the teacher."""
        return list(self.probes[0]["support"])

    def support(self, policy: str, key: str) -> list[float]:
        """A quantity of the support probe, by seed; NaN where it was not measured."""
        return [probe["support"][policy].get(key, math.nan) for probe in self.probes]

    def support_gap(self, first: str, second: str, key: str) -> Estimate:
        """A quantity of the support probe, one policy minus another, paired by seed."""
        pairs = zip(self.support(first, key), self.support(second, key), strict=True)
        return over_seeds([a - b for a, b in pairs])

    def prefix_scores(self, policy: str, model: str, length: int) -> np.ndarray:
        """Success rate when `model` continues the prefixes of each prompt: prompts of all seeds, `(S * N,)`."""
        digits = "".join(probe["prefixes"][policy][model][str(length)] for probe in self.probes)
        return np.array([int(digit) for digit in digits]) / self.probes[0]["rollouts_per_prompt"]

    def prefix_gain(self, policy: str, model: str, length: int) -> Estimate:
        """Success of a policy's prefixes minus that of the student's own, paired by prompt."""
        return paired_over_prompts(self.prefix_scores(policy, model, length), self.prefix_scores("0.0", model, length))

    @property
    def lengths(self) -> list[int]:
        """Lengths at which prefixes were cut."""
        return [int(length) for length in self.probes[0]["prefixes"]["0.0"]["teacher"]]

    @property
    def prefix_policies(self) -> list[str]:
        """Budgets whose prefixes were continued, without the student's own."""
        return [policy for policy in self.probes[0]["prefixes"] if policy != "0.0"]


def load_runs(folder: Path) -> Runs:
    """
    Read every finished run of `folder`, arms in their order of definition.

    Raises:
        `SystemExit`: If there is none.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-seed*.json"))]
    start = folder / "start.json"
    if not found or not start.exists():
        raise SystemExit(f"No finished runs in {folder}: start without `--report` first.")
    trained = [run for run in found if "arm" in run]
    by_arm = {name: [run for run in trained if run["arm"] == name] for name in make_arms(1)}
    probes = [run for run in found if "support" in run]
    return Runs(
        json.loads(start.read_text(encoding="utf-8")), {name: runs for name, runs in by_arm.items() if runs}, probes
    )

"""The finished runs of `offline_opd.py`, read back, and the statistics of their comparison."""

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from reproduce.offline_opd_arms import ARMS, Arm
from reproduce.runs import Estimate, difference, over_seeds
from reproduce.trust_region_runs import as_rates


DECODINGS = ("sampled", "greedy")


@dataclass(frozen=True)
class Runs:
    """
    Finished runs.

    Args:
        start (`dict`):
            Scores before training, see [`~reproduce.offline_opd_arms.run_start`].
        by_arm (`dict[str, list[dict]]`):
            Runs of each arm, by seed, see [`~reproduce.offline_opd_arms.run_arm`]. Only arms with a finished run.
        data (`dict[str, list[dict]]`):
            Costs of scored rollouts by the name of the data, see [`~reproduce.offline_opd_data.make_data`].
        memory (`dict[str, dict]`):
            Memory of some arms, see [`~reproduce.offline_opd_memory.measure_memory`].
    """

    start: dict[str, Any]
    by_arm: dict[str, list[dict[str, Any]]]
    data: dict[str, list[dict[str, Any]]]
    memory: dict[str, dict[str, int]]

    @property
    def steps(self) -> int:
        return next(iter(self.by_arm.values()))[0]["steps"]

    @cached_property
    def points(self) -> list[int]:
        """Steps at which the runs were measured, without step 0."""
        return sorted(map(int, next(iter(self.by_arm.values()))[0]["curve"]))

    def arm(self, name: str) -> Arm:
        return ARMS[name]

    def has(self, *names: str) -> bool:
        return all(name in self.by_arm for name in names)

    def seeds(self, *names: str) -> list[int]:
        """Seeds that all of the arms have."""
        found = [{run["seed"] for run in self.by_arm[name]} for name in names]
        return sorted(set.intersection(*found))

    # Accuracy

    def before(self, model: str, decoding: str) -> np.ndarray:
        """Rates of each prompt before training, of shape `(1, N)`. `model` is `early`, `late`, `first` or `second`."""
        return as_rates(self.start[model][decoding], decoding)[None]

    def scores(self, name: str, decoding: str, step: int | None = None) -> np.ndarray:
        """Rates of each prompt after a step, by default the last, of shape `(S, N)`."""
        step = self.points[-1] if step is None else step
        if step == 0:
            return np.repeat(self.before(self.arm(name).data.student, decoding), len(self.by_arm[name]), axis=0)
        return np.stack([as_rates(run["curve"][str(step)][decoding], decoding) for run in self.by_arm[name]])

    def rate(self, name: str, decoding: str) -> Estimate:
        """Rate after the last step, mean over seeds."""
        return over_seeds(list(self.scores(name, decoding).mean(axis=1)))

    def gap(self, first: str, second: str, decoding: str) -> Estimate:
        """Rate of one arm minus that of another after the last step, with the variance of seeds and prompts."""
        return difference(self.scores(first, decoding), self.scores(second, decoding))

    def gain(self, name: str, decoding: str) -> Estimate:
        """Rate after the last step minus that before training."""
        return difference(self.scores(name, decoding), self.before(self.arm(name).data.student, decoding))

    # Policies and gradients

    def policy(self, name: str, key: str) -> Estimate:
        """`kl_to_start` or `kl_to_teacher` after training, nats per token."""
        return over_seeds([run["policy"][key] for run in self.by_arm[name]])

    def policy_gap(self, first: str, second: str, key: str) -> Estimate:
        """The same, one arm minus another, paired by seed."""
        values = [{run["seed"]: run["policy"][key] for run in self.by_arm[name]} for name in (first, second)]
        return over_seeds([values[0][seed] - values[1][seed] for seed in self.seeds(first, second)])

    def probe(self, name: str, step: int, key: str) -> Estimate:
        """A quantity of [`~reproduce.offline_opd_policies.gradient_discrepancy`]."""
        return over_seeds([run["probes"][str(step)][key] for run in self.by_arm[name]])

    def drift(self, name: str) -> Estimate:
        """`offline/drift_kl`, mean of the last ten steps; NaN for a live arm."""
        if not self.arm(name).offline:
            return Estimate(math.nan, math.nan)
        return over_seeds([float(np.mean(run["metrics"]["offline/drift_kl"][-10:])) for run in self.by_arm[name]])

    # Costs

    def cost(self, name: str, field: str) -> Estimate:
        return over_seeds([run[field] for run in self.by_arm[name]])

    def throughput(self, name: str, clock: str = "cpu_", one_time: bool = False) -> dict[int, float]:
        """
        Completion tokens trained on per second, by seed: of training alone, or with collecting and scoring.

        Args:
            name (`str`):
                Arm.
            clock (`str`, *optional*, defaults to `"cpu_"`):
                `"cpu_"` for CPU time, `""` for wall time.
            one_time (`bool`, *optional*, defaults to `False`):
                Whether the time that an offline arm takes to collect and score is added.
        """
        return {
            run["seed"]: run["tokens"]
            / (run[f"train_{clock}seconds"] + (sum(self.one_time(name, run["seed"], clock)) if one_time else 0.0))
            for run in self.by_arm[name]
        }

    def speedup(self, name: str, over: str, clock: str = "cpu_", one_time: bool = False) -> Estimate:
        """Ratio of the throughputs of two arms, paired by seed."""
        ours, theirs = (self.throughput(arm, clock, one_time) for arm in (name, over))
        return over_seeds([ours[seed] / theirs[seed] for seed in self.seeds(name, over)])

    def one_time(self, name: str, seed: int, clock: str = "cpu_") -> tuple[float, float]:
        """Seconds of collecting and scoring the data of an offline arm; zeros for a live one."""
        arm = self.arm(name)
        if not arm.offline:
            return 0.0, 0.0
        # Both teachers score the same rollouts, which were collected for the first
        first, own = replace(arm.data, teacher="first").name(), arm.data.name()
        collected, scored = (next(made for made in self.data[name] if made["seed"] == seed) for name in (first, own))
        scoring = "score_top_k" if arm.loss == "top_k" else "score"
        return collected[f"collect_{clock}seconds"], scored[f"{scoring}_{clock}seconds"]

    def findings(self, name: str) -> set[str]:
        """Names of the findings that are errors in any run of an offline arm."""
        found = [run["findings"].items() for run in self.by_arm[name]]
        return {check for run in found for check, severity in run if severity == "error"}


def load_runs(folder: Path) -> Runs:
    """
    Read every finished run of `folder`, arms in their order of definition.

    Raises:
        `SystemExit`: If there is none.
    """
    found = [_read(path) for path in sorted(folder.glob("*-seed*.json"))]
    trained = {name: [run for run in found if run.get("arm") == name] for name in ARMS}
    by_arm = {name: runs for name, runs in trained.items() if runs}
    if not by_arm or not (folder / "start.json").exists():
        raise SystemExit(f"No finished runs in {folder}: start without `--report` first.")
    data: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("data_*-seed*.json")):
        data.setdefault(path.stem.removeprefix("data_").rsplit("-seed", 1)[0], []).append(_read(path))
    memory = folder / "memory.json"
    return Runs(_read(folder / "start.json"), by_arm, data, _read(memory) if memory.exists() else {})


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))

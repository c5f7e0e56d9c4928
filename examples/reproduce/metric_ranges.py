"""
What the metrics of the three trainers look like in runs that went well and in runs that did not: one run each of arms
like those of the other studies, seed 0, with every metric kept.

```sh
python examples/reproduce/metric_ranges.py           # what is missing (10 minutes on one core), then the report
python examples/reproduce/metric_ranges.py --report  # only rebuild results/metric_ranges.md
```

The runs are in `results/metric_ranges_runs.json`. The pages of the trainers quote the report.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reproduce import study


# isort: split
from benchmarks._report import machine
from reproduce import logit_mixing, offline_opd, trust_region
from testbed.evaluate import CHECKPOINTS


GRPO_STEPS = 30
OPD_STEPS = 40
PREFIXES = ("mixing/", "importance/", "adaptive/", "blend/", "offline/", "rewards/", "reward")
# Seconds say something about the machine, not about the training
_MACHINE = ("seconds", "tokens_per_second", "/std")
TITLES = {
    "logit_mix_grpo": "LogitMixGRPOTrainer",
    "trust_region_opd": "TrustRegionOPDTrainer",
    "offline_opd": "OfflineOPDTrainer",
}


def _grpo(name: str) -> Callable[[str], Any]:
    return lambda scratch: logit_mixing.make_trainer(logit_mixing.make_arms(GRPO_STEPS)[name], 0, GRPO_STEPS, scratch)


def _opd(**settings: Any) -> Callable[[str], Any]:
    arm, student = trust_region.Arm("", ("", None, ""), settings), CHECKPOINTS / "student"
    return lambda scratch: trust_region.make_trainer(
        arm, student, trust_region.training_prompts(0, OPD_STEPS), 0, OPD_STEPS, scratch
    )


def _offline(name: str) -> Callable[[str], Any]:
    return lambda scratch: offline_opd.make_trainer(offline_opd.ARMS[name], Path(scratch), 0, OPD_STEPS, scratch)


# "trainer: run" -> how its trainer is made
RUNS: dict[str, Callable[[str], Any]] = {
    "logit_mix_grpo: mixed, weight 0.3": _grpo("mixed_0.3"),
    "logit_mix_grpo: mixed, adaptive weight": _grpo("adaptive"),
    "logit_mix_grpo: student, 0.5 to 0": _grpo("decay_0.5"),
    "trust_region_opd: trust region 0.01, annealed": _opd(
        rollout_policy="trust_region", kl_budget=0.01, blend_warmup_steps=15
    ),
    "trust_region_opd: student rollouts, top-16 loss": _opd(rollout_policy="student", kl_support="student_top_k"),
    "trust_region_opd: speculative KD": _opd(rollout_policy="speculative_kd"),
    "trust_region_opd: TIP": _opd(rollout_policy="student", token_selection="tip"),
    "trust_region_opd: forward KL above 0.8 nats": _opd(rollout_policy="student", forward_kl_entropy=0.8),
    "trust_region_opd: IW-OPD": _opd(rollout_policy="student", distillation_objective="iw_opd"),
    "offline_opd: sampled token (forgets the task)": _offline("offline"),
    "offline_opd: sampled token, with the ratio": _offline("offline_ratio"),
    "offline_opd: top-16 reverse KL": _offline("offline_topk"),
}


def work(name: str, seed: int | None, settings: dict[str, Any], scratch: str) -> dict[str, Any]:
    """One run; returns its metrics, step by step."""
    trainer = RUNS[name](scratch)
    trainer.train()
    metrics: dict[str, dict[int, float]] = {}
    for entry in trainer.state.log_history:
        for metric, value in entry.items():
            if metric.startswith(PREFIXES) and not metric.endswith(_MACHINE):
                metrics.setdefault(metric, {})[entry["step"]] = float(f"{value:.4g}")
    trainer_name, run = name.split(": ")
    result = {"trainer": trainer_name, "run": run, "seed": 0, "steps": trainer.state.global_step}
    return result | {"machine": machine(), "metrics": metrics}


def rows(runs: study.Runs, trainer: str) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(metric, run, values by step) of a trainer's runs, sorted by metric."""
    found = [runs.results[name] for name in RUNS if name in runs.results]
    measured = [(metric, run) for run in found if run["trainer"] == trainer for metric in run["metrics"]]
    for metric, run in sorted(measured, key=lambda pair: pair[0]):
        yield metric, run["run"], run["metrics"][metric]


def number(value: float) -> str:
    """Three digits, or four decimals."""
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{round(value, 4):g}"


def report(runs: study.Runs, folder: Path) -> str:
    """The Markdown of the report."""
    lines = [
        "# What the metrics look like",
        "",
        "Written by `python examples/reproduce/metric_ranges.py`; do not edit. One run (seed 0) of each arm on the",
        f"test-bed, {GRPO_STEPS} steps of GRPO or {OPD_STEPS} of distillation, with the settings of",
        "[logit_mixing.md](logit_mixing.md), [trust_region.md](trust_region.md) and [offline_opd.md](offline_opd.md).",
        "Every step was logged; *last 5* is the mean of the last five. One seed, one task: an example, not a norm.",
    ]
    for trainer, title in TITLES.items():
        cells = []
        for metric, run, values in rows(runs, trainer):
            series = [values[step] for step in sorted(values, key=int)]
            numbers = map(number, (series[0], min(series), max(series), sum(series[-5:]) / 5))
            cells.append([f"`{metric}`", run, *numbers])
        header = ["metric", "run", "first", "lowest", "highest", "last 5"]
        lines += ["", f"## {title}", "", study.markdown_table(header, cells)]
    return "\n".join(lines) + "\n"


STUDY = study.Study("metric_ranges", options={}, arms=lambda settings: (), work=work, report=report, once=tuple(RUNS))

if __name__ == "__main__":
    STUDY.main(__doc__)

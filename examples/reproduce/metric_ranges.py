"""
What the metrics of the three trainers look like in runs that went well and in runs that did not: one run of nine arms
like those of the other studies, seed 0, with every metric kept.

```sh
python examples/reproduce/metric_ranges.py           # what is missing (10 minutes on one core), then the report
python examples/reproduce/metric_ranges.py --report  # only rebuild results/metric_ranges.md from results/metric_runs
```

Remove a file of `results/metric_runs` to repeat its run. The pages of the trainers quote the report.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
for _name, _value in (("TRL_EXPERIMENTAL_SILENCE", "1"), ("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false")):
    os.environ.setdefault(_name, _value)

RESULTS = Path(__file__).resolve().parent / "results"
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


def grpo_run(name: str) -> Callable[[str], Any]:
    """Builder of a trainer of `logit_mixing.py`."""

    def build(scratch: str) -> Any:
        from reproduce.arms import make_arms, make_trainer

        return make_trainer(make_arms(GRPO_STEPS)[name], 0, GRPO_STEPS, scratch)

    return build


def opd_run(**settings: Any) -> Callable[[str], Any]:
    """Builder of a trainer of `trust_region.py` with other settings."""

    def build(scratch: str) -> Any:
        from reproduce.trust_region_arms import Arm, make_trainer, training_prompts
        from testbed.evaluate import CHECKPOINTS

        prompts = training_prompts(0, OPD_STEPS)
        return make_trainer(Arm("", settings), CHECKPOINTS / "student", prompts, 0, OPD_STEPS, scratch)

    return build


def offline_run(name: str) -> Callable[[str], Any]:
    """Builder of a trainer of `offline_opd.py`; the first one draws and scores the rollouts."""

    def build(scratch: str) -> Any:
        from reproduce.offline_opd_arms import ARMS, make_trainer

        return make_trainer(ARMS[name], Path(scratch), 0, OPD_STEPS, scratch)

    return build


# (trainer, run) -> what it is and how its trainer is made
RUNS: dict[tuple[str, str], Callable[[str], Any]] = {
    ("logit_mix_grpo", "mixed, weight 0.3"): grpo_run("mixed_0.3"),
    ("logit_mix_grpo", "mixed, adaptive weight"): grpo_run("adaptive"),
    ("logit_mix_grpo", "student, 0.5 to 0"): grpo_run("decay_0.5"),
    ("trust_region_opd", "trust region 0.01, annealed"): opd_run(
        rollout_policy="trust_region", kl_budget=0.01, blend_warmup_steps=15
    ),
    ("trust_region_opd", "student rollouts, top-16 loss"): opd_run(
        rollout_policy="student", kl_support="student_top_k"
    ),
    ("trust_region_opd", "speculative KD"): opd_run(rollout_policy="speculative_kd"),
    ("offline_opd", "sampled token (forgets the task)"): offline_run("offline"),
    ("offline_opd", "sampled token, with the ratio"): offline_run("offline_ratio"),
    ("offline_opd", "top-16 reverse KL"): offline_run("offline_topk"),
}


def path_of(trainer: str, run: str) -> Path:
    """File of a finished run."""
    slug = "".join(letter if letter.isalnum() or letter == "." else "_" for letter in run)
    return RESULTS / "metric_runs" / f"{trainer}-{slug}.json"


def train(trainer_name: str, run: str, scratch: str) -> None:
    """One run; writes its metrics, step by step."""
    from reproduce.jobs import be_quiet, machine, write_json

    be_quiet()
    trainer = RUNS[trainer_name, run](scratch)
    trainer.train()
    metrics: dict[str, dict[int, float]] = {}
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            if name.startswith(PREFIXES) and not name.endswith(_MACHINE):
                metrics.setdefault(name, {})[entry["step"]] = float(f"{value:.4g}")
    result = {"trainer": trainer_name, "run": run, "seed": 0, "steps": trainer.state.global_step}
    write_json(path_of(trainer_name, run), result | {"machine": machine(), "metrics": metrics})


def rows(trainer: str) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(metric, run, values by step) of a trainer's finished runs, sorted by metric."""
    found = []
    for order, (name, run) in enumerate(RUNS):
        if name == trainer:
            metrics = json.loads(path_of(name, run).read_text(encoding="utf-8"))["metrics"]
            found += [(metric, order, run, values) for metric, values in metrics.items()]
    for metric, _, run, values in sorted(found, key=lambda row: row[:2]):
        yield metric, run, values


def number(value: float) -> str:
    """Three digits, or four decimals."""
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{round(value, 4):g}"


def report() -> str:
    """The Markdown of the report."""
    lines = [
        "# What the metrics look like",
        "",
        "Written by `python examples/reproduce/metric_ranges.py`; do not edit. One run (seed 0) of nine arms on the",
        f"test-bed, {GRPO_STEPS} steps of GRPO or {OPD_STEPS} of distillation, with the settings of",
        "[logit_mixing.md](logit_mixing.md), [trust_region.md](trust_region.md) and [offline_opd.md](offline_opd.md).",
        "Every step was logged; *last 5* is the mean of the last five. One seed, one task: an example, not a norm.",
    ]
    for trainer, title in TITLES.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| metric | run | first | lowest | highest | last 5 |",
            "|---|---|---|---|---|---|",
        ]
        for metric, run, values in rows(trainer):
            series = [values[step] for step in sorted(values, key=int)]
            numbers = " | ".join(map(number, (series[0], min(series), max(series), sum(series[-5:]) / 5)))
            lines.append(f"| `{metric}` | {run} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--report", action="store_true", help="only rebuild the report")
    if not parser.parse_args().report:
        missing = [key for key in RUNS if not path_of(*key).exists()]
        with tempfile.TemporaryDirectory() as scratch:
            for number_, key in enumerate(missing, 1):
                print(f"{number_} of {len(missing)}: {': '.join(key)}", flush=True)
                path_of(*key).parent.mkdir(parents=True, exist_ok=True)
                train(*key, scratch)
    (RESULTS / "metric_ranges.md").write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    main()

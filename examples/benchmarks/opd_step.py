"""
A training step of `TrustRegionOPDTrainer` with student rollouts against one of `trl.DistillationTrainer`.

The bar: at most 1.02 times the time. Two ways to have student rollouts: `rollout_policy="student"`, and a trust region
whose warmup is over. All trainers take real steps (rollouts, divergence, update) on the test-bed pair, in alternation
in one process and from the same random state, so that every step decodes the same tokens.

```sh
python examples/benchmarks/opd_step.py
python examples/benchmarks/opd_step.py --steps 40
```
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from _report import Report, Seconds, seconds
from train_step import CHECKPOINTS, OneStepAtATime
from trl import DistillationConfig, DistillationTrainer

from testbed import task
from trl_blend import TrustRegionOPDConfig, TrustRegionOPDTrainer


BAR = 1.02


def build(arm: str, folder: str, args: argparse.Namespace) -> DistillationTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(Path(folder) / arm),
        "per_device_train_batch_size": args.batch_size,
        "max_completion_length": task.MAX_NEW_TOKENS,
        "learning_rate": 5e-5,
        "max_steps": args.steps + 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    common: dict[str, Any] = {
        "model": str(CHECKPOINTS / "student"),
        "teacher_model": str(CHECKPOINTS / "teacher"),
        "train_dataset": task.build_prompt_dataset("train", 4000),
    }
    if arm == "trl":
        return DistillationTrainer(args=DistillationConfig(**settings), **common)
    policy: dict[str, Any] = {"rollout_policy": "student"}
    if arm == "warmed_up":
        # So small that the first step does not set its later rollouts apart from the other arms
        policy = {"kl_budget": 1e-12, "blend_warmup_steps": 1}
    return TrustRegionOPDTrainer(args=TrustRegionOPDConfig(**settings, **policy), **common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40, help="measured steps of each trainer")
    args = parser.parse_args()
    arms = ("trl", "student", "warmed_up")
    times: dict[str, list[Seconds]] = {arm: [] for arm in arms}
    report = Report("opd_step", vars(args))
    with tempfile.TemporaryDirectory() as folder:
        runs = {arm: OneStepAtATime(build(arm, folder, args)) for arm in arms}
        for seed in range(2):  # not measured: first calls, and the step before the warmup is over
            for run in runs.values():
                run.advance(seed)
        for step in range(args.steps):
            for arm in arms[step % 3 :] + arms[: step % 3]:
                times[arm].append(seconds(lambda arm=arm, step=step: runs[arm].advance(100 + step)))
        tokens = {arm: run.trainer.state.log_history[-1]["num_tokens"] for arm, run in runs.items()}
        assert tokens["trl"] == tokens["student"], f"the arms decoded different rollouts: {tokens}"
        report.note("tokens of all steps", tokens)
    for clock in Seconds._fields:
        by_arm = {arm: [getattr(value, clock) for value in values] for arm, values in times.items()}
        for arm, values in by_arm.items():
            report.note(f"{arm}: step, {clock} time (s)", values)
        for arm, name in (("student", "student rollouts"), ("warmed_up", "warmup over")):
            ratios = [ours / theirs for ours, theirs in zip(by_arm[arm], by_arm["trl"], strict=True)]
            report.row(f"training step, {name} / `trl.DistillationTrainer`, {clock} time", ratios, BAR)
    report.write()


if __name__ == "__main__":
    main()

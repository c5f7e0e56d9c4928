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

from _report import Report
from train_step import CHECKPOINTS, compare
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
    report = Report("opd_step", vars(args))
    rows = {
        "student": "student rollouts / `trl.DistillationTrainer`",
        "warmed_up": "warmup over / `trl.DistillationTrainer`",
    }
    with tempfile.TemporaryDirectory() as folder:
        arms = {arm: build(arm, folder, args) for arm in ("trl", *rows)}
        compare(report, arms, "student", args.steps, rows, BAR)
    report.write()


if __name__ == "__main__":
    main()

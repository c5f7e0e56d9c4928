"""
A training step of `OfflineOPDTrainer` against a step of distillation with a live teacher.

The bar: at most a third of the time, without what falls once (collecting the rollouts, scoring them). Live steps
decode a batch of rollouts and run the teacher: `trl.DistillationTrainer`, and the same with the loss on sampled
tokens. All trainers take real steps on the test-bed, in alternation in one process, with as many rollouts per step. A
plain step of `trl.SFTTrainer` on the same tokens shows what the offline loss adds.

```sh
python examples/benchmarks/offline_step.py
python examples/benchmarks/offline_step.py --batch_size 16
```
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _report import Report, Seconds, seconds
from datasets import Dataset
from train_step import CHECKPOINTS, OneStepAtATime
from transformers import Trainer
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

from reproduce.live_opd import SampledTokenOPDTrainer
from testbed import task
from trl_blend import (
    OfflineOPDConfig,
    OfflineOPDTrainer,
    RolloutConfig,
    RolloutStore,
    ScoringConfig,
    collect_rollouts,
    score_rollouts,
)


BAR = 0.333
STUDENT, TEACHER = str(CHECKPOINTS / "sft_student"), str(CHECKPOINTS / "teacher")
TOP_K = 16
LIVE = {"trl": "`trl.DistillationTrainer`", "sampled": "live, sampled token"}
OFFLINE = {
    "offline": "offline",
    "grouped": "offline, rows grouped by length",
    "top_k": f"offline, top-{TOP_K} reverse KL",
}


def make_data(folder: Path, rows: int, batch_size: int) -> tuple[dict[str, Any], dict[str, Seconds]]:
    """Rollouts of the student, `rollouts` and `scored`, and the time of both stages."""
    result: dict[str, Any] = {}
    prompts = task.build_prompt_dataset("train", rows)

    def collect() -> None:
        args = RolloutConfig(
            output_dir=folder / "rollouts", temperature=1.0, top_p=1.0, max_completion_length=task.MAX_NEW_TOKENS,
            batch_size=batch_size, dtype="float32", disable_tqdm=True,
        )  # fmt: skip
        result["rollouts"] = collect_rollouts(STUDENT, prompts, args)

    def score() -> None:
        args = ScoringConfig(output_dir=folder / "scored", top_k=TOP_K, dtype="float32", disable_tqdm=True)
        result["scored"] = score_rollouts(result["rollouts"], TEACHER, args)

    return result, {"collecting": seconds(collect), "scoring": seconds(score)}


def build(arm: str, folder: Path, scored: RolloutStore, args: argparse.Namespace) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder / arm),
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-6,  # so that rollouts keep their lengths
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
    if arm in LIVE:
        trainer_class = DistillationTrainer if arm == "trl" else SampledTokenOPDTrainer
        prompts = task.build_prompt_dataset("train", args.batch_size * (args.steps + 3))
        live = DistillationConfig(max_completion_length=task.MAX_NEW_TOKENS, **settings)
        return trainer_class(model=STUDENT, teacher_model=TEACHER, args=live, train_dataset=prompts)
    if arm == "sft":
        rows = scored.dataset()
        data = {
            "input_ids": [row["prompt_ids"] + row["completion_ids"] for row in rows],
            "completion_mask": [[0] * len(row["prompt_ids"]) + [1] * len(row["completion_ids"]) for row in rows],
        }
        sft = SFTConfig(max_length=None, completion_only_loss=True, **settings)
        return SFTTrainer(model=STUDENT, args=sft, train_dataset=Dataset.from_dict(data))
    own: dict[str, Any] = {"offline_loss": "top_k_reverse_kl" if arm == "top_k" else "sampled_token"}
    if arm == "grouped":
        own["train_sampling_strategy"] = "group_by_length"
    return OfflineOPDTrainer(model=STUDENT, args=OfflineOPDConfig(**settings, **own), train_dataset=scored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64, help="rollouts of a step")
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each trainer")
    args = parser.parse_args()
    name = "offline_step" if args.batch_size == 64 else f"offline_step_{args.batch_size}"
    report = Report(name, vars(args))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made, costs = make_data(folder, args.batch_size * (args.steps + 3), args.batch_size)
        scored = made["scored"]
        names = [*LIVE, *OFFLINE, "sft"]
        runs = {arm: OneStepAtATime(build(arm, folder, scored, args)) for arm in names}
        for seed in range(2):  # not measured: first calls
            for run in runs.values():
                run.advance(seed)
        times: dict[str, list[Seconds]] = {arm: [] for arm in names}
        for step in range(args.steps):
            first = step % len(names)
            order = names[first:] + names[:first]
            for arm in order[:: 1 if step // len(names) % 2 else -1]:
                times[arm].append(seconds(lambda arm=arm, step=step: runs[arm].advance(100 + step)))
    report.note("completion tokens of a row", scored.manifest.num_completion_tokens / scored.manifest.num_rows)
    for clock in Seconds._fields:
        by_arm = {arm: [getattr(value, clock) for value in values] for arm, values in times.items()}
        for stage, cost in costs.items():
            report.note(f"{stage}, once, {clock} time per {args.batch_size} rows (s)",
                        getattr(cost, clock) / (args.steps + 3))  # fmt: skip
        for arm, values in by_arm.items():
            report.note(f"{arm}: step, {clock} time (s)", values)
        for arm, quantity in OFFLINE.items():
            for live, other in LIVE.items():
                ratios = [ours / theirs for ours, theirs in zip(by_arm[arm], by_arm[live], strict=True)]
                report.row(f"training step, batch {args.batch_size}, {quantity} / {other}, {clock} time", ratios, BAR)
        ratios = [ours / theirs for ours, theirs in zip(by_arm["offline"], by_arm["sft"], strict=True)]
        report.row(f"training step, batch {args.batch_size}, offline / `trl.SFTTrainer`, {clock} time", ratios, None)
    report.write()


if __name__ == "__main__":
    main()

"""
A training step of `LogitMixGRPOTrainer` at weight 0 against one of `trl.GRPOTrainer`.

The bar: at most 1.02 times the time. Two ways to be at weight 0: a run without a teacher (`teacher_weight=0`), and one
whose weight has decayed to 0, teacher loaded. All trainers take real steps (rollouts, rewards, update) on the test-bed
student, in alternation in one process and from the same random state, so that every step decodes the same tokens.

```sh
python examples/benchmarks/train_step.py
python examples/benchmarks/train_step.py --steps 40
```
"""

import argparse
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _report import Report, Seconds, seconds
from transformers import PrinterCallback, Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from testbed import task
from trl_blend import LogitMixGRPOConfig, LogitMixGRPOTrainer


BAR = 1.02
CHECKPOINTS = Path(__file__).resolve().parents[1] / "testbed" / "checkpoints"


class OneStepAtATime(TrainerCallback):
    """Lets a trainer in a thread of its own run until its next step is done, whenever [`advance`] is called."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.error: BaseException | None = None
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        trainer.add_callback(self)
        trainer.remove_callback(PrinterCallback)
        threading.Thread(target=self._train, daemon=True).start()
        self._wait()

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as error:
            self.error = error
        finally:
            self._done.release()

    def _wait(self) -> None:
        self._done.acquire()
        if self.error is not None:
            raise self.error

    def on_train_begin(self, args, state, control, **kwargs):
        self._done.release()
        self._go.acquire()

    def on_step_end(self, args, state, control, **kwargs):
        self._done.release()
        self._go.acquire()

    def advance(self, seed: int) -> None:
        torch.manual_seed(seed)
        self._go.release()
        self._wait()


def build(arm: str, folder: str, args: argparse.Namespace) -> GRPOTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(Path(folder) / arm),
        "per_device_train_batch_size": args.batch_size,
        "num_generations": 8,
        "max_completion_length": task.MAX_NEW_TOKENS,
        "learning_rate": 3e-5,
        "max_steps": args.steps + 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "log_completions": False,
        "seed": 0,
    }
    common: dict[str, Any] = {
        "model": str(CHECKPOINTS / "student"),
        "reward_funcs": task.format_and_answer_reward,
        "train_dataset": task.build_prompt_dataset("train", 2000),
    }
    if arm == "trl":
        return GRPOTrainer(args=GRPOConfig(**settings), **common)
    teacher = str(CHECKPOINTS / "teacher")
    weight: dict[str, Any] = {"teacher_weight": 0.0}
    if arm == "decayed":
        # So small that the first step does not set its later rollouts apart from the other arms
        weight = {"teacher_weight": 1e-6, "teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 1}
    return LogitMixGRPOTrainer(args=LogitMixGRPOConfig(**settings, **weight), teacher_model=teacher, **common)


def compare(
    report: Report, arms: dict[str, Trainer], same_tokens: str, steps: int, rows: dict[str, str], bar: float
) -> None:
    """
    Time `steps` steps of each arm, in alternation, and report its ratio to `"trl"`.

    Args:
        report (`Report`):
            Where to write.
        arms (`dict[str, Trainer]`):
            Trainers by name, with two steps more than are measured.
        same_tokens (`str`):
            Arm that must decode exactly what `"trl"` does.
        steps (`int`):
            Measured steps.
        rows (`dict[str, str]`):
            Lines of the table: arm and quantity.
        bar (`float`):
            Largest ratio.
    """
    runs = {arm: OneStepAtATime(trainer) for arm, trainer in arms.items()}
    times: dict[str, list[Seconds]] = {arm: [] for arm in arms}
    names = list(arms)
    for seed in range(2):  # not measured: first calls, and the step before a schedule has ended
        for run in runs.values():
            run.advance(seed)
    for step in range(steps):
        first = step % len(names)
        order = names[first:] + names[:first]
        # An arm that repeats the shapes of the one before it is a few percent faster: both orders, equally often
        for arm in order[:: 1 if step // len(names) % 2 else -1]:
            times[arm].append(seconds(lambda arm=arm, step=step: runs[arm].advance(100 + step)))
    tokens = {arm: run.trainer.state.log_history[-1]["num_tokens"] for arm, run in runs.items()}
    assert tokens["trl"] == tokens[same_tokens], f"the arms decoded different rollouts: {tokens}"
    report.note("tokens of all steps", tokens)
    for clock in Seconds._fields:
        by_arm = {arm: [getattr(value, clock) for value in values] for arm, values in times.items()}
        for arm, values in by_arm.items():
            report.note(f"{arm}: step, {clock} time (s)", values)
        for arm, quantity in rows.items():
            ratios = [ours / theirs for ours, theirs in zip(by_arm[arm], by_arm["trl"], strict=True)]
            report.row(f"training step, {quantity}, {clock} time", ratios, bar)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40, help="measured steps of each trainer")
    args = parser.parse_args()
    report = Report("train_step", vars(args))
    rows = {
        "weight_zero": "`teacher_weight=0` / `trl.GRPOTrainer`",
        "decayed": "weight decayed to 0 / `trl.GRPOTrainer`",
    }
    with tempfile.TemporaryDirectory() as folder:
        arms = {arm: build(arm, folder, args) for arm in ("trl", *rows)}
        compare(report, arms, "weight_zero", args.steps, rows, BAR)
    report.write()


if __name__ == "__main__":
    main()

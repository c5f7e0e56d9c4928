"""
Time a training step of offline distillation beside one of live distillation, which also decodes rollouts and runs the
teacher. `make demo-offline` ends with it:

```sh
python examples/reproduce/compare_live.py --scored outputs/demo_offline/scored
```
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback
from trl import DistillationConfig

from reproduce.live_opd import LiveOPDTrainer, SampledTokenOPDTrainer
from testbed.evaluate import CHECKPOINTS
from testbed.task import MAX_NEW_TOKENS, build_prompt_dataset
from trl_blend import OfflineOPDConfig, OfflineOPDTrainer, load_scored_rollouts


LIVE = {"live, sampled token": SampledTokenOPDTrainer, "live, full KL (TRL)": LiveOPDTrainer}


class StepTimes(TrainerCallback):
    """Seconds from the end of each optimizer step to the end of the next; a step's data are part of it."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def median(self) -> float:
        # A step is as long as its longest rows: the median keeps out what else ran on the machine
        return statistics.median(end - start for start, end in zip(self.ends, self.ends[1:]))


def time_steps(options: argparse.Namespace) -> list[tuple[str, float, float]]:
    """Name, seconds per step and completion tokens per step of each way to distil."""
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        # The first step is not timed
        common = {
            "output_dir": folder,
            "max_steps": options.steps + 1,
            "per_device_train_batch_size": options.batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "model_init_kwargs": {"dtype": "float32"},
            "use_cpu": True,
            "bf16": False,
            "seed": 0,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        scored = load_scored_rollouts(options.scored)
        args = OfflineOPDConfig(offline_loss=options.offline_loss, teacher_consistency="off", **common)
        OfflineOPDTrainer(model=options.student, args=args, train_dataset=scored, callbacks=[times]).train()
        tokens = options.batch_size * scored.manifest.num_completion_tokens / scored.manifest.num_rows
        rows = [("offline", times.median(), tokens)]
        prompts = build_prompt_dataset("train", 8192)
        for name, trainer_class in LIVE.items():
            args = DistillationConfig(
                max_completion_length=MAX_NEW_TOKENS, teacher_model_init_kwargs={"dtype": "float32"}, **common
            )
            times = StepTimes()
            trainer = trainer_class(
                model=options.student,
                teacher_model=options.teacher,
                args=args,
                train_dataset=prompts,
                callbacks=[times],
            )
            trainer.train()
            rows.append((name, times.median(), statistics.mean(trainer.tokens)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scored", required=True, help="output of `trl-blend score`")
    parser.add_argument("--student", default=str(CHECKPOINTS / "sft_student"))
    parser.add_argument("--teacher", default=str(CHECKPOINTS / "teacher"))
    parser.add_argument("--offline_loss", default="top_k_reverse_kl")
    parser.add_argument("--batch_size", type=int, default=64, help="rollouts of a step (default: 64)")
    parser.add_argument("--steps", type=int, default=8, help="steps to time (default: 8)")
    options = parser.parse_args()

    table = Table(title=f"Time of a training step, without one-time costs: median of {options.steps} steps")
    for column in ("distillation", "seconds per step", "completion tokens per second", "step time / offline"):
        table.add_column(column, justify="left" if column == "distillation" else "right")
    rows = time_steps(options)
    offline = rows[0][1]
    for name, seconds, tokens in rows:
        table.add_row(name, f"{seconds:.3f}", f"{tokens / seconds:,.0f}", f"{seconds / offline:.2f}")
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    main()

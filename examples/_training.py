"""What the scripts share about a run: scores before and after it, and what is left when it is over."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from _results import print_table


class _OnTrainBegin(TrainerCallback):
    """Call a function once, when the model is prepared and a checkpoint to resume from is loaded; keep the result."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function
        self.result: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.result = self.function()


class StepTimes(TrainerCallback):
    """Wall time from the end of each optimizer step to the end of the next; a step's data are part of it."""

    def __init__(self):
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def train_and_score(trainer: Any, score: Callable[[], Any]) -> tuple[Any, Any]:
    """
    Train, and score before and after.

    Before is when training begins: only then have FSDP and ZeRO put the weights in place. After a resume it is the
    checkpoint that the run starts from.
    """
    begin = _OnTrainBegin(score)
    trainer.add_callback(begin)
    # On the command line "true" means the latest checkpoint of `output_dir`
    checkpoint = trainer.args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(checkpoint).lower() == "true" else checkpoint)
    return begin.result, score()


def finish(
    trainer: Any, before: dict, after: dict, rewards: Sequence[str], num_prompts: int, dataset_name: str | None
) -> None:
    """Save model and card, print the table and write it to `before_after.json`, push on request."""
    folder = Path(trainer.args.output_dir)
    trainer.save_model(str(folder))
    trainer.create_model_card(model_name=folder.name, dataset_name=dataset_name)
    if trainer.accelerator.is_main_process and num_prompts:
        print_table(before, after, rewards, num_prompts)
        results = {"rewards": rewards, "prompts": num_prompts, "before": before, "after": after}
        (folder / "before_after.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    trainer.accelerator.print(f"Model saved to {folder}.")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    trainer.end()

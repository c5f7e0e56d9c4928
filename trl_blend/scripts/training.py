"""What the scripts share about a run: scores before and after it, and what is left when it is over."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback

from trl_blend.scripts.interrupt import StopOnInterrupt, say_how_to_go_on
from trl_blend.scripts.messages import EXIT_INTERRUPTED
from trl_blend.scripts.running import training_begins
from trl_blend.scripts.scoring import print_table


class _OnTrainBegin(TrainerCallback):
    """Call a function once, when the model is prepared and a checkpoint to resume from is loaded; keep the result."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function
        self.result: Any = None
        self.step = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.result, self.step = self.function(), state.global_step


class Scores(NamedTuple):
    """Scores before and after a run, and the step of `before`: 0, or that of the checkpoint it went on from."""

    before: Any
    after: Any
    first_step: int


def train_and_score(trainer: Any, score: Callable[[], Any]) -> Scores:
    """
    Train, save the model, and score before and after.

    Before is when training begins: only then have FSDP and ZeRO put the weights in place. After a resume it is the
    checkpoint that the run starts from. After Ctrl-C this process ends with a checkpoint.
    """
    begin, stop = _OnTrainBegin(score), StopOnInterrupt(trainer.accelerator)
    trainer.add_callback(begin)
    trainer.add_callback(stop)  # from here on, a checkpoint is worth something
    # On the command line "true" means the latest checkpoint of `output_dir`
    checkpoint = trainer.args.resume_from_checkpoint
    training_begins()
    try:
        trainer.train(resume_from_checkpoint=True if str(checkpoint).lower() == "true" else checkpoint)
    finally:
        stop.restore()
    if stop.checkpoint is not None:
        step, steps = trainer.state.global_step, trainer.state.max_steps
        trainer.accelerator.end_training()
        say_how_to_go_on(f"Stopped after step {step} of {steps}", stop.checkpoint)
        sys.exit(EXIT_INTERRUPTED)
    trainer.save_model(trainer.args.output_dir)
    try:
        if stop.requested_anywhere():  # after the last step, as in an evaluation at the end
            raise KeyboardInterrupt
        return Scores(begin.result, score(), begin.step)
    except KeyboardInterrupt:
        trainer.accelerator.print(
            f"Training is complete: the model is in {trainer.args.output_dir}; it has not been scored."
        )
        raise


def finish(trainer: Any, scores: Scores, rewards: Sequence[str], num_prompts: int, dataset_name: str | None) -> None:
    """Save the card, print the table and write it to `before_after.json`, push on request."""
    folder = Path(trainer.args.output_dir)
    results = {"rewards": rewards, "prompts": num_prompts, "before": scores.before, "after": scores.after}
    if scores.first_step:
        results["before_step"] = scores.first_step
    if num_prompts:
        trainer.card_results = {**results, "decoding": "greedy"}
    trainer.create_model_card(model_name=folder.name, dataset_name=dataset_name)
    if trainer.accelerator.is_main_process and num_prompts:
        print_table(results)
        (folder / "before_after.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    trainer.accelerator.print(f"Model saved to {folder}.")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    trainer.accelerator.end_training()

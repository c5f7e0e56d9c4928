"""
Ctrl-C during training: the first one ends the run after the current optimizer step, with a checkpoint, and says how to
go on; the second one ends it at once.
"""

import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_blend.scripts.messages import is_main_process
from trl_blend.scripts.settings import COMMAND_VARIABLE, take_option


class StopOnInterrupt(TrainerCallback):
    """
    Turn the first SIGINT into a checkpoint and the end of training.

    All processes stop at the same step, even if the signal reaches them at different ones. A process that ignores
    SIGINT, such as a background job of a script, goes on ignoring it.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            That of the trainer.

    Attributes:
        checkpoint (`Path` or `None`): What the run was stopped with.
    """

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.checkpoint: Path | None = None
        self._requested = self._stopping = False
        self._previous: Any = None
        self._process = os.getpid()

    def on_train_begin(self, args, state, control, **kwargs):
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._previous = signal.signal(signal.SIGINT, self._request)

    def _request(self, number: int, frame: Any) -> None:
        self.restore()  # the next one is Python's again
        self._requested = True
        if is_main_process() and os.getpid() == self._process:  # workers of a dataloader are forks of it
            # Not `print`: the signal may have come in the middle of one
            os.write(2, b"\nStopping after this step, with a checkpoint. Ctrl-C again stops at once, without one.\n")

    def restore(self) -> None:
        """Put the handler back that was there before training."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested_anywhere():
            self._stopping = control.should_save = control.should_log = True
            control.should_evaluate = False  # with `save_strategy="best"`, its result decides on the checkpoint
            args.save_only_model = False  # a run cannot go on from a model alone
            args.save_total_limit = None  # with 1, the end of training deletes all checkpoints but the best

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._stopping:  # the checkpoint is written, and the end of an epoch is not what was asked for
            control.should_evaluate = control.should_save = False

    def requested_anywhere(self) -> bool:
        """Whether SIGINT has reached any process; all of them have to ask."""
        if self.accelerator.num_processes == 1:
            return self._requested
        requests = torch.tensor(float(self._requested), device=self.accelerator.device)
        return self.accelerator.reduce(requests, reduction="sum").item() > 0

    def on_save(self, args, state, control, **kwargs):
        if self._stopping:
            # Only now: a checkpoint that holds it would stop the resumed run as well
            control.should_training_stop = True
            self.checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def how_to_go_on(checkpoint: Any) -> str:
    """The command that resumes from a checkpoint."""
    given = shlex.split(os.environ.get(COMMAND_VARIABLE, ""))
    if given:
        _, rest = take_option(given, "resume_from_checkpoint")
        return f"Go on with:\n{shlex.join([*rest, '--resume_from_checkpoint', str(checkpoint)])}"
    return f"Go on with the same command and\n--resume_from_checkpoint {shlex.quote(str(checkpoint))}"


def say_how_to_go_on(event: str, checkpoint: Path) -> None:
    """Write what happened and the command to standard error, once per launch."""
    if not is_main_process():
        return
    if checkpoint.is_dir():
        event = f"{event}; the checkpoint is {checkpoint}.\n{how_to_go_on(checkpoint)}"
    else:
        event = f"{event}, but the checkpoint {checkpoint} is gone: another callback or program has removed it."
    print(event, file=sys.stderr, flush=True)

"""How a script runs: one line for errors of the user, exit codes, and as many processes as were asked for."""

import os
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from trl_blend.errors import ConfigError, TrlBlendError
from trl_blend.scripts.messages import (
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    is_main_process,
    name_options,
    one_line,
    say,
    without_token,
)
from trl_blend.scripts.settings import NUM_PROCESSES_VARIABLE, parse_script


# Arguments of the trainers that have another name as an option
_RENAMED = {
    "model": "model_name_or_path",
    "teacher_model": "teacher_model_name_or_path",
    "train_dataset": "dataset_name",
}
# The launcher ends all processes when one ends; the others wait that long for the message of the first
_SECONDS_TO_SPEAK = 10.0
_training_began = threading.Event()


def run(main: Callable[..., None], make_parser: Callable[..., Any]) -> None:
    """Run `main`, which takes the dataclasses of the parser, with the arguments of this process."""
    _training_began.clear()
    try:
        main(*_parse(make_parser()))
    except KeyboardInterrupt:
        if is_main_process():
            say("Interrupted.")
        sys.exit(EXIT_INTERRUPTED)
    except TrlBlendError as error:
        _fail(error)
    except (OSError, ValueError, TypeError, ImportError) as error:
        # What a library refuses before training is a setting, a name or a file
        if _training_began.is_set() or not (isinstance(error, OSError) or _raised_by_library(error)):
            raise
        _fail(error)


def training_begins() -> None:
    """From here on, an error keeps its traceback: it is a full disk or a reward's bug, not a wrong path."""
    _training_began.set()


def _raised_by_library(error: BaseException) -> bool:
    """Whether an error comes from an installed package, and not from this one, a script or a user's module."""
    own, standard = str(Path(__file__).parents[1]), sysconfig.get_path("stdlib")
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    for file in reversed(files):
        if file.startswith(own) or {"site-packages", "dist-packages"} & set(Path(file).parts):
            return not file.startswith(own)
        if not file.startswith((standard, "<")):
            return False
    return False


def _parse(parser: Any) -> tuple[Any, ...]:
    try:
        arguments = parse_script(parser, sys.argv[1:])
    except TrlBlendError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # those of the configurations that ours derive from
        raise ConfigError(str(error)) from error
    sys.argv[1:] = without_token(sys.argv[1:])  # wandb records them
    training_args = next(one for one in arguments if hasattr(one, "world_size"))
    wanted = os.environ.get(NUM_PROCESSES_VARIABLE)
    if wanted is not None and int(wanted) != training_args.world_size:
        raise ConfigError(
            f"{wanted} processes were asked for, but this run has {training_args.world_size}. Without accelerators, "
            "set `--use_cpu`; on several machines, check their number."
        )
    _check_checkpoint(training_args)
    _tell_of_earlier_run(training_args)
    return arguments


def _check_checkpoint(args: Any) -> None:
    """Refuse to go on from what is no checkpoint, before models are loaded."""
    given = args.resume_from_checkpoint
    if given is None:
        return
    latest = str(given).lower() == "true"  # on the command line: the latest of `output_dir`
    folder = get_last_checkpoint(args.output_dir) if latest and Path(args.output_dir).is_dir() else given
    if latest and folder in (None, given):
        raise ConfigError(f"`resume_from_checkpoint={given}`: there is no checkpoint in {args.output_dir}.")
    if not (Path(folder) / TRAINER_STATE_NAME).is_file():
        raise ConfigError(
            f"`resume_from_checkpoint={given}` is no folder with a {TRAINER_STATE_NAME}. Give a checkpoint of an "
            "interrupted run, or `true` for the latest one in `output_dir`."
        )


def _tell_of_earlier_run(args: Any) -> None:
    """Say what becomes of a folder that is used again, and how to go on instead."""
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint or not is_main_process() or not (folder.is_dir() and any(folder.iterdir())):
        return
    checkpoint = get_last_checkpoint(args.output_dir)
    kept = f"; `--resume_from_checkpoint {checkpoint}` would go on from the last" if checkpoint else ""
    say(f"note: {folder} is not empty. This run starts anew and overwrites what is there{kept}.")


def _fail(error: Exception) -> NoReturn:
    if not is_main_process():
        time.sleep(_SECONDS_TO_SPEAK)
    say(f"error: {name_options(one_line(error), (), _RENAMED)}")
    sys.exit(EXIT_USER_ERROR)

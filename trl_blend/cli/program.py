"""`main`: which command, its options, and what becomes of an error."""

import argparse
import sys
from collections.abc import Callable, Sequence

from trl_blend._version import __version__
from trl_blend.cli import demo, env, export, teacher_data, training
from trl_blend.errors import ConfigError, TrlBlendError
from trl_blend.scripts import settings
from trl_blend.scripts.messages import (
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    check_options,
    fail_in_one_line,
    name_options,
    nearest,
    option_names,
    say,
    unknown_options,
)


PROGRAM = "trl-blend"


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        arguments (`Sequence[str]`, *optional*):
            Arguments of the command line, those of this process by default.

    Returns:
        `int`: 0; 1 if `inspect` finds the data inconsistent, `env` finds an upstream version that this package was
        not written for, or a training script failed; 2 for an error of the user; 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given and given[0] in training.COMMANDS:
            return training.run(given[0], given[1:])
        if given and given[0] in teacher_data.COMMANDS:
            return teacher_data.run(given[0], given[1:])
        return _run(given)
    except KeyboardInterrupt:
        kept = " What is written is kept: run the same command again to go on."
        say(f"Interrupted.{kept if given and given[0] in teacher_data.COMMANDS else ''}")
        return EXIT_INTERRUPTED
    except (TrlBlendError, OSError) as error:
        say(f"error: {error}")
        return EXIT_USER_ERROR
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        say(
            "error: Out of memory on the accelerator. Lower --batch_size (rollouts; starts a new store) or "
            f"--tokens_per_batch (scores), or set --dtype bfloat16. ({str(error).splitlines()[0]})"
        )
        return EXIT_USER_ERROR


def _run(given: list[str]) -> int:
    parser, commands = _build_parser()
    if given and not given[0].startswith("-") and given[0] not in commands:
        raise ConfigError(
            f"unknown command `{given[0]}`{nearest(given[0], commands) or '.'} There are {', '.join(commands)}."
        )
    command = commands.get(given[0]) if given else None
    if command is None:
        fail_in_one_line(parser)
        if given and given[0] not in parser._option_string_actions:
            raise unknown_options(given[:1], option_names(parser), PROGRAM)
        parser.parse_args(given)  # `--help`, `--version`, or the error that a command is required
    known = option_names(command)
    check_options(given[1:], known, command.prog)  # before argparse misses what it may stand for
    options, unknown = command.parse_known_args([*_from_config(given[1:], command), *given[1:]])
    if unknown:
        raise unknown_options(unknown, known, command.prog)
    values = vars(options)
    run: Callable[..., int] = values.pop("run")
    renamed = values.pop("renamed", {})
    values.pop("config", None)
    try:
        return run(**values)
    except TrlBlendError as error:
        raise ConfigError(name_options(str(error), values, renamed)) from error


def _from_config(arguments: list[str], command: argparse.ArgumentParser) -> list[str]:
    """The settings of `--config file.yaml` as options to put in front of the others, which so override them."""
    file, _ = settings.take_option(arguments, "config")
    if file is None:
        return []
    values = settings.read_yaml(file)
    settings.check_keys(values, option_names(command), file)
    return settings.as_options(command, values, file)


def _build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of `--help`, and that of each command by its name."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Train students together with their teachers: see `trl-blend COMMAND --help`."
    )
    parser.add_argument("--version", action="version", version=f"trl_blend {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands: dict[str, argparse.ArgumentParser] = {}

    def command(
        name: str, run: Callable[..., int], summary: str, renamed: dict[str, str] | None = None
    ) -> argparse.ArgumentParser:
        added = subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        fail_in_one_line(added)
        added.set_defaults(run=run, renamed=renamed or {})
        added.add_argument("--config", metavar="FILE", help="YAML file of options; those on the command line win")
        commands[name] = added
        return added

    for name, script in training.COMMANDS.items():  # they are run before this parser is asked
        commands[name] = subparsers.add_parser(name, help=script.summary, add_help=False)
    for name, (*_, summary) in teacher_data.COMMANDS.items():
        commands[name] = subparsers.add_parser(name, help=summary, add_help=False)
    teacher_data.add_commands(command)
    export.add_command(command)
    env.add_command(command)
    demo.add_command(command)
    return parser, commands

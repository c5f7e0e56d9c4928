"""How the command line speaks: exit codes, one line per error, and the nearest name for a misspelt one."""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from trl_blend.errors import ConfigError, nearest


EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130


def is_main_process() -> bool:
    """Whether this is the first process of a launch, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def one_line(message: object) -> str:
    """A message without line breaks."""
    return " ".join(str(message).split())


def say(message: object) -> None:
    """Write one line to standard error, with the number of the process unless it is the first."""
    who = "" if is_main_process() else f" (process {os.environ['RANK']})"
    sys.stderr.write(f"trl-blend{who}: {one_line(message)}\n")  # in one piece: other processes write too
    sys.stderr.flush()


def tell(message: str) -> None:
    """Write a result to standard output, once per launch."""
    if is_main_process():
        print(message)


def without_token(arguments: Sequence[str]) -> list[str]:
    """Arguments to show or record: the value of `--hub_token` is replaced."""
    shown = []
    for previous, argument in zip(["", *arguments], arguments):
        name, equals, _ = argument.partition("=")
        if previous.replace("-", "_") == "__hub_token":
            argument = "TOKEN"
        elif equals and name.replace("-", "_") == "__hub_token":
            argument = f"{name}=TOKEN"
        shown.append(argument)
    return shown


def option_names(parser: argparse.ArgumentParser) -> set[str]:
    """Long options of a parser, without dashes in front."""
    return {option[2:] for option in parser._option_string_actions if option.startswith("--")}


def check_options(arguments: Sequence[str], known: set[str], seen: str, similar: Iterable[str] = ()) -> None:
    """Refuse long options of no known name, with the nearest one of those that are `similar`, or else of the known."""
    options = [item for item in arguments if re.match(r"--[\w-]+(=|$)", item)]
    foreign = [item for item in options if item[2:].partition("=")[0] not in known]
    if foreign:
        raise unknown_options(foreign, known, seen, similar)


def unknown_options(
    arguments: Sequence[str], known: Iterable[str], seen: str, similar: Iterable[str] = ()
) -> ConfigError:
    """The error for arguments that nobody knows, see [`check_options`]; the help of `seen` lists them."""
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
    if not options:
        return ConfigError(f"unexpected argument `{arguments[0]}` (see `{seen} --help`)")
    plain = [(name, name.lstrip("-").replace("-", "_")) for name in options]
    said = ", ".join(f"`{name}`{nearest(one, similar, '--') or nearest(one, known, '--')}" for name, one in plain)
    return ConfigError(f"unknown option {said} (see `{seen} --help`)")


def fail_in_one_line(parser: argparse.ArgumentParser) -> None:
    """Let a parser raise [`~trl_blend.errors.ConfigError`] where it would print its usage and exit."""

    def error(message: str) -> NoReturn:
        # `--max_steps/--max-steps` is one option under two spellings
        message = re.sub(r"(--\w+)(/--?[\w-]+)+", r"\1", message)
        raise ConfigError(f"{message} (see `{parser.prog} --help`)")

    parser.error = error
    parser._negative_number_matcher = re.compile(r"-\d*\.?\d+(e[-+]?\d+)?$", re.IGNORECASE)  # -1e-4 is one too


def name_options(message: str, options: Iterable[str], renamed: dict[str, str]) -> str:
    """
    A message of the Python API in the words of the command line: `` `model='x'` `` becomes
    `` `--model_name_or_path='x'` ``. `renamed` has the Python arguments whose option has another name.
    """
    names = {name: name for name in options} | renamed

    def replace(found: re.Match[str]) -> str:
        name = names.get(found[2])
        return found[0] if name is None or found[1] else f"`--{name}{found[3]}"

    return re.sub(r"(columns? )?`([a-z_0-9]+)(=|`|\[)", replace, message)

"""
Settings of a training script from a YAML file and the command line, checked before anything is loaded.

The scripts and `trl-blend` read them with the same functions: what a file says is parsed as if it stood on the command
line. TRL's parser would start a training with half of the mistakes that are found so: a scalar where a list belongs, a
fraction of a step, an abbreviated option.
"""

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

from trl_blend import _resources
from trl_blend.errors import ConfigError
from trl_blend.scripts import checks
from trl_blend.scripts.messages import fail_in_one_line, nearest, one_line, option_names, unknown_options


ACCELERATE_CONFIG = "accelerate_config"
NUM_PROCESSES_VARIABLE = "TRL_BLEND_NUM_PROCESSES"
COMMAND_VARIABLE = "TRL_BLEND_COMMAND"
"""Set by `trl-blend` for the processes that it launches: how many they have to be, and the command that did."""


def take_option(arguments: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `--name value` or `--name=value`, and the arguments without it; the last one counts."""
    value, rest = None, []
    items = iter(arguments)
    for item in items:
        if item == f"--{name}":
            value = next(items, None)
            if value is None or value.startswith("--"):
                raise ConfigError(f"`--{name}` needs a value.")
        elif item.startswith(f"--{name}="):
            value = item.partition("=")[2]
        else:
            rest.append(item)
    return value, rest


def read_yaml(file: str, option: str = "config", shipped: Iterable[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, given by `--{option}`."""
    import yaml

    given = f"`--{option} {file}`"
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{given}: there is no such file{_nearest_file(file, shipped)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{given} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{given} is not YAML: {one_line(error)}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"{given} has to hold `option: value` lines.")
    return values


def _nearest_file(file: str, shipped: Iterable[str]) -> str:
    folder = Path(file).parent
    names = {path.name for path in folder.glob("*.y*ml")} if folder.is_dir() else set()
    return nearest(Path(file).name, names) or nearest(file, shipped) or "."


def read_script_config(file: str) -> tuple[dict[str, Any], dict[str, str]]:
    """
    Settings and environment variables of a YAML file, or of one of `examples/configs`, named without its suffix.

    Paths below `examples/` in a file that ships with the package are found from any working directory.
    """
    shipped = _resources.shipped_yaml("configs")
    path = Path(file)
    if not path.exists() and file in shipped:
        path = shipped[file]
    values = read_yaml(str(path), shipped=shipped)
    if path.resolve() in {known.resolve() for known in shipped.values()}:
        values = {name: _find_example(value) for name, value in values.items()}
    variables = values.pop("env", None) or {}
    if not isinstance(variables, dict):
        raise ConfigError(f"`--config {file}`: `env` has to hold `VARIABLE: value` lines, not {variables!r}.")
    return values, {name: str(value) for name, value in variables.items()}


def _find_example(value: Any) -> Any:
    if isinstance(value, list):
        return [_find_example(one) for one in value]
    if isinstance(value, str) and value.startswith("examples/") and not Path(value).exists():
        found = _resources.examples_dir().parent / value
        return str(found) if found.exists() else value
    return value


def spelled(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Values of the options that are spelled out, before anything is parsed."""
    found: dict[str, list[str]] = {}
    values: list[str] = []  # of the option that was read last
    for item in arguments:
        if item.startswith("--"):
            name, equals, value = item[2:].partition("=")
            values = found[name.replace("-", "_")] = [value] if equals else []
        else:
            values.append(item)
    return found


class Given(NamedTuple):
    """Arguments of a command: the file of `--config`, its settings, the variables under `env` in it, and the rest."""

    file: str | None
    values: dict[str, Any]
    variables: dict[str, str]
    rest: list[str]


def read_arguments(arguments: Sequence[str]) -> Given:
    """Take `--config` out of the arguments and read it."""
    file, rest = take_option(arguments, "config")
    values, variables = read_script_config(file) if file is not None else ({}, {})
    return Given(file, values, variables, rest)


def check_keys(keys: Iterable[str], known: set[str], file: str | None, similar: Iterable[str] = ()) -> None:
    """Refuse keys of a YAML file that nobody knows, see [`check_options`]."""
    for key in keys:
        if key not in known:
            found = nearest(key, similar) or nearest(key, known) or "."
            raise ConfigError(f"`--config {file}`: unknown key `{key}`{found}")


def apply_config(
    parser: Any, values: dict[str, Any], file: str | None, launched: bool = True
) -> tuple[list[str], dict[str, Any]]:
    """
    Settings of a YAML `file` as arguments of the script, to put in front of the others, which so override them; and,
    where it is `launched`, its settings for `accelerate launch`. What cannot be written as an argument becomes a
    default of `parser`.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If neither of them knows a key.
    """
    types = {action.dest: action.type for action in parser._actions if action.dest != "help"}
    known, values = parser._option_string_actions, dict(values)
    for name in [name for name in values if name.startswith("no_") and name not in types and f"--{name}" in known]:
        values[name.removeprefix("no_")] = not values.pop(name)
    others = {name: value for name, value in values.items() if name not in types}
    check_keys(others, launch_names() if others and launched else set(), file, option_names(parser))
    # Nothing after a colon is a value for a configuration of TRL's, and none for a command of ours
    own = {name: value for name, value in values.items() if name in types and (launched or value is not None)}
    unwritten = {name: value for name, value in own.items() if value is None or _is_nested(value, known[f"--{name}"])}
    parser.set_defaults_with_config(**unwritten)
    written = {name: value for name, value in own.items() if name not in unwritten}
    return as_options(parser, written, file), others


def _is_nested(value: Any, action: argparse.Action) -> bool:
    """Whether the option of a value has no way to write it: it takes one text, or a dictionary as JSON."""
    return isinstance(value, (dict, list)) and action.nargs not in ("+", "*") and action.type in (None, dict, str)


def _text(action: argparse.Action, value: Any) -> str:
    """A value of a YAML file as it is written on the command line."""
    if value is False and "no" in (action.choices or ()):
        return "no"  # which YAML 1.1 reads as false
    return json.dumps(value, default=str) if isinstance(value, (bool, dict, list)) else str(value)


def as_options(parser: argparse.ArgumentParser, values: dict[str, Any], file: str | None) -> list[str]:
    """
    Settings of a YAML file as arguments of a parser that has an option for each of them.

    A switch is set by `true`, and unset by `false` where there is a `--no_` one.
    """
    known, options = parser._option_string_actions, []
    for name, value in values.items():
        action = known[f"--{name}"]
        if value is None:
            continue
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise ConfigError(f"`--config {file}`: `{name}: {_text(action, value)}` is no true/false.")
            switch = f"--{name}" if value else f"--no_{name}"
            options.extend([switch] if switch in known else [])
        elif action.nargs == "+" and isinstance(value, list):
            options.extend([f"--{name}", *(_text(action, one) for one in value)])
        else:
            options.append(f"--{name}={_text(action, value)}")
    return options


def make_parser(dataclasses: Sequence[str], **settings: Any) -> Any:
    """A [`~trl.TrlParser`] of dataclasses, such as `"trl:ModelConfig"`."""
    from trl import TrlParser

    return TrlParser([resolve_name(dataclass) for dataclass in dataclasses], **settings)


def launch_parser() -> argparse.ArgumentParser:
    """The parser of `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def launch_names() -> set[str]:
    """Names of the options of `accelerate launch`, and of our `--accelerate_config`."""
    return option_names(launch_parser()) - {"help"} | {ACCELERATE_CONFIG}


def parse_script(parser: Any, arguments: Sequence[str], launched: bool = True) -> tuple[Any, ...]:
    """
    The dataclasses of a training script, from its own arguments; raises what to change.

    Keys of the YAML file that `accelerate launch` understands are left to it, unless `launched` is `False`: then the
    command is no training script.
    """
    fail_in_one_line(parser)
    parser.allow_abbrev = False
    given = read_arguments(arguments)
    os.environ.update(given.variables)
    from_file, others = apply_config(parser, given.values, given.file, launched)
    _check_processes(others.get("num_processes"), given.file)
    arguments = [*from_file, *given.rest]
    try:
        *outputs, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    except ValueError as error:
        _name_broken_json(error, spelled(arguments))
        raise
    if unknown:
        raise unknown_options(unknown, option_names(parser), parser.prog)
    values = {name: value for output in outputs for name, value in vars(output).items()}
    checks.check_required([need for output in outputs for need in getattr(output, "required", ())], values)
    checks.check_ranges(values)
    checks.check_effects(values, parser.get_default)
    return tuple(outputs)


def _name_broken_json(error: ValueError, given: dict[str, list[str]]) -> None:
    """Raise in the name of its option what `json` says of a value."""
    cause = error if isinstance(error, json.JSONDecodeError) else error.__cause__
    if isinstance(cause, json.JSONDecodeError):
        for name, values in given.items():
            if cause.doc in values:
                raise ConfigError(f"`--{name} {cause.doc}` is not JSON: {cause}.") from error


def _check_processes(wanted: Any, file: str | None) -> None:
    """A script started otherwise than by `trl-blend` cannot follow the number in its settings."""
    running = os.environ.get("WORLD_SIZE", "1")
    if wanted is not None and COMMAND_VARIABLE not in os.environ and str(wanted) != running:
        raise ConfigError(
            f"`--config {file}`: `num_processes: {wanted}`, but {running} are running. Give `accelerate launch` "
            f"`--num_processes {wanted}`, or use `trl-blend`, which reads this key."
        )

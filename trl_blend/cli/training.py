"""
`grpo-mix`, `trust-region-opd`, `offline-opd`: the scripts of `examples/`, launched with accelerate as `trl` does it.

Options and settings are checked in this process, with the script's own parser; what the script does not know goes to
`accelerate launch`.
"""

import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_blend import _resources
from trl_blend.errors import ConfigError
from trl_blend.scripts import settings
from trl_blend.scripts.messages import fail_in_one_line, nearest, option_names, unknown_options, without_token


class Script(NamedTuple):
    """A script of `examples/` that exposes `make_parser`."""

    module: str
    summary: str


COMMANDS = {
    "grpo-mix": Script("grpo_mix", "train with GRPO on rollouts that a teacher helps to decode"),
    "trust-region-opd": Script("trust_region_opd", "distil on rollouts inside a trust region around the student"),
    "offline-opd": Script("offline_opd", "distil from stored rollouts that a teacher has scored"),
}

_HELP = (
    "Further options are those of `accelerate launch`, such as --num_processes N; --accelerate_config takes {names}, "
    "or a path. --config FILE reads any of these options from YAML; it also takes {configs}."
)


def run(name: str, arguments: Sequence[str], command: str | None = None) -> int:
    """
    Run one of [`COMMANDS`].

    Args:
        name (`str`):
            The command.
        arguments (`Sequence[str]`):
            Options of the script and of `accelerate launch`.
        command (`str`, *optional*):
            Command line that the user is told to go on with after Ctrl-C. Defaults to this one.

    Returns:
        `int`: Exit code.
    """
    script_arguments, launch_arguments, wants_cpu = check_arguments(name, list(arguments))
    os.environ[settings.COMMAND_VARIABLE] = command or shlex.join(["trl-blend", name, *without_token(arguments)])
    from trl_blend.cli.launching import launch

    return launch(_script(name), launch_arguments, script_arguments, wants_cpu)


def _script(name: str) -> Path:
    return _resources.examples_dir() / f"{COMMANDS[name].module}.py"


def check_arguments(name: str, arguments: list[str]) -> tuple[list[str], list[str], bool]:
    """Arguments of the script, those of `accelerate launch`, and whether training is to be on the CPU."""
    file, rest = settings.take_option(arguments, "config")
    named, rest = settings.take_option(rest, settings.ACCELERATE_CONFIG)
    values, variables = settings.read_script_config(file) if file is not None else ({}, {})
    config_file = _accelerate_config(named if named is not None else values.get(settings.ACCELERATE_CONFIG))
    # What can be found without the imports has been found
    os.environ.update(variables)
    parser = _make_parser(name)
    others = settings.apply_config(parser, values, file) if file is not None else {}
    namespace, unknown = parser.parse_known_args(rest)
    known = settings.launch_options()
    for key in others:
        if key not in known:
            raise settings.unknown_key(key, option_names(parser) | known, file)
    foreign = [item for item in unknown if item.startswith("--") and _option(item) not in known]
    if foreign:
        raise unknown_options(foreign, option_names(parser) | known, parser.prog)
    others.pop(settings.ACCELERATE_CONFIG, None)
    config = ["--config_file", str(config_file)] if config_file else []
    from_file = settings.as_options(settings.launch_parser(), others, file) if file is not None else []
    launch_arguments = [*config, *from_file, *unknown]
    script_arguments = _without(rest, unknown)
    if file is not None:
        script_arguments = ["--config", file, *script_arguments]
    return script_arguments, launch_arguments, bool(namespace.use_cpu)


def _make_parser(name: str) -> Any:
    """The parser of a script; this loads TRL."""
    folder = str(_resources.examples_dir())
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(COMMANDS[name].module)
    finally:
        sys.path.remove(folder)
    parser = module.make_parser(prog=f"trl-blend {name}")
    fail_in_one_line(parser)
    parser.allow_abbrev = False
    names, configs = (", ".join(_resources.shipped_yaml(kind)) for kind in ("accelerate_configs", "configs"))
    parser.epilog = _HELP.format(names=names, configs=configs)
    return parser


def _accelerate_config(named: Any) -> Path | None:
    """File of `--accelerate_config`: a path, or the name of a shipped one."""
    if named is None:
        return None
    shipped = _resources.shipped_yaml("accelerate_configs")
    if Path(str(named)).is_file():
        settings.read_yaml(str(named), settings.ACCELERATE_CONFIG)
        return Path(named)
    if named not in shipped:
        raise ConfigError(
            f"`--accelerate_config {named}` is neither a file nor one of {', '.join(shipped)}{nearest(named, shipped)}"
        )
    return shipped[named]


def _option(argument: str) -> str:
    return argument[2:].partition("=")[0]


def _without(arguments: list[str], removed: list[str]) -> list[str]:
    """Arguments without an ordered part of them."""
    left = iter(removed)
    current = next(left, None)
    kept = []
    for argument in arguments:
        if argument == current:
            current = next(left, None)
        else:
            kept.append(argument)
    return kept

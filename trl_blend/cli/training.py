"""
`grpo-mix`, `trust-region-opd`, `offline-opd`: the scripts of `examples/`, launched with accelerate as `trl` does it.

Options and settings are checked in this process, with the script's own parser; what the script does not know goes to
`accelerate launch`.
"""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_blend import _resources
from trl_blend.cli import options
from trl_blend.errors import ConfigError
from trl_blend.scripts import checks, settings
from trl_blend.scripts.messages import check_options, fail_in_one_line, nearest, option_names, without_token


class Command(NamedTuple):
    """A script of `examples/`, the dataclasses that its parser is made of, and what it does not start without."""

    script: str
    summary: str
    dataclasses: tuple[str, ...]
    required: tuple[checks.Need, ...]


_ARGUMENTS = "trl_blend.scripts.arguments"
COMMANDS = {
    "grpo-mix": Command(
        "grpo_mix.py",
        "train with GRPO on rollouts that a teacher helps to decode",
        (
            f"{_ARGUMENTS}:GRPOMixScriptArguments",
            "trl_blend:LogitMixGRPOConfig",
            f"{_ARGUMENTS}:GRPOMixModelConfig",
            "trl:DatasetMixtureConfig",
        ),
        checks.GRPO_MIX,
    ),
    "trust-region-opd": Command(
        "trust_region_opd.py",
        "distil on rollouts inside a trust region around the student",
        (
            f"{_ARGUMENTS}:TrustRegionOPDScriptArguments",
            "trl_blend:TrustRegionOPDConfig",
            "trl:ModelConfig",
            "trl:DatasetMixtureConfig",
        ),
        checks.TRUST_REGION_OPD,
    ),
    "offline-opd": Command(
        "offline_opd.py",
        "distil from stored rollouts that a teacher has scored",
        (f"{_ARGUMENTS}:OfflineOPDScriptArguments", "trl_blend:OfflineOPDConfig", "trl:ModelConfig"),
        checks.OFFLINE_OPD,
    ),
}

_EPILOG = (
    "Further options are those of `accelerate launch`, such as --num_processes N; --accelerate_config takes {names}, "
    "or a path. --config FILE reads any of these options from YAML; it also takes {configs}."
)


def run(name: str, arguments: Sequence[str], command: str | None = None) -> int:
    """
    Run one of [`COMMANDS`] with options of its script and of `accelerate launch`; returns the exit code.

    After Ctrl-C the user is told to go on with `command`, which is this one by default.
    """
    if "--help-all" in arguments:
        print(make_parser(name).format_help())
        return 0
    if {"-h", "--help"} & set(arguments):
        fields = options.read_options(COMMANDS[name].dataclasses)
        print(options.format_help(fields, f"trl-blend {name}", COMMANDS[name].summary, _epilog()))
        return 0
    script_arguments, launch_arguments, wants_cpu = check_arguments(name, list(arguments))
    os.environ[settings.COMMAND_VARIABLE] = command or shlex.join(["trl-blend", name, *without_token(arguments)])
    from trl_blend.cli.launching import launch

    return launch(script_path(name), launch_arguments, script_arguments, wants_cpu)


def script_path(name: str) -> Path:
    return _resources.examples_dir() / COMMANDS[name].script


def make_parser(name: str) -> Any:
    """The parser of a script, as it makes it itself; this imports TRL."""
    return settings.make_parser(COMMANDS[name].dataclasses, prog=f"trl-blend {name}", epilog=_epilog())


def check_arguments(name: str, arguments: list[str]) -> tuple[list[str], list[str], bool]:
    """Arguments of the script, those of `accelerate launch`, and whether training is to be on the CPU."""
    given = settings.read_arguments(arguments)
    named, rest = settings.take_option(given.rest, settings.ACCELERATE_CONFIG)
    in_file = given.values.pop(settings.ACCELERATE_CONFIG, None)
    config_file = accelerate_config(named if named is not None else in_file)
    _check_names(name, given._replace(rest=rest))
    os.environ.update(given.variables)
    parser = make_parser(name)
    fail_in_one_line(parser)
    parser.allow_abbrev = False
    from_file, others = settings.apply_config(parser, given.values, given.file)
    namespace, unknown = parser.parse_known_args([*from_file, *rest])
    known = settings.launch_names()
    check_options(unknown, known, parser.prog, option_names(parser))
    launch_arguments = settings.as_options(settings.launch_parser(), others, given.file) + unknown
    if config_file is not None:
        launch_arguments = ["--config_file", str(config_file), *launch_arguments]
    script_arguments = _without(rest, unknown)
    if given.file is not None:
        script_arguments = ["--config", given.file, *script_arguments]
    return script_arguments, launch_arguments, bool(namespace.use_cpu)


def _check_names(name: str, given: settings.Given) -> None:
    """Say what is misspelt, or missing, before TRL is imported, which takes five seconds."""
    try:
        fields = options.read_options(COMMANDS[name].dataclasses)
        own = options.spellings(fields)
        known = own | options.launch_spellings() | {settings.ACCELERATE_CONFIG}
    except (LookupError, ValueError, OSError):
        return  # the parsers are asked below
    settings.check_keys(given.values, known, given.file, own)
    check_options(given.rest, known, f"trl-blend {name}", own)
    checks.check_required(COMMANDS[name].required, given.values | settings.spelled(given.rest))


def accelerate_config(named: Any) -> Path | None:
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


def _epilog() -> str:
    names, configs = (", ".join(_resources.shipped_yaml(kind)) for kind in ("accelerate_configs", "configs"))
    return _EPILOG.format(names=names, configs=configs)


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

"""`trl-blend env`: versions, devices, and whether the installed TRL is one that this package was written for."""

import ast
import importlib
import importlib.metadata
import inspect
import json
import platform
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from trl_blend import __version__
from trl_blend._contract import SEAMS, TRAINERS
from trl_blend.cli.messages import EXIT_FAILED, tell


PACKAGES = ("trl", "transformers", "torch", "accelerate", "peft", "datasets", "huggingface_hub", "vllm", "deepspeed")


def add_command(command: Callable[..., Any]) -> None:
    """Add the command to the command line."""
    parser = command("env", print_env, "print versions and devices, and check the installed TRL against this package")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")


def print_env(as_json: bool = False) -> int:
    """Print the environment; 1 if something upstream is not what this package was written for."""
    broken = differences()
    found = {**versions(), "devices": devices()}
    if as_json:
        tell(json.dumps({**found, "contract": {"seams": len(SEAMS), "differences": broken}}, indent=2))
        return EXIT_FAILED if broken else 0
    lines = [f"{name:<16} {', '.join(value) if isinstance(value, list) else value}" for name, value in found.items()]
    state = f"{len(broken)} differences" if broken else "as this package was written for"
    lines.append(f"{'upstream methods':<16} {len(SEAMS)} checked: {state}")
    tell("\n".join([*lines, *(f"  {text}" for text in broken)]))
    return EXIT_FAILED if broken else 0


def versions() -> dict[str, str]:
    """Versions of this package, of those that it is built on, of Python, and the platform."""
    found = {"trl_blend": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"python": sys.version.split()[0], "platform": platform.platform()}


def devices() -> list[str]:
    """Names of the accelerators, or the CPU with its cores and threads of torch."""
    import torch

    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.accelerator.is_available():
        return [torch.accelerator.current_accelerator().type] * torch.accelerator.device_count()
    return [f"CPU ({torch.get_num_threads()} threads)"]


def differences() -> list[str]:
    """What the installed versions do not keep of `trl_blend/_contract.py`, one sentence each."""
    found = []
    for path, seam in SEAMS.items():
        try:
            actual = parameters(resolve(path))
        except (AttributeError, ImportError) as error:
            found.append(f"`{path}` is gone ({error}). trl_blend/{seam.users} relies on it.")
            continue
        if actual != seam.parameters:
            found.append(f"`{path}` now takes ({actual}), it took ({seam.parameters}). Check trl_blend/{seam.users}.")
    for trainer, attributes in TRAINERS.items():
        try:
            present = _attributes(resolve(trainer))
        except (AttributeError, ImportError) as error:
            found.append(f"`{trainer}` is gone ({error}).")
            continue
        gone = [name for name in attributes if name not in present]
        found.extend(f"`{trainer}.{name}` is gone. trl_blend/{attributes[name]} reads it." for name in gone)
    return found


def resolve(path: str) -> Any:
    """The object that a dotted path names."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


def parameters(function: Callable[..., Any]) -> str:
    """Parameters of a function in the notation of [`~trl_blend._contract.Seam`]."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(
        stars.get(one.kind, "") + one.name + ("" if one.default is one.empty else "=")
        for one in inspect.signature(function).parameters.values()
    )


def _attributes(trainer: type) -> set[str]:
    """Attributes of a class, and those that the sources of its methods assign to `self`."""
    found = set(dir(trainer))
    for parent in trainer.__mro__[:-1]:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(parent)))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    found.add(node.attr)
    return found

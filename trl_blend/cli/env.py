"""`trl-blend env`: versions, devices, and whether the installed packages are those that this one takes."""

import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable
from typing import Any

from packaging.requirements import Requirement

from trl_blend._version import __version__
from trl_blend.scripts.messages import EXIT_FAILED, tell


PACKAGES = ("trl", "transformers", "torch", "accelerate", "peft", "datasets", "huggingface_hub", "vllm", "deepspeed")
_EXTRAS = ("peft", "wandb", "vllm")  # that a run may use; what the tools of development are is not asked


def add_command(command: Callable[..., Any]) -> None:
    """Add the command to the command line."""
    parser = command("env", print_env, "print versions and devices, and check the versions against what is required")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")


def print_env(as_json: bool = False) -> int:
    """Print the environment; 1 if an installed package is of a version that this one does not take."""
    found, wrong = {**versions(), "devices": devices()}, differences()
    if as_json:
        tell(json.dumps({**found, "differences": wrong}, indent=2))
    else:
        lines = [f"{name:<16} {', '.join(v) if isinstance(v, list) else v}" for name, v in found.items()]
        tell("\n".join([*lines, *wrong]))
    return EXIT_FAILED if wrong else 0


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
    """Packages whose installed version is not one that this package requires, one sentence each."""
    found = []
    try:
        lines = importlib.metadata.requires("trl_blend") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        lines = []
    for line in lines:
        required = Requirement(line)
        is_extra = required.marker is not None
        if is_extra and not any(required.marker.evaluate({"extra": extra}) for extra in _EXTRAS):
            continue
        try:
            installed = importlib.metadata.version(required.name)
        except importlib.metadata.PackageNotFoundError:
            if not is_extra:
                found.append(f"{required.name} is not installed, and trl_blend needs {required.specifier or 'it'}.")
            continue
        if not required.specifier.contains(installed, prereleases=True):
            found.append(f"{required.name} {installed} is installed, and trl_blend needs {required.specifier}.")
    return found

"""Imports go downwards only: every import statement of the package is read and held against the table of rooms."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "trl_blend"

# room -> rooms it may import. A room is a folder or a module directly below the package; "" is the package itself.
ALLOWED = {
    "errors": set(),
    "_resources": {"errors"},
    # A table of strings; what they name is imported only when it is checked
    "_contract": set(),
    "schedules": {"errors"},
    "ops": {"errors", "ops"},
    "_compat": {"errors", "ops"},
    "generation": {"errors", "schedules", "ops", "generation"},
    "teacher": {"errors", "schedules", "ops", "generation", "teacher", "_compat"},
    # Below the trainers, which save, describe and push a run with it
    "hub": {"errors", "schedules", "ops", "generation", "teacher", "hub", "_compat", "_resources"},
}
ALLOWED["trainers"] = ALLOWED["hub"] | {"trainers"}
ALLOWED["cli"] = ALLOWED["trainers"] | {"cli", "_contract"}
ALLOWED["__main__"] = {"cli"}
ALLOWED[""] = set(ALLOWED)

MAY_IMPORT_TRL = {"trainers", "_compat"}
# Rooms whose only foundations are the standard library and what is listed here.
FOREIGN = {"errors": set(), "_resources": set(), "_contract": set(), "schedules": set(), "ops": {"torch"}, "": set()}

REPOSITORY_FOLDERS = {PACKAGE, "examples", "tests", "model_cards"}


def modules_on_disk() -> dict[str, Path]:
    names = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules_on_disk()


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Absolute names of the modules that `source` imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:  # `from package import module` imports the module
                if (base, alias.name) != (PACKAGE, "__version__"):  # a constant, which hides no direction
                    yield f"{base}.{alias.name}" if is_room_or_module(f"{base}.{alias.name}") else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def is_room_or_module(name: str) -> bool:
    return name in MODULES or (name.startswith(f"{PACKAGE}.") and name.removeprefix(f"{PACKAGE}.") in ALLOWED)


def room_of(module: str) -> str:
    return (module.split(".") + [""])[1]


def trainer_of(module: str) -> str | None:
    """Folder of the trainer that a module belongs to; modules with a leading underscore are shared by all trainers."""
    parts = module.split(".")
    return parts[2] if parts[1:2] == ["trainers"] and len(parts) > 2 and not parts[2].startswith("_") else None


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """The rules that `source`, standing at `module`, breaks."""
    room, found = room_of(module), []
    for name in imported_modules(source, module, is_package):
        top = name.split(".")[0]
        if top == PACKAGE:
            target = room_of(name)
            if target not in ALLOWED[room]:
                found.append(f"{module} imports {name}: {room or PACKAGE} may not import {target or PACKAGE}")
            elif trainer_of(name) not in (None, trainer_of(module)) and room == "trainers":
                found.append(f"{module} imports {name}: trainers never import each other")
        elif top == "trl" and room not in MAY_IMPORT_TRL:
            found.append(f"{module} imports {name}: only {sorted(MAY_IMPORT_TRL)} import trl")
        elif room in FOREIGN and top not in FOREIGN[room] and top not in sys.stdlib_module_names:
            found.append(f"{module} imports {name}: {room or PACKAGE} is built on {sorted(FOREIGN[room])} only")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_the_rules(module):
    path = MODULES[module]
    assert room_of(module) in ALLOWED, f"{module} is a new room: say in this test what it may import"
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("trl_blend.errors", "from .ops import mixing", "errors may not import ops"),
        ("trl_blend.errors", "import torch", "errors is built on [] only"),
        ("trl_blend.schedules", "from trl_blend.ops.mixing import mix_logits", "schedules may not import ops"),
        ("trl_blend.ops.mixing", "from ..generation.rules import LogitMixing", "ops may not import generation"),
        ("trl_blend.ops.mixing", "from .. import _compat", "ops may not import _compat"),
        ("trl_blend.ops.mixing", "from ..schedules import linear", "ops may not import schedules"),
        ("trl_blend.ops.mixing", "def f():\n    import transformers", "ops is built on ['torch'] only"),
        ("trl_blend.ops.mixing", "import trl.trainer.utils", "import trl"),
        ("trl_blend.generation.hooks", "from trl_blend.teacher import compatibility", "may not import teacher"),
        ("trl_blend.generation.hooks", "from .. import LogitMixing", "generation may not import trl_blend"),
        ("trl_blend.generation.hooks", "from trl import GRPOTrainer", "import trl"),
        ("trl_blend.teacher.store", "from ..trainers import _cards", "teacher may not import trainers"),
        ("trl_blend.teacher.store", "import trl_blend.trainers.logit_mix_grpo", "teacher may not import trainers"),
        ("trl_blend._compat", "from .trainers import logit_mix_grpo", "_compat may not import trainers"),
        ("trl_blend._contract", "from . import errors", "_contract may not import errors"),
        ("trl_blend._contract", "import transformers", "_contract is built on [] only"),
        ("trl_blend.trainers.a.trainer", "from ... import _contract", "trainers may not import _contract"),
        ("trl_blend._resources", "from .hub import card", "_resources may not import hub"),
        ("trl_blend.trainers.a.trainer", "from ..b.trainer import T", "trainers never import each other"),
        ("trl_blend.trainers._shared", "from .b import T", "trainers never import each other"),
        ("trl_blend.hub.card", "from ..trainers import _cards", "hub may not import trainers"),
        ("trl_blend.trainers.a.trainer", "import_module('trl_blend.cli')", "trainers may not import cli"),
        ("trl_blend.hub.card", "from ..cli import main", "hub may not import cli"),
        ("trl_blend.hub.card", "from trl import GRPOConfig", "import trl"),
        ("trl_blend", "import transformers", "trl_blend is built on [] only"),
    ],
)
def test_a_broken_rule_is_found(module, source, rule):
    found = violations(source, module, is_package=module == PACKAGE)
    assert len(found) == 1
    assert rule in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "trl_blend.ops.mixing",
            "import math\nimport torch\nfrom ..errors import ConfigError\nfrom . import reduction",
        ),
        ("trl_blend.generation.hooks", "import transformers\nfrom trl_blend.ops.mixing import mix_logits"),
        ("trl_blend.trainers.a.trainer", "from trl import GRPOTrainer\nfrom ... import _compat, _resources"),
        ("trl_blend.trainers.a.trainer", "from ... import __version__"),
        ("trl_blend.trainers.a.trainer", "from .config import C\nfrom .._shared import f\nfrom ..a import config"),
        ("trl_blend.hub.card", "from ..teacher.store import RolloutStore\nimport huggingface_hub"),
        ("trl_blend.trainers._cards", "from ..hub import card"),
        ("trl_blend", "from .trainers.a import T\nfrom .generation.rules import LogitMixing"),
    ],
)
def test_a_kept_rule_is_not_reported(module, source):
    assert violations(source, module, is_package=module == PACKAGE) == []


def test_no_other_folder_at_the_top():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    folders = {name.split("/")[0] for name in listed.stdout.splitlines() if "/" in name}
    assert {name for name in folders if not name.startswith(".")} <= REPOSITORY_FOLDERS


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import trl_blend", {"torch", "transformers", "trl"}),
        ("import trl_blend.ops", {"transformers", "trl"}),
        ("import trl_blend.schedules", {"torch", "transformers", "trl"}),
        ("from trl_blend import LogitMixing", {"trl"}),
    ],
)
def test_imports_stay_light(statement, absent):
    code = f"import sys\n{statement}\nprint(*sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []

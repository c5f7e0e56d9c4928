"""Imports go downwards only, and in no circle: every import statement of the package is read."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "trl_blend"

# The journey of the data: a room imports itself and what stands before it. A room is a folder or a module directly
# below the package; the package itself, which only names what is public, comes last.
ORDER = (
    "errors",
    "schedules",
    "_version",
    "_files",
    "_resources",
    "ops",
    "_compat",
    "models",
    "generation",
    "rollouts",
    "consistency",
    "reports",
    "export",
    "serving",
    "trainers",
    "scripts",
    "cli",
    "__main__",
    "",
)
MAY_IMPORT_TRL = {"trainers", "scripts", "_compat"}
# What talks to an engine of vLLM in this process, and what runs inside of one
MAY_IMPORT_VLLM = {"trl_blend.rollouts.engines.vllm", "trl_blend.serving.model", "trl_blend.serving.plugin"}
# Rooms whose only foundations are the standard library, what is listed here, and these rooms of ours
PURE = {
    "errors": (set(), set()),
    "schedules": (set(), {"errors"}),
    "_version": (set(), set()),
    "_files": (set(), {"errors"}),
    "_resources": (set(), set()),
    "ops": ({"torch"}, {"errors"}),
    "": (set(), set(ORDER)),
}

REPOSITORY_FOLDERS = {PACKAGE, "examples", "tests", "model_cards"}


def modules_on_disk() -> dict[str, Path]:
    names = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules_on_disk()


def imported_modules(source: str) -> Iterator[str]:
    """Names of the modules that `source` imports, wherever the statement stands. A relative one begins with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:  # `from package import module` imports the module
                name = f"{base}.{alias.name}"
                yield name if name in MODULES or name.removeprefix(f"{PACKAGE}.") in ORDER else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def room_of(module: str) -> str:
    return (module.split(".") + [""])[1]


def trainer_of(module: str) -> str | None:
    """Folder of the trainer that a module belongs to; modules with a leading underscore are shared by all trainers."""
    parts = module.split(".")
    return parts[2] if parts[1:2] == ["trainers"] and len(parts) > 2 and not parts[2].startswith("_") else None


def violations(source: str, module: str) -> list[str]:
    """The rules that `source`, standing at `module`, breaks."""
    room, found = room_of(module), []
    for name in imported_modules(source):
        top, target = name.split(".")[0], room_of(name)
        if name.startswith("."):
            found.append(f"{module} imports {name}: imports are absolute")
        elif top == PACKAGE and ORDER.index(target) > ORDER.index(room):
            found.append(f"{module} imports {name}: {target or PACKAGE} stands after {room}")
        elif top == PACKAGE and room in PURE and target not in PURE[room][1] | {room}:
            found.append(f"{module} imports {name}: {room} is built on {sorted(PURE[room][1])} only")
        elif top == PACKAGE and room == "trainers" and trainer_of(name) not in (None, trainer_of(module)):
            found.append(f"{module} imports {name}: trainers never import each other")
        elif top == "trl" and room not in MAY_IMPORT_TRL:
            found.append(f"{module} imports {name}: only {sorted(MAY_IMPORT_TRL)} import trl")
        elif top == "vllm" and module not in MAY_IMPORT_VLLM:
            found.append(f"{module} imports {name}: only {sorted(MAY_IMPORT_VLLM)} import vllm")
        elif top != PACKAGE and room in PURE and top not in PURE[room][0] and top not in sys.stdlib_module_names:
            found.append(f"{module} imports {name}: {room or PACKAGE} is built on {sorted(PURE[room][0])} only")
    return found


def circles(imports: Mapping[str, set[str]]) -> list[str]:
    """Modules that import themselves, through others or not."""
    reached = {module: set(targets) for module, targets in imports.items()}
    while True:
        grown = {module: targets.union(*(reached[t] for t in targets)) for module, targets in reached.items()}
        if grown == reached:
            return sorted(module for module, targets in reached.items() if module in targets)
        reached = grown


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_the_rules(module):
    assert room_of(module) in ORDER, f"{module} is a new room: say in this test where it stands"
    assert violations(MODULES[module].read_text(), module) == []


def test_no_import_goes_in_a_circle():
    imports = {module: set(imported_modules(path.read_text())) & set(MODULES) for module, path in MODULES.items()}
    assert circles(imports) == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("trl_blend.errors", "from trl_blend.ops import mixing", "ops stands after errors"),
        ("trl_blend.errors", "import torch", "errors is built on [] only"),
        ("trl_blend.schedules", "from trl_blend.ops.mixing import mix_logits", "ops stands after schedules"),
        ("trl_blend.ops.mixing", "from ..errors import ConfigError", "imports are absolute"),
        ("trl_blend.ops.mixing", "from trl_blend.generation.rules import LogitMixing", "generation stands after ops"),
        ("trl_blend.ops.mixing", "from trl_blend import _compat", "_compat stands after ops"),
        ("trl_blend.ops.mixing", "from trl_blend.schedules import linear", "ops is built on ['errors'] only"),
        ("trl_blend.ops.mixing", "def f():\n    import transformers", "ops is built on ['torch'] only"),
        ("trl_blend.ops.mixing", "import trl.trainer.utils", "import trl"),
        ("trl_blend.generation.hooks", "from trl_blend.rollouts import store", "rollouts stands after generation"),
        ("trl_blend.generation.hooks", "from trl_blend import LogitMixing", "trl_blend stands after generation"),
        ("trl_blend.generation.hooks", "from trl import GRPOTrainer", "import trl"),
        ("trl_blend.models.loading", "from trl_blend.trainers import _cards", "trainers stands after models"),
        ("trl_blend.reports.cards", "from trl_blend.export.spec import MixingSpec", "export stands after reports"),
        ("trl_blend.rollouts.store", "import trl_blend.trainers.logit_mix_grpo", "trainers stands after rollouts"),
        ("trl_blend.rollouts.collect", "def f():\n    from vllm import LLM", "import vllm"),
        ("trl_blend.serving.blend", "from trl_blend.trainers import _partners", "trainers stands after serving"),
        ("trl_blend.serving.worker", "import vllm", "import vllm"),
        (
            "trl_blend.consistency.check",
            "if TYPE_CHECKING:\n    from trl_blend.trainers.a.trainer import T",
            "trainers stands after consistency",
        ),
        ("trl_blend.trainers.a.trainer", "from trl_blend.trainers.b.trainer import T", "trainers never import"),
        ("trl_blend.trainers._shared", "from trl_blend.trainers.b import T", "trainers never import each other"),
        ("trl_blend.trainers.a.trainer", "import_module('trl_blend.cli')", "cli stands after trainers"),
        ("trl_blend", "import transformers", "trl_blend is built on [] only"),
    ],
)
def test_a_broken_rule_is_found(module, source, rule):
    found = violations(source, module)
    assert len(found) == 1
    assert rule in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "trl_blend.ops.mixing",
            "import math\nimport torch\nfrom trl_blend.errors import ConfigError\nfrom trl_blend.ops import reduction",
        ),
        ("trl_blend.generation.hooks", "import transformers\nfrom trl_blend.ops.mixing import mix_logits"),
        ("trl_blend.trainers.a.trainer", "from trl import GRPOTrainer\nfrom trl_blend import _compat, _resources"),
        ("trl_blend.trainers.a.trainer", "from trl_blend._version import __version__"),
        (
            "trl_blend.trainers.a.trainer",
            "from trl_blend.trainers import _cards\nfrom trl_blend.trainers.a import config",
        ),
        ("trl_blend.export.card", "from trl_blend.reports.cards import render\nimport huggingface_hub"),
        ("trl_blend", "from trl_blend.trainers.a import T\nfrom trl_blend.generation.rules import LogitMixing"),
    ],
)
def test_a_kept_rule_is_not_reported(module, source):
    assert violations(source, module) == []


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
        ("import trl_blend.models.compatibility", {"torch", "transformers", "trl"}),
        ("import trl_blend.rollouts.store", {"torch", "transformers", "trl"}),
        ("import trl_blend.consistency.report", {"torch", "transformers", "trl"}),
        ("import trl_blend.schedules", {"torch", "transformers", "trl"}),
        ("import trl_blend.serving.plugin", {"torch", "transformers", "trl", "vllm"}),
        ("import trl_blend.serving.arguments", {"trl", "vllm"}),
        ("import trl_blend.cli", {"torch", "transformers", "trl"}),
        ("from trl_blend import LogitMixing", {"trl"}),
    ],
)
def test_imports_stay_light(statement, absent):
    code = f"import sys\n{statement}\nprint(*sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []

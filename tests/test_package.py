"""The package as it is published: names, docstrings, declared dependencies, wheel contents, launch configurations."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import trl_blend
from tests.lower_bounds import lower_bounds
from trl_blend._resources import model_card_template


ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "trl_blend").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ACCELERATE_CONFIGS = sorted((ROOT / "examples" / "accelerate_configs").glob("*.yaml"))

DISTRIBUTION_OF = {"yaml": "pyyaml"}  # import names that are not the distribution's


# -------------------- public names


def test_version_is_that_of_the_installed_distribution():
    try:
        installed = version("trl_blend")
    except PackageNotFoundError:
        assert trl_blend.__version__ == "0+unknown"
    else:
        assert trl_blend.__version__ == installed == PROJECT["version"]


@pytest.mark.parametrize("name", trl_blend.__all__)
def test_public_name_resolves(name):
    value = getattr(trl_blend, name)
    assert name in dir(trl_blend)
    if name != "__version__":
        assert value is getattr(importlib.import_module(trl_blend._MODULE_OF[name]), name)


def test_lazy_and_static_names_agree():
    tree = ast.parse((ROOT / "trl_blend" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    static = {alias.name: node.module for node in block.body for alias in node.names}
    assert static == trl_blend._MODULE_OF
    assert sorted(trl_blend.__all__) == sorted([*trl_blend._MODULE_OF, "__version__"])


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'trl_blend' has no attribute 'LogitMixGRPO'"):
        _ = trl_blend.LogitMixGRPO


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_module_has_a_docstring(path):
    public = not path.stem.startswith("_") or path.stem == "__init__"
    assert not public or ast.get_docstring(ast.parse(path.read_text())), f"{path} says nothing about itself"


# -------------------- dependencies


def normalized(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement).group()
    return re.sub(r"[-_.]+", "-", name).lower()


def undeclared(source: str, required: set[str], optional: set[str]) -> set[str]:
    """Distributions that `source` imports undeclared; an optional one may only be imported inside a function."""
    tree = ast.parse(source)
    lazy = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    missing = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"trl_blend"}:
            distribution = normalized(DISTRIBUTION_OF.get(top, top))
            if distribution not in required and not (node in lazy and distribution in optional):
                missing.add(distribution)
    return missing


REQUIRED = {normalized(requirement) for requirement in PROJECT["dependencies"]}
OPTIONAL = {
    normalized(requirement)
    for extra in ("peft", "wandb", "vllm")
    for requirement in PROJECT["optional-dependencies"][extra]
}
# Loaded by vLLM, and by nothing else
INSIDE_VLLM = ROOT / "trl_blend" / "serving" / "model.py"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_is_declared(path):
    required = REQUIRED | {"vllm"} if path == INSIDE_VLLM else REQUIRED
    assert undeclared(path.read_text(), required, OPTIONAL) == set()


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("import os, torch\nfrom trl.trainer import utils\nfrom . import x\nfrom trl_blend import errors", set()),
        ("def f():\n    from peft import PeftModel", set()),
        ("from peft import PeftModel", {"peft"}),
        ("def f():\n    import scipy.special", {"scipy"}),
        ("import yaml", {"pyyaml"}),
    ],
)
def test_an_undeclared_import_is_found(source, missing):
    assert undeclared(source, {"torch", "trl"}, {"peft"}) == missing


def test_every_direct_requirement_has_a_tested_version():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normalized(line) for line in lines if re.match(r"[\w.-]+==[\w.]+$", line)}
    wanted = {
        normalized(requirement)
        for requirements in [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
        for requirement in requirements
    }
    assert wanted - pinned - {"trl-blend"} == set()


def test_the_oldest_releases_are_read_from_the_ranges():
    bounds = lower_bounds(PROJECT)
    assert bounds["transformers"] == "5.10.1" and bounds["peft"] == "0.19.0" and "pytest" not in bounds
    assert {normalized(name) for name in bounds} >= REQUIRED
    with pytest.raises(SystemExit, match="no lower bound for .'numpy'"):
        lower_bounds({**PROJECT, "dependencies": ["numpy"]})


def test_an_export_needs_the_oldest_transformers_that_the_package_takes():
    oldest = lower_bounds(PROJECT)["transformers"]
    source = (ROOT / "trl_blend/export/custom_generate/generate.py").read_text()
    assert f"TRANSFORMERS = ({', '.join(oldest.split('.')[:2])})" in source


# -------------------- wheel and resources


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="the development environment builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def packed_examples() -> set[str]:
    """What a user runs: scripts, their settings, launch configurations, the test-bed with its checkpoints."""
    patterns = ["*.py", "configs/*.yaml", "accelerate_configs/*.yaml", "testbed/*.py", "testbed/checkpoints/*/*"]
    found = {path for pattern in patterns for path in (ROOT / "examples").glob(pattern)}
    found.remove(ROOT / "examples/testbed/cards.py")  # writes into the repository
    assert len(found) > 40 and ROOT / "examples/testbed/checkpoints/teacher/model.safetensors" in found
    return {f"trl_blend/{path.relative_to(ROOT)}" for path in found}


def test_wheel_carries_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    cards = {f"trl_blend/model_cards/{path.name}" for path in (ROOT / "model_cards").glob("*.md")}
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "trl_blend").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert cards and "trl_blend/py.typed" in files
    assert packed == files | cards | packed_examples()


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        text = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    metadata = Parser().parsestr(text)
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"peft", "wandb", "vllm", "dev"} <= set(metadata.get_all("Provides-Extra"))
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_finds_its_own_templates(wheel, tmp_path):
    name = next((ROOT / "model_cards").glob("*.md")).name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"from trl_blend._resources import model_card_template\nprint(model_card_template({name!r}))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "trl_blend" / "model_cards" / name


def test_wheel_finds_its_own_examples(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from trl_blend import _resources\nfrom trl_blend.cli import training\n"
        "from trl_blend.scripts import settings\n"
        "print(_resources.examples_dir())\nprint(training.script_path('grpo-mix'))\n"
        "print(training.accelerate_config('cpu'))\n"
        "print(settings.read_script_config('grpo_mix_testbed')[0]['model_name_or_path'])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    examples = tmp_path / "trl_blend" / "examples"
    assert [Path(line) for line in done.stdout.split()] == [
        examples,
        examples / "grpo_mix.py",
        examples / "accelerate_configs" / "cpu.yaml",
        examples / "testbed" / "checkpoints" / "student",
    ]


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in SOURCES if path.name == "trainer.py"))
def test_every_trainer_has_a_card_template(folder):
    template = Path(model_card_template(f"{folder}.md"))
    assert template.is_absolute()
    assert template.read_text().startswith('[% extends "_card.md" %]')
    assert "{{ card_data }}" in (template.parent / "_card.md").read_text()


@pytest.mark.parametrize("name", ["missing.md", "../README.md", ""])
def test_unknown_template_lists_the_known_ones(name):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{name!r}") + r".*logit_mix_grpo\.md"):
        model_card_template(name)


# -------------------- accelerate_configs


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.name)
def test_accelerate_config_is_one_that_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    kind, processes = {
        "cpu": ("NO", 1),
        "fsdp2_cpu": ("FSDP", 2),
        "fsdp2": ("FSDP", 8),
        "multi_gpu": ("MULTI_GPU", 8),
    }.get(path.stem, ("DEEPSPEED", 8))
    assert (config.distributed_type.value, config.num_processes) == (kind, processes)
    assert config.use_cpu == path.stem.endswith("cpu")
    assert config.fsdp_config.get("fsdp_version", 2) == 2


def launch(config: str, script: str, tmp_path: Path) -> subprocess.CompletedProcess:
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    path = ROOT / "examples" / "accelerate_configs" / config
    return subprocess.run([*command, path, "script.py"], capture_output=True, text=True, timeout=300, cwd=tmp_path)


def test_one_cpu_process_starts_without_a_warning(tmp_path):
    script = (
        "from accelerate import Accelerator\na = Accelerator()\nprint(a.num_processes, a.device, a.use_distributed)\n"
    )
    done = launch("cpu.yaml", script, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 cpu False\n", "")

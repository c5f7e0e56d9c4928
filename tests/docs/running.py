"""Run what the pages show: Python as it stands, command lines by the program that would read them, in one process."""

import contextlib
import dataclasses
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

import trl_blend
from testbed.task import build_prompt_dataset, build_sft_dataset
from tests.docs.markdown import ROOT
from trl_blend.scripts.settings import parse_script


CHECKPOINTS = ROOT / "examples" / "testbed" / "checkpoints"
# What the pages call a model, and the checkpoint of the test-bed that stands in for it
MODELS = {
    "Qwen/Qwen2.5-0.5B-Instruct": "student",
    "Qwen/Qwen2.5-1.5B-Instruct": "teacher",
    "Qwen/Qwen3-1.7B-Base": "student",
    "Qwen/Qwen3-8B": "teacher",
    "my-org/my-sft-model": "teacher",
    "my-sft": "sft_student",
}
# A run of a page is cut to this; what a page sets itself is kept, and so is the rest of what it runs
SMALL_CONFIG = {
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 4,
    "max_completion_length": 8,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
}
CONFIGS = {
    "trl_blend": ("LogitMixGRPOConfig", "TrustRegionOPDConfig", "OfflineOPDConfig"),
    "trl": ("SFTConfig",),
}
# Of a script or a command, where it has the option and the page does not give it
SMALL_OPTIONS = {**SMALL_CONFIG, "max_steps": 1, "num_test_prompts": 2, "num_generations": 4}
# And where the page gives what the option is read with
READ_WITH = {"offline_opd": dict.fromkeys(("num_test_prompts", "max_completion_length"), "test_dataset_name")}
SMALL_CALLS = {
    "RolloutConfig": {"max_completion_length": 12, "dtype": "float32"},
    "ScoringConfig": {"dtype": "float32"},
}
SMALL_COMMAND = {
    "rollouts": ["--max_completion_length", "12", "--dtype", "float32", "--disable_tqdm"],
    "score": ["--dtype", "float32", "--disable_tqdm"],
}


def make_clone(folder: Path) -> None:
    """A working directory with what a clone of the repository holds, and nothing else."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in {Path(file).parts[0] for file in found}:
        (folder / name).symlink_to(ROOT / name)


def make_world(folder: Path) -> None:
    """A working directory in which every name of the pages exists."""
    for name, checkpoint in MODELS.items():
        shutil.copytree(CHECKPOINTS / checkpoint, folder / name)
    (folder / "examples").symlink_to(ROOT / "examples")
    rows = list(build_prompt_dataset("train", 48))
    _write(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows[:16]])
    _write(
        folder / "trl-lib/DeepMath-103K/train.jsonl",
        [{"prompt": row["prompt"], "solution": f"${row['answer']}$"} for row in rows],
    )
    build_sft_dataset("train", 16).to_json(folder / "my-org/my-teacher-samples/train.jsonl")
    _write(
        folder / "my-org/my-prompts/train.jsonl",
        [{"problem": row["prompt"][-1]["content"], "answer": str(row["answer"])} for row in rows],
    )


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@contextlib.contextmanager
def small_runs() -> Iterator[None]:
    """Configs made, and functions called, inside the context are cut to a few small steps on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        for module_name, names in CONFIGS.items():
            for name in names:
                config = getattr(importlib.import_module(module_name), name)
                fields = {field.name for field in dataclasses.fields(config)}
                cut = {setting: value for setting, value in SMALL_CONFIG.items() if setting in fields}
                patch.setattr(importlib.import_module(module_name), name, _with_defaults(config, cut))
        for name, cut in SMALL_CALLS.items():
            patch.setattr(trl_blend, name, _with_defaults(getattr(trl_blend, name), cut))
        yield


def _with_defaults(function: Callable[..., Any], defaults: dict[str, Any]) -> Callable[..., Any]:
    return lambda *args, **settings: function(*args, **{**defaults, **settings})


def run_python(code: str, name: str, variables: dict[str, Any], cut: bool = True) -> None:
    """Execute a block, cut as in [`small_runs`] or as it stands; `variables` go in and come out."""
    with small_runs() if cut else contextlib.nullcontext():
        exec(compile(code, name, "exec"), variables)


def command_lines(code: str) -> list[list[str]]:
    """The words of each command of a block, comments left out."""
    joined = re.sub(r"\\\n", " ", code)
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def run_command(words: list[str], execute: bool, cut: bool = True) -> None:
    """
    Have a command parsed by its own parser; then run it, in this process, where `execute`. Trainings are always cut,
    the commands that make data only where `cut`.
    """
    while "=" in words[0]:
        words = words[1:]
    runners = {"make": _make, "pip": _pip, "accelerate": _accelerate, "python": _python, "cp": _copy}
    runners["trl-blend"] = partial(_trl_blend, cut=cut)
    assert words[0] in runners, f"the tests cannot read `{words[0]}`; teach `tests/docs/running.py`"
    runners[words[0]](words[1:], execute)


# Commands that install, or take minutes, are compared with what there is and not run: targets of the Makefile, extras
# of the package, options of these scripts
ONLY_CHECKED = ("make", "pip", "examples/testbed/evaluate.py", "examples/testbed/train.py")


def _make(words: list[str], execute: bool) -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for word in words:
        assert word in targets, f"make {word}"


def _pip(words: list[str], execute: bool) -> None:
    assert words[0] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = re.search(r"\[([\w,]+)\]", words[-1])
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"]) if extras else True


def _copy(words: list[str], execute: bool) -> None:
    subprocess.run(["cp", *words], check=True)


def _python(words: list[str], execute: bool) -> None:
    script = ROOT / words[0]
    text = script.read_text(encoding="utf-8")
    for word in words[1:]:
        if word.startswith("--"):
            assert f'"{word}"' in text, f"{words[0]} has no option {word}"
    if execute and words[0] not in ONLY_CHECKED:
        subprocess.run([sys.executable, script, *words[1:]], check=True)


def _trl_blend(words: list[str], execute: bool, cut: bool) -> None:
    from trl_blend.cli import main, program, training

    name, arguments = words[0], words[1:]
    if name in training.COMMANDS:
        script_arguments, _, _ = training.check_arguments(name, arguments)
        run_script(importlib.import_module(training.script_path(name).stem), script_arguments, execute)
    elif execute:
        assert main([*words, *(SMALL_COMMAND.get(name, []) if cut else [])]) == 0, words
    else:
        command = program._build_parser()[1][name]
        command.parse_args([*program._from_config(arguments, command), *arguments])


def _accelerate(words: list[str], execute: bool) -> None:
    assert words[0] == "launch"
    launch = launch_command_parser().parse_args(words[1:])
    if launch.config_file:
        assert (ROOT / launch.config_file).is_file()
    module = importlib.import_module(Path(launch.training_script).stem)
    assert Path(module.__file__) == ROOT / launch.training_script
    run_script(module, launch.training_script_args, execute)


def run_script(module: Any, words: list[str], execute: bool) -> None:
    """Parse the arguments of an example script as it does, cut what is not given, and run it."""
    parser = module.make_parser()
    given = {word.removeprefix("--") for word in words if word.startswith("--")}
    read_with = READ_WITH.get(module.__name__.rsplit(".", 1)[-1], {})
    unread = {name for name, other in read_with.items() if other not in given}
    known = {action.dest for action in parser._actions} - unread
    cut = [
        word
        for name, value in SMALL_OPTIONS.items()
        if name in known and name not in given
        for word in (f"--{name}", str(value))
    ]
    parsed = parse_script(parser, [*words, *cut])
    if execute:
        module.main(*parsed)

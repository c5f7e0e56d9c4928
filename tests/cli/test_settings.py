"""Settings of a script: YAML against the command line, wrong types, misspelt keys, shipped files from anywhere."""

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from trl import TrlParser

from trl_blend import _resources
from trl_blend.cli import program
from trl_blend.errors import ConfigError
from trl_blend.scripts import checks, settings


ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Options:
    steps: int = 5
    rate: float = 1.0
    limit: int | None = 3
    name: str = "none"
    kind: Literal["a", "b", "no"] = "a"
    flag: bool = False
    switch: bool = True
    weights: list[float] = field(default_factory=lambda: [1.0])
    names: list[str] | None = None
    extra: dict[str, Any] | str | None = None

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"`steps={self.steps}` is negative.")


def parse(*arguments):
    return settings.parse_script(TrlParser((Options,), prog="script"), list(map(str, arguments)))[0]


@pytest.fixture
def config(tmp_path):
    def write(text):
        (tmp_path / "config.yaml").write_text(text)
        return tmp_path / "config.yaml"

    return write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: 7\nrate: 1e-3", {"steps": 7, "rate": 1e-3}),  # YAML 1.1 reads 1e-3 as a text
        ("rate: 2", {"rate": 2.0}),
        ("limit: null\nname: none", {"limit": None, "name": "none"}),
        ("kind: no", {"kind": "no"}),  # YAML 1.1 reads a boolean
        ("name: 5\nkind: b", {"name": "5", "kind": "b"}),
        ("flag: true\nswitch: no", {"flag": True, "switch": False}),
        ("no_switch: true", {"switch": False}),
        ("extra: [a, b]", {"extra": ["a", "b"]}),
        ("name: true", {"name": "true"}),
        ("weights: 0.5\nnames: one", {"weights": [0.5], "names": ["one"]}),  # not its letters
        ("weights: [1, 2e-1]\nnames: [one, 2]", {"weights": [1.0, 0.2], "names": ["one", "2"]}),
        ("extra: {a: [1, 2]}", {"extra": {"a": [1, 2]}}),
    ],
)
def test_values_of_a_file(config, text, expected):
    found = vars(parse("--config", config(text)))
    assert found == vars(Options()) | expected
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in (vars(Options()) | expected).items()
    }


def test_the_command_line_wins_and_takes_both_forms(config, monkeypatch):
    monkeypatch.setenv("TRL_BLEND_TEST", "")
    file = config("steps: 7\nrate: 2\nenv: {TRL_BLEND_TEST: x}")
    assert vars(parse(f"--config={file}", "--steps", 8, "--names", "a", "b")) == vars(Options()) | {
        "steps": 8,
        "rate": 2.0,
        "names": ["a", "b"],
    }
    assert os.environ["TRL_BLEND_TEST"] == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step: 3", "unknown key `step`; did you mean `steps`?"),
        ("num_proceses: 3", "unknown key `num_proceses`; did you mean `num_processes`?"),
        ("xyzzy: 3", "unknown key `xyzzy`."),
        ("env: 3", "`env` has to hold `VARIABLE: value` lines, not 3."),
        ("- 3", "has to hold `option: value` lines."),
        ("3: 4", "has to hold `option: value` lines."),
        ("", "has to hold `option: value` lines."),
        ("a: b: c", "is not YAML: mapping values are not allowed here"),
        ("num_processes: 2", "`num_processes: 2`, but 1 are running. Give `accelerate launch` `--num_processes 2`"),
    ],
)
def test_what_is_wrong_in_a_file(config, monkeypatch, text, message):
    monkeypatch.delenv("TRL_BLEND_COMMAND", raising=False)
    file = config(text)
    with pytest.raises(ConfigError) as caught:
        parse("--config", file)
    assert str(caught.value).startswith(f"`--config {file}`") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_number_of_processes_is_left_to_the_program(config, monkeypatch):
    monkeypatch.setenv("TRL_BLEND_COMMAND", "trl-blend grpo-mix")
    assert parse("--config", config("num_processes: 2\naccelerate_config: cpu")) == Options()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: few", "--steps: invalid int value: 'few'"),
        ("steps: 1.5", "--steps: invalid int value: '1.5'"),
        ("steps: true", "--steps: invalid int value: 'true'"),
        ("limit: [1]", "--limit: invalid int value: '[1]'"),
        ("rate: {a: 1}", "--rate: invalid float value: '{\"a\": 1}'"),
        ("flag: perhaps", "--flag: Truthy value expected: got perhaps"),
        ("kind: c", "--kind: invalid choice: 'c'"),
        ("weights: [1, x]", "--weights: invalid float value: 'x'"),
    ],
)
def test_values_of_a_wrong_type_are_found_as_on_the_command_line(config, text, message):
    with pytest.raises(ConfigError) as caught:
        parse("--config", config(text))
    assert str(caught.value).startswith(f"argument {message}") and "(see `script --help`)" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "3"], "unknown option `--step`; did you mean `--steps`? (see `script --help`)"),
        (["--steps", "few"], "argument --steps: invalid int value: 'few' (see `script --help`)"),
        (["--kind", "c"], "argument --kind: invalid choice: 'c'"),
        (["--num_processes", "2"], "unknown option `--num_processes`"),
        (["3"], "unexpected argument `3`"),
    ],
)
def test_what_is_wrong_on_the_command_line(arguments, message):
    with pytest.raises(ConfigError) as caught:
        parse(*arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"number": 0, "rate": 0.0, "text": "0"}, ["--number=0", "--rate=0.0", "--text=0"]),
        ({"number": None, "text": ""}, ["--text="]),
        ({"rates": [0, 0.5]}, ["--rates", "0", "0.5"]),
        ({"rates": 0.5}, ["--rates=0.5"]),
        ({"text": False, "mode": False}, ["--text=false", "--mode=no"]),
        ({"text": True, "number": [1]}, ["--text=true", "--number=[1]"]),
        ({"text": {"a": [True]}}, ['--text={"a": [true]}']),
        ({"quiet": True, "copy": True}, ["--quiet", "--copy"]),
        ({"quiet": False, "copy": False}, ["--no_copy"]),
        ({"no_copy": True}, ["--no_copy"]),
        ({"no_copy": False}, []),
    ],
)
def test_a_file_as_options(values, expected):
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--text")
    parser.add_argument("--mode", choices=("no", "yes"))
    for switch in ("--quiet", "--copy", "--no_copy"):
        parser.add_argument(switch, action="store_true")
    assert settings.as_options(parser, values, "file") == expected


def test_shipped_settings_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values, _ = settings.read_script_config("grpo_mix_testbed")
    checkpoints = ROOT / "examples" / "testbed" / "checkpoints"
    assert values["model_name_or_path"] == str(checkpoints / "student")
    assert values["teacher_model_name_or_path"] == [str(checkpoints / "teacher")]
    assert values["output_dir"] == "outputs/grpo_mix_testbed"
    # A user's own file says what it says
    (tmp_path / "own.yaml").write_text("model_name_or_path: examples/testbed/checkpoints/student")
    assert settings.read_script_config("own.yaml")[0]["model_name_or_path"] == "examples/testbed/checkpoints/student"


@pytest.mark.parametrize("name", sorted(_resources.shipped_yaml("configs")))
def test_every_shipped_file_passes_the_checks(name):
    import grpo_mix
    import offline_opd
    import trust_region_opd

    if name.startswith("serve"):
        export = program._build_parser()[1]["export"]
        export.parse_args(program._from_config(["--config", str(_resources.shipped_yaml("configs")[name])], export))
        return
    modules = {"grpo": grpo_mix, "offline": offline_opd}
    parser = modules.get(name.split("_")[0], trust_region_opd).make_parser()
    values, _ = settings.read_script_config(name)
    arguments, others = settings.apply_config(parser, values, name)
    assert others == {} and parser.parse_known_args(arguments)[1] == []


@pytest.mark.parametrize(
    ("given", "hint"),
    [("grpo_mix_testbedd", "; did you mean `grpo_mix_testbed`?"), ("nowhere.yaml", ".")],
)
def test_a_settings_file_that_does_not_exist(given, hint):
    with pytest.raises(ConfigError) as caught:
        settings.read_script_config(given)
    assert str(caught.value) == f"`--config {given}`: there is no such file{hint}"


@pytest.mark.parametrize("name", ["num_test_prompts", "lora_r", "lora_alpha", "lora_dropout"])
def test_a_number_without_a_value(name):
    with pytest.raises(ConfigError, match=f"`--{name}` has no value. Give it a number, or leave it out"):
        checks.check_ranges({name: None})

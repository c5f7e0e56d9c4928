"""Options that are read from sources: the same as those of the parsers, in a help that a person can read, and fast."""

import ast
import dataclasses
import importlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import trl_blend
from trl_blend import cli
from trl_blend.cli import options, teacher_data, training
from trl_blend.scripts import settings
from trl_blend.scripts.messages import option_names


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    "grpo-mix": trl_blend.LogitMixGRPOConfig,
    "trust-region-opd": trl_blend.TrustRegionOPDConfig,
    "offline-opd": trl_blend.OfflineOPDConfig,
}
each_command = pytest.mark.parametrize("name", training.COMMANDS)


@each_command
def test_names_helps_choices_and_defaults_are_those_of_the_parser(name):
    parser = training.make_parser(name)
    fields = options.read_options(training.COMMANDS[name].dataclasses)
    assert options.spellings(fields) == option_names(parser)
    actions = {action.dest: action for action in reversed(parser._actions)}  # the last of a name is its `--no_` form
    assert fields.keys() == actions.keys() - {"help"}
    for field, option in fields.items():
        action = actions[field]
        if not option.group and field not in options.COMMON:  # it is not shown
            continue
        assert option.help == " ".join(action.help.split())
        if option.choices and action.choices:
            assert list(option.choices) == list(action.choices)
        try:
            default = ast.literal_eval(option.default or "None")
        except ValueError:  # another name, such as that of an `Enum`
            continue
        assert default == action.default or option.default is None


@each_command
def test_a_script_has_the_parser_of_its_command(name):
    module = importlib.import_module(training.script_path(name).stem)
    assert option_names(module.make_parser()) == option_names(training.make_parser(name))


@pytest.mark.parametrize("name", teacher_data.COMMANDS)
def test_names_of_data_commands_are_those_of_the_parser(name):
    dataclass, *_ = teacher_data.COMMANDS[name]
    fields = options.read_options([dataclass])
    assert options.spellings(fields) == option_names(settings.make_parser([dataclass]))


def test_names_of_accelerate():
    assert options.launch_spellings() | {settings.ACCELERATE_CONFIG} == settings.launch_names()


@each_command
def test_help_has_our_options_by_group_and_what_most_runs_set(name, capsys):
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    config = CONFIGS[name]
    own = {field.name for field in dataclasses.fields(config)} - {
        field.name
        for base in config.__mro__[1:]
        if dataclasses.is_dataclass(base)
        for field in dataclasses.fields(base)
    }
    script = {"reward_funcs", "num_test_prompts"}
    common = {"model_name_or_path", "dataset_name", "output_dir", "learning_rate", "max_steps", "use_peft"}
    for field in own | script | common:
        assert f"\n  --{field} " in shown
    headings = [line.strip(" >") for line in config.__doc__.splitlines() if "> Parameters that" in line]
    assert headings and all(f"\n{heading}:\n" in shown for heading in headings)
    assert "--adam_epsilon" not in shown and "--num_processes N" in shown and len(shown.splitlines()) < 280


def test_the_whole_help(capsys):
    assert cli.main(["offline-opd", "--help-all"]) == 0
    shown = capsys.readouterr().out
    assert "--adam_epsilon" in shown and "--sft_teacher" in shown and "--num_processes N" in shown


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["trust-region-opd", "--help"], 0, "--kl_budget FLOAT"),
        (["grpo-mix", "--temprature", "1"], 2, "unknown option `--temprature`; did you mean `--temperature`? (see"),
        (["grpo-mix", "--config", "{}"], 2, "unknown key `num_proceses`; did you mean `num_processes`?"),
        (["grpo-mix"], 2, "`--reward_funcs` (what is trained on) are missing"),
    ],
)
def test_an_answer_takes_less_than_two_seconds(tmp_path, arguments, status, said):
    (tmp_path / "run.yaml").write_text("output_dir: out\nnum_proceses: 2")
    command = [sys.executable, "-m", "trl_blend", *(text.format(tmp_path / "run.yaml") for text in arguments)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == status and said in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == (status == 2)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_spellings_that_the_parsers_know_are_not_called_misspelt(monkeypatch):
    seen = []
    monkeypatch.setattr("trl_blend.cli.launching.launch", lambda *given: seen.append(given) or 0)
    monkeypatch.setenv("TRL_BLEND_COMMAND", "")  # put back afterwards
    arguments = ["--output-dir", "out", "--use_cpu", "--bf16=false", "--no-gradient-checkpointing", "--use-peft"]
    arguments += [
        "--model-name-or-path",
        "student",
        "--dataset-name=prompts.jsonl",
        "--reward-funcs",
        "accuracy_reward",
    ]
    assert cli.main(["grpo-mix", *arguments, "--num-processes", "1"]) == 0
    ((_, launch_arguments, script_arguments, wants_cpu),) = seen
    assert (script_arguments, launch_arguments, wants_cpu) == (arguments, ["--num-processes", "1"], True)


def test_what_cannot_be_read_is_left_to_the_parser(monkeypatch, capsys):
    def fail(names):
        raise LookupError(names)

    monkeypatch.setattr(options, "read_options", fail)
    assert cli.main(["offline-opd", "--sft_techer", "x"]) == 2
    assert "unknown option `--sft_techer`; did you mean `--sft_teacher`?" in capsys.readouterr().err

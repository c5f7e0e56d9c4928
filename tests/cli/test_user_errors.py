"""
Nothing that a user gets wrong ends in a traceback: one line, exit code 2, before training begins. The inputs are those
of `wrong_inputs.py`; scripts run in this process, as accelerate would run them.
"""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from accelerate.commands import launch as accelerate_launch

from tests.cli import wrong_inputs as wrong
from trl_blend import cli, collect_rollouts, score_rollouts
from trl_blend.errors import TrlBlendError
from trl_blend.scripts import running


CHECKPOINTS = Path(__file__).resolve().parents[2] / "examples" / "testbed" / "checkpoints"
TRAIN = (
    "--use_cpu --bf16 false --report_to none --max_steps 1 --per_device_train_batch_size 4 --save_strategy no "
    "--model_name_or_path ~/student"
)
PROMPTS = "--dataset_name @/good.jsonl --prompt_column question --max_completion_length 8"
ON_POLICY = (
    f"{TRAIN} {PROMPTS} --teacher_model_name_or_path ~/teacher --num_test_prompts 0 "
    "--reward_funcs testbed.task.format_reward"
)
# Of every command a run that works
RUNS = {
    "grpo-mix": f"{ON_POLICY} --num_generations 2",
    "trust-region-opd": ON_POLICY,
    "offline-opd": f"{TRAIN} --dataset_name @/scored".replace("~/student", "~/sft_student"),
    "rollouts": f"--disable_tqdm true --model_name_or_path ~/sft_student {PROMPTS}",
    "score": "--disable_tqdm true --teacher_model_name_or_path ~/teacher --rollouts @/rollouts --top_k 4",
}
_PROMPTS = [(given.format("--dataset_name"), said) for given, said in wrong.PROMPTS]
_TABLE = [
    (f"{given.format('--test_dataset_name')} --prompt_column question --reward_funcs testbed.task.format_reward", said)
    for given, said in wrong.PROMPTS
    if given.split("/")[-1] in ("nowhere.jsonl", "null.jsonl", "long.jsonl", "header.csv")
]
INPUTS = {
    "grpo-mix": [*_PROMPTS, *wrong.SHARED, *wrong.TRAINING, *wrong.ON_POLICY, *wrong.GRPO_MIX],
    "trust-region-opd": [_PROMPTS[0], *wrong.TRAINING, *wrong.ON_POLICY, *wrong.TRUST_REGION_OPD],
    "offline-opd": [*_TABLE, *wrong.TRAINING, *wrong.OFFLINE_OPD],
    "rollouts": [*_PROMPTS, *wrong.DATA_COMMANDS, *wrong.ROLLOUTS],
    "score": [*wrong.DATA_COMMANDS, *wrong.SCORE],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, content in wrong.FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for command, output in (("rollouts", "rollouts"), ("score", "scored")):
        assert cli.main(words(command, f"--output_dir @/{output}", folder)) == 0
    for name in ("torn", "newer", "nameless", "emptied"):
        shutil.copytree(folder / "rollouts", folder / name)
    (folder / "nameless" / "manifest.json").unlink()
    (folder / "emptied" / "manifest.json").write_text("")
    shard = next((folder / "torn" / "data").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:40])
    manifest = folder / "newer" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema_version": 99}))
    return folder


def words(command, given, folder):
    line = f"{command} {RUNS[command]} {given}"
    return [word.replace("@/", f"{folder}/").replace("~/", f"{CHECKPOINTS}/") for word in line.split()]


@pytest.fixture
def in_process(monkeypatch):
    """What accelerate would start, run here; where training would begin, the script is left with `SystemExit`."""

    def launch(options):
        module = importlib.import_module(Path(options.training_script).stem)
        monkeypatch.setattr(module, "train_and_score", lambda *_: sys.exit("training began"))
        monkeypatch.setattr(sys, "argv", [options.training_script, *options.training_script_args])
        running.run(module.main, module.make_parser)

    monkeypatch.setattr(accelerate_launch, "launch_command", launch)
    for name in ("TRL_BLEND_COMMAND", "TRL_BLEND_NUM_PROCESSES", "ACCELERATE_USE_CPU", "PET_SHUTDOWN_TIMEOUT"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)


def run(command, given, folder, output):
    """The exit code of a command."""
    try:
        return cli.main(words(command, f"--output_dir {output} {given}", folder))
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize("command", RUNS)
def test_the_run_that_they_change_works(command, files, tmp_path, in_process):
    assert run(command, "", files, tmp_path / "out") in (0, "training began")


@pytest.mark.parametrize(
    ("command", "given", "said"),
    [pytest.param(name, *row, id=f"{name} {row[0]}") for name, inputs in INPUTS.items() for row in inputs],
)
def test_one_line_says_what_to_change(command, given, said, files, tmp_path, in_process, capsys):
    status = run(command, given, files, tmp_path / "out")
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("trl-blend: error: ")]
    assert status == 2 and len(lines) == 1, (status, printed.err[-2000:])
    assert "Traceback" not in printed.err and re.search(said, lines[0]), lines[0]


@pytest.mark.parametrize(
    ("function", "given", "said"), [pytest.param(*row, id=f"{row[0]} {row[1]}") for row in wrong.CALLS]
)
def test_the_functions_behind_the_commands_raise_errors_of_this_package(function, given, said, files, tmp_path):
    settings = {"output_dir": str(tmp_path / "out"), "disable_tqdm": True} | given
    args = [settings.pop("output_dir")]
    with pytest.raises(TrlBlendError, match=said):
        if function == "collect":
            model, prompts = settings.pop("model", str(CHECKPOINTS / "student")), settings.pop("prompts", ["1+1=?"])
            collect_rollouts(model, prompts, *args, **settings)
        else:
            rollouts = settings.pop("rollouts", str(files / "rollouts"))
            score_rollouts(rollouts, settings.pop("teacher", str(CHECKPOINTS / "teacher")), *args, **settings)

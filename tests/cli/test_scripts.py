"""What the example scripts refuse in one line before a model is loaded: rewards, splits, checkpoints."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoConfig

import grpo_mix
from trl_blend.errors import ConfigError
from trl_blend.rollouts import prompts
from trl_blend.scripts import data, rewards, running, scoring, training


NAMED = ["--model_name_or_path", "student", "--teacher_model_name_or_path", "teacher", "--reward_funcs", "a.reward"]
NAMED += ["--dataset_name", "testbed"]


def parse(monkeypatch, *arguments):
    given = ["--use_cpu", "true", "--bf16", "false", *NAMED, *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", ["grpo_mix.py", *given])
    monkeypatch.delenv("TRL_BLEND_NUM_PROCESSES", raising=False)
    return running._parse(grpo_mix.make_parser())


@pytest.mark.parametrize("given", [["--hub_token", "hf_secret"], ["--hub-token=hf_secret"]])
def test_a_token_is_used_and_then_gone_from_the_arguments(tmp_path, monkeypatch, given):
    _, training_args, *_ = parse(monkeypatch, "--output_dir", tmp_path, *given, "--seed", 3)
    assert (training_args.hub_token == "hf_secret", training_args.seed) == (True, 3)
    wandb = pytest.importorskip("wandb")
    assert not any("secret" in argument for argument in [*sys.argv, *wandb.Settings()._args])
    assert sys.argv[-2:] == ["--seed", "3"] and any("TOKEN" in argument for argument in sys.argv)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.reward", "no module 'nowhere' on the import path"),
        ("testbed.tusk.reward", "no module 'testbed.tusk' on the import path"),
        ("rewards.boxed_accuracy", "rewards has no function 'boxed_accuracy'; did you mean `boxed_accuracy_reward`"),
    ],
)
def test_rewards_that_do_not_exist(name, message):
    with pytest.raises(ConfigError, match=message):
        rewards.load_reward(name)


def test_a_reward_whose_module_is_broken_keeps_its_error(tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        rewards.load_reward("broken_reward.reward")


def test_a_split_that_does_not_exist(tmp_path, monkeypatch):
    rows = Dataset.from_dict({"prompt": ["1+1="] * 4})
    monkeypatch.setattr(prompts, "load_dataset", lambda *args, **kwargs: DatasetDict(training=rows))
    parsed = parse(monkeypatch, "--output_dir", tmp_path, "--dataset_name", "some/prompts")
    with pytest.raises(ConfigError, match="`dataset_train_split=train` is no split of the dataset. It has training."):
        data.load_prompts(*parsed)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("true", "`resume_from_checkpoint=true`: there is no checkpoint in "),
        ("checkpoint-3", "`resume_from_checkpoint=checkpoint-3` is no folder with a trainer_state.json"),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_what_is_no_checkpoint(tmp_path, monkeypatch, given, message, exists):
    output = tmp_path / "out"
    if exists:
        output.mkdir()
    with pytest.raises(ConfigError, match=message):
        parse(monkeypatch, "--output_dir", output, "--resume_from_checkpoint", given)


def test_checkpoints_that_can_be_resumed_from(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").touch()
    for given in ("true", str(checkpoint)):
        _, args, *_ = parse(monkeypatch, "--output_dir", tmp_path, "--resume_from_checkpoint", given)
        assert args.resume_from_checkpoint == given


def test_an_error_of_a_configuration_is_one_of_the_user(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="must be divisible|not divisible"):
        parse(monkeypatch, "--output_dir", tmp_path, "--per_device_train_batch_size", 3, "--num_generations", 2)


@pytest.mark.parametrize(
    ("began", "error", "raised"),
    [
        (False, FileNotFoundError("no such file: nowhere"), SystemExit),
        (True, FileNotFoundError("no such file: nowhere"), FileNotFoundError),
        (True, ConfigError("no such file: nowhere"), SystemExit),
    ],
)
def test_an_error_of_the_system_is_the_users_until_training_begins(
    tmp_path, monkeypatch, capsys, began, error, raised
):
    def main(*arguments):
        def train(resume_from_checkpoint):
            raise error

        if began:
            args = SimpleNamespace(resume_from_checkpoint=None)
            trainer = SimpleNamespace(args=args, accelerator=None, add_callback=lambda callback: None, train=train)
            training.train_and_score(trainer, score=dict)
        raise error

    given = ["--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path / "out"), *NAMED]
    monkeypatch.setattr(sys, "argv", ["grpo_mix.py", *given])
    monkeypatch.delenv("TRL_BLEND_NUM_PROCESSES", raising=False)
    running.training_begins()  # in an earlier run of this process
    with pytest.raises(raised) as caught:
        running.run(main, grpo_mix.make_parser)
    told = "" if raised is FileNotFoundError else "trl-blend: error: no such file: nowhere\n"
    assert capsys.readouterr().err == told
    assert raised is FileNotFoundError or caught.value.code == 2


@pytest.mark.parametrize("library", [True, False])
def test_what_a_library_refuses_before_training_is_one_line_and_a_mistake_of_ours_is_not(
    tmp_path, monkeypatch, capsys, library
):
    def main(*arguments):
        if library:
            AutoConfig.for_model("nothing")  # any error that is raised inside of a package will do
        raise TypeError("ours")

    monkeypatch.setattr(
        sys, "argv", ["grpo_mix.py", "--use_cpu", "--bf16=false", *NAMED, f"--output_dir={tmp_path}/out"]
    )
    monkeypatch.delenv("TRL_BLEND_NUM_PROCESSES", raising=False)
    with pytest.raises(SystemExit if library else TypeError):
        running.run(main, grpo_mix.make_parser)
    assert capsys.readouterr().err.startswith("trl-blend: error: ") == library


def test_a_folder_that_is_used_again_is_told_of(tmp_path, monkeypatch, capsys):
    parse(monkeypatch, "--output_dir", tmp_path)
    assert capsys.readouterr().err == ""
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").touch()
    parse(monkeypatch, "--output_dir", tmp_path)
    told = capsys.readouterr().err
    assert f"note: {tmp_path} is not empty. This run starts anew and overwrites what is there" in told
    assert f"`--resume_from_checkpoint {tmp_path}/checkpoint-3` would go on from the last" in told
    parse(monkeypatch, "--output_dir", tmp_path, "--resume_from_checkpoint", "true")
    assert "not empty" not in capsys.readouterr().err


def test_a_reward_that_never_gives_a_number_is_refused():
    with pytest.raises(
        ConfigError, match="Reward 1 of `reward_funcs` gave no number for any of the 2 .*answer_column"
    ):
        scoring.means_and_errors(torch.tensor([[1.0, math.nan], [0.0, math.nan]]))


def test_a_bar_is_shown_while_a_policy_is_scored(capsys):
    state = SimpleNamespace(is_main_process=True)
    trainer = SimpleNamespace(accelerator=state, args=SimpleNamespace(disable_tqdm=False))
    assert list(scoring.scoring_bar(trainer, "student")(range(3))) == [0, 1, 2]
    assert "scoring: student" in capsys.readouterr().err
    trainer.args.disable_tqdm = True
    assert list(scoring.scoring_bar(trainer, "student")(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""

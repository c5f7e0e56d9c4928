"""What the example scripts refuse in one line before a model is loaded: rewards, splits, checkpoints."""

import sys
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict

import grpo_mix
from trl_blend.errors import ConfigError
from trl_blend.scripts import data, rewards, running, training


def parse(monkeypatch, *arguments):
    given = ["--use_cpu", "true", "--bf16", "false", *map(str, arguments)]
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
        ("rewards.boxed_accuracy", "rewards has no 'boxed_accuracy': accuracy_reward, boxed_format_reward, boxed_acc"),
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
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: DatasetDict(training=rows))
    script_args, *_, dataset_args = parse(monkeypatch, "--output_dir", tmp_path, "--dataset_name", "some/prompts")
    with pytest.raises(ConfigError, match="`dataset_train_split=train` is no split of the dataset. It has training."):
        data.load_prompts(script_args, dataset_args)


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

    given = ["--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["grpo_mix.py", *given])
    monkeypatch.delenv("TRL_BLEND_NUM_PROCESSES", raising=False)
    running.training_begins()  # in an earlier run of this process
    with pytest.raises(raised) as caught:
        running.run(main, grpo_mix.make_parser)
    told = "" if raised is FileNotFoundError else "trl-blend: error: no such file: nowhere\n"
    assert capsys.readouterr().err == told
    assert raised is FileNotFoundError or caught.value.code == 2

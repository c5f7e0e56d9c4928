"""What every run is told at its start, and that none ends without a step: refusals, the opening line, the record."""

import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DistillationTrainer, GRPOTrainer, SFTTrainer

from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import runs
from tests.trainers.card_reading import run_of, settings_of
from trl_blend.errors import ConfigError
from trl_blend.trainers._record import RECORD_FILE


PARENTS = {"grpo": GRPOTrainer, "opd": DistillationTrainer, "offline": SFTTrainer}
PROMPTED = ("grpo", "opd")


@pytest.fixture
def refuses(make, monkeypatch):
    """`refuses(kind, match, **settings)`: before a model is loaded."""

    def check(kind, match, **settings):
        build = lambda **settings: make(kind, **settings)  # noqa: E731
        return runs.check_refusal(build, PARENTS[kind], monkeypatch, ConfigError, match, **settings)

    return check


def stream(num_rows):
    return IterableDataset.from_generator(lambda: ({"prompt": runs.PROMPTS[row]} for row in range(num_rows)))


# -------------------- not one step


@pytest.mark.parametrize(
    ("kind", "settings", "numbers"),
    [
        (
            "grpo",
            {"per_device_train_batch_size": 16, "train_dataset": runs.dataset(("1", "2"))},
            ("2 rows", "takes 4"),
        ),
        ("grpo", {"steps_per_generation": 5, "max_steps": -1}, ("8 rows", "takes 10")),
        ("opd", {"train_dataset": runs.dataset(("1", "2"))}, ("2 rows", "takes 8")),
        ("opd", {"gradient_accumulation_steps": 4, "num_rollouts_per_prompt": 2}, ("8 rows", "takes 16")),
    ],
)
def test_fewer_rows_than_one_generation_batch(refuses, kind, settings, numbers):
    message = refuses(kind, "not one step", **settings)
    assert all(number in message for number in numbers)


def test_a_batch_that_is_dropped(refuses, make, rows):
    few = {"train_dataset": rows.select(range(3)), "dataloader_drop_last": True}
    message = refuses("offline", "`dataloader_drop_last=True`", **few)
    assert "3 rows" in message and "takes 8" in message
    assert make("offline", **{**few, "per_device_train_batch_size": 3}).train().global_step == 1
    trainer = make("offline", train_dataset=rows.select(range(3)))
    assert trainer.train().global_step == 1  # an incomplete batch is one


@pytest.mark.parametrize("kind", PARENTS)
def test_no_rows(refuses, rows, kind):
    nothing = {"offline": rows.select([])}.get(kind, runs.dataset(()))
    for settings in ({"train_dataset": nothing}, {"trainer_kwargs": {"eval_dataset": nothing}}):
        assert "has no rows (0)" in refuses(kind, "no rows", **settings) or kind in PROMPTED
    refuses(kind, r"`eval_dataset\['odd'\]`", trainer_kwargs={"eval_dataset": {"odd": nothing}})


@pytest.mark.parametrize("kind", PROMPTED)
def test_data_that_are_no_rows_of_prompts(refuses, kind):
    refuses(kind, "dictionary of train, test", train_dataset=DatasetDict(train=runs.dataset(), test=runs.dataset()))
    refuses(kind, "Set `max_steps`", train_dataset=stream(8), max_steps=-1)
    refuses(kind, "`eval_strategy='steps'` without `eval_dataset`", eval_strategy="steps", eval_steps=1)
    message = refuses(kind, "no column `prompt`", train_dataset=runs.dataset().rename_column("prompt", "question"))
    assert message.startswith("`train_dataset`") and "question" in message
    for bad in (None, "", "  ", ["text"], [{"content": "no role"}], []):
        prompts = [bad] * 8 if not isinstance(bad, str | None) else [*runs.PROMPTS[:7], bad]
        row = 7 if len(set(map(str, prompts))) > 1 else 0
        refuses(kind, f"Row {row} of `train_dataset`", train_dataset=Dataset.from_dict({"prompt": prompts}))
    refuses(kind, "Row 0 of `train_dataset` is 1,", train_dataset=Dataset.from_dict({"prompt": [1] * 8}))
    test = Dataset.from_dict({"prompt": ["1", None]})
    refuses(kind, "Row 1 of `eval_dataset`", trainer_kwargs={"eval_dataset": test})


@pytest.mark.parametrize("kind", PROMPTED)
def test_a_stream_that_ends_before_the_first_step(make, kind):
    """How many rows it has is known when they are read: before a checkpoint of the untrained model is written."""
    settings = {"per_device_train_batch_size": 16, "max_steps": 3, "save_strategy": "epoch"}
    trainer = make(kind, train_dataset=stream(2), **settings)
    with pytest.raises(ConfigError, match=r"after 0 of 3 steps.*fewer rows than one batch takes"):
        trainer.train()
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert make(kind, train_dataset=stream(8), max_steps=1).train().global_step == 1


@pytest.mark.parametrize("kind", PARENTS)
def test_a_run_that_is_over_already(make, kind):
    first = make(kind, save_strategy="steps", save_steps=1)
    first.train()
    checkpoint = f"{first.args.output_dir}/checkpoint-1"
    with pytest.raises(ConfigError, match="The checkpoint is of step 1, and the run has 1 steps"):
        make(kind).train(resume_from_checkpoint=checkpoint)
    assert make(kind, max_steps=2).train(resume_from_checkpoint=checkpoint).global_step == 2


# -------------------- the line at the start


LINES = [
    (
        "grpo",
        {"teacher_weight": 0.3, "trainer_kwargs": {"eval_dataset": runs.dataset(("1", "2"))}},
        "LogitMixGRPO: student student; teacher teacher; 8 training rows; 2 held out; reward reward; objective mixed, "
        "teacher weight 0.3; deployed is the mixture of student and teacher.",
    ),
    (
        "grpo",
        {"teacher": None, "teacher_weight": 0.0},
        "LogitMixGRPO: student student; teacher none (`teacher_weight=0`); 8 training rows; none held out; reward "
        "reward; objective of GRPO; deployed is the student alone.",
    ),
    (
        "opd",
        {"kl_budget": 0.05, "blend_warmup_steps": 3, "trainer_kwargs": {"reward_funcs": runs.reward}},
        "TrustRegionOPD: student student; teacher teacher; 8 training rows; none held out; reward reward (measured "
        "only); policy trust_region with a KL budget of 0.05 nats, linear, for 3 steps; deployed is the "
        "student alone.",
    ),
    (
        "offline",
        {"offline_loss": "sampled_token"},
        "OfflineOPD: student student; teacher not recorded with the rollouts; 8 training rows; none held out; no "
        "reward; loss sampled_token; deployed is the student alone.",
    ),
]


@pytest.mark.parametrize(("kind", "settings", "line"), LINES)
def test_a_run_starts_with_a_line_that_says_what_it_is(make, capsys, kind, settings, line):
    make(kind, **settings).train()
    assert capsys.readouterr().out.splitlines()[0] == line


def test_what_a_script_holds_out_is_said(make, capsys):
    trainer = make("opd")
    trainer.num_held_out = 1234
    trainer.train()
    assert "; 1,234 held out;" in capsys.readouterr().out


# -------------------- the log is JSON


class LogsNothing(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._metrics["train"]["odd"].append(float("nan"))
        self.trainer._metrics["train"]["endless"].append(float("inf"))


@pytest.mark.parametrize("kind", PARENTS)
def test_a_number_that_is_none_is_null_in_the_files(make, kind):
    trainer = make(kind, save_strategy="steps", save_steps=1)
    trainer.add_callback(LogsNothing(trainer))
    trainer.train()

    def refuse(word):
        raise AssertionError(word)

    (path,) = Path(trainer.args.output_dir).glob("checkpoint-1/trainer_state.json")
    log = json.loads(path.read_text(), parse_constant=refuse)["log_history"]
    assert log[0]["odd"] is None and log[0]["endless"] is None and isinstance(log[0]["loss"], float)


# -------------------- a run that goes on


def card_of(trainer):
    return Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8")


SAVED = {"save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    ("kind", "option"), [("grpo", {"teacher_weight": [0.25]}), ("opd", {"canonicalize_eos": False})]
)
def test_a_resumed_run_says_what_has_changed_and_its_card_credits_the_steps(make, caplog, kind, option):
    first = make(kind, **SAVED)
    first.train()
    checkpoint = f"{first.args.output_dir}/checkpoint-1"
    other = {"teacher": "second", "learning_rate": 1e-4, "temperature": 0.9, **option, **SAVED, "max_steps": 2}
    resumed = make(kind, train_dataset=runs.dataset(runs.PROMPTS[::-1]), **other)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=checkpoint)
    (message,) = [text for text in caplog.messages if "Resuming with other settings" in text]
    for text in ("`teacher=teacher (weights ", "`teacher=second (weights ", "`data=8 rows", "`temperature=1.0`"):
        assert text in message, text
    for name, value in option.items():
        assert f"now `{name}={value}`" in message
    assert "`learning_rate=0.0001` (the checkpoint's optimizer keeps the former)" in message
    assert resumed.state.log_history[-2]["learning_rate"] == 5e-3  # transformers restores it
    card = card_of(resumed)
    credited = run_of(card)["steps 1 to 1"]
    assert "teacher teacher (weights" in credited and "temperature 1.0, later 0.9" in credited
    assert "learning_rate 0.005, which the optimizer keeps (0.0001 was given)" in credited
    assert settings_of(card)["learning rate"][0] == "0.005"
    # The record goes on with the run
    third = make(kind, **{**other, "max_steps": 3}, train_dataset=runs.dataset(runs.PROMPTS[::-1]))
    third.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    assert run_of(card_of(third))["steps 1 to 1"] == credited and "steps 2 to 2" not in run_of(card_of(third))
    # What the optimizer keeps is what the next run is compared with, whatever was given in between
    back = make(
        kind, **{**other, "learning_rate": 5e-3, "max_steps": 3}, train_dataset=runs.dataset(runs.PROMPTS[::-1])
    )
    back.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    assert "steps 2 to 2" not in run_of(card_of(back))


@pytest.mark.parametrize("kind", PARENTS)
def test_a_run_that_goes_on_as_it_was_says_nothing(make, caplog, kind):
    first = make(kind, **SAVED)
    first.train()
    with caplog.at_level(logging.WARNING):
        resumed = make(kind, **{**SAVED, "max_steps": 2})
        resumed.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-1")
    assert "Resuming with" not in caplog.text and "steps 1 to 1" not in run_of(card_of(resumed))
    record = json.loads(Path(first.args.output_dir, "checkpoint-1", RECORD_FILE).read_text())
    assert str(Path(first.args.output_dir).parent) not in json.dumps(record)  # a checkpoint may be pushed


def test_other_rewards_and_other_scores_are_named(make, caplog, rows):
    def length(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    for kind, other, text in (
        ("grpo", {"reward_funcs": length}, "`reward=reward`, now `reward=length`"),
        ("offline", {"train_dataset": rows.select(range(4))}, "`data=8 rows"),
        ("offline", {"importance_correction": "token"}, "`importance_correction='none'`"),
    ):
        named = {"offline_loss": "sampled_token"} if kind == "offline" else {}
        first = make(kind, **SAVED, **named)
        first.train()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            resumed = make(kind, **{**named, "max_steps": 2, **other})
            resumed.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-1")
        assert text in caplog.text


def test_a_checkpoint_that_does_not_belong_to_the_run(make):
    first = make("opd", **SAVED)
    first.train()
    with pytest.raises(ConfigError, match="trained with trainer TrustRegionOPD, this run has trainer LogitMixGRPO"):
        make("grpo", max_steps=2).train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-1")


def test_an_adapter_does_not_go_on_from_another_base(make):
    def lora(seed):
        peft = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
        return {"student": tiny_model(seed=seed), "trainer_kwargs": {"peft_config": peft, **tokenizer}}

    tokenizer = {"processing_class": tiny_tokenizer()}
    first = make("grpo", **SAVED, **lora(0))
    first.train()
    checkpoint = f"{first.args.output_dir}/checkpoint-1"
    with pytest.raises(ConfigError, match=r"the checkpoint was trained with base .*\(weights"):
        make("grpo", max_steps=2, **lora(2)).train(resume_from_checkpoint=checkpoint)
    assert make("grpo", max_steps=2, **lora(0)).train(resume_from_checkpoint=checkpoint).global_step == 2


def test_a_checkpoint_without_a_record_is_said_to_have_none(make, caplog):
    first = make("opd", **SAVED)
    first.train()
    checkpoint = Path(first.args.output_dir, "checkpoint-1")
    (checkpoint / RECORD_FILE).unlink()
    resumed = make("opd", **{**SAVED, "max_steps": 2})
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert f"checkpoint-1 has no {RECORD_FILE}" in caplog.text
    assert "without a record" in run_of(card_of(resumed))["steps 1 to 1"]

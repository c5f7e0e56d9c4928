"""What the constructor refuses before a model is loaded, and what it accepts."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from trl import SFTTrainer

from tests.tiny import tiny_tokenizer
from tests.trainers import scored
from tests.trainers.runs import check_refusal
from trl_blend.errors import ConfigError, StoreError, UnsupportedError
from trl_blend.trainers.offline_opd import checks
from trl_blend.trainers.offline_opd.checks import check_parallelism


def refusal(build_offline, monkeypatch, error, match, **kwargs):
    return check_refusal(build_offline, SFTTrainer, monkeypatch, error, match, **kwargs)


def collate(rows):
    return rows


KWARGS = {
    "data_collator": {"data_collator": collate},
    "formatting_func": {"formatting_func": str},
    "compute_loss_func": {"compute_loss_func": collate},
}


@pytest.mark.parametrize("name", KWARGS)
def test_arguments_without_a_use(build_offline, monkeypatch, name):
    refusal(build_offline, monkeypatch, ConfigError, f"`{name}` has no use", trainer_kwargs=KWARGS[name])


def test_data_of_the_wrong_kind(build_offline, monkeypatch, rows):
    refusal(build_offline, monkeypatch, ConfigError, r"`train_dataset\[0\]` is a dict", train_dataset=list(rows))
    text = Dataset.from_dict({"text": ["a"]})
    refusal(build_offline, monkeypatch, StoreError, "it has text", train_dataset=text)
    refusal(build_offline, monkeypatch, ConfigError, "eval_dataset", trainer_kwargs={"eval_dataset": [1]})


def test_rows_are_checked_before_the_model_is_loaded(build_offline, monkeypatch, rows):
    bad = rows.map(lambda row: {"teacher_logps": row["teacher_logps"][:-1] + [0.7]})
    refusal(build_offline, monkeypatch, StoreError, "teacher_logps.*0.7", train_dataset=bad)
    wide = rows.map(lambda row: {"completion_ids": row["completion_ids"][:-1] + [64]})
    refusal(build_offline, monkeypatch, StoreError, "outside the vocabulary of 64", train_dataset=wide)


def test_top_k_loss_on_data_without_top_k(build_offline, monkeypatch, rows):
    data = rows.remove_columns("teacher_topk_ids")
    message = refusal(
        build_offline, monkeypatch, StoreError, "teacher_topk_ids", train_dataset=data, offline_loss="top_k_reverse_kl"
    )
    assert "top_k" in message and "sampled_token" in message


def test_a_bound_on_a_drift_that_cannot_be_measured(build_offline, monkeypatch, rows):
    data = rows.remove_columns("student_logps")
    refusal(build_offline, monkeypatch, ConfigError, "student_logps", train_dataset=data, max_policy_drift=0.1)


def test_a_ratio_to_an_unknown_policy(build_offline, monkeypatch, rows):
    data = rows.remove_columns("rollout_logps")
    settings = {"train_dataset": data, "importance_correction": "token"}
    refusal(build_offline, monkeypatch, ConfigError, "importance_correction='token'.*lacks rollout_logps", **settings)


def test_prepared_rows_without_their_store(build_offline, rows):
    prepared = build_offline().train_dataset
    assert build_offline(train_dataset=prepared).train_dataset is prepared
    with pytest.raises(ConfigError, match="rows that a trainer has prepared.*Pass their store as `rollout_store`"):
        build_offline(train_dataset=prepared, teacher_consistency="warn")


def test_a_ratio_to_an_unknown_policy_in_an_evaluation(build_offline, rows):
    data = rows.remove_columns("rollout_logps")
    trainer = build_offline(importance_correction="token", trainer_kwargs={"eval_dataset": {"known": rows}})
    for given, name in ((data, "eval_dataset"), ({"b": data}, r"eval_dataset\['b'\]")):
        with pytest.raises(ConfigError, match=f"`importance_correction='token'.*`{name}` lacks rollout_logps"):
            trainer.evaluate(given)
    whole, prepared = (trainer.evaluate(given)["eval_loss"] for given in (rows, trainer.train_dataset))
    assert trainer.evaluate("known")["eval_loss"] == whole == pytest.approx(prepared)
    with pytest.raises(StoreError, match="nowhere"):
        trainer.evaluate("nowhere")


def test_a_baseline_on_data_without_top_k(build_offline, monkeypatch, rows):
    settings = {"train_dataset": rows.remove_columns("teacher_topk_ids"), "advantage_baseline": "kl"}
    refusal(build_offline, monkeypatch, StoreError, "teacher_topk_ids.*without `advantage_baseline`", **settings)


def test_an_extrapolation_from_an_unknown_student(build_offline, monkeypatch, rows):
    """`rollout_logps` would be those of the tempered distribution."""
    settings = {"train_dataset": rows.remove_columns("student_logps"), "reward_extrapolation": 1.25}
    refusal(build_offline, monkeypatch, ConfigError, "reward_extrapolation=1.25.*lacks student_logps", **settings)


def test_unknown_model_and_unknown_store(build_offline, monkeypatch):
    refusal(build_offline, monkeypatch, ConfigError, "model='/nowhere'", student="/nowhere")
    refusal(build_offline, monkeypatch, (ConfigError, StoreError), "/nowhere", train_dataset="/nowhere")


def test_a_tokenizer_and_a_loaded_model_are_accepted(build_offline, models):
    trainer = build_offline(
        student=scored.load(models, "student"), trainer_kwargs={"processing_class": tiny_tokenizer()}
    )
    assert trainer.consistency_report is None and trainer.rollout_store is None
    trainer.train()


def test_rows_may_be_shuffled_before_training(build_offline, rows):
    ordered, shuffled = (build_offline(shuffle_dataset=value).train_dataset["input_ids"] for value in (False, True))
    assert ordered != shuffled and sorted(ordered) == sorted(shuffled)


@pytest.mark.parametrize("enabled", ["cp_enabled", "sp_enabled"])
def test_rows_that_are_split_over_processes(build_offline, monkeypatch, enabled):
    split = SimpleNamespace(**{"cp_enabled": False, "sp_enabled": False, "tp_size": 1, enabled: True})
    check_parallelism(SimpleNamespace(parallelism_config=None))
    with pytest.raises(UnsupportedError, match="cp_size"):
        check_parallelism(SimpleNamespace(parallelism_config=split))
    seen = []
    monkeypatch.setattr(checks, "check_parallelism", seen.append)
    assert seen == [build_offline().accelerator]

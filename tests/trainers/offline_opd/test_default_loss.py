"""The loss of a run whose user chose none: the one that the data allow, recorded and said."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from tests.trainers import runs
from tests.trainers.card_reading import rows_of, run_of, settings_of, write_card
from trl_blend import load_scored_rollouts
from trl_blend.consistency.report import ConsistencyReport, Finding
from trl_blend.errors import ConfigError
from trl_blend.trainers._record import RECORD_FILE
from trl_blend.trainers.offline_opd import checks


TOP_K = ["teacher_topk_ids", "teacher_topk_logps", "teacher_tail_logmass"]
CHOSEN = {
    "top_k": ([], {"offline_loss": "top_k_reverse_kl"}, "top_k_reverse_kl (chosen: the data have"),
    "ratio": (
        TOP_K,
        {"offline_loss": "sampled_token", "importance_correction": "token"},
        "sampled_token, with the ratio to the policy of the rollouts (chosen: the data lack",
    ),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_the_default_is_the_loss_that_was_measured_to_work(build_offline, rows, capsys, name):
    dropped, settings, said = CHOSEN[name]
    data = {"train_dataset": rows.remove_columns(dropped)}
    trainer = build_offline(**data, offline_loss="auto", save_strategy="steps", save_steps=1)
    runs.assert_same_run(runs.train(trainer), runs.train(build_offline(**data, **settings)))
    assert f"; loss {said} the teacher's most probable tokens)" in capsys.readouterr().out
    card = write_card(trainer)
    assert f'(chosen by `offline_loss="auto"`: {said.split("chosen: ")[1]}' in rows_of(card)["loss"]
    paper = {"top_k": "loss", "ratio": "ratio to the policy of the rollouts"}[name]
    assert paper in settings_of(card) and ('`offline_loss="sampled_token"`' in card) == (name == "top_k")
    record = json.loads(Path(trainer.args.output_dir, "checkpoint-1", RECORD_FILE).read_text())
    assert {key: record["settings"][key] for key in settings} == settings
    assert "chosen" not in rows_of(write_card(build_offline(**data, **settings)))["loss"]


def test_data_without_what_a_working_loss_reads(build_offline, rows):
    with pytest.raises(ConfigError, match="`offline_loss='auto'` needs"):
        build_offline(train_dataset=rows.remove_columns([*TOP_K, "rollout_logps"]), offline_loss="auto")


def test_a_stream_of_rows_is_no_store(build_offline):
    with pytest.raises(ConfigError, match="`stream_rollouts=True` reads the shards of a store.* is a Dataset"):
        build_offline(stream_rollouts=True)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")  # of TRL, which builds logits for them
def test_predictions_on_what_evaluations_take(build_on_store, folder):
    trainer = build_on_store()
    store = load_scored_rollouts(folder / "scored_teacher")
    expected = trainer.evaluate(store)
    for data in (store, str(folder / "scored_teacher"), store.dataset()):
        predicted = trainer.predict(data)
        assert predicted.metrics["test_loss"] == expected["eval_loss"]
        assert np.isfinite(predicted.predictions[0]).all()
    by_name = trainer.evaluate({"a": store})
    assert by_name["eval_a_loss"] == expected["eval_loss"]


def test_the_warnings_of_the_check_are_said(build_on_store, monkeypatch, caplog):
    report = ConsistencyReport(
        [Finding("policy_gap", "ok", "small"), Finding("unlikely_tokens", "warning", "many", remedy="look")]
    )
    monkeypatch.setattr(checks, "_run_check", lambda *args: report)
    with caplog.at_level(logging.WARNING):
        build_on_store()
    (message,) = [text for text in caplog.messages if "The check of the rollouts warns" in text]
    assert "[warning] unlikely_tokens: many" in message and "remedy: look" in message and "policy_gap" not in message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "8 rollouts"),
        ({"gradient_accumulation_steps": 32}, "8 rollouts, all that there are"),
        ({"per_device_train_batch_size": 3}, "3 rollouts, 2 in the last step of an epoch"),
        ({"per_device_train_batch_size": 3, "dataloader_drop_last": True}, "3 rollouts"),
    ],
)
def test_a_step_counts_the_rows_that_there_are(build_offline, settings, said):
    assert run_of(write_card(build_offline(**settings)))["per step"] == said


def test_the_usage_shows_the_prompt_of_a_user(build_offline, rows, models):
    trainer = build_offline()
    tokenizer = trainer.processing_class
    messages = [{"role": "user", "content": "7*8+1="}]
    templated = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    for prompt, shown in ((templated, '[{"role": "user", "content": "7*8+1="}]'), (templated[:-1], "What is 123")):
        row = {**rows[0], "prompt_ids": prompt}
        assert shown in write_card(build_offline(train_dataset=type(rows).from_list([row] * 8)))
    trainer.processing_class.chat_template = None
    assert repr(trainer.example_prompt({"input_ids": templated, "labels": [-100] * len(templated)})) == "'7*8+1='"

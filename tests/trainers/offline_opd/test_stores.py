"""Real stores: collected, scored, checked for their teacher, trained on."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from trl import SFTTrainer

from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import runs, scored
from tests.trainers.runs import PROMPTS, check_refusal, snapshot
from trl_blend import load_scored_rollouts
from trl_blend.consistency.provenance import PROVENANCE_FILE, TeacherProvenance, record_teacher
from trl_blend.errors import ConfigError, ConsistencyError, StoreError


@pytest.fixture
def build(build_on_store):
    return build_on_store


@pytest.mark.parametrize("offline_loss", ["sampled_token", "top_k_forward_kl"])
def test_from_rollouts_to_a_trained_model(build, folder, offline_loss):
    trainer = build(
        offline_loss=offline_loss, eval_strategy="no", trainer_kwargs={"eval_dataset": str(folder / "scored_teacher")}
    )
    assert trainer.consistency_report.ok and len(trainer.train_dataset) == len(PROMPTS)
    before = snapshot(trainer.model)
    record = runs.train(trainer)
    assert any(not torch.equal(before[name], value) for name, value in snapshot(trainer.model).items())
    # float16 log-probs of the student that drew the rollouts
    assert abs(record.logged("offline/drift_kl")[0]) < 1e-5
    assert trainer.evaluate()["eval_loss"] != 0
    trainer.save_model()
    with open(f"{trainer.args.output_dir}/{PROVENANCE_FILE}", encoding="utf-8") as file:
        assert TeacherProvenance.from_dict(json.load(file)).teacher.name == str(folder / "teacher")


def test_stored_scores_are_the_live_ones_within_float16(build, folder):
    trainer = build()
    teacher = scored.load(folder, "teacher")
    for row in trainer.train_dataset:
        start = row["labels"].count(-100)
        live = scored.logprobs(teacher, row["input_ids"])[start - 1 : -1]
        live = live.gather(-1, torch.tensor(row["input_ids"][start:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row["teacher_logps"][start:]).double(), live, rtol=1e-3, atol=1e-5)


def test_an_opened_store_and_rows_of_it(build, folder):
    store = load_scored_rollouts(folder / "scored_teacher")
    assert build(train_dataset=store).consistency_report.ok
    some = store.dataset().select(range(4))
    with pytest.raises(ConsistencyError, match="manifest"):
        build(train_dataset=some)
    trainer = build(train_dataset=some, trainer_kwargs={"rollout_store": store})
    assert trainer.consistency_report.ok and len(trainer.train_dataset) == 4


def test_streaming_a_store(build):
    trainer = build(stream_rollouts=True, max_steps=2, per_device_train_batch_size=4)
    record = runs.train(trainer)
    assert len(record.calls) == 2 and trainer.consistency_report.ok


def test_a_ratio_to_rollouts_of_a_nucleus_is_warned_of(build, folder, caplog):
    with caplog.at_level(logging.WARNING):
        build(importance_correction="token")
        assert "sampled with {'top_p': 0.9}" in caplog.text and "--top_p 1" in caplog.text
        caplog.clear()
        build()
        build(train_dataset=load_scored_rollouts(folder / "scored_teacher").dataset(), teacher_consistency="off")
    assert "top_p" not in caplog.text


def test_rows_that_lose_their_end_are_counted(build, folder, caplog):
    rows = load_scored_rollouts(folder / "scored_teacher").dataset()
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
    limit = sorted(lengths)[-3]
    with caplog.at_level(logging.WARNING):
        build(max_length=limit)
        expected = sum(length > limit for length in lengths)
        assert 0 < expected < len(rows) and f"{expected} of {len(rows)} rows are longer" in caplog.text
        caplog.clear()
        build(max_length=max(lengths))
    assert "rows are longer" not in caplog.text


# Teacher consistency


@pytest.mark.parametrize("how", ["strict", "warn", "off"])
def test_scores_of_another_teacher(build, caplog, how):
    if how == "strict":
        with pytest.raises(ConsistencyError, match="teacher"):
            build(store="scored_second")
        return
    with caplog.at_level(logging.WARNING):
        trainer = build(store="scored_second", teacher_consistency=how)
    assert ("Teacher consistency could not be established" in caplog.text) == (how == "warn")
    if how == "off":
        assert trainer.consistency_report is None
    else:
        assert [finding.name for finding in trainer.consistency_report.errors] == ["teacher"]


def test_another_student(build, folder, tmp_path):
    tiny_model(seed=5).save_pretrained(folder / "other")
    tiny_tokenizer().save_pretrained(folder / "other")
    record_teacher(folder / "other", str(folder / "teacher"), overwrite=True)
    with pytest.raises(ConsistencyError, match="rollout_student"):
        build(student="other")


def test_missing_provenance_says_how_to_record_or_override_it(build):
    with pytest.raises(ConsistencyError) as raised:
        build(student="unrecorded")
    for text in ("record-teacher", "TeacherProvenanceCallback", "sft_teacher", 'teacher_consistency="warn"'):
        assert text in str(raised.value), text


def test_a_stated_teacher_is_called_stated(build, folder):
    report = build(student="unrecorded", sft_teacher=str(folder / "teacher")).consistency_report
    assert report.ok and report["provenance"].evidence["how"] == "stated"
    with pytest.raises(ConsistencyError, match="teacher"):
        build(student="unrecorded", sft_teacher=str(folder / "second"))


def test_a_record_of_a_former_run_goes(build, folder):
    trainer = build(student="unrecorded", sft_teacher=str(folder / "teacher"))
    trainer.save_model()
    record_teacher(trainer.args.output_dir, str(folder / "second"))
    trainer.save_model()
    assert not (Path(trainer.args.output_dir) / PROVENANCE_FILE).exists()


@pytest.mark.parametrize("how", ["strict", "warn", "off"])
def test_a_broken_record(build, folder, tmp_path, how):
    shutil.copytree(folder / "student", tmp_path / "broken")
    (tmp_path / "broken" / PROVENANCE_FILE).write_text("{")
    settings = {"student": tmp_path / "broken", "teacher_consistency": how}
    if how == "off":
        assert build(**settings)._provenance is None
    else:
        with pytest.raises(ConfigError, match="not a teacher provenance record"):
            build(**settings)


def test_rows_are_scored_again(build, folder):
    live = {"teacher_model_name_or_path": str(folder / "teacher"), "rescore_num_rows": 4}
    load = {"teacher_model_init_kwargs": {"dtype": "float32"}}
    report = build(**live, **load).consistency_report
    assert report["rescored"].severity == "ok" and report.ok
    live["teacher_model_name_or_path"] = str(folder / "second")
    with pytest.raises(ConsistencyError, match="rescored"):
        build(**live, **load)


def test_the_check_comes_before_any_model(build, monkeypatch):
    check_refusal(build, SFTTrainer, monkeypatch, ConsistencyError, "teacher", store="scored_second")


# Stores that are refused


def test_rollouts_without_scores(build):
    with pytest.raises(ConfigError, match="trl-blend score"):
        build(store="rollouts")


def test_half_written_and_newer_stores(build, folder):
    for name, change in {"half": {"complete": False}, "newer": {"schema_version": 99}}.items():
        shutil.copytree(folder / "scored_teacher", folder / name)
        path = folder / name / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(StoreError, match={"half": "half-written", "newer": "99"}[name]):
            build(store=name)

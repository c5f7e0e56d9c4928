"""Real stores: collected, scored, checked for their teacher, trained on, and what the card says of it."""

import json
import logging
import shutil

import pytest
import torch
import yaml
from trl import SFTTrainer

from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import scored
from tests.trainers.runs import PROMPTS, check_refusal, snapshot
from tests.trainers.trust_region_opd.test_model_card import rows_of
from trl_blend import collect_rollouts, load_scored_rollouts, score_rollouts
from trl_blend.errors import ConfigError, ConsistencyError, StoreError
from trl_blend.teacher.provenance import PROVENANCE_FILE, TeacherProvenance, record_teacher


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """The tiny models, the SFT student with its record among them, and a store of scored rollouts."""
    folder = tmp_path_factory.mktemp("stores")
    for name in ("student", "teacher", "second"):
        shutil.copytree(models / name, folder / name)
    shutil.copytree(folder / "student", folder / "unrecorded")
    record_teacher(folder / "student", str(folder / "teacher"))
    prompts = [{"prompt": prompt} for prompt in PROMPTS]
    options = {"show_progress": False, "dtype": "float32"}
    collect_rollouts(
        str(folder / "student"), prompts, folder / "rollouts", max_new_tokens=8, rows_per_shard=3, **options
    )
    for name in ("teacher", "second"):
        score_rollouts(folder / "rollouts", str(folder / name), folder / f"scored_{name}", top_k=4, **options)
    return folder


@pytest.fixture
def build(folder, tmp_path):
    def builder(student="student", store="scored_teacher", **kwargs):
        kwargs = {"teacher_consistency": "strict", "train_dataset": str(folder / store), **kwargs}
        return scored.build_offline(folder, tmp_path / "run", student=str(folder / student), **kwargs)

    return builder


def card_of(trainer):
    trainer.create_model_card(model_name="tiny")
    with open(f"{trainer.args.output_dir}/README.md", encoding="utf-8") as file:
        return file.read()


@pytest.mark.parametrize("offline_loss", ["sampled_token", "top_k_forward_kl"])
def test_from_rollouts_to_a_trained_model(build, folder, offline_loss):
    trainer = build(
        offline_loss=offline_loss, eval_strategy="no", trainer_kwargs={"eval_dataset": str(folder / "scored_teacher")}
    )
    assert trainer.consistency_report.ok and len(trainer.train_dataset) == len(PROMPTS)
    before = snapshot(trainer.model)
    record = scored.train_offline(trainer)
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
    record = scored.train_offline(trainer)
    assert len(record.steps) == 2 and trainer.consistency_report.ok


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
        assert trainer.consistency_report is None and "Not checked" in card_of(trainer)
    else:
        assert [finding.name for finding in trainer.consistency_report.errors] == ["teacher"]
        assert "not everything held" in card_of(trainer)


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
    trainer = build(student="unrecorded", sft_teacher=str(folder / "teacher"))
    assert trainer.consistency_report.ok
    card = card_of(trainer)
    assert "was stated by the user, not verified" in card and str(folder / "teacher") in card
    with pytest.raises(ConsistencyError, match="teacher"):
        build(student="unrecorded", sft_teacher=str(folder / "second"))


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


# Card


def test_card(build, folder):
    trainer = build(max_steps=2)
    trainer.train()
    card = card_of(trainer)
    rows = rows_of(card.split("### Teacher consistency")[0])
    assert (
        str(folder / "teacher") in rows["teacher"]
        and str(folder / "student") in rows["student that drew the rollouts"]
    )
    assert "temperature 0.7, top_p 0.9" in rows["sampling"] and "8 rows" in rows["rollouts"]
    assert rows["scored with"].startswith("transformers, temperature 1.0")
    assert rows["drift from the policy of the rollouts, first and last log"].endswith("nats per token")
    for finding in trainer.consistency_report:
        assert f"| {finding.name} | {finding.severity} |" in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert {"trl", "trl-blend", "offline-opd"} <= set(metadata["tags"])
    for text in ("wu2026lightning", "arXiv:2604.13010", "huggingface.co/papers/2604.13010"):
        assert text in card
    for mark in ("[[", "[%", "{%", "{{ ", "None", "raw"):
        assert mark not in card.split("---", 2)[2], mark


def test_card_of_rows_without_a_manifest(build_offline):
    card = card_of(build_offline(offline_loss="top_k_reverse_kl"))
    assert "unknown: no identity was recorded" in card and "where they came from is not recorded" in card
    assert "is a choice of `trl_blend`" in card

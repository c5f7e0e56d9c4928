"""Several stores in one training: each with its own teacher, scored by route, each checked on its own."""

import logging
import shutil

import pytest
import torch
from datasets import Dataset, concatenate_datasets

import offline_opd
from tests.rollouts.collecting import collect, score
from tests.trainers import runs, scored
from tests.trainers.card_reading import rows_of, run_of, tables_of, write_card
from tests.trainers.offline_opd.test_reference_loss import reference_step
from tests.trainers.runs import PROMPTS, assert_close_tensors, assert_same_tensors, snapshot
from trl_blend import load_scored_rollouts
from trl_blend.consistency.provenance import read_provenance, record_teacher
from trl_blend.errors import ConfigError, ConsistencyError


ROUTES = {"sums": "teacher", "words": "second"}


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """A student of two teachers, rollouts with a route, and a store of each teacher."""
    folder = tmp_path_factory.mktemp("stores")
    for name in ("student", "teacher", "second"):
        shutil.copytree(models / name, folder / name)
    for name in ROUTES.values():
        record_teacher(folder / "student", str(folder / name), add=True)
    prompts = [{"prompt": text, "route": ["sums", "words", "words"][n % 3]} for n, text in enumerate(PROMPTS)]
    settings = {"max_completion_length": 8, "rows_per_shard": 3, "dtype": "float32", "logps_dtype": "float32"}
    collect(str(folder / "student"), prompts, folder / "rollouts", **settings)
    for route, name in ROUTES.items():
        scoring = {"route": route, "top_k": 4, "dtype": "float32", "logps_dtype": "float32"}
        score(folder / "rollouts", str(folder / name), folder / f"scored_{route}", **scoring)
    return folder


@pytest.fixture
def build(folder, tmp_path):
    """`build(stores=…, **settings)` makes a trainer on stores of `folder`, strict by default."""

    def builder(stores=("scored_sums", "scored_words"), **kwargs):
        data = [str(folder / store) if isinstance(store, str) else store for store in stores]
        kwargs = {"teacher_consistency": "strict", "train_dataset": data, "student": folder / "student", **kwargs}
        return scored.build_offline(folder, tmp_path / "run", **{**kwargs, "student": str(kwargs["student"])})

    return builder


def test_the_rows_of_all_stores_are_trained_on(build, folder):
    stores = [load_scored_rollouts(folder / f"scored_{route}") for route in ROUTES]
    trainer = build(offline_loss="top_k_reverse_kl", max_steps=1, train_sampling_strategy="sequential")
    assert trainer.consistency_report.ok and len(trainer.train_dataset) == len(PROMPTS)
    rows = [row for store in stores for row in store.dataset()]
    student = scored.load(folder, "student")
    expected_loss, expected = reference_step(student, Dataset.from_list(rows), "top_k_reverse_kl", "sequence")
    record = runs.train(trainer)
    assert record.calls[0].loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close_tensors(record.gradients[0], expected, 1e-4)
    trainer.save_model()
    assert len(read_provenance(trainer.args.output_dir).teachers) == 2


def test_each_store_is_checked_on_its_own(build, folder):
    report = build().consistency_report
    found = [(finding.name, finding.severity) for finding in report if finding.name in ("teacher", "provenance")]
    assert found == [("provenance", "ok"), ("teacher", "info")] * 2
    for route, name in ROUTES.items():
        of_store = [str(finding) for finding in report if f"scored_{route}: " in finding.message]
        assert len(of_store) == len(list(report)) / 2
        assert any(f"{folder / name} " in text and "one of 2" in text for text in of_store)
        assert any("which rows were whose is not recorded" in text for text in of_store)
    # The recorded teachers do not stand for any third one, and one of the two scores is enough to fail
    record_teacher(folder / "student", str(folder / "teacher"), overwrite=True)
    try:
        with pytest.raises(ConsistencyError, match=r"\[error\] teacher: .*scored_words: ") as raised:
            build()
        assert "scored_sums: " not in str(raised.value)
    finally:
        record_teacher(folder / "student", str(folder / "second"), add=True)


def test_the_rows_of_a_route_are_those_of_its_teacher(build, folder, tmp_path):
    student = shutil.copytree(folder / "student", tmp_path / "student")
    for route, name in ROUTES.items():
        record_teacher(student, str(folder / name), add=True, route=route)
    trainer = build(student=student)
    assert [one.severity for one in trainer.consistency_report if one.name == "teacher"] == ["ok", "ok"]
    identity = run_of(write_card(trainer))["identity of the teacher 2"]
    assert identity.startswith("**verified**") and identity.endswith("recorded in the student's fine-tuning")
    # Both teachers are known, but each is that of the other rows
    record_teacher(student, str(folder / "second"), overwrite=True, route="sums")
    record_teacher(student, str(folder / "teacher"), add=True, route="words")
    with pytest.raises(ConsistencyError, match=r"scored_sums: .* fine-tuning of route `sums`") as raised:
        build(student=student)
    assert "of the fine-tuning of route `words`" in str(raised.value)


def test_a_mixed_precision_of_the_stores(build, folder, tmp_path):
    half = {"route": "words", "top_k": 4, "dtype": "float32", "logps_dtype": "float16"}
    store = score(folder / "rollouts", str(folder / "second"), tmp_path / "half", **half)
    whole, mixed = build(), build(stores=["scored_sums", store])
    for one, other in zip(whole.train_dataset, mixed.train_dataset, strict=True):
        torch.testing.assert_close(
            torch.tensor(one["teacher_logps"]), torch.tensor(other["teacher_logps"]), rtol=1e-3, atol=1e-3
        )


def test_rows_of_several_stores(build, folder):
    stores = [load_scored_rollouts(folder / f"scored_{route}") for route in ROUTES]
    rows = concatenate_datasets([store.dataset() for store in stores])
    weights = [1.0] * len(stores[0]) + [2.0] * len(stores[1])
    trainer = build(train_dataset=rows.add_column("row_weight", weights), trainer_kwargs={"rollout_store": stores})
    assert trainer.consistency_report.ok and len(trainer.rollout_stores) == 2 and trainer.rollout_store is None


def test_card_and_opening_line_name_all_teachers(build, folder, capsys):
    trainer = build(max_steps=1)
    trainer.train()
    assert "teacher teacher and second;" in capsys.readouterr().out
    card = write_card(trainer)
    assert str(folder) not in card
    run, rows = run_of(card), rows_of(card)
    assert run["teacher 1"].startswith("`teacher` ") and run["teacher 2"].startswith("`second` ")
    for number in (1, 2):
        assert run[f"identity of the teacher {number}"].endswith("which rows were whose is not recorded")
    counts = [len(load_scored_rollouts(folder / f"scored_{route}")) for route in ROUTES]
    for number, (route, count) in enumerate(zip(ROUTES, counts, strict=True), 1):
        assert rows[f"rollouts of teacher {number}"].startswith(f"{count} rows, ")
        assert rows[f"scores of teacher {number}"].endswith(f"the rows of route `{route}`")
    assert run["data"].startswith(f"{sum(counts)} rollouts of ")
    assert rows["student that drew the rollouts"].startswith("`student` ")
    checks = tables_of(card)["Teacher consistency"][1:]
    assert sum(name == "teacher" and "scored_" in finding for name, _, finding in checks) == 2


def test_an_unchecked_training(build):
    card = write_card(build(teacher_consistency="off"))
    assert run_of(card)["identity of the teacher 2"].endswith("compared with nothing")


def test_evaluation_on_several_stores(build, folder):
    both = [str(folder / "scored_sums"), str(folder / "scored_words")]
    trainer = build(per_device_eval_batch_size=8, trainer_kwargs={"eval_dataset": both})
    together = trainer.evaluate()["eval_loss"]
    parts = [trainer.evaluate(store)["eval_loss"] for store in both]
    sizes = [len(load_scored_rollouts(store)) for store in both]
    expected = sum(size * loss for size, loss in zip(sizes, parts, strict=True)) / sum(sizes)
    assert together == pytest.approx(expected, rel=1e-5) == trainer.evaluate(both)["eval_loss"]


def test_resumed_is_uninterrupted(build, tmp_path):
    run = {"per_device_train_batch_size": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = build(**run)
    whole.train()
    expected = snapshot(whole.model)
    resumed = build(**run)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    assert_same_tensors(snapshot(resumed.model), expected)


# Refused


def test_what_cannot_be_trained_on_together(build, folder, tmp_path):
    scoring = {"dtype": "float32", "logps_dtype": "float32"}
    with pytest.raises(ConfigError, match="`train_dataset` has .*scored_sums and .*scored_sums, which hold the same"):
        build(stores=["scored_sums", "scored_sums"])
    every = score(folder / "rollouts", str(folder / "second"), tmp_path / "every", top_k=4, **scoring)
    with pytest.raises(ConfigError, match="which hold the same rollouts: a row belongs to one teacher"):
        build(stores=["scored_sums", every])
    for top_k, match in ((3, "top_k 4 in .*scored_sums, and 3 in"), (0, "the columns .*teacher_tail_logmass")):
        other = {"route": "words", "top_k": top_k, **scoring}
        store = score(folder / "rollouts", str(folder / "second"), tmp_path / f"top{top_k}", **other)
        with pytest.raises(ConfigError, match=match):
            build(stores=["scored_sums", store])


def test_lists_of_something_else(build, folder):
    with pytest.raises(ConfigError, match="`train_dataset` is an empty list"):
        build(stores=[])
    rows = load_scored_rollouts(folder / "scored_words").dataset()
    with pytest.raises(ConfigError, match="a list with a dataset in it.*concatenate_datasets"):
        build(stores=["scored_sums", rows])
    with pytest.raises(ConfigError, match=r"`train_dataset\[1\]` is a int"):
        build(stores=["scored_sums", 3])
    with pytest.raises(ConfigError, match=r"`train_dataset\[0\]=.*rollouts'` is .*trl-blend score"):
        build(stores=["rollouts", "scored_sums"])


def test_a_list_of_one_is_one(build, folder):
    (name,) = stores = [str(folder / "scored_sums")]
    trainer = build(stores=stores, stream_rollouts=True, max_steps=1)
    assert trainer.rollout_store.name == name
    assert [finding.message for finding in trainer.consistency_report] == [
        finding.message for finding in build(train_dataset=name).consistency_report
    ]


def test_the_script_takes_several(folder, tmp_path, capsys):
    parser = offline_opd.make_parser()
    named = ["--model_name_or_path", str(folder / "student"), "--output_dir", str(tmp_path), "--dtype", "float32"]
    run = ["--max_steps", "1", "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    stores = ["--dataset_name", str(folder / "scored_sums"), str(folder / "scored_words")]
    parsed = parser.parse_args_and_config([*named, *run, *stores])
    offline_opd.main(*parsed)
    assert "teacher teacher and second; 8 training rows" in capsys.readouterr().out
    parsed[0].dataset_revision = "v2"
    with pytest.raises(ConfigError, match="`dataset_revision='v2'` is of one repository, and `dataset_name` has 2"):
        offline_opd.main(*parsed)


def test_settings_for_one_store(build, folder):
    with pytest.raises(ConfigError, match="`stream_rollouts=True` reads one store after the other"):
        build(stream_rollouts=True, max_steps=1)
    with pytest.raises(ConfigError, match="scores rows of one store again, and there are 2"):
        build(teacher_model_name_or_path=str(folder / "teacher"))
    with pytest.raises(ConfigError, match="names one teacher, and there are 2 stores.*record-teacher"):
        build(sft_teacher=str(folder / "teacher"))


def test_evaluation_on_the_scores_of_another_teacher(build, folder, caplog):
    stores = {route: load_scored_rollouts(folder / f"scored_{route}") for route in ROUTES}
    for trained, evaluated, warned in (("sums", "words", 1), ("sums", "sums", 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            build([f"scored_{trained}"], trainer_kwargs={"eval_dataset": {"other": stores[evaluated]}})
        found = [text for text in caplog.messages if "scored by another teacher" in text]
        assert len(found) == warned and all(r"`eval_dataset['other']` holds" in text for text in found)
    stores["words"].manifest.scoring["vocab_size"] -= 1
    with pytest.raises(ConfigError, match="`eval_dataset` holds .*the loss would be another one"):
        build(["scored_sums"], offline_loss="top_k_reverse_kl", trainer_kwargs={"eval_dataset": stores["words"]})


def test_evaluation_without_the_log_probs_that_the_loss_reads(build, folder):
    rows = load_scored_rollouts(folder / "scored_sums").dataset().remove_columns("student_logps")
    with pytest.raises(
        ConfigError, match="`reward_extrapolation=1.25` needs .*but `eval_dataset` lacks student_logps"
    ):
        build(offline_loss="sampled_token", reward_extrapolation=1.25, trainer_kwargs={"eval_dataset": rows})

import copy
import dataclasses
import json
import re
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from tests.consistency.worlds import CHECKS, make_world, rewritten, severities, unrecorded
from tests.models.checkpoints import changed, hub_snapshot, noisy, save_model, scored_columns, write_scored
from tests.tiny import ARCHITECTURES, tiny_lora, tiny_model, tiny_tokenizer
from trl_blend.consistency.check import check_teacher_consistency
from trl_blend.consistency.provenance import record_teacher
from trl_blend.errors import ConfigError, ConsistencyError, StoreError
from trl_blend.models.fingerprint import identify_model
from trl_blend.models.identity import ModelIdentity


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_consistent_set(world):
    report = check_teacher_consistency(world.student, str(world.scored.folder), world.teacher)
    assert tuple(severities(report)) == CHECKS
    expected = dict.fromkeys(CHECKS, "ok")
    assert severities(report) == expected
    assert report.ok
    report.raise_if_failed()
    loaded = AutoModelForCausalLM.from_pretrained(world.student)
    again = check_teacher_consistency(loaded, world.scored, world.teacher_model, processing_class=tiny_tokenizer())
    assert severities(again) == expected
    without = check_teacher_consistency(world.student, world.scored)
    assert severities(without) == {**expected, "rescored": "info"}
    assert "no live teacher" in without["rescored"].message
    assert "Not asked for" in (
        check_teacher_consistency(world.student, world.scored, world.teacher, num_rows=0)["rescored"].message
    )


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "qwen3"])
def test_other_architectures(arch, tmp_path):
    model = tiny_model(arch, seed=1)
    student, teacher = save_model(noisy(model, 0.01), tmp_path / "s"), save_model(model, tmp_path / "t")
    record_teacher(student, teacher)
    # Both as they are loaded by name: transformers 5.10 gives Gemma 2 another attention there than in memory
    loaded = [AutoModelForCausalLM.from_pretrained(name) for name in (student, teacher)]
    columns = scored_columns(*loaded, num_rows=8, max_new_tokens=10)
    scored = write_scored(tmp_path / "scored", columns, student, teacher)
    report = check_teacher_consistency(student, scored, teacher)
    of_the_numbers = {"eos", "truncation"}  # what a random model makes of them
    found = {name: severity for name, severity in severities(report).items() if name not in of_the_numbers}
    assert found == dict.fromkeys([name for name in CHECKS if name not in of_the_numbers], "ok")
    other = check_teacher_consistency(student, scored, changed(model, 0.5))
    assert [finding.name for finding in other.errors] == ["rescored"]


# The teacher of the log-probs and that of the fine-tuning


@pytest.mark.parametrize("amount", [1.0, 1e-3])
def test_another_teacher(world, tmp_path, amount):
    other = save_model(changed(world.teacher_model, amount, "model.layers.0.mlp.up_proj.weight"), tmp_path / "other")
    report = check_teacher_consistency(world.student, rewritten(world, tmp_path / "scored", teacher=other))
    assert [finding.name for finding in report.errors] == ["teacher"]
    finding = report["teacher"]
    assert finding.severity == "error"
    assert "differ in the weights" in finding.message
    assert other in finding.message and world.teacher in finding.message
    assert "Score the rollouts with the teacher of the fine-tuning" in finding.remedy
    assert finding.evidence["compared_by"] == "weights"


@pytest.mark.parametrize(
    ("dtype", "settings", "severity", "message"),
    [
        ("float32", {"max_shard_size": "10KB"}, "ok", "have the same weights"),
        ("bfloat16", {}, "info", "one is a bfloat16 copy of the other"),
    ],
)
def test_the_same_teacher_saved_otherwise(world, tmp_path, dtype, settings, severity, message):
    model = copy.deepcopy(world.teacher_model).to(getattr(torch, dtype))
    other = save_model(model, tmp_path / "other", **settings)
    report = check_teacher_consistency(world.student, rewritten(world, tmp_path / "scored", teacher=other))
    assert report.ok and report["teacher"].severity == severity
    assert message in report["teacher"].message


def test_the_same_weights_under_another_configuration(world, tmp_path):
    shutil.copytree(world.teacher, tmp_path / "other")
    config = AutoConfig.from_pretrained(world.teacher)
    config.rms_norm_eps = 1e-3
    config.save_pretrained(tmp_path / "other")
    scored = rewritten(world, tmp_path / "scored", teacher=str(tmp_path / "other"))
    finding = check_teacher_consistency(world.student, scored)["teacher"]
    assert finding.severity == "error"
    assert "config.rms_norm_eps (0.001 and 1e-06)" in finding.message


def test_a_teacher_with_an_adapter(world, tmp_path):
    model = tiny_lora(AutoModelForCausalLM.from_pretrained(world.teacher))
    model.save_pretrained(tmp_path / "adapter")
    scored = rewritten(world, tmp_path / "scored", teacher=str(tmp_path / "adapter"))
    finding = check_teacher_consistency(world.student, scored)["teacher"]
    assert finding.severity == "error"
    assert "an adapter that only one of them has" in finding.message
    record_teacher(shutil.copytree(world.student, tmp_path / "student"), str(tmp_path / "adapter"), overwrite=True)
    assert check_teacher_consistency(str(tmp_path / "student"), scored)["teacher"].severity == "ok"
    other = tiny_lora(AutoModelForCausalLM.from_pretrained(world.teacher), seed=1)
    other.save_pretrained(tmp_path / "adapter")
    scored = rewritten(world, tmp_path / "scored_2", teacher=str(tmp_path / "adapter"))
    finding = check_teacher_consistency(str(tmp_path / "student"), scored)["teacher"]
    assert finding.evidence["differences"] == ["the adapter's weights"]


ROUTES = {
    "math": ("ok", "have the same weights. It is recorded for the rows of route `math`"),
    "code": ("error", "and the teacher of the fine-tuning of route `code`, .* differ in the weights"),
    "prose": ("missing", "is recorded for the rows of route `math`, and not for the rows of route `prose`"),
    None: ("info", "It is one of 2 teachers of the fine-tuning; the data have no route"),
}


@pytest.fixture(scope="module")
def two_teachers(world, tmp_path_factory):
    """The student, whose record names another teacher for the route `code`."""
    folder = tmp_path_factory.mktemp("two")
    student = str(shutil.copytree(world.student, folder / "student"))
    other = save_model(changed(world.teacher_model, 1.0), folder / "other")
    record_teacher(student, world.teacher, add=True, route="math")
    record_teacher(student, other, add=True, route="code")
    return student


@pytest.mark.parametrize("route", ROUTES)
def test_the_teacher_of_a_route(world, two_teachers, tmp_path, route):
    scoring = {"temperature": 1.0, "top_k": None, "dtype": "float32", **({"route": route} if route else {})}
    severity, message = ROUTES[route]
    report = check_teacher_consistency(two_teachers, rewritten(world, tmp_path / "scored", scoring=scoring))
    assert report["teacher"].severity == severity and re.search(message, report["teacher"].message)
    assert report.ok == (severity in ("ok", "info"))
    assert ("trl-blend record-teacher --add --route prose" in report["teacher"].remedy) == (route == "prose")


@pytest.mark.parametrize(("routes", "expected"), [(["math"], "math"), (["math", "code"], "code")])
def test_the_routes_of_rows_that_one_teacher_has_scored(world, two_teachers, tmp_path, routes, expected):
    number = len(world.columns["key"])
    columns = {**world.columns, "route": [routes[n % len(routes)] for n in range(number)]}
    scored = write_scored(tmp_path / "scored", columns, world.student, world.teacher)
    finding = check_teacher_consistency(two_teachers, scored)["teacher"]
    severity, message = ROUTES[expected]
    assert finding.severity == severity and re.search(message, finding.message)
    # Without routes in the record they tell nothing
    assert check_teacher_consistency(world.student, scored)["teacher"].severity == "ok"


# Provenance


def test_no_record_says_how_to_record_or_override(world, tmp_path):
    student = unrecorded(world, tmp_path / "student")
    report = check_teacher_consistency(student, world.scored)
    assert severities(report)["provenance"] == "missing"
    assert severities(report)["teacher"] == "info"
    for remedy in (
        "TeacherProvenanceCallback",
        "trl-blend record-teacher",
        "sft_teacher=",
        'teacher_consistency="warn"',
    ):
        assert remedy in report["provenance"].remedy
    with pytest.raises(ConsistencyError, match="1 of 11 checks failed\n  \\[missing\\] provenance: ") as error:
        report.raise_if_failed()
    assert error.value.report is report
    assert "remedy: Record it" in str(error.value)


def test_the_record_of_a_base_is_not_that_of_an_adapter_in_memory(world, tmp_path):
    """Whose teacher may be another one, recorded where its folder is."""
    adapted = tiny_lora(AutoModelForCausalLM.from_pretrained(world.student))
    adapted.save_pretrained(tmp_path / "adapter")
    record_teacher(tmp_path / "adapter", changed(world.teacher_model, 1e-3))
    report = check_teacher_consistency(adapted, world.scored)
    assert (report["provenance"].severity, report["teacher"].severity) == ("missing", "info")
    assert "a record beside the base is not that of the adapter" in report["provenance"].message
    assert check_teacher_consistency(str(tmp_path / "adapter"), world.scored)["teacher"].severity == "error"
    stated = check_teacher_consistency(adapted, world.scored, sft_teacher=world.teacher)
    assert (stated["provenance"].severity, stated["teacher"].severity) == ("info", "ok")


def test_a_stated_teacher(world, tmp_path, monkeypatch):
    student = unrecorded(world, tmp_path / "student")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    save_model(world.teacher_model, hub_snapshot(tmp_path / "hub", "org/teacher"))
    save_model(changed(world.teacher_model, 1e-3), hub_snapshot(tmp_path / "hub", "org/other"))

    for stated in (world.teacher, "org/teacher", identify_model(world.teacher)):
        report = check_teacher_consistency(student, world.scored, sft_teacher=stated)
        assert report.ok
        assert severities(report)["provenance"] == "info"
        assert "stated, not verified" in report["provenance"].message
        assert "compared by its fingerprint" in report["provenance"].message
        assert severities(report)["teacher"] == "ok"
    report = check_teacher_consistency(student, world.scored, sft_teacher="org/other")
    assert report["teacher"].severity == "error"
    assert report["teacher"].evidence["compared_by"] == "weights"


def test_a_stated_teacher_that_is_not_here_is_compared_by_name(world, tmp_path):
    student = unrecorded(world, tmp_path / "student")

    def check(stated, **identity):
        recorded = dataclasses.replace(identify_model(world.teacher), **identity)
        scored = rewritten(
            world, tmp_path / f"scored {stated} {identity}".replace("/", "-"), teacher=recorded.to_dict()
        )
        return check_teacher_consistency(student, scored, sft_teacher=stated)

    same = check("org/teacher", name="org/teacher")
    assert "known by its name only" in same["provenance"].message
    assert same["teacher"].severity == "info"
    assert "have the same name. Their weights were not compared" in same["teacher"].message
    assert check("org/other", name="org/teacher")["teacher"].severity == "error"
    unknown = check("org/teacher", name="/data/teacher")["teacher"]
    assert unknown.severity == "missing"
    assert "cannot be compared" in unknown.message
    assert "folders or cached Hub ids" in unknown.remedy


def test_commits_of_the_same_name(world, tmp_path):
    student = unrecorded(world, tmp_path / "student")

    def identity(commit):
        return ModelIdentity(name="org/teacher", commit=commit)

    scored = rewritten(world, tmp_path / "scored", teacher=identity("1" * 40).to_dict())
    for commit, severity in (("1" * 40, "info"), (None, "info"), ("2" * 40, "error")):
        report = check_teacher_consistency(student, scored, sft_teacher=identity(commit))
        assert report["teacher"].severity == severity


def test_a_stated_teacher_does_not_replace_the_record(world, tmp_path):
    assert (
        check_teacher_consistency(world.student, world.scored, sft_teacher=world.teacher)["provenance"].severity
        == "ok"
    )
    other = save_model(tiny_model(seed=9), tmp_path / "other")
    report = check_teacher_consistency(world.student, world.scored, sft_teacher=other)
    assert [finding.name for finding in report.errors] == ["provenance"]
    assert f"`sft_teacher` is {other}" in report["provenance"].message


# Data without a manifest, or without identities


def test_a_plain_dataset(world):
    dataset = Dataset.from_dict(world.columns)
    report = check_teacher_consistency(world.student, dataset, world.teacher, tolerance=1e-3)
    assert severities(report) == {**dict.fromkeys(CHECKS, "ok"), "manifest": "missing", "rollout_student": "info"}
    assert "have no manifest" in report["manifest"].message
    assert report["policy_gap"].evidence["is_reverse_kl"] is False  # nothing says how it was sampled
    assert severities(check_teacher_consistency(world.student, dataset))["teacher"] == "info"
    streamed = check_teacher_consistency(world.student, dataset.to_iterable_dataset(), world.teacher, tolerance=1e-3)
    assert severities(streamed) == severities(report)


def test_data_without_identities(world, tmp_path):
    scored = rewritten(world, tmp_path / "scored", student=None, teacher=None)
    report = check_teacher_consistency(world.student, scored)
    assert [finding.name for finding in report.errors] == ["manifest"]
    assert "do not record the student and the teacher" in report["manifest"].message
    assert "`trl-blend rollouts` and `trl-blend score`" in report["manifest"].remedy
    assert severities(report)["tokenizer"] == "info"


def test_a_live_teacher_that_gives_the_log_probs_is_the_one_that_scored(world, tmp_path):
    scored = rewritten(world, tmp_path / "scored", student=world.student, teacher=None)
    report = check_teacher_consistency(world.student, scored, world.teacher)
    assert [finding.name for finding in report.errors] == []
    assert report["teacher"].severity == "ok"
    assert "the live teacher gives the stored log-probs" in report["teacher"].message
    other = changed(world.teacher_model, 1.0)
    report = check_teacher_consistency(world.student, scored, other)
    assert {finding.name for finding in report.errors} == {"manifest", "rescored"}
    assert report["teacher"].severity == "info"


# The student


def test_another_rollout_student(world, tmp_path):
    other = save_model(changed(world.student_model, 1e-3), tmp_path / "other")
    record_teacher(other, world.teacher)
    report = check_teacher_consistency(other, world.scored)
    assert [finding.name for finding in report.errors] == ["rollout_student"]
    assert "collect rollouts with this one" in report["rollout_student"].remedy
    loaded = AutoModelForCausalLM.from_pretrained(world.student, dtype=torch.bfloat16)
    assert check_teacher_consistency(loaded, world.scored)["rollout_student"].severity == "info"


def test_a_fresh_adapter_is_still_the_rollout_student(world):
    def check(**settings):
        model = tiny_lora(AutoModelForCausalLM.from_pretrained(world.student), **settings)
        return check_teacher_consistency(model, world.scored)

    fresh = check(init_lora_weights=True)
    assert fresh.ok and fresh["provenance"].severity == fresh["rollout_student"].severity == "ok"
    assert check()["rollout_student"].evidence["differences"] == ["an adapter that only one of them has"]


def test_a_student_that_cannot_be_hashed_is_compared_through_its_checkpoint(world, tmp_path):
    def quantized(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        next(model.parameters()).quant_state = object()
        return model

    finding = check_teacher_consistency(quantized(world.student), world.scored)["rollout_student"]
    assert finding.severity == "ok"
    assert f"quantised in memory (unknown method): compared is the checkpoint {world.student}" in finding.message
    other = save_model(changed(world.student_model, 1e-3), tmp_path / "other")
    assert check_teacher_consistency(quantized(other), world.scored)["rollout_student"].severity == "error"
    model = quantized(world.student)
    model.config._name_or_path = ""
    assert check_teacher_consistency(model, world.scored)["rollout_student"].severity == "missing"


# Tokenizers and templates


def add_token(tokenizer):
    tokenizer.add_tokens(["<tool>"])


def set_eos(tokenizer):
    tokenizer.eos_token = "<unk>"


def set_pad(tokenizer):
    tokenizer.pad_token = "<eos>"


def set_template(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


def unmark_template(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )


def no_template(tokenizer):
    tokenizer.chat_template = None


@pytest.mark.parametrize("role", ["student", "data", "teacher"])
@pytest.mark.parametrize(
    ("change", "check", "severity", "message"),
    [
        (add_token, "tokenizer", "error", "The vocabulary of "),
        (set_eos, "tokenizer", "warning", "end-of-sequence token"),
        (set_pad, "tokenizer", "ok", "are the same"),
        (set_template, "chat_template", "error", "render the same conversation differently"),
        (unmark_template, "chat_template", "info", "render plain conversations alike"),
        (no_template, "chat_template", "warning", "has no chat template, the others do"),
    ],
)
def test_tokenizer_and_template(world, tmp_path, role, change, check, severity, message):
    other = tiny_tokenizer()
    change(other)
    student = identify_model(world.student_model, tokenizer=other if role == "data" else tiny_tokenizer())
    teacher = identify_model(world.teacher_model, tokenizer=other if role == "teacher" else tiny_tokenizer())
    scored = rewritten(world, tmp_path / "scored", student=student.to_dict(), teacher=teacher.to_dict())
    processing_class = other if role == "student" else None
    report = check_teacher_consistency(world.student, scored, processing_class=processing_class)
    assert report[check].severity == severity
    assert message in report[check].message
    if severity in ("error", "warning"):
        assert report[check].remedy
    others = {finding.name for finding in report if finding.severity not in ("ok", "info")}
    assert others <= {check}


def test_no_template_anywhere(world, tmp_path):
    bare = tiny_tokenizer()
    bare.chat_template = None
    entries = {
        name: identify_model(getattr(world, f"{name}_model"), tokenizer=bare).to_dict()
        for name in ("student", "teacher")
    }
    scored = rewritten(world, tmp_path / "scored", **entries)
    finding = check_teacher_consistency(world.student, scored, processing_class=bare)["chat_template"]
    assert (finding.severity, finding.message) == ("ok", "Student, data, teacher have no chat template.")


# Arguments and the report


@pytest.mark.parametrize(
    ("settings", "message"), [({"num_rows": -1}, "num_rows=-1"), ({"tolerance": 0.0}, "tolerance=0.0")]
)
def test_settings_out_of_range(world, settings, message):
    with pytest.raises(ConfigError, match=message):
        check_teacher_consistency(world.student, world.scored, world.teacher, **settings)


def test_data_that_are_not_scored_rollouts(world):
    with pytest.raises(StoreError, match="teacher_logps"):
        check_teacher_consistency(world.student, Dataset.from_dict({"prompt_ids": [[1]], "completion_ids": [[1]]}))
    with pytest.raises(StoreError, match="no/such-data"):
        check_teacher_consistency(world.student, "no/such-data")


def test_report(world, tmp_path):
    report = check_teacher_consistency(unrecorded(world, tmp_path / "student"), world.scored)
    fields = json.loads(json.dumps(report.to_dict()))
    assert fields["ok"] is False
    assert [finding["name"] for finding in fields["findings"]] == list(CHECKS)
    assert "[missing] provenance: " in str(report)
    with pytest.raises(KeyError, match="no check 'nothing'"):
        report["nothing"]


def test_no_model_is_changed(world):
    student = AutoModelForCausalLM.from_pretrained(world.student).train()
    before = identify_model(student)
    check_teacher_consistency(student, world.scored, student, num_rows=2)
    assert student.training
    assert identify_model(student) == before
    assert all(parameter.grad is None for parameter in student.parameters())

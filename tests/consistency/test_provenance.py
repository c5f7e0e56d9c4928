import json
from unittest.mock import Mock, patch

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.models.checkpoints import changed, hub_snapshot, save_model
from tests.tiny import tiny_lora, tiny_model
from trl_blend.consistency.provenance import (
    PROVENANCE_FILE,
    TeacherProvenance,
    TeacherProvenanceCallback,
    read_provenance,
    record_teacher,
)
from trl_blend.errors import ConfigError
from trl_blend.models.fingerprint import identify_model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_model(tiny_model(seed=1), tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def student(tmp_path):
    return save_model(tiny_model(seed=2), tmp_path / "student")


def test_record_and_read(student, teacher):
    assert read_provenance(student) is None
    written = record_teacher(student, teacher, note="samples of May")
    found = read_provenance(student)
    assert found == written
    assert found.teacher == identify_model(teacher)
    assert (found.how, found.note) == ("recorded", "samples of May")
    assert found.created_at.endswith("+00:00")
    assert read_provenance(AutoModelForCausalLM.from_pretrained(student)) == written
    assert read_provenance(tiny_model()) is None


def test_another_teacher_is_refused_without_overwrite(student, teacher):
    record_teacher(student, teacher)
    other = changed(tiny_model(seed=1), 1e-3)
    with pytest.raises(ConfigError, match="records another teacher, .*overwrite=True"):
        record_teacher(student, other)
    assert read_provenance(student).teacher.name == teacher
    record_teacher(student, tiny_model(seed=1))  # the same weights
    record_teacher(student, other, overwrite=True)
    assert read_provenance(student).teacher.weights == identify_model(other).weights


def test_record_needs_a_folder_and_a_teacher(tmp_path, teacher):
    with pytest.raises(ConfigError, match="checkpoint_folder=.*nowhere' is not a folder"):
        record_teacher(tmp_path / "nowhere", teacher)
    with pytest.raises(ConfigError, match="holds no model"):
        record_teacher(tmp_path, teacher)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="'no/teacher' is neither a folder"):
        record_teacher(tmp_path, "no/teacher")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_an_adapter_has_its_own_record_or_that_of_its_base(student, teacher, tmp_path):
    model = tiny_lora(AutoModelForCausalLM.from_pretrained(student))
    adapter = str(tmp_path / "adapter")
    model.save_pretrained(adapter)
    assert read_provenance(adapter) is None
    record_teacher(student, teacher, note="base")
    assert read_provenance(adapter).note == "base"
    record_teacher(adapter, teacher, note="adapter")
    assert read_provenance(adapter).note == "adapter"


def test_in_memory_a_trained_adapter_has_no_record_and_a_new_one_that_of_its_base(student, teacher):
    record_teacher(student, teacher, note="base")
    model = tiny_lora(AutoModelForCausalLM.from_pretrained(student), init_lora_weights=True)
    assert read_provenance(model).note == "base"
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    assert read_provenance(model) is None  # of several nobody says what they change together
    trained = tiny_lora(AutoModelForCausalLM.from_pretrained(student))
    assert read_provenance(trained) is None


def test_of_a_hub_id(tmp_path, monkeypatch, teacher):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for branch, commit in (("main", "1" * 40), ("v2", "2" * 40)):
        folder = hub_snapshot(tmp_path, "org/student", commit, branch)
        save_model(tiny_model(), folder)
        record_teacher(folder, teacher, note=branch)
    assert read_provenance("org/student").note == "main"
    assert read_provenance("org/student", revision="v2").note == "v2"
    with pytest.raises(ConfigError, match="'org/other' is neither"):
        read_provenance("org/other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a teacher provenance record \\(JSONDecodeError"),
        ("[]", "is not a teacher provenance record"),
        ('{"schema_version": 1, "how": "recorded"}', "record \\(KeyError: 'teacher'\\). Delete it and record"),
        ('{"schema_version": 3}', "schema_version=3; this release reads 1. Update trl_blend"),
    ],
)
def test_a_broken_record_is_an_error_not_a_missing_one(student, text, message):
    with open(f"{student}/{PROVENANCE_FILE}", "w") as file:
        file.write(text)
    with pytest.raises(ConfigError, match=message):
        read_provenance(student)


def test_json_round_trip(student, teacher):
    record_teacher(student, teacher)
    with open(f"{student}/{PROVENANCE_FILE}") as file:
        fields = json.load(file)
    assert TeacherProvenance.from_dict(fields) == read_provenance(student)
    assert fields["teacher"]["weights"]["sha256"] == identify_model(teacher).weights.sha256
    assert fields["schema_version"] == 1


def test_several_teachers(student, teacher):
    first, second, third = (identify_model(tiny_model(seed=seed)) for seed in (1, 5, 7))
    record_teacher(student, teacher, note="two parts")
    written = record_teacher(student, second, add=True)
    assert read_provenance(student) == written and written.note == "two parts"
    assert [one.weights for one in written.teachers] == [first.weights, second.weights]
    with open(f"{student}/{PROVENANCE_FILE}") as file:
        fields = json.load(file)
    assert TeacherProvenance.from_dict(fields) == written
    # Adding one again changes nothing, one of the two alone is another record
    assert len(record_teacher(student, first, add=True).teachers) == 2
    for one in (first, third):
        with pytest.raises(ConfigError, match="records another teacher, .* and .*add=True.*overwrite=True"):
            record_teacher(student, one)
    with pytest.raises(ConfigError, match="`add=True` keeps the recorded teachers"):
        record_teacher(student, third, add=True, overwrite=True)
    assert len(record_teacher(student, third, overwrite=True).teachers) == 1


@pytest.mark.parametrize("routes", [(), (("math",), ("code", "prose"))])
def test_the_nearest_teacher_comes_first(routes):
    first, second, third = (identify_model(tiny_model(seed=seed)) for seed in (1, 5, 7))
    record = TeacherProvenance(first, "recorded", "now", others=(second,), routes=routes)
    assert record.nearest(second).teachers == (second, first)
    assert record.nearest(second).routes_of_teachers == record.routes_of_teachers[::-1]
    assert record.nearest(first) == record.nearest(third) == record.nearest(None) == record


def test_the_routes_of_a_teacher(student, teacher):
    second = identify_model(tiny_model(seed=5))
    record_teacher(student, teacher)  # a record of before, which gets its route with `add`
    record_teacher(student, second, add=True, route=["code", "prose"])
    assert read_provenance(student).routes == ((), ("code", "prose"))
    written = record_teacher(student, teacher, add=True, route="math")
    assert read_provenance(student) == written and written.routes == (("math",), ("code", "prose"))
    assert record_teacher(student, second, add=True, route="code").routes == written.routes
    assert record_teacher(student, teacher, add=True, route="logic").routes[0] == ("math", "logic")
    with open(f"{student}/{PROVENANCE_FILE}") as file:
        fields = json.load(file)
    assert TeacherProvenance.from_dict({**fields, "routes": []}).routes == ()
    with pytest.raises(ConfigError, match="`route='math'` is that of .* and of .* A row has one teacher"):
        record_teacher(student, second, add=True, route="math")
    assert record_teacher(student, second, overwrite=True, route="math").routes == (("math",),)


def test_a_teacher_recorded_again_keeps_its_routes_and_note(student, teacher):
    record_teacher(student, teacher, route="math", note="samples of May")
    again = record_teacher(student, teacher, route="code")
    assert (again.routes, again.note) == ((("math", "code"),), "samples of May")


def trainer(model, output_dir, callback, **settings):
    args = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        report_to=[],
        disable_tqdm=True,
        **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **settings},
    )
    ids = torch.arange(6, 14)
    rows = [{"input_ids": ids, "labels": ids}] * 4
    return Trainer(model, args, train_dataset=rows, callbacks=[callback])


def test_callback_writes_beside_every_checkpoint(tmp_path, teacher):
    callback = TeacherProvenanceCallback(teacher, note="run 1")
    run = trainer(tiny_model(), tmp_path, callback)
    with patch(
        "trl_blend.consistency.provenance.identify_model",
        side_effect=lambda *args, **kwargs: identify_model(*args, **kwargs),
    ) as identified:
        run.train()
    assert identified.call_count == 1
    run.save_model()
    expected = identify_model(teacher)
    for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        found = read_provenance(str(folder))
        assert found.teacher == expected
        assert (found.how, found.note) == ("recorded", "run 1")
        assert identify_model(str(folder)).weights is not None
    assert read_provenance(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")).note == "run 1"


def test_callback_of_several_teachers(tmp_path, teacher):
    other = identify_model(tiny_model(seed=5))
    trainer(tiny_model(), tmp_path, TeacherProvenanceCallback([teacher, other]), max_steps=2).train()
    assert read_provenance(str(tmp_path / "checkpoint-2")).teachers == (identify_model(teacher), other)
    run = trainer(tiny_model(), tmp_path, TeacherProvenanceCallback(teacher))
    with pytest.raises(ConfigError, match="records another teacher"):
        run.train(resume_from_checkpoint=True)
    run = trainer(tiny_model(), tmp_path, TeacherProvenanceCallback([other, teacher]))  # in any order
    run.train(resume_from_checkpoint=True)


def test_callback_of_routes(tmp_path, teacher):
    other = identify_model(tiny_model(seed=5))
    callback = TeacherProvenanceCallback({"math": teacher, "code": other, "logic": teacher})
    trainer(tiny_model(), tmp_path, callback, max_steps=2).train()
    found = read_provenance(str(tmp_path / "checkpoint-2"))
    assert found.routes_of_teachers == [(identify_model(teacher), ("math", "logic")), (other, ("code",))]


def test_callback_identifies_the_teacher_before_the_training(tmp_path):
    """A teacher that is trained on in place would otherwise be recorded as what it became."""
    model = tiny_model()
    before = identify_model(model)
    trainer(model, tmp_path, TeacherProvenanceCallback(model)).train()
    assert identify_model(model).weights != before.weights
    assert read_provenance(str(tmp_path / "checkpoint-4")).teacher.weights == before.weights


def test_callback_fails_before_the_first_step(tmp_path):
    run = trainer(tiny_model(), tmp_path, TeacherProvenanceCallback("no/teacher"))
    with pytest.raises(ConfigError, match="'no/teacher' is neither a folder"):
        run.train()
    assert run.state.global_step == 0


def test_callback_refuses_to_resume_with_another_teacher(tmp_path, teacher):
    trainer(tiny_model(), tmp_path, TeacherProvenanceCallback(teacher), max_steps=2).train()
    other = identify_model(tiny_model(seed=5))
    run = trainer(tiny_model(), tmp_path, TeacherProvenanceCallback(other))
    with pytest.raises(ConfigError, match="records another teacher"):
        run.train(resume_from_checkpoint=True)
    trainer(tiny_model(), tmp_path, TeacherProvenanceCallback(teacher)).train(resume_from_checkpoint=True)
    assert read_provenance(str(tmp_path / "checkpoint-4")).teacher.name == teacher
    trainer(tiny_model(), tmp_path, TeacherProvenanceCallback(other)).train()  # a new run
    assert read_provenance(str(tmp_path)).teacher == other


def test_only_the_main_process_writes(tmp_path, teacher):
    run = trainer(tiny_model(), tmp_path, TeacherProvenanceCallback(teacher))
    callback, state = TeacherProvenanceCallback(teacher), run.state
    state.is_world_process_zero = False
    for event in (callback.on_train_begin, callback.on_save, callback.on_train_end):
        event(run.args, state, run.control)
    assert not (tmp_path / PROVENANCE_FILE).exists()


def test_it_is_among_the_files_that_are_pushed(tmp_path, teacher):
    run = trainer(tiny_model(), tmp_path, TeacherProvenanceCallback(teacher), max_steps=1, save_strategy="no")
    run.train()
    run.hub_model_id = "me/model"
    api = Mock()
    with (
        patch.object(run, "init_hf_repo"),
        patch.object(run, "create_model_card"),
        patch("transformers.trainer.hf_api", return_value=api),
    ):
        run.push_to_hub()
    upload = api.upload_folder.call_args.kwargs
    assert upload["folder_path"] == str(tmp_path)
    sent = filter_repo_objects([path.name for path in tmp_path.iterdir()], ignore_patterns=upload["ignore_patterns"])
    assert {PROVENANCE_FILE, "model.safetensors"} <= set(sent)

"""Which weight, revision and folder a save names, and what it takes away of an earlier run in the same folder."""

import logging
import shutil
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from tests.export.conftest import modules_cache  # noqa: F401
from tests.hub.server import hub_endpoint  # noqa: F401
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import runs
from tests.trainers.logit_mix_grpo.test_saving import LORA, MIX, exported_greedy, spec, trainers_greedy
from trl_blend.errors import UnsupportedError


NO_CHECKPOINTS = {**MIX, "max_steps": 1, "save_strategy": "no"}


def push(models, name, repository):
    """Commit of one of the models under the name of a repository."""
    tiny_tokenizer().push_to_hub(repository)
    return AutoModelForCausalLM.from_pretrained(models / name).push_to_hub(repository).oid


def names(folder):
    return {path.relative_to(folder).parts[0] for path in Path(folder).rglob("*") if path.is_file()}


# The best checkpoint


@pytest.mark.usefixtures("modules_cache")
def test_the_best_student_is_saved_with_its_own_weight(build):
    settings = {**MIX, "max_steps": 3, "teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "x", "eval_strategy": "steps", "eval_steps": 1}
    trainer = build(**settings, **best, trainer_kwargs={"eval_dataset": runs.dataset()})
    trainer.evaluate = lambda *args, **kwargs: {"eval_x": float(trainer.state.global_step == 2)}
    trainer.train()
    trainer.save_model()
    output = Path(trainer.args.output_dir)
    assert spec(output)["weights"] == pytest.approx([0.2]) and spec(output)["step"] == 2
    assert exported_greedy(output) == trainers_greedy(trainer)
    saved, best, last = (output / name / "model.safetensors" for name in ("", "checkpoint-2", "checkpoint-3"))
    assert saved.read_bytes() == best.read_bytes() != last.read_bytes()
    trainer.args.load_best_model_at_end, trainer.args.max_steps = False, 4
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-3"))
    trainer.save_model()
    assert not names(output) & {"mixing.json", "custom_generate", "reference"}  # the weight is 0: the student alone


# Revisions


def test_the_revision_that_the_teacher_was_loaded_from(build, models, hub_endpoint, tmp_path):  # noqa: F811
    old = push(models, "teacher", "me/teacher")
    push(models, "second", "me/teacher")
    load = {"revision": old, "dtype": "float32"}
    trainer = build(teacher="me/teacher", teacher_model_init_kwargs=load, **MIX)
    trainer.save_model()
    assert spec(trainer.args.output_dir)["references"][0]["commit"] == old
    # Not what the name and the commit alone lead to
    trainer = build(teacher="me/teacher", teacher_model_init_kwargs={**load, "rms_norm_eps": 0.1}, **MIX)
    trainer.save_model()
    assert spec(trainer.args.output_dir)["references"][0]["path"] == "reference"


@pytest.mark.usefixtures("modules_cache")
@pytest.mark.parametrize("in_memory", [False, True])
def test_the_revision_that_the_base_was_loaded_from(build, models, hub_endpoint, in_memory):  # noqa: F811
    old = push(models, "teacher", "me/base")
    new = push(models, "second", "me/base")
    for revision in (old, new):
        student = AutoModelForCausalLM.from_pretrained("me/base", revision=revision) if in_memory else "me/base"
        load = {} if in_memory else {"model_init_kwargs": {"revision": revision}}
        trainer = build(student=student, teacher=None, trainer_kwargs={"peft_config": LORA}, **load, **MIX)
        trainer.save_model()
        output = Path(trainer.args.output_dir)
        # A model in memory does not say where it is from: pinned if it is what the name stands for, else copied
        commit = None if in_memory and revision == old else revision
        assert spec(output)["base"]["commit"] == commit and (output / "reference").exists() == (commit is None)
        assert exported_greedy(output) == trainers_greedy(trainer)


# Folders


@pytest.mark.usefixtures("modules_cache")
@pytest.mark.parametrize("kind", [{}, {"trainer_kwargs": {"peft_config": LORA}}], ids=["full", "lora"])
@pytest.mark.parametrize("other", [{"objective": "student"}, {"teacher_weight": 0.0}], ids=["student", "off"])
def test_another_run_in_the_folder_does_not_mix(models, tmp_path, kind, other):
    mixed = runs.build(models, tmp_path, **NO_CHECKPOINTS, **kind)
    mixed.save_model()
    assert {"mixing.json", "custom_generate", "reference"} <= names(tmp_path)
    trainer = runs.build(models, tmp_path, **{**MIX, "max_steps": 1, **other}, **kind)
    trainer.train()
    trainer.save_model()
    left = {path.name for path in tmp_path.rglob("*")}  # those of the checkpoint too
    assert "checkpoint-1" in left
    assert not left & {"mixing.json", "custom_generate", "reference", "base", "adapter"}
    configs = [path.read_text() for path in tmp_path.rglob("config.json")]
    assert not any("auto_map" in config for config in configs)
    with trainer._decoding_greedily(), trainer.policy((0.0,)):
        assert exported_greedy(tmp_path) == trainer._generate(list(runs.PROMPTS))[1]


def test_distillation_in_the_folder_does_not_mix(models, tmp_path):
    runs.build(models, tmp_path, **NO_CHECKPOINTS).save_model()
    runs.build_opd(models, tmp_path, max_steps=1).save_model()
    assert not names(tmp_path) & {"mixing.json", "custom_generate", "reference"}


def test_what_is_not_ours_stays(models, tmp_path):
    runs.build(models, tmp_path, **NO_CHECKPOINTS).save_model()
    (tmp_path / "reference" / "notes.txt").write_text("mine")
    (tmp_path / "base").mkdir()  # no mixing.json has ever named it
    (tmp_path / "base" / "model.safetensors").write_text("mine")
    (tmp_path / "custom_generate" / "generate.py").write_text("def generate(): 'mine'")
    runs.build(models, tmp_path, **{**NO_CHECKPOINTS, "objective": "student"}).save_model()
    assert [path.name for path in (tmp_path / "reference").iterdir()] == ["notes.txt"]
    assert {"custom_generate", "base"} <= names(tmp_path) and "mixing.json" not in names(tmp_path)


LORA_ON_BASE = {"teacher": None, "trainer_kwargs": {"peft_config": LORA}}
OF_TWO = {"teacher": ["teacher", "second"], "teacher_weight": [0.3, 0.2]}


@pytest.mark.parametrize("pushes", [False, True])
@pytest.mark.parametrize(
    ("former", "left"),
    [(OF_TWO, {"reference_0", "reference_1"}), (LORA_ON_BASE, {"adapter"})],
    ids=["fewer teachers", "no adapter"],
)
def test_another_mixture_in_the_folder(models, tmp_path, hub_endpoint, former, left, pushes):  # noqa: F811
    folder = tmp_path / "run"
    runs.build(models, folder, **{**NO_CHECKPOINTS, **former}).save_model()
    assert left <= names(folder)
    hub = {"push_to_hub": True, "hub_strategy": "every_save", "hub_always_push": True, "hub_model_id": "me/again"}
    trainer = runs.build(models, folder, **{**MIX, "max_steps": 1}, **(hub if pushes else {}))
    if pushes:
        trainer.train()
        assert not names(snapshot_download("me/again")) & left
    else:
        trainer.save_model()
    assert {"reference", "mixing.json"} <= names(folder) and not names(folder) & left


@pytest.mark.usefixtures("modules_cache")
def test_a_base_in_the_folder_itself(models, tmp_path):
    base = tmp_path / "run" / "base"
    shutil.copytree(models / "student", base)
    weights = (base / "model.safetensors").read_bytes()
    for _ in range(2):  # the second run finds the mixing.json of the first, which names it
        trainer = runs.build(
            models, tmp_path / "run", student=str(base), trainer_kwargs={"peft_config": LORA}, **NO_CHECKPOINTS
        )
        trainer.save_model()
        assert spec(tmp_path / "run")["base"]["path"] == "base"
        assert (base / "model.safetensors").read_bytes() == weights
        assert exported_greedy(tmp_path / "run") == trainers_greedy(trainer)


def test_a_copy_that_was_replaced_by_a_link(models, tmp_path):
    folder, shared = tmp_path / "run", tmp_path / "shared"
    runs.build(models, folder, **NO_CHECKPOINTS).save_model()
    shutil.move(folder / "reference", shared)
    (folder / "reference").symlink_to(shared)
    before = {path.name: path.read_bytes() for path in shared.iterdir()}
    runs.build(models, folder, **NO_CHECKPOINTS).save_model()
    assert {path.name: path.read_bytes() for path in shared.iterdir()} == before
    assert (folder / "reference").is_dir() and not (folder / "reference").is_symlink()


def test_what_is_called_like_an_adapter_stays(models, tmp_path):
    (tmp_path / "adapter_old").mkdir()
    (tmp_path / "adapter_notes.txt").write_text("mine")
    for _ in range(2):
        runs.build(models, tmp_path, **LORA_ON_BASE, **NO_CHECKPOINTS).save_model()
    assert (tmp_path / "adapter_old").is_dir() and (tmp_path / "adapter_notes.txt").is_file()


@pytest.mark.parametrize("kind", [{}, {"trainer_kwargs": {"peft_config": LORA}}], ids=["full", "lora"])
def test_a_checkpoint_names_folders_as_seen_from_it(models, tmp_path, kind):
    """It may be pushed: where they are on this machine is nobody's business."""
    trainer = runs.build(models, tmp_path, **{**MIX, "max_steps": 1}, **kind)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    found = spec(checkpoint)
    named = [found["references"][0], *([found["base"]] if kind else [])]
    for source, name in zip(named, ("teacher", "student"), strict=False):
        assert source["path"].startswith("..") and (checkpoint / source["path"]).samefile(models / name)


def test_a_folder_that_is_called_like_a_checkpoint(models, tmp_path):
    trainer = runs.build(models, tmp_path / "checkpoint-7", **{**MIX, "max_steps": 1})
    trainer.train()
    trainer.save_model()
    assert names(tmp_path) == {"checkpoint-7"}
    output = tmp_path / "checkpoint-7"
    trainer.save_model(output / "checkpoint-8")
    decodes = [
        (folder / "reference").is_dir() for folder in (output, output / "checkpoint-1", output / "checkpoint-8")
    ]
    assert decodes == [True, False, True]


def test_an_adapter_of_another_name_is_refused(build, models):
    student = get_peft_model(AutoModelForCausalLM.from_pretrained(models / "student"), LORA, adapter_name="mine")
    with pytest.raises(UnsupportedError, match="'mine'.*adapter_name"):
        build(student=student, teacher=None, **MIX)


# Pushes


def test_a_checkpoint_without_a_mixture_takes_the_former_one_along(build, tmp_path):
    trainer = build(**MIX)
    trainer.save_model()
    output = Path(trainer.args.output_dir)
    trainer.mixed_policy_files.finish(output, (0.4,), 1, saved=tmp_path)  # sharded weights only
    assert not names(output) & {"mixing.json", "custom_generate", "reference"}


def test_pushed_checkpoints_of_another_run_do_not_mix(models, tmp_path, hub_endpoint):  # noqa: F811
    folder = tmp_path / "run"
    runs.build(models, folder, **NO_CHECKPOINTS).save_model()
    hub = {"push_to_hub": True, "hub_strategy": "every_save", "hub_always_push": True, "hub_model_id": "me/plain"}
    trainer = runs.build(models, folder, **{**MIX, "max_steps": 1, "objective": "student"}, **hub)
    trainer.train()
    pushed = names(snapshot_download("me/plain"))
    assert "model.safetensors" in pushed and not pushed & {"mixing.json", "custom_generate", "reference"}


def test_uploads_of_other_peoples_weights_are_announced(build, models, hub_endpoint, caplog):  # noqa: F811
    push(models, "teacher", "me/teacher")
    hub = {"push_to_hub": True, "hub_model_id": "me/mixed"}
    with caplog.at_level(logging.WARNING):
        build(teacher="me/teacher", **MIX, **hub)
        build(**MIX)
        assert "uploads" not in caplog.text
        trainer = build(teacher=["me/teacher", tiny_model(seed=5)], **{**MIX, "teacher_weight": [0.1, 0.1]}, **hub)
        size = sum(p.numel() * 4 for p in trainer.partners[1].parameters()) / 1e9
        assert f"uploads teacher_model[1] ({size:.2g} GB) too" in caplog.text
        build(teacher=None, trainer_kwargs={"peft_config": LORA}, **MIX, **hub)
    assert caplog.text.count("uploads") == 2 and "the base of `model` (" in caplog.text

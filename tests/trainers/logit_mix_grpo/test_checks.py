"""What the constructor refuses beside `tests/trainers/test_refusals.py`, before a model is loaded where it can."""

import functools
import logging
import shutil

import pytest
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
)
from trl import GRPOTrainer

from tests.trainers import runs
from trl_blend.errors import ConfigError, TokenizerMismatchError, UnsupportedError


@pytest.fixture
def refuses(build, monkeypatch):
    """Assert that the constructor raises before anything is loaded."""
    return functools.partial(runs.check_refusal, build, GRPOTrainer, monkeypatch)


def test_the_guard_sees_several_models_that_are_loaded(refuses):
    refuses(runs.ModelLoaded, None, teacher=["teacher", "second"], teacher_weight=[0.2, 0.1])


# Schedule and number of teachers


@pytest.mark.parametrize(
    ("eval_dataset", "state"),
    [(None, "missing"), ({"test": runs.dataset()}, "a dictionary"), (runs.dataset().select([]), "empty")],
)
def test_adaptive_needs_one_validation_set(refuses, eval_dataset, state):
    settings = {"teacher_weight_schedule": "adaptive", "trainer_kwargs": {"eval_dataset": eval_dataset}}
    message = refuses(ConfigError, "`eval_dataset`", **settings)
    assert f"is {state}" in message and "'adaptive'" in message


@pytest.mark.parametrize(
    ("teacher", "weights"), [("teacher", [0.2, 0.1]), (["teacher", "second"], [0.2]), (["teacher"], [0.2, 0.1])]
)
def test_one_weight_per_teacher(refuses, teacher, weights):
    num_teachers = len(teacher) if isinstance(teacher, list) else 1
    refuses(
        ConfigError, rf"{len(weights)} value\(s\) for {num_teachers} teacher", teacher=teacher, teacher_weight=weights
    )


def test_adaptive_with_tools(refuses):
    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    for kwargs in ({"tools": [add]}, {"environment_factory": object}):
        kwargs["eval_dataset"] = runs.dataset()
        refuses(UnsupportedError, "`tools`", teacher_weight_schedule="adaptive", trainer_kwargs=kwargs)
        refuses(runs.ModelLoaded, None, trainer_kwargs=kwargs)


def test_one_revision_for_several_teachers_is_ambiguous(refuses):
    settings = {"teacher": ["teacher", "second"], "teacher_weight": [0.1, 0.1], "teacher_model_revision": "v2"}
    refuses(ConfigError, "`teacher_model_revision='v2'` is ambiguous for 2 teachers", **settings)


def test_the_differing_teacher_of_several_is_named(refuses, other_tokenizer):
    settings = {"teacher": ["teacher", str(other_tokenizer)], "teacher_weight": [0.1, 0.1]}
    refuses(TokenizerMismatchError, r"`teacher_model\[1\]`", **settings)


# Rollouts that are drawn without the teacher

ROLLOUTS = {
    "use_transformers_continuous_batching": {"use_transformers_continuous_batching": True},
    "rollout_func": {"trainer_kwargs": {"rollout_func": lambda prompts, trainer: {}}},
}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollouts_without_the_teacher(refuses, name):
    message = refuses(UnsupportedError, f"`{name}` draws tokens without the teacher", **ROLLOUTS[name])
    assert "`teacher_weight=[0.5]`" in message
    # A weight that decays to 0, or starts there, still mixes
    decay = {"teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 5}
    refuses(UnsupportedError, f"`{name}`", **decay, **ROLLOUTS[name])


@pytest.mark.parametrize("name", ROLLOUTS)
def test_nothing_is_refused_at_weight_zero(refuses, name):
    refuses(runs.ModelLoaded, None, teacher_weight=0.0, **ROLLOUTS[name])


# What only the loaded student shows


def test_a_warper_of_the_mixed_objective_is_a_warning(build, caplog):
    with caplog.at_level(logging.WARNING):
        build(top_p=0.9)
    assert "{'top_p': 0.9}" in caplog.text and "change the distribution" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        build()
    assert "change the distribution" not in caplog.text


@pytest.fixture(params=["in memory", "by name"])
def truncating_student(models, tmp_path, request):
    """A student whose checkpoint carries sampling settings, as those of many chat models do."""
    student = AutoModelForCausalLM.from_pretrained(models / "student")
    student.generation_config.update(do_sample=True, typical_p=0.5, top_k=5)
    if request.param == "in memory":
        return student
    folder = shutil.copytree(models / "student", tmp_path / "truncating")
    student.save_pretrained(folder)
    return str(folder)


def test_warpers_of_the_students_checkpoint(build, truncating_student, caplog):
    trainer = build(parent=True, student=truncating_student)
    taken, _ = trainer.model._prepare_generation_config(trainer.generation_config)
    # What TRL leaves open comes from the checkpoint: `top_k` is 0 in its config, `typical_p` is not there
    assert (taken.typical_p, taken.top_k) == (0.5, 0)
    settings = {"objective": "student", "student": truncating_student}
    with pytest.raises(ConfigError, match=r"^{'typical_p': 0.5}.*generation_config.json.*`generation_kwargs`"):
        build(**settings)
    with pytest.raises(ConfigError, match=r"^{'top_k': 5, 'typical_p': 0.5}"):
        build(top_k=None, **settings)
    build(generation_kwargs={"typical_p": 1.0}, **settings)
    build(student=truncating_student, objective="mixed")
    assert "{'typical_p': 0.5}" in caplog.text


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_is_a_warning(build, caplog, dropout):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=dropout)
    with caplog.at_level(logging.WARNING):
        build(teacher=None, trainer_kwargs={"peft_config": config})
    assert ("The student has dropout" in caplog.text) == (dropout > 0)

"""The README.md that is written beside a checkpoint."""

import ast
import re

import pytest
import yaml
from peft import LoraConfig

from tests.tiny import tiny_model
from tests.trainers import runs
from trl_blend import __version__


NOTICE = "Decoded alone, this model is not the policy whose reward was maximised"


def card_of(trainer) -> str:
    trainer.create_model_card(model_name="tiny")
    with open(f"{trainer.args.output_dir}/README.md", encoding="utf-8") as file:
        return file.read()


def settings_of(card: str) -> dict[str, str]:
    """The rows of the card's table."""
    return dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", card, flags=re.MULTILINE))


def assert_complete(card):
    # A double brace of BibTeX is followed by text, a placeholder by a space
    assert not re.search(r"\[\[|\[%|\[#|\{\{ |\{%|%\}", card)
    assert "None" not in card.split("---", 2)[2]
    metadata = yaml.safe_load(card.split("---")[1])
    assert {"trl", "trl-blend", "logit-mix-grpo"} <= set(metadata["tags"])
    assert metadata["library_name"] == "transformers"
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return ast.parse(code), code


def names_used(code):
    return {node.id for node in ast.walk(code) if isinstance(node, ast.Name)}


def test_mixed(build, models):
    settings = {"teacher_weight_schedule": "cosine", "teacher_weight_decay_steps": 4, "temperature": 0.7}
    trainer = build(teacher_weight=0.4, max_steps=2, save_strategy="steps", save_steps=2, **settings)
    trainer.train()
    path = f"{trainer.args.output_dir}/README.md"
    with open(path, encoding="utf-8") as file:
        card = file.read()
    tree, code = assert_complete(card)
    rows = settings_of(card)
    assert rows["teacher (frozen)"] == str(models / "teacher")
    assert rows["teacher weight at step 0"] == "0.4"
    assert rows["schedule"] == "cosine to 0 in 4 steps"
    assert float(rows["weight at the end"].strip()) == pytest.approx(0.2)
    assert rows["mixing space"] == "logits"
    assert rows["objective"] == "mixed"
    assert rows["loss type, ratio level"] == f"{trainer.args.loss_type}, token"
    assert rows["generations per prompt, temperature"] == "4, 0.7"
    assert NOTICE in card
    assert "arXiv:2605.20555" in card and "gan2026complementing" in card and "huggingface.co/papers/2605.20555" in card
    assert "zhang2026logitfusion" not in card and "deepseek" not in card.lower()
    # The example decodes with the reference
    assert {"blended_generation", "LogitMixing", "references"} <= names_used(tree)
    assert str(models / "teacher") in code
    assert f"trl_blend: {__version__}" in card


def test_student(build, models):
    settings = {"teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 10}
    card = card_of(build(objective="student", teacher_weight=0.5, mixing_space="probs", is_clip_max=2.5, **settings))
    tree, _ = assert_complete(card)
    rows = settings_of(card)
    assert rows["teacher (frozen)"] == str(models / "teacher")
    assert rows["schedule"] == "linear to 0 in 10 steps"
    assert rows["mixing space"] == "probs"
    assert rows["objective"] == "student, importance ratio clipping `max` at 2.5"
    assert NOTICE not in card and "blended_generation" not in card and "pipeline" in names_used(tree)
    assert "deployed alone" in card
    assert "zhang2026logitfusion" in card and "Logit fusion" in card
    assert "2605.20555" not in card and "gan2026" not in card


@pytest.mark.parametrize("mode", ["ppo", "none"])
def test_student_without_a_cap(build, mode):
    card = card_of(build(objective="student", is_clip_mode=mode))
    assert settings_of(card)["objective"] == f"student, importance ratio clipping `{mode}`"


def test_probability_mixing_is_decoded_so(build):
    tree, _ = assert_complete(card_of(build(mixing_space="probs")))
    assert "ProbabilityMixing" in names_used(tree) and "LogitMixing" not in names_used(tree)


def test_several_teachers(build, models):
    card = card_of(build(teacher=["teacher", "second"], teacher_weight=[0.2, 0.1]))
    assert_complete(card)
    assert settings_of(card)["teacher (frozen)"] == f"{models / 'teacher'}, {models / 'second'}"
    assert settings_of(card)["teacher weight at step 0"] == "0.2, 0.1"


def test_the_base_of_the_student(build):
    peft_config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    trainer = build(teacher=None, trainer_kwargs={"peft_config": peft_config})
    trainer.create_model_card(model_name="tiny")
    with open(f"{trainer.args.output_dir}/README.md", encoding="utf-8") as file:
        card = file.read()
    assert settings_of(card)["teacher (frozen)"] == "the student's base, adapters disabled"
    assert NOTICE in card and "references = None" in card


def test_an_unnamed_teacher(build):
    card = card_of(build(teacher=tiny_model(seed=1)))
    assert settings_of(card)["teacher (frozen)"] == "an unnamed model"


def test_without_a_teacher(build):
    card = card_of(build(teacher_weight=0.0))
    assert settings_of(card)["teacher (frozen)"] == "none"
    assert NOTICE not in card
    assert_complete(card)


def test_adaptive(build):
    settings = {"teacher_weight_schedule": "adaptive", "trainer_kwargs": {"eval_dataset": runs.dataset()}}
    trainer = build(teacher_weight=0.5, **settings)
    trainer.adaptive_weights = (0.25,)
    rows = settings_of(card_of(trainer))
    assert (rows["schedule"], rows["teacher weight at step 0"], rows["weight at the end"]) == (
        "adaptive",
        "0.5",
        "0.25",
    )

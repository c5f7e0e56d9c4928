"""What the loaded student brings along: dropout, sampling settings in its checkpoint, frozen adapter weights."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig

from tests.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.trainers.runs import dataset, train
from trl_blend.errors import ConfigError, UnsupportedError


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def test_greedy_decoding_ignores_dropout(build):
    trainer = build(
        teacher=None, teacher_weight=0.3, trainer_kwargs={"peft_config": LoraConfig(lora_dropout=0.5, **LORA)}
    )
    trainer.model.train()
    state, rows = torch.get_rng_state(), list(dataset())
    first, second = (trainer.greedy_rewards(rows, (0.3,)).rewards for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_rollouts_are_drawn_without_dropout(build, caplog, dropout):
    """At a vanishing weight the ratio is 1 without dropout; with it, only the loss's own forward is noisy."""
    trainer = build(
        objective="student",
        teacher_weight=1e-7,
        learning_rate=0.0,
        trainer_kwargs={"peft_config": LoraConfig(lora_dropout=dropout, **LORA)},
    )
    assert ("has dropout" in caplog.text) == (dropout > 0)
    inputs = train(trainer).calls[0].inputs
    student = trainer.accelerator.unwrap_model(trainer.model).eval()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    length = inputs["completion_ids"].size(1)
    with torch.no_grad():
        logits = student(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1].double()
    logps = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)
    valid = inputs["completion_mask"].bool()
    torch.testing.assert_close(inputs["old_per_token_logps"][valid].double(), logps[valid], atol=1e-4, rtol=0)


@pytest.mark.parametrize("objective", ["student", "mixed"])
def test_truncation_in_the_checkpoint_is_seen(build, models, tmp_path, caplog, objective):
    student = tmp_path / "student"
    shutil.copytree(models / "student", student)
    path = student / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"min_p": 0.2, "do_sample": True}))
    if objective == "student":
        with pytest.raises(ConfigError, match="min_p.*0.2.*generation_config.json"):
            build(student=str(student), objective=objective, teacher_weight=0.3)
    else:
        build(student=str(student), objective=objective, teacher_weight=0.3)
        assert "min_p" in caplog.text


def test_frozen_adapter_weights_stay_frozen(build):
    model = tiny_lora(tiny_model(seed=0))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    trainer = build(
        student=model, teacher=None, teacher_weight=0.3, trainer_kwargs={"processing_class": tiny_tokenizer()}
    )
    train(trainer)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and not any("lora_A" in name for name in trainable)


def test_a_base_that_the_adapter_changed_is_refused(build):
    config = LoraConfig(**{**LORA, "init_lora_weights": True}, bias="all")
    with pytest.raises(UnsupportedError, match="bias='all'"):
        build(teacher=None, teacher_weight=0.3, trainer_kwargs={"peft_config": config})


def test_the_student_is_no_teacher_of_itself(build):
    model = tiny_model(seed=0)
    with pytest.raises(ConfigError, match="`teacher_model` is `model` itself"):
        build(student=model, teacher=model, teacher_weight=0.3, trainer_kwargs={"processing_class": tiny_tokenizer()})


def test_adaptive_refuses_tools_and_an_empty_validation_set(build):
    settings = {"teacher_weight": 0.3, "teacher_weight_schedule": "adaptive"}
    with pytest.raises(ConfigError, match="empty"):
        build(**settings, trainer_kwargs={"eval_dataset": dataset(())})
    with pytest.raises(UnsupportedError, match="tools"):
        build(**settings, trainer_kwargs={"eval_dataset": dataset(), "tools": [len]})


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
def test_other_decoding_loops_are_refused(build, name):
    with pytest.raises(ConfigError, match=name):
        build(teacher_weight=0.3, generation_kwargs={name: 2})


def test_delta_contradicts_another_clip_mode(build):
    with pytest.raises(ConfigError, match="delta"):
        build(teacher_weight=0.3, objective="student", delta=4.0)

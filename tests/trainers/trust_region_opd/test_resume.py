"""A run that is interrupted and resumed in mid-warmup is the uninterrupted run, bit for bit."""

import json
import logging

import pytest

from tests.trainers import runs


# Steps of one epoch, two micro-batches each
RUN = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 4}
WARMUPS = {
    "linear": {"kl_budget": 0.3, "blend_warmup_steps": 4},
    "cosine": {"kl_budget": 0.3, "kl_budget_schedule": "cosine", "blend_warmup_steps": 3},
    "speculative_kd": {"rollout_policy": "speculative_kd", "blend_warmup_steps": 3, "num_rollouts_per_prompt": 2},
    "temperature": {"rollout_policy": "student", "temperature_warmup_start": 0.5, "temperature_warmup_steps": 4},
    "veto": {"rollout_policy": "student", "distillation_target": "veto", "veto_warmup_steps": 4},
}
MOVING = {
    "linear": "blend/kl_budget",
    "cosine": "blend/kl_budget",
    "temperature": "blend/temperature",
    "veto": "blend/veto_weight",
}
EXACT = ("blend/kl_budget", "blend/kl_behavior_student", "blend/temperature", "blend/veto_weight", "num_tokens")
SETTINGS_FILE = "trust_region_opd_settings.json"


@pytest.mark.parametrize("name", WARMUPS)
def test_resumed_is_uninterrupted(build_opd, name):
    prompts = tuple(f"{n}-7=" for n in range(8))
    settings = {**RUN, **WARMUPS[name], "train_dataset": runs.dataset(prompts)}
    whole = runs.train(build_opd(save_strategy="steps", save_steps=2, **settings))
    checkpoint = f"{whole.trainer.args.output_dir}/checkpoint-2"
    resumed = runs.train(build_opd(**settings), resume_from_checkpoint=checkpoint)
    assert resumed.losses == whole.losses[4:] and any(resumed.losses)
    for gradients, expected in zip(resumed.gradients, whole.gradients[2:], strict=True):
        runs.assert_same_tensors(gradients, expected)
    runs.assert_same_tensors(runs.snapshot(resumed.trainer.model), runs.snapshot(whole.trainer.model))
    for metric in EXACT:  # the log of a resumed run starts with that of the checkpoint
        assert resumed.logged(metric) == whole.logged(metric)
    if name in MOVING:
        values = whole.logged(MOVING[name])
        assert len(values) == 4 and len(set(values[1:])) > 1, "nothing moves after the checkpoint: nothing is tested"


@pytest.fixture(scope="module")
def checkpoint(models, tmp_path_factory):
    settings = {**RUN, **WARMUPS["linear"], "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = runs.build_opd(models, tmp_path_factory.mktemp("run"), **settings)
    trainer.train()
    return f"{trainer.args.output_dir}/checkpoint-1"


def test_a_checkpoint_has_the_settings_of_the_method_beside_the_model(checkpoint):
    with open(f"{checkpoint}/{SETTINGS_FILE}", encoding="utf-8") as file:
        assert json.load(file) == {
            "rollout_policy": "trust_region",
            "kl_budget": 0.3,
            "kl_budget_schedule": "linear",
            "blend_warmup_steps": 4,
            "teacher_weight": None,
            "skd_top_k": None,
            "skd_teacher_temperature": None,
            "temperature_warmup_start": None,
            "temperature_warmup_steps": None,
            "num_rollouts_per_prompt": 1,
            "kl_support": "full",
            "kl_top_k": 16,
            "distillation_target": "teacher",
            "veto_weight_start": None,
            "veto_warmup_steps": None,
            "canonicalize_eos": True,
            "teacher_eos_token_id": None,
            "temperature": 1.0,
            "beta": 1.0,
        }


def test_a_checkpoint_holds_one_model(checkpoint):
    from safetensors.torch import load_file

    names = set(load_file(f"{checkpoint}/model.safetensors"))
    assert names and not any("teacher" in name or "partner" in name for name in names)


@pytest.mark.parametrize(
    ("changed", "name", "was"),
    [
        ({"kl_budget": 0.2}, "kl_budget=0.2", "kl_budget=0.3"),
        ({"kl_budget_schedule": "cosine"}, "kl_budget_schedule='cosine'", "kl_budget_schedule='linear'"),
        ({"blend_warmup_steps": 9}, "blend_warmup_steps=9", "blend_warmup_steps=4"),
        ({"kl_support": "student_top_k"}, "kl_support='student_top_k'", "kl_support='full'"),
        ({"distillation_target": "veto"}, "distillation_target='veto'", "distillation_target='teacher'"),
        ({"num_rollouts_per_prompt": 2}, "num_rollouts_per_prompt=2", "num_rollouts_per_prompt=1"),
        ({"temperature": 0.9}, "temperature=0.9", "temperature=1.0"),
    ],
)
def test_another_setting_is_a_warning_with_both_values(build_opd, checkpoint, caplog, changed, name, was):
    trainer = build_opd(**{**RUN, **WARMUPS["linear"], "max_steps": 2, **changed})
    with caplog.at_level(logging.WARNING):
        record = runs.train(trainer, resume_from_checkpoint=checkpoint)
    message = next(text for text in caplog.messages if "Resuming with" in text)
    assert f"`{name}`" in message and f"`{was}`" in message
    # What is given now is what runs
    assert record.logged("blend/kl_budget")[-1] == trainer.args.rule_at(1).kl_budget


def test_the_same_settings_are_no_warning(build_opd, checkpoint, caplog):
    with caplog.at_level(logging.WARNING):
        runs.train(build_opd(**{**RUN, **WARMUPS["linear"], "max_steps": 2}), resume_from_checkpoint=checkpoint)
    assert "Resuming with" not in caplog.text


def test_a_checkpoint_of_trl_can_be_continued(build_opd):
    """It has no settings of a blend: the schedule goes on from the checkpoint's step."""
    parent = build_opd(parent=True, **{**RUN, "max_steps": 1}, save_strategy="steps", save_steps=1)
    parent.train()
    ours = build_opd(**{**RUN, **WARMUPS["linear"], "max_steps": 2})
    record = runs.train(ours, resume_from_checkpoint=f"{parent.args.output_dir}/checkpoint-1")
    assert record.logged("blend/kl_budget") == [pytest.approx(0.3 * 3 / 4)]


def test_a_trained_model_is_reloaded_without_this_package(build_opd, models):
    from transformers import AutoModelForCausalLM

    trainer = build_opd(**RUN, **WARMUPS["linear"])
    trainer.train()
    trainer.save_model()
    reloaded = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)
    runs.assert_same_tensors(runs.snapshot(reloaded), runs.snapshot(trainer.model))

"""A run that is interrupted and resumed in mid-schedule is the uninterrupted run, bit for bit."""

import logging

import pytest

from tests.trainers import runs


SCHEDULES = {
    "constant": {"teacher_weight": 0.3},
    "linear": {"teacher_weight": 0.4, "teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 5},
    "cosine": {"teacher_weight": 0.4, "teacher_weight_schedule": "cosine", "teacher_weight_decay_steps": 3},
    "adaptive": {"teacher_weight": 0.4, "teacher_weight_schedule": "adaptive", "adaptive_offset": 0.0},
}


def parity(completion_ids, **kwargs):
    return [float(sum(ids) % 2) for ids in completion_ids]


def settings_of(schedule, objective):
    settings = {**SCHEDULES[schedule], "objective": objective, "max_steps": 4, "learning_rate": 2e-3}
    settings.update(reward_funcs=parity, adaptive_num_prompts=4)
    return {**settings, "trainer_kwargs": {"eval_dataset": runs.dataset(("3*3=", "10-1=", "why?", "zz"))}}


@pytest.mark.parametrize("objective", ["mixed", "student"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "adaptive"])
def test_resumed_is_uninterrupted(build, schedule, objective):
    settings = settings_of(schedule, objective)
    whole = runs.train(build(save_strategy="steps", save_steps=2, **settings))
    checkpoint = f"{whole.trainer.args.output_dir}/checkpoint-2"
    resumed = runs.train(build(**settings), resume_from_checkpoint=checkpoint)
    assert resumed.losses == whole.losses[2:] and any(resumed.losses)
    for gradients, expected in zip(resumed.gradients, whole.gradients[2:], strict=True):
        runs.assert_same_tensors(gradients, expected)
    runs.assert_same_tensors(runs.snapshot(resumed.trainer.model), runs.snapshot(whole.trainer.model))
    for name in ("mixing/teacher_weight", "mixing/kl_behavior_student", "num_tokens"):
        # The log of a resumed run starts with that of the checkpoint
        assert resumed.logged(name) == whole.logged(name)
    weights = whole.logged("mixing/teacher_weight")
    assert len(set(weights[1:])) > 1, "the weight does not move after the checkpoint, which tests nothing"


def test_resumed_with_peft_and_a_reused_batch(build):
    """The checkpoint lies between two generation batches of two optimizer steps each."""
    from peft import LoraConfig

    settings = settings_of("linear", "student")
    peft_config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    settings.update(num_iterations=2, teacher=None, trainer_kwargs={"peft_config": peft_config})
    whole = runs.train(build(save_strategy="steps", save_steps=2, **settings))
    checkpoint = f"{whole.trainer.args.output_dir}/checkpoint-2"
    resumed = runs.train(build(**settings), resume_from_checkpoint=checkpoint)
    assert resumed.losses == whole.losses[2:] and any(resumed.losses)
    runs.assert_same_tensors(runs.snapshot(resumed.trainer.model), runs.snapshot(whole.trainer.model))


@pytest.fixture(scope="module")
def checkpoint(models, tmp_path_factory):
    settings = {**settings_of("linear", "mixed"), "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = runs.build(models, tmp_path_factory.mktemp("run"), **settings)
    trainer.train()
    return f"{trainer.args.output_dir}/checkpoint-1"


@pytest.mark.parametrize(
    ("changed", "name", "was"),
    [
        ({"teacher_weight": 0.2}, "teacher_weight=[0.2]", "teacher_weight=[0.4]"),
        (
            {"teacher_weight_schedule": "cosine"},
            "teacher_weight_schedule='cosine'",
            "teacher_weight_schedule='linear'",
        ),
        ({"mixing_space": "probs"}, "mixing_space='probs'", "mixing_space='logits'"),
        ({"teacher_weight_decay_steps": 9}, "teacher_weight_decay_steps=9", "teacher_weight_decay_steps=5"),
    ],
)
def test_another_schedule_is_a_warning_with_both_values(build, checkpoint, caplog, changed, name, was):
    settings = {**settings_of("linear", "mixed"), "max_steps": 2, **changed}
    trainer = build(**settings)
    with caplog.at_level(logging.WARNING):
        record = runs.train(trainer, resume_from_checkpoint=checkpoint)
    (message,) = [text for text in caplog.messages if "Resuming with" in text]
    assert f"`{name}`" in message and f"`{was}`" in message
    # What is given now is what runs
    assert record.logged("mixing/teacher_weight")[-1] == trainer.args.weights_at(1)[0]


def test_the_same_schedule_is_no_warning(build, checkpoint, caplog):
    with caplog.at_level(logging.WARNING):
        runs.train(build(**{**settings_of("linear", "mixed"), "max_steps": 2}), resume_from_checkpoint=checkpoint)
    assert "Resuming with" not in caplog.text


def test_a_checkpoint_of_grpo_can_be_continued(build, models):
    """It has no teacher weight: the schedule goes on from the checkpoint's step."""
    parent = build(parent=True, save_strategy="steps", save_steps=1)
    parent.train()
    settings = {**settings_of("linear", "mixed"), "max_steps": 2}
    record = runs.train(build(**settings), resume_from_checkpoint=f"{parent.args.output_dir}/checkpoint-1")
    assert record.logged("mixing/teacher_weight") == [pytest.approx(0.4 * 4 / 5)]

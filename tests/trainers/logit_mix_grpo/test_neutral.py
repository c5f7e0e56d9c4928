"""Where no teacher takes part, the trainer is `trl.GRPOTrainer`, bit for bit."""

import pytest

from tests.trainers import runs


REUSE = {  # several optimizer steps per generation batch, and two passes over it
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 6,
}


def assert_same_run(actual: runs.Record, expected: runs.Record) -> None:
    assert actual.losses == expected.losses and any(expected.losses)
    assert actual.logged("grad_norm") == expected.logged("grad_norm")
    assert len(actual.gradients) == len(expected.gradients) > 0
    for gradients, expected_gradients in zip(actual.gradients, expected.gradients):
        runs.assert_same_tensors(gradients, expected_gradients)
    runs.assert_same_tensors(runs.snapshot(actual.trainer.model), runs.snapshot(expected.trainer.model))


SETTINGS = {"plain": {"max_steps": 3}, "reuse": REUSE, "beta": {"beta": 0.1, "max_steps": 2}}


@pytest.fixture(scope="module")
def parents(models, tmp_path_factory):
    """TRL's own run for each of the settings."""
    return {
        name: runs.train(runs.build(models, tmp_path_factory.mktemp(name), parent=True, max_grad_norm=1.0, **settings))
        for name, settings in SETTINGS.items()
    }


@pytest.mark.parametrize(
    ("objective", "teacher", "name"),
    [
        ("mixed", "teacher", "plain"),
        ("mixed", None, "reuse"),
        ("mixed", "teacher", "beta"),
        ("student", None, "plain"),
        ("student", "teacher", "reuse"),
        ("student", "teacher", "beta"),
    ],
)
def test_weight_zero_is_grpo(build, parents, objective, teacher, name):
    ours = build(objective=objective, teacher=teacher, teacher_weight=0.0, max_grad_norm=1.0, **SETTINGS[name])
    assert_same_run(runs.train(ours), parents[name])
    assert ours.partners == []


def test_a_positive_weight_is_not_grpo(build, parents):
    """The comparison above can fail."""
    ours = runs.train(build(teacher_weight=0.05, max_grad_norm=1.0, **SETTINGS["plain"]))
    with pytest.raises(AssertionError):
        assert_same_run(ours, parents["plain"])


@pytest.fixture(scope="module")
def interrupted(models, tmp_path_factory):
    """TRL's own run of four steps, with a checkpoint after two."""
    folder = tmp_path_factory.mktemp("interrupted")
    return runs.train(runs.build(models, folder, parent=True, max_steps=4, save_strategy="steps", save_steps=2))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("objective", ["mixed", "student"])
def test_after_the_decay_it_is_grpo_again(build, interrupted, objective, schedule):
    ours = build(
        objective=objective,
        teacher_weight=0.5,
        teacher_weight_schedule=schedule,
        teacher_weight_decay_steps=2,
        max_steps=4,
    )
    assert len(ours.partners) == 1 and ours.current_weights() == (0.5,)
    checkpoint = f"{interrupted.trainer.args.output_dir}/checkpoint-2"
    resumed = runs.train(ours, resume_from_checkpoint=checkpoint)
    assert resumed.losses == interrupted.losses[2:]
    for gradients, expected in zip(resumed.gradients, interrupted.gradients[2:]):
        runs.assert_same_tensors(gradients, expected)
    runs.assert_same_tensors(runs.snapshot(ours.model), runs.snapshot(interrupted.trainer.model))
    assert resumed.logged("mixing/teacher_weight") == [0.0, 0.0]


def test_evaluation_at_weight_zero_is_that_of_grpo(build):
    metrics = []
    for kwargs in ({"parent": True}, {"teacher_weight": 0.0}):
        trainer = build(trainer_kwargs={"eval_dataset": runs.dataset()}, **kwargs)
        logged = trainer.evaluate()
        metrics.append({name: value for name, value in logged.items() if "time" not in name and "second" not in name})
    assert metrics[0] == metrics[1]
    assert metrics[0]["eval_reward"] > 0

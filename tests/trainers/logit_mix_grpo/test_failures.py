"""A failure in the middle of a step leaves the models unpatched and the trainer usable."""

import pytest
import torch
import trl.trainer.utils

from tests.trainers import forced, runs


class Failure(Exception):
    pass


def fail_once(monkeypatch, target, name, after=0):
    """Let the call number `after` of `target.name` raise, and later ones pass."""
    original, calls = getattr(target, name), []

    def failing(*args, **kwargs):
        calls.append(None)
        if len(calls) == after + 1:
            raise Failure
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, failing)


def assert_clean(trainer, clean):
    assert "generate" not in vars(trainer.model) and "generate_batch" not in vars(trainer.model)
    assert state(trainer) == clean


def state(trainer):
    return (
        trainer._rule,
        trainer._generating,
        trainer._recording,
        trainer.epsilon_low,
        trainer.epsilon_high,
        trainer.args.delta,
        trainer.generation_config.to_dict(),
    )


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory):
    """Losses of the same runs without a failure."""
    settings = {"teacher_weight": 0.4, "max_steps": 2}
    return {
        objective: runs.train(
            runs.build(models, tmp_path_factory.mktemp(objective), objective=objective, **settings)
        ).losses
        for objective in ("mixed", "student")
    }


@pytest.mark.parametrize("objective", ["mixed", "student"])
@pytest.mark.parametrize("where", ["teacher", "student", "reward", "loss"])
def test_training_goes_on_after_a_failure(build, undisturbed, monkeypatch, objective, where):
    trainer = build(objective=objective, teacher_weight=0.4, max_steps=2)
    clean, fused = state(trainer), trl.trainer.utils._ChunkedLogProbFunction
    if where == "teacher":
        fail_once(monkeypatch, trainer.partners[0].model, "forward", after=3)
    elif where == "student":
        fail_once(monkeypatch, trainer.model.model, "forward", after=3)
    elif where == "reward":
        fail_once(monkeypatch, trainer, "_calculate_rewards")
    else:
        # The only forward pass with gradient
        original = trainer.model.model.forward

        def failing(*args, **kwargs):
            if torch.is_grad_enabled():
                trainer.model.model.forward = original
                raise Failure
            return original(*args, **kwargs)

        trainer.model.model.forward = failing
    with pytest.raises(Failure):
        trainer.train()
    assert_clean(trainer, clean)
    assert trl.trainer.utils._ChunkedLogProbFunction is fused

    # Both this trainer and the next one of the process can train
    assert len(runs.train(trainer).losses) == 2
    assert runs.train(build(objective=objective, teacher_weight=0.4, max_steps=2)).losses == undisturbed[objective]


def test_statistics_of_a_failed_generation_do_not_reach_the_next_one(build, monkeypatch):
    """The rollouts of a step that failed after decoding are not part of the next step's means."""
    trainer = build(teacher_weight=0.4)
    fail_once(monkeypatch, trainer, "_calculate_rewards")
    with pytest.raises(Failure):
        trainer.train()
    record = runs.train(trainer)
    (call,) = record.calls
    assert call.inputs["completion_ids"].size(0) == 8
    expected = forced.logps(forced.frozen(1), [], [], call.inputs)
    values = [value for row in expected for value in row]
    assert record.logged("mixing/teacher_logp") == [pytest.approx(sum(values) / len(values), abs=1e-4)]

"""A failure in the middle of a step leaves the models unpatched and the trainer usable."""

import pytest
import torch
import trl.trainer.distillation_trainer as trl_distillation

from tests.trainers import forced, runs
from tests.trainers.trust_region_opd import policies


class Failure(Exception):
    pass


SETTINGS = {
    "plain": {"kl_budget": 0.3, "blend_warmup_steps": 4},
    "own_loss": {"kl_budget": 0.3, "blend_warmup_steps": 4, "kl_support": "student_top_k"},
    "temperature": {"rollout_policy": "student", "temperature_warmup_start": 0.5},
}


def fail_once(monkeypatch, target, name, after=0):
    """Let the call number `after` of `target.name` raise, and later ones pass."""
    original, calls = getattr(target, name), []

    def failing(*args, **kwargs):
        calls.append(None)
        if len(calls) == after + 1:
            raise Failure
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, failing)


def fail_in_the_forward_with_gradient(trainer):
    original = trainer.model.model.forward

    def failing(*args, **kwargs):
        if torch.is_grad_enabled():
            trainer.model.model.forward = original
            raise Failure
        return original(*args, **kwargs)

    trainer.model.model.forward = failing


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("where", ["teacher", "student", "loss"])
def test_training_goes_on_after_a_failure(build_opd, monkeypatch, name, where):
    trainer = build_opd(max_steps=2, **SETTINGS[name])
    divergence, sampler = trl_distillation._chunked_divergence_loss, trl_distillation.RepeatSampler
    generation = trainer.generation_config.to_dict()
    if where == "teacher":
        fail_once(monkeypatch, trainer.teacher_model.model, "forward", after=0 if name == "temperature" else 3)
    elif where == "student":
        fail_once(monkeypatch, trainer.model.model, "forward", after=3)
    else:
        fail_in_the_forward_with_gradient(trainer)
    with pytest.raises(Failure):
        trainer.train()
    assert "generate" not in vars(trainer.model) and "generate_batch" not in vars(trainer.model)
    assert trl_distillation._chunked_divergence_loss is divergence and trl_distillation.RepeatSampler is sampler
    assert trainer.generation_config.to_dict() == generation and trainer.generation_kwargs["temperature"] == 1.0
    # Both this trainer and the next one of the process can train
    assert len(runs.train(trainer).losses) == 2
    assert len(runs.train(build_opd(max_steps=2, **SETTINGS[name])).losses) == 2


def test_statistics_of_a_failed_generation_do_not_reach_the_next_one(build_opd):
    """The rollouts of a step that failed after decoding are not part of the next step's means."""
    trainer = build_opd(kl_budget=0.3, kl_budget_schedule="constant")
    original = trainer._generate_single_turn

    def generate(*args, **kwargs):
        original(*args, **kwargs)
        trainer._generate_single_turn = original
        raise Failure

    trainer._generate_single_turn = generate
    with pytest.raises(Failure):
        trainer.train()
    record = runs.train(trainer)
    (call,) = record.calls
    teacher = policies.logprob_rows(forced.frozen(1), call.inputs, 1.0)
    expected = [row[token] for row, token in zip(teacher, policies.emitted(call.inputs), strict=True)]
    assert record.logged("blend/teacher_logp") == [pytest.approx(policies.mean(expected), abs=1e-3)]

"""A LoRA student whose own base is the teacher: its loss and rollouts against the reference."""

import pytest
from peft import LoraConfig

from tests import reference_divergences
from tests.tiny import tiny_lora, tiny_model
from tests.trainers import forced, runs
from tests.trainers.trust_region_opd import policies


RUN = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 1e-3}
SETTINGS = {
    "trust_region": {"kl_budget": 0.3, "blend_warmup_steps": 4},
    "student": {"rollout_policy": "student"},
}


def lora(**settings):
    # Random rather than zero: otherwise the student is its own base at the first step
    return LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **settings
    )


def train_lora(build_opd, teacher, name, **settings):
    trainer_kwargs = {"peft_config": lora()}
    return runs.train(build_opd(teacher=teacher, trainer_kwargs=trainer_kwargs, **RUN, **SETTINGS[name], **settings))


def test_loss_and_gradient_equal_the_reference(build_opd):
    record = train_lora(build_opd, None, "student")
    base, total = forced.frozen(0), record.calls[0].inputs["num_items_in_batch"].item()
    student = forced.with_parameters(tiny_lora(tiny_model(seed=0)), record.calls[0].parameters)
    for call in record.calls[:2]:
        rows = zip(policies.token_logits(student, call.inputs), policies.token_logits(base, call.inputs))
        loss = sum(reference_divergences.reverse_kl_loss(s, t, s)[0] for s, t in rows) / total
        loss.backward()
        assert call.loss == pytest.approx(loss.item(), abs=1e-5)
    expected = {name: parameter.grad for name, parameter in student.named_parameters() if "lora" in name}
    runs.assert_close_tensors(record.gradients[0], expected, relative=1e-4)


def test_rollouts_are_those_of_the_trust_region_around_the_student(build_opd):
    trainer = build_opd(teacher=None, trainer_kwargs={"peft_config": lora()}, **SETTINGS["trust_region"])
    rollouts = runs.record_opd_rollouts(trainer)
    trainer.train()
    (rollout,) = rollouts
    student = forced.with_parameters(tiny_lora(tiny_model(seed=0)), rollout.parameters)
    rows = [policies.logprob_rows(model, rollout.inputs, 1.0) for model in (student, forced.frozen(0))]
    behavior = [policies.trust_region(0.3)(s, t) for s, t in zip(*rows, strict=True)]
    expected = [row[token] for row, token in zip(behavior, policies.emitted(rollout.inputs), strict=True)]
    recorded = policies.kept(rollout.records[0].behavior_logps, rollout.inputs)
    assert recorded == pytest.approx(expected, abs=2e-3)


def test_gradient_checkpointing_recomputes_with_the_adapters(build_opd):
    plain, checkpointed = (
        train_lora(build_opd, None, "student", gradient_checkpointing=flag) for flag in (False, True)
    )
    assert checkpointed.losses == pytest.approx(plain.losses, abs=1e-6)
    for gradients, expected in zip(checkpointed.gradients, plain.gradients, strict=True):
        runs.assert_close_tensors(gradients, expected, relative=1e-4)

"""The teacher weight is a property of a generation batch: every update that reuses the batch uses its weight."""

import pytest

from tests import reference
from tests.trainers import forced, runs


SCHEDULE = {"teacher_weight": 0.4, "teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 10}
# One generation batch for 4 optimizer steps of 2 micro-batches: 2 windows, each in 2 passes
REUSE = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 6,
    "loss_type": "grpo",
}


@pytest.fixture(scope="module", params=["mixed", "student"])
def record(request, models, tmp_path_factory):
    trainer = runs.build(models, tmp_path_factory.mktemp("run"), objective=request.param, **SCHEDULE, **REUSE)
    return runs.train(trainer)


def frozen_weight(call_index):
    return reference.linear_weight(step=4 * (call_index // 8), initial=0.4, decay_steps=10)


def test_the_stored_weight_stays_while_the_schedule_moves(record):
    assert len(record.calls) == 12
    for index, call in enumerate(record.calls):
        step = index // 2
        assert call.current_weights == pytest.approx((reference.linear_weight(step, 0.4, 10),))
        assert call.inputs["teacher_weight"] == [pytest.approx((frozen_weight(index),))] * 4
    assert frozen_weight(11) == pytest.approx(0.24)


def loss_at(weight, record, call, old_logps):
    inputs = call.inputs
    student, partner = forced.student_at(call.parameters).requires_grad_(False), forced.frozen(1)
    rows, advantages = forced.tokens(inputs), inputs["advantages"].tolist()
    if record.trainer.args.objective == "student":
        loss = reference.grpo_student_loss(
            forced.completion_logits(student, inputs),
            rows,
            forced.ones(rows),
            advantages,
            old_logps,
            is_clip_mode="floor",
            aggregation="grpo",
        )
    else:
        loss = reference.grpo_mixed_loss(
            forced.completion_logits(student, inputs),
            [forced.completion_logits(partner, inputs)],
            [weight],
            rows,
            forced.ones(rows),
            advantages,
            old_logps,
            aggregation="grpo",
        )
    return loss.item() / 2  # two micro-batches per step


@pytest.mark.parametrize("index", [5, 7, 11])
def test_the_loss_uses_the_stored_weight(record, index):
    call, generated = record.calls[index], record.calls[8 * (index // 8)]
    sampler = forced.student_at(generated.parameters).requires_grad_(False)
    losses = {}
    for name, weight in (("stored", frozen_weight(index)), ("current", call.current_weights[0])):
        old_logps = forced.logps(sampler, [forced.frozen(1)], [weight], call.inputs)
        losses[name] = loss_at(weight, record, call, old_logps)
    assert call.loss == pytest.approx(losses["stored"], abs=1e-5)
    assert call.loss != pytest.approx(losses["current"], abs=1e-4)


def test_the_logged_weight_is_that_of_the_generation(record):
    assert record.logged("mixing/teacher_weight") == pytest.approx([0.4, 0.24])

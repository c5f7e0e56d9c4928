"""Loss and gradient of real steps against `tests.reference`, from full-vocabulary logits in float64."""

import pytest
import torch

from tests import reference
from tests.trainers import forced, runs


PARTNERS = {"teacher": 1, "second": 2}
# Two updates on one generation batch: at the second one the ratios have left 1 for both objectives
TWO_UPDATES = {"num_iterations": 2, "max_steps": 2, "learning_rate": 1e-3}


def assert_interesting(inputs):
    """Left padding, right padding, and a finished row beside a truncated one."""
    rows = forced.tokens(inputs)
    finished = [row[-1] in runs.EOS_IDS for row in rows]
    assert len(set(inputs["prompt_mask"].sum(1).tolist())) > 1
    assert len({len(row) for row in rows}) > 1
    assert any(finished) and any(not f and len(row) == runs.MAX_LENGTH for f, row in zip(finished, rows))
    assert inputs["advantages"].abs().median() > 0.1


def check_call(record, index, loss_of):
    """The loss of a call and the gradient that it left, against those of `loss_of(student, inputs)`."""
    call = record.calls[index]
    student = forced.student_at(call.parameters)
    loss = loss_of(student, call.inputs)
    loss.backward()
    assert call.loss == pytest.approx(loss.item(), abs=1e-5)
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    runs.assert_close_tensors(record.gradients[index], expected, relative=1e-4)
    return loss.item()


def aggregation(inputs, loss_type):
    return {
        "aggregation": loss_type,
        "num_items": inputs["num_items_in_batch"].item(),
        "max_length": runs.MAX_LENGTH,
    }


@pytest.mark.parametrize(
    ("teachers", "weights", "space", "temperature", "level", "loss_type"),
    [
        (["teacher"], [0.3], "logits", 1.0, "token", "dapo"),
        (["teacher"], [0.6], "logits", 0.7, "sequence", "grpo"),
        (["teacher"], [0.4], "probs", 0.7, "token", "grpo"),
        (["teacher", "second"], [0.3, 0.2], "logits", 0.7, "token", "dr_grpo"),
        (["teacher", "second"], [0.2, 0.5], "probs", 1.3, "sequence", "bnpo"),
        (["teacher", "second"], [0.0, 0.5], "logits", 1.0, "token", "bnpo"),
        (["teacher", "second"], [1.0, -1.0], "arithmetic", 1.3, "token", "dapo"),
        (["teacher"], [-0.4], "arithmetic", 0.7, "sequence", "grpo"),
    ],
)
def test_mixed(build, teachers, weights, space, temperature, level, loss_type):
    mixture = {"temperature": temperature, "space": space}
    record = runs.train(
        build(
            teacher=teachers,
            teacher_weight=weights,
            mixing_space=space,
            temperature=temperature,
            importance_sampling_level=level,
            loss_type=loss_type,
            **TWO_UPDATES,
        )
    )
    first, second = record.calls
    assert_interesting(first.inputs)
    assert torch.equal(first.inputs["completion_ids"], second.inputs["completion_ids"])
    partners = [forced.frozen(PARTNERS[name]) for name in teachers]
    old = forced.logps(forced.student_at(first.parameters), partners, weights, first.inputs, **mixture)
    forced.assert_close_rows(forced.kept(second.inputs["old_per_token_logps"], first.inputs), old, 1e-4)

    def loss_of(student, inputs, old_logps=old):
        return reference.grpo_mixed_loss(
            forced.completion_logits(student, inputs),
            [forced.completion_logits(partner, inputs) for partner in partners],
            weights,
            forced.tokens(inputs),
            forced.ones(forced.tokens(inputs)),
            inputs["advantages"].tolist(),
            old_logps,
            level=level,
            **mixture,
            **aggregation(inputs, loss_type),
        )

    check_call(record, 0, loss_of)
    moved = check_call(record, 1, loss_of)
    # The second update is a test of the denominator only if another one would give another loss
    assert moved != pytest.approx(loss_of(forced.student_at(second.parameters), second.inputs, None).item(), abs=1e-3)


@pytest.mark.parametrize(
    ("mode", "level", "loss_type"),
    [
        ("ppo", "token", "dapo"),
        ("ppo", "sequence", "grpo"),
        ("none", "token", "bnpo"),
        ("none", "sequence", "grpo"),
        ("max", "token", "dr_grpo"),
        ("max", "sequence", "bnpo"),
        ("floor", "token", "dapo"),
        ("floor", "sequence", "bnpo"),
    ],
)
def test_student(build, mode, level, loss_type):
    cap, weight, temperature = 1.1, 0.4, 0.8
    record = runs.train(
        build(
            objective="student",
            teacher_weight=weight,
            temperature=temperature,
            is_clip_mode=mode,
            importance_sampling_level=level,
            loss_type=loss_type,
            **({"is_clip_max": cap} if mode in ("max", "floor") else {}),
            **TWO_UPDATES,
        )
    )
    first = record.calls[0]
    assert_interesting(first.inputs)
    initial = forced.student_at(first.parameters)
    behavior = forced.logps(initial, [forced.frozen(1)], [weight], first.inputs, temperature)

    def loss_of(student, inputs, behavior_logps=behavior, mode=mode, cap=cap):
        return reference.grpo_student_loss(
            forced.completion_logits(student, inputs),
            forced.tokens(inputs),
            forced.ones(forced.tokens(inputs)),
            inputs["advantages"].tolist(),
            behavior_logps,
            is_clip_mode=mode,
            is_clip_max=cap,
            temperature=temperature,
            level=level,
            **aggregation(inputs, loss_type),
        )

    check_call(record, 0, loss_of)
    check_call(record, 1, loss_of)
    # Each setting matters on this batch: the denominator, the mode and the cap
    own = forced.logps(initial, [], [], first.inputs, temperature)
    others = {"denominator": loss_of(initial, first.inputs, own)}
    others["mode"] = loss_of(
        initial, first.inputs, mode={"ppo": "none", "none": "max", "max": "ppo", "floor": "max"}[mode]
    )
    if mode in ("max", "floor"):
        others["cap"] = loss_of(initial, first.inputs, cap=3.0)
    for name, loss in others.items():
        assert first.loss != pytest.approx(loss.item(), abs=1e-3), name

import math

import pytest
import torch

from tests import reference
from trl_blend.errors import ConfigError
from trl_blend.ops import mix_logits, mix_probs, validate_weights
from trl_blend.ops.mixing import arithmetic_logits, student_weight


MIXES = [mix_logits, mix_probs]
WEIGHTS = [[0.3], [0.2, 0.5], [0.0, 0.4], [1.0], [0.7, 0.3], [0.0, 0.0]]


def random_logits(count, *shape):
    return [3 * torch.randn(*shape, dtype=torch.float64) for _ in range(count)]


def reference_mix(mix, student, partners, weights):
    row_mix = reference.mix_logits if mix is mix_logits else reference.mix_probs
    rows = [
        row_mix(student.flatten(0, -2)[n], [p.flatten(0, -2)[n] for p in partners], weights)
        for n in range(student.flatten(0, -2).shape[0])
    ]
    return torch.stack(rows).view(student.shape)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 2), (4, 7)])
def test_values_and_gradients_match_the_reference(mix, weights, shape):
    student, *partners = random_logits(1 + len(weights), *shape)
    student.requires_grad_()
    direction = torch.randn(*shape, dtype=torch.float64)
    mixed, expected = mix(student, partners, weights), reference_mix(mix, student, partners, weights)
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)
    if sum(weights) < 1:
        (grad,) = torch.autograd.grad((mixed * direction).sum(), student)
        (expected_grad,) = torch.autograd.grad((expected * direction).sum(), student)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mix", MIXES)
def test_gradcheck(mix):
    student, *partners = random_logits(3, 2, 4)
    assert torch.autograd.gradcheck(lambda z: mix(z, partners, [0.3, 0.2]), student.requires_grad_())


@pytest.mark.parametrize("mix", MIXES)
def test_limits_are_the_student_and_the_teacher(mix):
    student, teacher = random_logits(2, 3, 6)
    normalise = (lambda z: z) if mix is mix_logits else (lambda z: torch.log_softmax(z, -1))
    # The model of weight 0 must not take part at all: its row may even be NaN
    broken = torch.full_like(student, math.nan)
    torch.testing.assert_close(mix(student, [broken], [0.0]), normalise(student), rtol=0, atol=0)
    torch.testing.assert_close(mix(broken, [teacher], [1.0]), normalise(teacher), rtol=0, atol=0)
    # Rounding slack on either side of 1
    for weights in ([0.7, 0.3 - 5e-10], [0.7, 0.3 + 5e-10]):
        mixed = mix(broken, [teacher, teacher], weights)
        torch.testing.assert_close(mixed, normalise(teacher), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mix", MIXES)
def test_infinite_logits_give_no_nan(mix):
    student = torch.tensor([[0.5, -math.inf, 1.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-math.inf, 2.0, 1.5, -math.inf]], dtype=torch.float64)
    mixed = mix(student, [teacher], [0.25])
    torch.testing.assert_close(mixed, reference_mix(mix, student, [teacher], [0.25]), rtol=1e-12, atol=1e-12)
    assert torch.isinf(mixed).tolist() == [[mix is mix_logits, mix is mix_logits, False, True]]
    # The loss of a token that both can produce
    (grad,) = torch.autograd.grad(torch.log_softmax(mixed, -1)[0, 2], student)
    assert torch.isfinite(grad).all()
    assert grad[0, 3] == 0.0


def test_probabilities_far_below_the_smallest_float_stay_exact():
    student = torch.tensor([0.0, -2000.0, -3000.0], dtype=torch.float64)
    teacher = torch.tensor([0.0, -5000.0, -2500.0], dtype=torch.float64)
    mixed = mix_probs(student, [teacher], [0.25])
    expected = [0.0, -2000.0 + math.log(0.75), -2500.0 + math.log(0.25)]
    torch.testing.assert_close(mixed, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)


def test_mixed_probabilities_are_normalised():
    student, *partners = random_logits(3, 5, 11)
    total = mix_probs(student, partners, [0.2, 0.3]).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=0)


@pytest.mark.parametrize("mix", MIXES)
def test_partners_get_no_gradient(mix):
    student, teacher = (z.requires_grad_() for z in random_logits(2, 2, 4))
    mix(student, [teacher], [0.5]).square().sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_averaged_in_float32(mix, dtype):
    student, teacher = (z.to(dtype) for z in random_logits(2, 3, 50))
    mixed = mix(student, [teacher], [0.3])
    assert mixed.dtype == torch.float32
    # The inputs are already rounded; nothing is rounded to their dtype again
    expected = mix(student.double(), [teacher.double()], [0.3])
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-6, atol=2e-6)
    assert mix(student, [teacher], [0.0]).dtype == torch.float32


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan, math.inf])
def test_weights_outside_the_unit_interval_are_refused(weight):
    with pytest.raises(ConfigError, match=rf"`teacher_weight\[1\]` is {weight}. Set it to a number between 0 and 1"):
        validate_weights([0.0, weight], "teacher_weight")
    with pytest.raises(ConfigError, match=r"`weights\[0\]`"):
        mix_logits(torch.zeros(2), [torch.zeros(2)], [weight])


def test_weight_sums_above_one_are_refused():
    with pytest.raises(ConfigError, match=r"`weights` is \[0.6, 0.5\], which sums to 1.1. Lower them"):
        validate_weights([0.6, 0.5])
    with pytest.raises(ConfigError):
        validate_weights([1.0, 2e-9])
    assert validate_weights([1.0, 5e-10]) == (1.0, 5e-10)
    assert validate_weights((0, 1)) == (0.0, 1.0)


@pytest.mark.parametrize("weights", [[0.8, -0.8], [-0.5, 0.0], [1.5, 2.0]])
def test_arithmetic_matches_the_reference(weights):
    student, *partners = random_logits(3, 4, 6)
    student[0, 1] = partners[0][1, 2] = -math.inf
    student.requires_grad_()
    added = arithmetic_logits(student, partners, 1.0, weights).log_softmax(-1)
    rows = [reference.add_logits(student[n], [p[n] for p in partners], weights) for n in range(4)]
    expected = torch.stack([reference.log_softmax(row) for row in rows])
    torch.testing.assert_close(added, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(4, 6, dtype=torch.float64)
    losses = [torch.where(logps > -math.inf, logps * direction, 0.0).sum() for logps in (added, expected)]
    grad, wanted = (torch.autograd.grad(loss, student)[0] for loss in losses)
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


def test_weights_of_arithmetic_are_any_finite_numbers():
    assert validate_weights([2, -3.5, 0.0], space="arithmetic") == (2.0, -3.5, 0.0)
    assert student_weight([2.0, -3.5], "arithmetic") == 1.0
    for weight in (math.nan, math.inf, -math.inf):
        with pytest.raises(ConfigError, match=rf"`teacher_weight\[1\]` is {weight}. Set it to a finite number"):
            validate_weights([0.0, weight], "teacher_weight", "arithmetic")


@pytest.mark.parametrize("mix", MIXES)
def test_one_weight_per_partner(mix):
    with pytest.raises(ConfigError, match="2 entries for 1 partners"):
        mix(torch.zeros(2), [torch.zeros(2)], [0.1, 0.2])

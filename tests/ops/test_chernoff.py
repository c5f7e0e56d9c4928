import math

import pytest
import torch

from tests import reference_trust_region as reference
from trl_blend.ops.chernoff import chernoff_weight


INF = math.inf


def draw(*shape, scale=3.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize("scale", [0.05, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_bisection(scale, dtype):
    student, teacher = draw(2, 6, 25, scale=scale, dtype=dtype)
    weight = chernoff_weight(student, teacher)
    assert weight.shape == (2, 6) and weight.dtype == dtype
    for found, s, t in zip(weight.flatten(), student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist()):
        assert found.item() == pytest.approx(reference.chernoff_weight(s, t), abs=1e-4)


def test_half_precision_and_constants_of_a_row_change_nothing():
    student, teacher = (logits.bfloat16() for logits in draw(4, 25))
    weight = chernoff_weight(student, teacher)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, chernoff_weight(student.float() + 50, teacher.float() - 20), rtol=0, atol=2e-4)


def test_swapping_the_two_mirrors_the_weight():
    student, teacher = draw(5, 25)
    torch.testing.assert_close(
        chernoff_weight(student, teacher), 1 - chernoff_weight(teacher, student), rtol=0, atol=2e-4
    )


def test_two_tokens_have_a_closed_form():
    """p = (a, 1 - a) and its mirror image: the middle is uniform, at weight 1/2."""
    student = torch.tensor([[0.3, -1.2]])
    assert chernoff_weight(student, student.flip(-1)).item() == pytest.approx(0.5, abs=1e-4)


def test_excluded_tokens_and_broken_rows():
    student, teacher = draw(4, 10)
    student[0, 2], teacher[0, 3] = -INF, -INF
    teacher[1, 1:] = -INF  # one common token: the path is that token throughout
    student[2, 0] = math.nan
    weight = chernoff_weight(student, teacher)
    expected = reference.chernoff_weight(student[0].tolist(), teacher[0].tolist())
    assert weight[0].item() == pytest.approx(expected, abs=1e-4)
    assert 0 <= weight[1] <= 1 and weight[2].isnan() and weight[3].isfinite()

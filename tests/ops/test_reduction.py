import math

import pytest
import torch

from trl_blend.ops import masked_mean, masked_sum


VALUES = [[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]]
MASK = [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long, torch.float32])
def test_values(mask_dtype):
    values, mask = torch.tensor(VALUES), torch.tensor(MASK).to(mask_dtype)
    assert masked_sum(values, mask).item() == 19.0
    assert masked_sum(values, mask, dim=1).tolist() == [3.0, 16.0, 0.0]
    assert masked_sum(values, mask, dim=0).tolist() == [1.0, 18.0, 0.0]
    assert masked_mean(values, mask).item() == pytest.approx(19.0 / 3)
    assert masked_mean(values, mask, dim=-1).tolist() == [1.5, 16.0, 0.0]
    assert masked_mean(values, mask, dim=0).tolist() == [1.0, 9.0, 0.0]


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean])
@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_garbage_in_masked_places_changes_nothing(reduce, dim, garbage):
    mask = torch.tensor(MASK)
    clean = torch.tensor(VALUES, requires_grad=True)
    dirty = torch.tensor(VALUES).masked_fill(mask == 0, garbage).requires_grad_()
    expected, result = reduce(clean, mask, dim), reduce(dirty, mask, dim)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    # The square makes the incoming gradient differ from place to place
    expected.square().sum().backward()
    result.square().sum().backward()
    torch.testing.assert_close(dirty.grad, clean.grad, rtol=0, atol=0)
    assert (dirty.grad[mask == 0] == 0).all()
    assert (dirty.grad[mask == 1] != 0).all()


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean])
def test_nothing_valid_is_zero(reduce):
    values = torch.full((2, 3), math.nan, requires_grad=True)
    result = reduce(values, torch.zeros(2, 3))
    result.backward()
    assert result.item() == 0.0
    assert (values.grad == 0).all()
    assert reduce(torch.zeros(0, 3), torch.zeros(0, 3)).item() == 0.0


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean])
def test_gradcheck(reduce):
    values = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reduce(x, torch.tensor(MASK), 1), values)


def test_a_value_per_sequence_counts_once_per_valid_token():
    values, mask = torch.tensor([[2.0], [5.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert masked_sum(values, mask).item() == 11.0
    assert masked_mean(values, mask).item() == pytest.approx(11.0 / 4)
    assert masked_mean(torch.ones(2, 4) * 3, torch.tensor([[1], [0]])).item() == 3.0


def test_counts_beyond_what_half_precision_can_count():
    values = torch.ones(1, 3001, dtype=torch.bfloat16)
    assert masked_sum(values, torch.ones(1, 3001)).item() == 3001.0
    assert masked_mean(values, torch.ones(1, 3001)).item() == 1.0
    assert masked_sum(values.double(), torch.ones(1, 3001)).dtype == torch.float64

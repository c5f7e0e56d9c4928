import math

import pytest
import torch
from accelerate import Accelerator

from trl_blend.trainers._statistics import TokenMeans


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_means_are_over_tokens_not_over_calls(accelerator):
    means = TokenMeans()
    means.add("x", torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[True, True, True]]))
    means.add("x", torch.tensor([[10.0, 99.0]]), torch.tensor([[True, False]]))
    means.add("y", torch.tensor([[5.0, 7.0]]), torch.tensor([[True, True]]))
    assert means.reduce(accelerator) == {"x": pytest.approx(16 / 4), "y": pytest.approx(6.0)}


def test_reducing_clears(accelerator):
    means = TokenMeans()
    means.add("x", torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    assert means.reduce(accelerator) == {"x": 1.0}
    assert means.reduce(accelerator) == {}


def test_masked_values_do_not_count(accelerator):
    means = TokenMeans()
    means.add("x", torch.tensor([[math.nan, 2.0, -math.inf]]), torch.tensor([[False, True, False]]))
    assert means.reduce(accelerator) == {"x": 2.0}


def test_nothing_valid_is_zero(accelerator):
    means = TokenMeans()
    means.add("x", torch.tensor([[math.nan]]), torch.tensor([[False]]))
    assert means.reduce(accelerator) == {"x": 0.0}


def test_many_small_values_keep_their_digits(accelerator):
    means = TokenMeans()
    for _ in range(1000):
        means.add("x", torch.full((1, 100), 0.1), torch.ones(1, 100, dtype=torch.bool))
    assert means.reduce(accelerator)["x"] == pytest.approx(0.1, rel=1e-6)

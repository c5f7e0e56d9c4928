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


def test_maxima_are_over_all_calls_and_the_kept_tokens(accelerator):
    means = TokenMeans()
    for values, mask in (([[0.1, 0.4]], [[True, False]]), ([[0.3, 0.2]], [[True, True]])):
        means.add("x/mean", torch.tensor(values), torch.tensor(mask))
        means.add_max("x/max", torch.tensor(values), torch.tensor(mask))
    assert means.reduce(accelerator) == {"x/mean": pytest.approx(0.2), "x/max": pytest.approx(0.3)}
    assert means.reduce(accelerator) == {}


def test_a_maximum_is_forgotten_with_the_means(accelerator):
    means = TokenMeans()
    everything = torch.ones(1, 1, dtype=torch.bool)
    for value in (0.9, 0.2):
        means.add("x", torch.tensor([[value]]), everything)
        means.add_max("m", torch.tensor([[value]]), everything)
        assert means.reduce(accelerator)["m"] == pytest.approx(value)


def test_the_maximum_of_nothing_is_zero(accelerator):
    means = TokenMeans()
    means.add("x", torch.tensor([[5.0]]), torch.tensor([[False]]))
    means.add_max("m", torch.tensor([[5.0]]), torch.tensor([[False]]))
    assert means.reduce(accelerator) == {"x": 0.0, "m": 0.0}


def test_what_is_synchronised_is_kept_until_it_is_popped(accelerator):
    means = TokenMeans()
    for values in ([1.0, 2.0, 3.0], [10.0]):
        means.add("x", torch.tensor(values), torch.ones(len(values), dtype=torch.bool))
        means.add_max("m", torch.tensor(values), torch.ones(len(values), dtype=torch.bool))
        means.sync(accelerator)
    means.add("x", torch.tensor([1000.0]), torch.ones(1, dtype=torch.bool))  # not yet
    assert means.pop() == {"x": pytest.approx(4.0), "m": 10.0}
    assert means.pop() == {}
    means.sync(accelerator)
    assert means.pop() == {"x": 1000.0}

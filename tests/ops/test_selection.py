"""`tip_selection` against plain loops, and its limits."""

import math

import pytest
import torch

from tests import reference_divergences
from trl_blend.errors import ConfigError
from trl_blend.ops import tip_selection


def select(entropy, divergence, entropy_quantile=0.5, divergence_quantile=0.9):
    return tip_selection(
        torch.as_tensor(entropy, dtype=torch.float64),
        torch.as_tensor(divergence, dtype=torch.float64),
        entropy_quantile=entropy_quantile,
        divergence_quantile=divergence_quantile,
    ).tolist()


@pytest.mark.parametrize("quantiles", [(0.5, 0.9), (0.8, 0.3), (0.13, 0.77), (0.0, 0.5), (1.0, 1.0), (0.7, 0.0)])
@pytest.mark.parametrize("count", [1, 2, 37, 100])
def test_it_is_that_of_plain_loops(count, quantiles):
    entropy, divergence = torch.rand(2, count, dtype=torch.float64)
    expected = reference_divergences.tip_kept(entropy.tolist(), divergence.tolist(), *quantiles)
    assert select(entropy, divergence, *quantiles) == expected


def test_by_hand():
    """Uncertain, uncertain and right, sure and right, sure and wrong."""
    assert select([3.0, 2.0, 0.1, 0.2], [0.5, 0.0, 0.01, 0.3]) == [True, True, False, True]
    # The threshold of the divergence is that of the sure: among all, 0.3 is not high
    assert select([3.0, 2.0, 0.1, 0.2], [9.0, 8.0, 0.01, 0.3]) == [True, True, False, True]


def test_the_share_kept():
    entropy, divergence = torch.rand(2, 10001, dtype=torch.float64)
    assert sum(select(entropy, divergence, 0.6, 0.75)) / 10001 == pytest.approx(1 - 0.6 * 0.75, abs=1e-3)


def test_positions_that_do_not_count_change_nothing():
    entropy, divergence = torch.rand(2, 30, dtype=torch.float64)
    expected = select(entropy, divergence)
    gaps = torch.full((3, 20), math.nan, dtype=torch.float64)
    shapes = [gaps.clone(), torch.full((3, 20), 7.0, dtype=torch.float64)]
    for filled, values in zip(shapes, (entropy, divergence), strict=True):
        filled[:, 5:15] = values.view(3, 10)
    found = torch.tensor(select(*shapes))
    assert found[:, 5:15].flatten().tolist() == expected
    assert not found[:, :5].any() and not found[:, 15:].any()


def test_no_position_counts():
    assert select([math.nan] * 3, [math.nan] * 3) == [False] * 3


@pytest.mark.parametrize("quantiles", [(0.5, 1.0), (0.5, 0.8), (0.7, 0.5)])
@pytest.mark.parametrize("tied", [50, 80, 100])
def test_of_equal_entropies_the_share_is_kept(tied, quantiles):
    """Such as the 0 of all positions that a student is sure of: from a threshold on would be every one."""
    entropy, divergence = torch.rand(2, 100, dtype=torch.float64)
    entropy[:tied] = 0.0
    apart = entropy + 1e-9 * divergence
    expected = reference_divergences.tip_kept(apart.tolist(), divergence.tolist(), *quantiles)
    assert select(entropy, divergence, *quantiles) == expected


def test_of_positions_that_are_equal_in_both_the_earlier_are_kept():
    assert select([0.0] * 4, [0.0] * 4) == [True, True, True, False]


@pytest.mark.parametrize("name", ["entropy_quantile", "divergence_quantile"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_quantiles_out_of_range(name, value):
    with pytest.raises(ConfigError, match=rf"`{name}` is {value}. Set it to a number in \[0, 1\]"):
        select([1.0], [1.0], **{name: value})

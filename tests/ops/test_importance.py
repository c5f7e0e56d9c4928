import math

import pytest
import torch

from tests import reference
from trl_blend.errors import ConfigError
from trl_blend.ops import ImportanceSums, floored_log_ratio, importance_statistics, summarize_importance


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])


def valid_ratios(log_ratio, mask, level):
    zeros = torch.zeros_like(log_ratio)
    rows = reference.ratios(log_ratio.tolist(), zeros.tolist(), mask.tolist(), level)
    kept = [[float(r) for r, m in zip(row, valid, strict=True) if m] for row, valid in zip(rows, mask, strict=True)]
    return [row[0] for row in kept if row] if level == "sequence" else sum(kept, [])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("clip_max", [None, 1.2])
def test_sums_and_summary(level, clip_max):
    log_ratio = torch.randn(3, 4, dtype=torch.float64)
    ratios = valid_ratios(log_ratio, MASK, level)
    sums = importance_statistics(log_ratio, MASK, level=level, clip_max=clip_max)
    clipped = 0 if clip_max is None else sum(r > clip_max for r in ratios)
    expected = [len(ratios), sum(ratios), sum(r * r for r in ratios), max(ratios), clipped, 0, 0]
    assert [float(value) for value in sums] == pytest.approx(expected, rel=1e-12)
    assert all(value.dtype == torch.float64 and value.shape == () for value in sums)
    summary = summarize_importance(sums)
    assert summary == pytest.approx(
        {
            "ratio_mean": sum(ratios) / len(ratios),
            "ratio_max": max(ratios),
            "effective_sample_size": sum(ratios) ** 2 / sum(r * r for r in ratios) / len(ratios),
            "clipped_share": clipped / len(ratios),
            "suppressed_share": 0.0,
        }
    )
    assert 0 < summary["effective_sample_size"] <= 1


def test_sums_of_unequal_parts_combine_to_the_whole():
    log_ratio = torch.randn(5, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    whole = importance_statistics(log_ratio, mask, clip_max=1.0)
    parts = [importance_statistics(log_ratio[i:j], mask[i:j], clip_max=1.0) for i, j in [(0, 1), (1, 4), (4, 5)]]
    reduced = ImportanceSums(*(torch.stack(values).sum() for values in zip(*parts, strict=True)))
    reduced = reduced._replace(ratio_max=torch.stack([part.ratio_max for part in parts]).max())
    assert summarize_importance(reduced) == pytest.approx(summarize_importance(whole), rel=1e-12)


def test_effective_sample_size_of_known_ratios():
    equal = importance_statistics(torch.full((1, 4), 0.7), torch.ones(1, 4))
    assert summarize_importance(equal)["effective_sample_size"] == pytest.approx(1.0)
    one_dominates = importance_statistics(torch.tensor([[50.0, 0.0, 0.0, 0.0]]), torch.ones(1, 4))
    assert summarize_importance(one_dominates)["effective_sample_size"] == pytest.approx(0.25)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_garbage_in_masked_places_changes_nothing(level, garbage):
    log_ratio = torch.randn(3, 4)
    dirty = log_ratio.masked_fill(MASK == 0, garbage)
    assert importance_statistics(dirty, MASK, level=level) == importance_statistics(log_ratio, MASK, level=level)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3)])
def test_nothing_valid_is_zero(level, shape):
    sums = importance_statistics(torch.full(shape, math.nan), torch.zeros(shape), level=level, clip_max=1.0)
    assert [float(value) for value in sums] == [0.0] * 7
    assert set(summarize_importance(sums).values()) == {0.0}


def test_extreme_ratios_stay_finite():
    sums = importance_statistics(torch.tensor([[800.0, -800.0, -math.inf]]), torch.ones(1, 3))
    summary = summarize_importance(sums)
    assert all(math.isfinite(value) for value in summary.values())
    assert summary["effective_sample_size"] == pytest.approx(1 / 3)


def test_no_gradient():
    log_ratio = torch.randn(3, 4, requires_grad=True)
    assert not any(value.requires_grad for value in importance_statistics(log_ratio, MASK))


def test_unknown_level_is_refused():
    with pytest.raises(ConfigError, match="`level` is 'batch'. Set it to 'token' or 'sequence'"):
        importance_statistics(torch.zeros(1, 1), torch.ones(1, 1), level="batch")


def test_a_ratio_at_the_bound_is_not_clipped():
    assert importance_statistics(torch.zeros(1, 3), torch.ones(1, 3), clip_max=1.0).clipped_count == 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_suppressed_tokens_are_rewarded_and_certain(level):
    """Of the five tokens with a ratio of 0.05 only the first counts: behaviour sure, advantage positive, valid."""
    behavior = torch.tensor([[0.9, 0.4, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9]]).log()
    log_ratio = torch.tensor([[0.05, 0.05, 0.5, 0.05], [0.05, 0.05, 1.0, 1.0]]).log()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    for advantages in (torch.tensor([1.0, -1.0]), torch.tensor([[1.0], [-1.0]]).expand(2, 4)):
        sums = importance_statistics(log_ratio, mask, level=level, behavior_logps=behavior, advantages=advantages)
        assert (float(sums.certain_count), float(sums.suppressed_count)) == (2.0, 1.0)
        assert summarize_importance(sums)["suppressed_share"] == 0.5


def test_floored_ratio():
    """Between 1 and the cap where the advantage is positive, at most the cap elsewhere; no gradient."""
    ratios = torch.tensor([0.01, 0.9, 1.0, 2.0, 30.0], dtype=torch.float64)
    for advantage, expected in ((0.5, [1, 1, 1, 2, 3]), (-0.5, [0.01, 0.9, 1, 2, 3]), (0.0, [0.01, 0.9, 1, 2, 3])):
        floored = floored_log_ratio(ratios.log().requires_grad_(), torch.tensor(advantage), 3.0)
        assert floored.exp().tolist() == pytest.approx(expected, rel=1e-12)
        assert not floored.requires_grad

"""The reference itself, against numbers worked out by hand: trainer tests rest on it."""

import math

import pytest
import torch

from tests import reference


LOGITS = torch.tensor([math.log(1.0), math.log(2.0), math.log(5.0)], dtype=torch.float64)
OTHER = torch.tensor([math.log(4.0), math.log(2.0), math.log(2.0)], dtype=torch.float64)


def test_distributions():
    assert reference.softmax(LOGITS).tolist() == pytest.approx([0.125, 0.25, 0.625])
    # Equal weights: probabilities proportional to sqrt(1 * 4), sqrt(2 * 2), sqrt(5 * 2)
    geometric = reference.softmax(reference.mix_logits(LOGITS, [OTHER], [0.5])).tolist()
    total = 2 + 2 + math.sqrt(10)
    assert geometric == pytest.approx([2 / total, 2 / total, math.sqrt(10) / total])
    arithmetic = reference.mix_probs(LOGITS, [OTHER], [0.25]).exp().tolist()
    assert arithmetic == pytest.approx([0.09375 + 0.125, 0.1875 + 0.0625, 0.46875 + 0.0625])
    # Proxy tuning: probabilities proportional to p p+ / p-, that is 1 * 4 / 2, 2 * 2 / 1, 5 * 2 / 4
    other = torch.tensor([math.log(2.0), math.log(1.0), math.log(4.0)], dtype=torch.float64)
    added = reference.softmax(reference.add_logits(LOGITS, [OTHER, other], [1.0, -1.0])).tolist()
    assert added == pytest.approx([2 / 8.5, 4 / 8.5, 2.5 / 8.5])
    half = torch.tensor([math.log(0.5), math.log(0.5), -math.inf], dtype=torch.float64)
    assert float(reference.entropy(half)) == pytest.approx(math.log(2))
    assert float(reference.kl_divergence(half, reference.log_softmax(torch.zeros(3).double()))) == pytest.approx(
        math.log(1.5)
    )


def test_temperature_is_applied_after_mixing_logits_and_before_mixing_probabilities():
    squared = reference.mixed_logprobs(LOGITS, [], [], 0.5, "logits").exp().tolist()
    assert squared == pytest.approx([1 / 30, 4 / 30, 25 / 30])
    mixed = reference.mixed_logprobs(LOGITS, [OTHER], [0.5], 0.5, "probs").exp().tolist()
    assert mixed == pytest.approx([(1 / 30 + 16 / 24) / 2, (4 / 30 + 4 / 24) / 2, (25 / 30 + 4 / 24) / 2])


def test_softcap():
    weight, bias = torch.tensor([[1.0], [3.0]]).double(), torch.tensor([1.0, 0.0]).double()
    logits = reference.head_logits(torch.tensor([2.0]).double(), weight, bias, 0.5, 4.0)
    assert logits.tolist() == pytest.approx([4 * math.tanh(1.5 / 4), 4 * math.tanh(3 / 4)])


@pytest.mark.parametrize(
    ("mode", "ratio", "advantage", "loss"),
    [
        ("ppo", 1.5, 2.0, -2.4),
        ("ppo", 0.5, 2.0, -1.0),
        ("ppo", 1.5, -2.0, 3.0),
        ("ppo", 0.5, -2.0, 1.6),
        ("none", 5.0, -2.0, 10.0),
        ("max", 5.0, 2.0, -6.0),
        ("max", 5.0, -2.0, 6.0),
        ("max", 0.5, -2.0, 1.0),
    ],
)
def test_token_loss(mode, ratio, advantage, loss):
    ratio = torch.tensor(ratio, dtype=torch.float64)
    assert float(reference.token_loss(ratio, advantage, mode, (0.2, 0.2), 3.0)) == pytest.approx(loss)


def test_aggregation_and_sequence_ratio():
    losses = [[torch.tensor(x).double() for x in row] for row in ([1.0, 2.0, 3.0], [4.0, 5.0, math.nan])]
    mask = [[1, 1, 1], [1, 0, 0]]
    assert float(reference.aggregate(losses, mask, "grpo")) == pytest.approx((2.0 + 4.0) / 2)
    assert float(reference.aggregate(losses, mask, "bnpo")) == pytest.approx(10.0 / 4)
    assert float(reference.aggregate(losses, mask, "dapo", num_items=8)) == pytest.approx(10.0 / 8)
    assert float(reference.aggregate(losses, mask, "dr_grpo", max_length=5)) == pytest.approx(10.0 / 10)
    (row,) = reference.ratios([[-1.0, -3.0, 9.0]], [[-2.0, -1.0, 0.0]], [[1, 1, 0]], "sequence")
    assert [float(r) for r in row] == pytest.approx([math.exp(-0.5)] * 3)


def test_weights():
    assert reference.linear_weight(250, 0.5, 1000) == pytest.approx(0.375)
    assert reference.cosine_weight(250, 0.5, 1000) == pytest.approx(0.25 * (1 + math.sqrt(0.5)))
    assert reference.linear_weight(2000, 0.5, 1000) == reference.cosine_weight(2000, 0.5, 1000) == 0.0
    net_gain, weight = reference.adaptive_weight([True, True, False, False], [False, True, True, False], 10.0, 0.1)
    assert (net_gain, weight) == (0.0, pytest.approx(1 / (1 + math.e)))

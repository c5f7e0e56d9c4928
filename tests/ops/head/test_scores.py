"""`score_tokens` against float64 loops: values, the K ids that are kept, and the mass of the rest."""

import math
from contextlib import nullcontext

import pytest
import torch

from tests import reference
from tests.ops.head.conftest import set_tiles
from tests.ops.head.heads import random_head, to_double
from trl_blend.errors import ConfigError
from trl_blend.ops import LMHead, mixed_log_probs, score_tokens
from trl_blend.ops.head.scores import score_logits


N, V, H = 23, 37, 5
OPTIONS = [{}, {"bias": True, "logit_scale": 0.5, "softcap": 3.0}]


@pytest.fixture(autouse=True)
def tile_sizes(monkeypatch):
    set_tiles(monkeypatch, 7, 11)


def expected_scores(head: LMHead, targets, top_k):
    """Per token: `log p(target)`, the kept ids, their log-probabilities and the log-mass of the rest."""
    rows = []
    for n, target in enumerate(targets.tolist()):
        logprobs = reference.log_softmax(reference.head_logits(head.hidden[n], *head[1:])).tolist()
        kept = sorted(range(len(logprobs)), key=lambda v: -logprobs[v])[:top_k]
        if target not in kept:
            kept[-1] = target
        tail = math.fsum(math.exp(z) for v, z in enumerate(logprobs) if v not in kept)
        rows.append((logprobs[target], kept, [logprobs[v] for v in kept], math.log(tail)))
    return [list(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "options"])
@pytest.mark.parametrize("top_k", [1, 2, 5, 20, V - 1])
def test_scores_match_the_reference(options, top_k):
    head, targets = random_head(N, H, V, **options), torch.randint(0, V, (N,))
    scores = score_tokens(head, targets, top_k)
    logps, ids, topk_logps, tail = expected_scores(head, targets, top_k)
    exact = {"rtol": 0, "atol": 1e-12}
    assert scores.topk_ids.tolist() == ids
    torch.testing.assert_close(scores.logps, torch.tensor(logps, dtype=torch.float64), **exact)
    torch.testing.assert_close(scores.topk_logps, torch.tensor(topk_logps, dtype=torch.float64), **exact)
    torch.testing.assert_close(scores.tail_logmass, torch.tensor(tail, dtype=torch.float64), **exact)
    torch.testing.assert_close(score_tokens(head, targets).logps, scores.logps, **exact)


@pytest.mark.parametrize("top_k", [None, 1, 5, V - 3])
@pytest.mark.parametrize("vocab_size", [None, V - 2])
def test_logits_in_memory_have_the_same_scores(top_k, vocab_size):
    head, targets = random_head(N, H, V, **OPTIONS[1]), torch.randint(0, V - 2, (N,))
    logits = torch.stack([reference.head_logits(hidden, *head[1:]) for hidden in head.hidden])
    expected = score_tokens(head, targets, top_k, vocab_size=vocab_size)
    for mine, right in zip(score_logits(logits, targets, top_k, vocab_size=vocab_size), expected, strict=True):
        assert (mine is None) == (right is None)
        if mine is not None:
            torch.testing.assert_close(mine, right, rtol=0, atol=1e-10)


def test_the_target_is_kept_wherever_it_ranks():
    head = random_head(1, H, V)
    order = reference.head_logits(head.hidden[0], *head[1:]).argsort(descending=True)
    for rank, target in enumerate(order):
        ids = score_tokens(head, target[None], 4).topk_ids[0].tolist()
        assert ids == (order[:4].tolist() if rank < 4 else [*order[:3].tolist(), target.item()])


def test_a_tiny_tail_keeps_its_digits():
    # Two tokens hold all but e^-60 of the mass: `1 - p` is exactly 0 in float32
    logits = torch.tensor([[30.0, 30.0, -30.0, -31.0]])
    head = LMHead(logits, torch.eye(4))
    scores = score_tokens(head, torch.tensor([1]), 2)
    expected = math.log(math.exp(-60) + math.exp(-61)) - math.log(2)
    assert scores.tail_logmass.item() == pytest.approx(expected, rel=1e-6)
    # ... and also where the target is what is left of it
    scores = score_tokens(head, torch.tensor([2]), 3)
    assert sorted(scores.topk_ids[0].tolist()) == [0, 1, 2] and scores.topk_ids[0, 2] == 2
    assert scores.tail_logmass.item() == pytest.approx(-61 - math.log(2), rel=1e-6)


def test_without_a_competitor_the_log_probability_is_not_positive():
    head = LMHead(torch.tensor([[80.0, 0.0, 0.0]]), torch.eye(3))
    assert score_tokens(head, torch.tensor([0])).logps.item() == 0.0
    assert score_tokens(head, torch.tensor([0]), 2).topk_logps.max().item() <= 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [None, 5])
def test_half_precision_rounds_like_the_student(dtype, top_k):
    """Equal to `mixed_log_probs`, which follows TRL: a teacher that is the student has advantage 0."""
    head, targets = random_head(N, H, V, dtype=dtype), torch.randint(0, V, (N,))
    scores = score_tokens(head, targets, top_k)
    assert scores.logps.dtype == torch.float32
    live = mixed_log_probs(head, [], [], targets, compute_entropy=False).logps
    torch.testing.assert_close(scores.logps, live, rtol=0, atol=2e-6)
    exact = torch.tensor(expected_scores(to_double(head), targets, 1)[0])
    torch.testing.assert_close(scores.logps, exact, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_nothing_has_a_gradient():
    head, targets = random_head(N, H, V, requires_grad=True), torch.randint(0, V, (N,))
    assert not any(tensor.requires_grad for tensor in score_tokens(head, targets, 3))


@pytest.mark.parametrize("top_k", [None, 3])
def test_parameters_are_gathered_once(top_k):
    head, seen = random_head(N, H, V, bias=True), []

    def gather(*parameters):
        seen.append(parameters)
        return nullcontext()

    score_tokens(head, torch.randint(0, V, (N,)), top_k, gather_parameters=gather)
    assert len(seen) == 1 and seen[0][0] is head.weight and seen[0][1] is head.bias


@pytest.mark.parametrize("top_k", [0, -1, V, V + 1])
def test_top_k_out_of_range(top_k):
    with pytest.raises(ConfigError, match=rf"`top_k={top_k}` must be at least 1 and less than the vocabulary size 37"):
        score_tokens(random_head(N, H, V), torch.zeros(N, dtype=torch.long), top_k)


def test_shapes_that_do_not_fit():
    head = random_head(N, H, V)
    with pytest.raises(ConfigError, match=r"`targets` has shape \(22,\), expected \(23,\)"):
        score_tokens(head, torch.zeros(N - 1, dtype=torch.long))
    with pytest.raises(ConfigError, match="`head` has hidden states of shape"):
        score_tokens(head._replace(weight=head.weight[:, 1:]), torch.zeros(N, dtype=torch.long))

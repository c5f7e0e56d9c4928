"""Rows of the output layer that are no tokens: without them, everything is what it is for a smaller layer."""

import pytest
import torch

from tests.ops.head.conftest import set_tiles
from tests.ops.head.heads import leaves, random_head, stored
from trl_blend.errors import ConfigError
from trl_blend.ops import mixed_log_probs, reverse_kl, score_tokens, top_k_divergence


N, V, TOKENS, H, K = 9, 31, 23, 5, 4


@pytest.fixture(autouse=True)
def tile_sizes(monkeypatch):
    set_tiles(monkeypatch, 4, 7)


def shortened(head):
    bias = None if head.bias is None else head.bias.detach()[:TOKENS].requires_grad_()
    weight = head.weight.detach()[:TOKENS].requires_grad_()
    return head._replace(hidden=head.hidden.detach().requires_grad_(), weight=weight, bias=bias)


def of_top_k(head, targets, vocab_size):
    torch.manual_seed(3)
    store = stored(torch.randn(N, TOKENS, dtype=torch.float64).log_softmax(-1), K)._replace(targets=targets)
    return top_k_divergence(head, *store, vocab_size=vocab_size)


def of_mixture(space):
    torch.manual_seed(4)
    partners = [random_head(N, 3, TOKENS), random_head(N, 3, V + 5)]

    def function(head, targets, vocab_size):
        return mixed_log_probs(head, partners, [0.2, 0.3], targets, space=space, vocab_size=vocab_size)

    return function


def of_reverse_kl(head, targets, vocab_size):
    torch.manual_seed(5)
    return reverse_kl(head, random_head(N, 3, V), vocab_size=vocab_size)


FUNCTIONS = {
    "scores": lambda head, targets, vocab_size: score_tokens(head, targets, vocab_size=vocab_size)[:1],
    "top_k_scores": lambda head, targets, vocab_size: score_tokens(head, targets, K, vocab_size=vocab_size),
    "top_k": of_top_k,
    "mixed logits": of_mixture("logits"),
    "mixed probs": of_mixture("probs"),
    "reverse_kl": of_reverse_kl,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_rows_beyond_the_tokens_have_no_part(function):
    torch.manual_seed(0)
    head = random_head(N, H, V, bias=True, softcap=3.0, requires_grad=True)
    with torch.no_grad():
        head.weight[TOKENS:] *= 5.0  # they would be the most probable ones
    targets, short = torch.randint(0, TOKENS, (N,)), shortened(head)
    result, expected = function(head, targets, TOKENS), function(short, targets, None)
    for value, exact in zip(result, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=0, atol=1e-12)
    if result[0].requires_grad:
        result[0].sum().backward()
        expected[0].sum().backward()
        for whole, part in zip(leaves(head), leaves(short), strict=True):
            torch.testing.assert_close(whole.grad[: len(part)], part.grad, rtol=0, atol=1e-12)
            assert not whole.grad[len(part) :].any()


@pytest.mark.parametrize("name", ["scores", "top_k", "mixed logits"])
def test_a_layer_of_fewer_rows_is_taken_whole(name):
    head, targets = random_head(N, H, TOKENS), torch.randint(0, TOKENS, (N,))
    whole, cut = (FUNCTIONS[name](head, targets, size) for size in (None, V))
    torch.testing.assert_close(whole, cut, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="`vocab_size` is 0"):
        FUNCTIONS[name](head, targets, 0)

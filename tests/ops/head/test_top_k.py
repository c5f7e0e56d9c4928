"""`top_k_divergence` against float64 loops, against full divergences, and at its limits."""

import math

import pytest
import torch

from tests import reference
from tests.ops.head.heads import Stored, expected_top_k, gradients, leaves, logit_rows, random_head, stored, to_double
from trl_blend.errors import ConfigError
from trl_blend.ops import LMHead, top_k_divergence


N, H, V, K = 7, 5, 23, 4
OPTIONS = {"plain": {}, "everything": {"bias": True, "logit_scale": 0.7, "softcap": 3.0}}
every_direction = pytest.mark.parametrize("direction", ["reverse", "forward"])


def teacher_logprobs(rows=N, vocab=V):
    return torch.randn(rows, vocab, dtype=torch.float64).mul(2).log_softmax(-1)


def logprobs_of(head: LMHead) -> torch.Tensor:
    return torch.stack([reference.log_softmax(row) for row in logit_rows(head, V)]).detach()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_direction
def test_value_and_gradients_equal_the_reference(direction, options, tiles):
    head = random_head(N, H, V, requires_grad=True, **options)
    store = stored(teacher_logprobs(), K)
    # As a store rounds them: the masses do not add up to 1
    logps, tail = store.topk_logps.half().double(), store.tail_logmass.half().double()
    store = store._replace(topk_logps=logps, tail_logmass=tail)
    result = top_k_divergence(head, *store, direction=direction)
    own = to_double(head)
    expected = expected_top_k(own, store, direction)
    torch.testing.assert_close(tuple(result), expected)
    factors = [torch.randn(N, dtype=torch.float64)]
    grads = gradients([result.loss], leaves(head), factors)
    torch.testing.assert_close(grads, gradients(expected[:1], leaves(own), factors))


@every_direction
def test_gradcheck(direction):
    head = random_head(3, H, V, requires_grad=True, **OPTIONS["everything"])
    store = stored(teacher_logprobs(3), K)

    def loss(*tensors):
        return top_k_divergence(LMHead(*tensors, head.logit_scale, head.softcap), *store, direction=direction).loss

    assert torch.autograd.gradcheck(loss, leaves(head))


@every_direction
def test_one_token_short_of_the_vocabulary_is_the_full_divergence(direction):
    """With one token outside, the tail event is that token."""
    head, teacher = random_head(N, H, V), teacher_logprobs()
    value = top_k_divergence(head, *stored(teacher, V - 1), direction=direction).loss
    student = logprobs_of(head)
    p, q = (student, teacher) if direction == "reverse" else (teacher, student)
    torch.testing.assert_close(value, (p.exp() * (p - q)).sum(-1))


@every_direction
@pytest.mark.parametrize(("vocab", "top_k"), [(V, K), (2, 1)])
def test_equal_policies_have_no_divergence_and_no_gradient(direction, vocab, top_k):
    head = random_head(N, H, vocab, requires_grad=True)
    loss = top_k_divergence(head, *stored(logprobs_of(head), top_k), direction=direction).loss
    assert loss.abs().max() < 1e-14
    assert all(grad.abs().max() < 1e-14 for grad in torch.autograd.grad(loss.sum(), leaves(head)))


@every_direction
def test_a_teacher_without_tail_gives_finite_values_and_gradients(direction):
    head = random_head(N, H, V, requires_grad=True, dtype=torch.float32)
    store = stored(teacher_logprobs(), K)
    logps = store.topk_logps - store.topk_logps.logsumexp(-1, keepdim=True)
    store = store._replace(topk_logps=logps, tail_logmass=torch.full((N,), -math.inf))
    loss = top_k_divergence(head, *store, direction=direction).loss
    assert loss.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss.sum(), leaves(head)))
    floor = store._replace(tail_logmass=torch.full((N,), -30.0))
    torch.testing.assert_close(loss, top_k_divergence(head, *floor, direction=direction).loss)


def test_a_stored_log_prob_below_the_floor_of_the_tail_counts_as_it_is():
    head, store = random_head(N, H, V), stored(teacher_logprobs(), K)
    values = []
    for value in (-45.0, -31.0):
        store.topk_logps[:, -1] = value
        values.append(top_k_divergence(head, *store).loss)
    assert (values[0] > values[1]).all()


def test_a_token_without_probability_leaves_the_entropy_finite():
    head = random_head(N, H, V, bias=True)
    head.bias[3] = -torch.inf
    result = top_k_divergence(head, *stored(teacher_logprobs(), K))
    assert result.student_entropy.isfinite().all() and result.loss.isfinite().all()


def test_refusals():
    head, store = random_head(N, H, V), stored(teacher_logprobs(), K)
    with pytest.raises(ConfigError, match="direction='both'"):
        top_k_divergence(head, *store, direction="both")
    every_token = Stored(store.targets, torch.arange(V).expand(N, V), teacher_logprobs(), store.tail_logmass)
    with pytest.raises(ConfigError, match="23 tokens per position"):
        top_k_divergence(head, *every_token)

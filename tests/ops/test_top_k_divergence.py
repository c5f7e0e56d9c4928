"""`top_k_divergence` against float64 loops, against full divergences, and in memory."""

import math

import pytest
import torch

from tests import reference_offline
from tests.ops.heads import leaves, random_head, to_double
from tests.ops.test_mixed_head_memory import Recorder
from trl_blend.errors import ConfigError
from trl_blend.ops import LMHead
from trl_blend.ops.head import tiles
from trl_blend.ops.head.top_k import top_k_divergence


N, H, V, K = 7, 5, 23, 4
OPTIONS = {"plain": {}, "everything": {"bias": True, "logit_scale": 0.7, "softcap": 3.0}}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def stored(vocab: int = V, rows: int = N, top_k: int = K):
    """Teacher's log-probabilities, its top-k with the sampled token in the last place, and the tail."""
    teacher = torch.randn(rows, vocab, dtype=torch.float64).mul(2).log_softmax(-1)
    targets = torch.randint(vocab, (rows,))
    ids = teacher.topk(top_k).indices
    missing = ~(ids == targets[:, None]).any(-1)
    ids[missing, -1] = targets[missing]
    logps = teacher.gather(-1, ids)
    tail = teacher.scatter(-1, ids, -math.inf).logsumexp(-1)
    return teacher, targets, ids, logps, tail


def logits_of(head: LMHead) -> torch.Tensor:
    z = head.hidden @ head.weight.t()
    z = (z if head.bias is None else z + head.bias) * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_value_and_gradients_equal_the_reference(direction, options):
    head = random_head(N, H, V, requires_grad=True, **options)
    _, targets, ids, logps, tail = stored()
    logps, tail = logps.half().double(), tail.half().double()  # as a store rounds them: the masses do not add up to 1
    result = top_k_divergence(head, targets, ids, logps, tail, direction=direction)
    factors = torch.randn(N, dtype=torch.float64)
    grads = torch.autograd.grad((factors * result.loss).sum(), leaves(head))

    own = to_double(head)
    rows = logits_of(own)
    masses = torch.cat([logps, tail[:, None]], dim=-1).tolist()
    expected = torch.stack(
        [reference_offline.top_k_kl(rows[n], ids[n].tolist(), masses[n], direction) for n in range(N)]
    )
    expected_grads = torch.autograd.grad((factors * expected).sum(), leaves(own))
    torch.testing.assert_close(result.loss, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)

    logprobs = rows.detach().log_softmax(-1)
    torch.testing.assert_close(result.student_logps, logprobs.gather(-1, targets[:, None]).squeeze(-1))
    torch.testing.assert_close(result.student_entropy, torch.special.entr(logprobs.exp()).sum(-1))
    assert result.is_top1.tolist() == (logprobs.argmax(-1) == targets).double().tolist()
    assert not any(x.requires_grad for x in result[1:])


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_gradcheck(direction):
    head = random_head(3, H, V, requires_grad=True, **OPTIONS["everything"])
    _, targets, ids, logps, tail = stored(rows=3)

    def loss(*tensors):
        return top_k_divergence(
            LMHead(*tensors, head.logit_scale, head.softcap), targets, ids, logps, tail, direction=direction
        ).loss

    assert torch.autograd.gradcheck(loss, leaves(head))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_one_token_short_of_the_vocabulary_is_the_full_divergence(direction):
    """With one token outside, the tail event is that token."""
    head = random_head(N, H, V)
    teacher, targets, *_ = stored()
    ids = teacher.topk(V - 1).indices
    tail = teacher.scatter(-1, ids, -math.inf).logsumexp(-1)
    value = top_k_divergence(head, targets, ids, teacher.gather(-1, ids), tail, direction=direction).loss
    student = logits_of(head).log_softmax(-1)
    p, q = (student, teacher) if direction == "reverse" else (teacher, student)
    torch.testing.assert_close(value, (p.exp() * (p - q)).sum(-1))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_equal_policies_have_no_divergence_and_no_gradient(direction):
    head = random_head(N, H, V, requires_grad=True)
    teacher = logits_of(head).detach().log_softmax(-1)
    ids = teacher.topk(K).indices
    tail = teacher.scatter(-1, ids, -math.inf).logsumexp(-1)
    loss = top_k_divergence(head, ids[:, 0], ids, teacher.gather(-1, ids), tail, direction=direction).loss
    assert loss.abs().max() < 1e-14
    assert all(grad.abs().max() < 1e-14 for grad in torch.autograd.grad(loss.sum(), leaves(head)))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_a_teacher_without_tail_gives_finite_values_and_gradients(direction):
    head = random_head(N, H, V, requires_grad=True, dtype=torch.float32)
    _, targets, ids, logps, _ = stored()
    logps = logps - logps.logsumexp(-1, keepdim=True)
    tail = torch.full((N,), -math.inf)
    loss = top_k_divergence(head, targets, ids, logps, tail, direction=direction).loss
    assert loss.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss.sum(), leaves(head)))
    floor = torch.full((N,), -30.0)
    torch.testing.assert_close(loss, top_k_divergence(head, targets, ids, logps, floor, direction=direction).loss)


def test_a_stored_log_prob_below_the_floor_of_the_tail_counts_as_it_is():
    head = random_head(N, H, V)
    _, targets, ids, logps, tail = stored()
    values = []
    for value in (-45.0, -31.0):
        logps[:, -1] = value
        values.append(top_k_divergence(head, targets, ids, logps, tail).loss)
    assert (values[0] > values[1]).all()


def test_a_token_without_probability_leaves_the_entropy_finite():
    head = random_head(N, H, V, bias=True)
    head.bias[3] = -torch.inf
    _, targets, ids, logps, tail = stored()
    result = top_k_divergence(head, targets, ids, logps, tail)
    assert result.student_entropy.isfinite().all() and result.loss.isfinite().all()


def test_a_frozen_head_gets_no_gradient_and_no_rows_give_no_values():
    head = random_head(N, H, V)
    head.hidden.requires_grad_(True)
    _, targets, ids, logps, tail = stored()
    top_k_divergence(head, targets, ids, logps, tail).loss.sum().backward()
    assert head.hidden.grad is not None and head.weight.grad is None
    none = slice(0, 0)
    empty = top_k_divergence(
        head._replace(hidden=head.hidden[none]), targets[none], ids[none], logps[none], tail[none]
    )
    assert all(x.shape == (0,) for x in empty)
    empty.loss.sum().backward()  # a micro-batch without labels still reaches the model


def test_bfloat16_is_near_float32():
    head = random_head(N, H, V, requires_grad=True, dtype=torch.bfloat16)
    _, targets, ids, logps, tail = stored()
    value = top_k_divergence(head, targets, ids, logps, tail).loss
    exact = top_k_divergence(to_double(head), targets, ids, logps, tail).loss
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, atol=0.05, rtol=0.05)
    (grad,) = torch.autograd.grad(value.sum(), [head.weight])
    assert grad.dtype == torch.bfloat16


def test_no_tensor_has_the_size_of_the_logits(monkeypatch):
    rows, vocab, chunk = 96, 640, 8
    monkeypatch.setattr(tiles, "TOKEN_TILE", chunk)
    monkeypatch.setattr(tiles, "VOCAB_TILE", vocab)
    head = random_head(rows, H, vocab, requires_grad=True)
    _, targets, ids, logps, tail = stored(vocab, rows)
    forward, backward = Recorder(), Recorder()
    with forward:
        loss = top_k_divergence(head, targets, ids, logps, tail).loss.sum()
    with backward:
        loss.backward()
    assert max(*forward.sizes, *backward.sizes) == chunk * vocab


def test_refusals():
    head = random_head(N, H, V)
    _, targets, ids, logps, tail = stored()
    with pytest.raises(ConfigError, match="direction='both'"):
        top_k_divergence(head, targets, ids, logps, tail, direction="both")
    _, targets, ids, logps, tail = stored(top_k=V)
    with pytest.raises(ConfigError, match="23 tokens per position"):
        top_k_divergence(head, targets, ids, logps, tail)

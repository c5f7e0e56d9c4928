"""`mixed_log_probs` against TRL's kernel, which knows one output layer: the student's or a concatenation."""

import pytest
import torch

from tests.ops.heads import leaves, random_head
from trl_blend.ops import mixed_log_probs
from trl_blend.ops.head import tiles as tiling


trl_utils = pytest.importorskip("trl.trainer.utils")
N, V = 13, 37


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "TOKEN_TILE", 5)
    monkeypatch.setattr(tiling, "VOCAB_TILE", 8)


def trl_log_probs(hidden, weight, bias, targets, temperature, softcap=None, logit_scale=1.0):
    logps, entropy, *_ = trl_utils._ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, temperature, 16, softcap, logit_scale, ("entropy",)
    )
    return logps, entropy


def grads_of(result, tensors, directions):
    return torch.autograd.grad(sum((r * d).sum() for r, d in zip(result, directions)), tensors)


@pytest.mark.parametrize("options", [{}, {"bias": True, "logit_scale": 0.7}], ids=["plain", "options"])
@pytest.mark.parametrize("weights", [[0.3], [0.2, 0.5]])
def test_mixed_logits_are_one_wider_output_layer(weights, options):
    """`[W_S ; W_T] · [w_S h_S ; w_T h_T]`, with biases and scales folded in."""
    student = random_head(N, 6, V, dtype=torch.float32, requires_grad=True, **options)
    partners = [random_head(N, 5 + i, V, dtype=torch.float32, **options) for i in range(len(weights))]
    targets = torch.randint(0, V, (N,))
    directions = torch.randn(2, N)
    result = mixed_log_probs(student, partners, weights, targets, temperature=0.8)

    parts = list(zip([1 - sum(weights), *weights], [student, *partners]))
    hidden = torch.cat([weight * head.logit_scale * head.hidden for weight, head in parts], dim=1)
    weight = torch.cat([head.weight for _, head in parts], dim=1)
    bias = sum(weight * head.logit_scale * head.bias for weight, head in parts) if options else None
    expected = trl_log_probs(hidden, weight, bias, targets, 0.8)
    torch.testing.assert_close(tuple(result), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(
        grads_of(result, leaves(student), directions),
        grads_of(expected, leaves(student), directions),
        rtol=1e-5,
        atol=5e-6,
    )


@pytest.mark.parametrize("space", ["logits", "probs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "logit_scale": 0.7}, {"softcap": 2.0, "logit_scale": 1.3}], ids=str
)
def test_a_partner_of_weight_0_leaves_the_student_as_trl_computes_it(space, dtype, options):
    student = random_head(N, 6, V, dtype=dtype, requires_grad=True, **options)
    partner = random_head(N, 4, V, dtype=dtype)
    targets = torch.randint(0, V, (N,))
    directions = torch.randn(2, N)
    result = mixed_log_probs(student, [partner], [0.0], targets, temperature=0.8, space=space)
    expected = trl_log_probs(
        student.hidden, student.weight, student.bias, targets, 0.8, student.softcap, student.logit_scale
    )
    # In bfloat16 too: the logits are rounded in the same place
    torch.testing.assert_close(tuple(result), expected, rtol=1e-5, atol=2e-6)
    # TRL rounds the logits gradient to bfloat16 as well, this package only where the hardware gains from it
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        grads_of(result, leaves(student), directions),
        grads_of(expected, leaves(student), directions),
        rtol=tolerance,
        atol=tolerance,
    )


def test_autocast_as_trl():
    student = random_head(N, 6, V, dtype=torch.float32, requires_grad=True)
    targets = torch.randint(0, V, (N,))
    with torch.autocast("cpu", torch.bfloat16):
        result = mixed_log_probs(student, [], [], targets)
        expected = trl_log_probs(student.hidden, student.weight, None, targets, 1.0)
    torch.testing.assert_close(tuple(result), expected, rtol=1e-5, atol=2e-6)

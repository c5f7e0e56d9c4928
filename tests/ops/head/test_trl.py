"""`mixed_log_probs` and `reverse_kl` without their options are what TRL computes for one output layer, or two."""

import pytest
import torch

from tests.ops.head.conftest import set_tiles
from tests.ops.head.heads import leaves, random_head
from trl_blend.ops import mixed_log_probs, reverse_kl


trl_utils = pytest.importorskip("trl.trainer.utils")
distillation = pytest.importorskip("trl.trainer.distillation_trainer")
kernels = pytest.importorskip("trl.kernels.chunked_divergence")
N, V = 18, 37
BATCH = (2, 9)

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
every_option = pytest.mark.parametrize(
    "options", [{}, {"bias": True, "logit_scale": 0.7}, {"softcap": 2.0, "logit_scale": 1.3}], ids=str
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    set_tiles(monkeypatch, 5, 8)
    monkeypatch.setattr(kernels, "TOKEN_CHUNK_SIZE", 7)
    monkeypatch.setattr(kernels, "VOCAB_CHUNK_SIZE", 16)


def trl_log_probs(hidden, weight, bias, targets, temperature, softcap=None, logit_scale=1.0):
    logps, entropy, *_ = trl_utils._ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, temperature, 16, softcap, logit_scale, ("entropy",)
    )
    return logps, entropy


def trl_divergence(student, teacher, mask, temperature):
    loss, entropy, _ = distillation._chunked_divergence_loss(
        student.hidden.view(*BATCH, -1),
        teacher.hidden.view(*BATCH, -1),
        student.weight,
        teacher.weight,
        mask,
        1.0,
        num_items_in_batch=torch.tensor(11),
        student_lm_head_bias=student.bias,
        teacher_lm_head_bias=teacher.bias,
        student_logit_scale=student.logit_scale,
        teacher_logit_scale=teacher.logit_scale,
        student_final_logit_softcapping=student.softcap,
        teacher_final_logit_softcapping=teacher.softcap,
        temperature=temperature,
    )
    return loss, entropy


def assert_equal(result, expected, student, directions, dtype):
    # In bfloat16 too: logits are rounded in the same place, or not at all
    torch.testing.assert_close(tuple(result), expected, rtol=2e-5, atol=2e-6)
    # TRL rounds the gradients of logits to bfloat16 as well, this package only where the hardware gains from it
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    grads, wanted = (
        torch.autograd.grad(sum((r * d).sum() for r, d in zip(values, directions)), leaves(student))
        for values in (result, expected)
    )
    torch.testing.assert_close(grads, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"bias": True, "logit_scale": 0.7}], ids=["plain", "options"])
@pytest.mark.parametrize("weights", [[0.3], [0.2, 0.5]])
def test_mixed_logits_are_one_wider_output_layer(weights, options):
    """`[W_S ; W_T] · [w_S h_S ; w_T h_T]`, with biases and scales folded in."""
    student = random_head(N, 6, V, dtype=torch.float32, requires_grad=True, **options)
    partners = [random_head(N, 5 + i, V, dtype=torch.float32, **options) for i in range(len(weights))]
    targets = torch.randint(0, V, (N,))
    result = mixed_log_probs(student, partners, weights, targets, temperature=0.8)
    parts = list(zip([1 - sum(weights), *weights], [student, *partners]))
    hidden = torch.cat([weight * head.logit_scale * head.hidden for weight, head in parts], dim=1)
    weight = torch.cat([head.weight for _, head in parts], dim=1)
    bias = sum(weight * head.logit_scale * head.bias for weight, head in parts) if options else None
    expected = trl_log_probs(hidden, weight, bias, targets, 0.8)
    assert_equal(result, expected, student, torch.randn(2, N), torch.float32)


@pytest.mark.parametrize("space", ["logits", "probs"])
@every_dtype
@every_option
def test_a_partner_of_weight_0_leaves_the_student_as_trl_computes_it(space, dtype, options):
    student = random_head(N, 6, V, dtype=dtype, requires_grad=True, **options)
    partner = random_head(N, 4, V, dtype=dtype)
    targets = torch.randint(0, V, (N,))
    result = mixed_log_probs(student, [partner], [0.0], targets, temperature=0.8, space=space)
    expected = trl_log_probs(
        student.hidden, student.weight, student.bias, targets, 0.8, student.softcap, student.logit_scale
    )
    assert_equal(result, expected, student, torch.randn(2, N), dtype)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@every_dtype
@every_option
def test_reverse_kl_is_the_loss_of_the_distillation_trainer(dtype, temperature, options):
    student = random_head(N, 6, V, dtype=dtype, requires_grad=True, **options)
    teacher = random_head(N, 4, V, dtype=dtype, **options)
    mask = (torch.rand(BATCH) < 0.6).long()
    values = reverse_kl(student, teacher, temperature=temperature)
    loss, entropy = (torch.where(mask.view(-1) > 0, value, 0.0).sum() for value in values[:2])
    expected = trl_divergence(student, teacher, mask, temperature)
    torch.testing.assert_close(entropy, expected[1], rtol=2e-5, atol=2e-6)
    assert_equal([loss / 11], expected[:1], student, [1.0], dtype)


def test_autocast_as_trl():
    student = random_head(N, 6, V, dtype=torch.float32, requires_grad=True)
    teacher = random_head(N, 4, V, dtype=torch.float32)
    targets = torch.randint(0, V, (N,))
    with torch.autocast("cpu", torch.bfloat16):
        mixture = mixed_log_probs(student, [], [], targets)
        expected = trl_log_probs(student.hidden, student.weight, None, targets, 1.0)
        divergence = reverse_kl(student, teacher)
        expected_divergence = trl_divergence(student, teacher, torch.ones(BATCH), 1.0)
    torch.testing.assert_close(tuple(mixture), expected, rtol=2e-5, atol=2e-6)
    result = (divergence.loss.sum() / 11, divergence.student_entropy.sum())
    torch.testing.assert_close(result, expected_divergence, rtol=2e-5, atol=2e-6)

"""`reverse_kl` without any of its options is the loss that TRL's `DistillationTrainer` computes with `beta=1`."""

import pytest
import torch

from tests.ops.heads import leaves, random_head
from trl_blend.ops import reverse_kl
from trl_blend.ops.head import tiles as tiling


distillation = pytest.importorskip("trl.trainer.distillation_trainer")
kernels = pytest.importorskip("trl.kernels.chunked_divergence")
B, T, V = 2, 9, 37


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "TOKEN_TILE", 5)
    monkeypatch.setattr(tiling, "VOCAB_TILE", 8)
    monkeypatch.setattr(kernels, "TOKEN_CHUNK_SIZE", 7)
    monkeypatch.setattr(kernels, "VOCAB_CHUNK_SIZE", 16)


def trl_loss(student, teacher, mask, temperature):
    loss, entropy, _ = distillation._chunked_divergence_loss(
        student.hidden.view(B, T, -1),
        teacher.hidden.view(B, T, -1),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "logit_scale": 0.7}, {"softcap": 2.0, "logit_scale": 1.3}], ids=str
)
def test_equals_trl(dtype, temperature, options):
    student = random_head(B * T, 6, V, dtype=dtype, requires_grad=True, **options)
    teacher = random_head(B * T, 4, V, dtype=dtype, **options)
    mask = (torch.rand(B, T) < 0.6).long()
    result = reverse_kl(student, teacher, temperature=temperature)
    loss, entropy = (torch.where(mask.view(-1) > 0, value, 0.0).sum() for value in result[:2])
    loss = loss / 11
    expected = trl_loss(student, teacher, mask, temperature)
    # In bfloat16 too: neither rounds a logit
    torch.testing.assert_close((loss, entropy), expected, rtol=2e-5, atol=2e-6)
    # TRL rounds the gradients of logits to bfloat16 as well, this package only where the hardware gains from it
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves(student)),
        torch.autograd.grad(expected[0], leaves(student)),
        rtol=tolerance,
        atol=tolerance,
    )


def test_autocast_as_trl():
    student = random_head(B * T, 6, V, dtype=torch.float32, requires_grad=True)
    teacher = random_head(B * T, 4, V, dtype=torch.float32)
    mask = torch.ones(B, T)
    with torch.autocast("cpu", torch.bfloat16):
        result = reverse_kl(student, teacher)
        expected = trl_loss(student, teacher, mask, 1.0)
    torch.testing.assert_close((result.loss.sum() / 11, result.student_entropy.sum()), expected, rtol=2e-5, atol=2e-6)

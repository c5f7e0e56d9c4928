"""The losses of `reverse_kl` for random output layers, from the float64 reference."""

import torch
from torch import Tensor

from tests import reference, reference_divergences
from trl_blend.ops import EosMap, LMHead


def logit_rows(head: LMHead, vocab_size: int) -> list[Tensor]:
    return [reference.head_logits(hidden, *head[1:])[:vocab_size] for hidden in head.hidden]


def expected_reverse_kl(
    student: LMHead,
    teacher: LMHead,
    *,
    temperature: float = 1.0,
    veto_weight: float = 0.0,
    top_k: int | None = None,
    eos: EosMap | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, ...]:
    """Loss, entropy and reverse KL, token by token."""
    size = min(student.weight.shape[0], teacher.weight.shape[0]) if vocab_size is None else vocab_size
    tokens = [
        reference_divergences.reverse_kl_loss(
            row,
            teacher_row,
            row,
            temperature=temperature,
            veto_weight=veto_weight,
            top_k=top_k,
            eos=None if eos is None else (eos.target, list(eos.merged)),
        )
        for row, teacher_row in zip(logit_rows(student, size), logit_rows(teacher, size), strict=True)
    ]
    return tuple(torch.stack(values) for values in zip(*tokens, strict=True))


def gradients(output: Tensor, tensors: list[Tensor], direction: Tensor) -> list[Tensor]:
    grads = torch.autograd.grad((output * direction).sum(), tensors, retain_graph=True)
    return [grad.double() for grad in grads]

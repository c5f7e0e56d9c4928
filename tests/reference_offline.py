"""
Distillation from stored log-probabilities in slow, plain float64, as `tests/reference.py`.

A row of logits has shape `(V,)`. `frozen` is the student's row at which everything under a stop-gradient is evaluated.
"""

import math

import torch
from torch import Tensor

from tests.reference import log_softmax, log_sum_exp


def sampled_token_loss(student: Tensor, frozen: Tensor, token: int, teacher_logp: float) -> Tensor:
    """`-sg[log p_T(y) - log p_θ(y)] log p_θ(y)` of one token."""
    advantage = teacher_logp - log_softmax(frozen.detach())[token]
    return -advantage * log_softmax(student)[token]


def corrected_loss(student: Tensor, frozen: Tensor, token: int, teacher_logp: float, rollout_logp: float) -> Tensor:
    """The same times `sg[p_θ(y) / μ(y)]`."""
    ratio = math.exp(log_softmax(frozen.detach())[token].item() - rollout_logp)
    return ratio * sampled_token_loss(student, frozen, token, teacher_logp)


def baseline_loss(
    student: Tensor, frozen: Tensor, token: int, teacher_logp: float, tokens: list[int], masses: list[float]
) -> Tensor:
    """`-sg[log p_T(y) - log p_θ(y) + KL(p_θ‖p_T)] log p_θ(y)`, the divergence over `tokens` and all others."""
    own = frozen.detach()
    advantage = teacher_logp - log_softmax(own)[token] + top_k_kl(own, tokens, masses, "reverse")
    return -advantage * log_softmax(student)[token]


def extrapolated_loss(
    student: Tensor, frozen: Tensor, token: int, teacher_logp: float, reference_logp: float, scale: float
) -> Tensor:
    """`-sg[λ (log p_T(y) - log p_ref(y)) - (log p_θ(y) - log p_ref(y))] log p_θ(y)`."""
    own = log_softmax(frozen.detach())[token]
    advantage = scale * (teacher_logp - reference_logp) - (own - reference_logp)
    return -advantage * log_softmax(student)[token]


def event_logmasses(row: Tensor, tokens: list[int]) -> list[Tensor]:
    """Log-masses of the tokens, and of all others together."""
    logprobs = log_softmax(row)
    others = [logprobs[v] for v in range(len(row)) if v not in tokens]
    return [*(logprobs[v] for v in tokens), log_sum_exp(torch.stack(others))]


def top_k_kl(student: Tensor, tokens: list[int], teacher_logmasses: list[float], direction: str) -> Tensor:
    """`Σ_c p_S log(p_S/p_T)` or `Σ_c p_T log(p_T/p_S)` over the tokens and the event of all others."""
    total = torch.zeros((), dtype=torch.float64)
    for student_logmass, teacher_logmass in zip(event_logmasses(student, tokens), teacher_logmasses, strict=True):
        if direction == "reverse":
            total = total + student_logmass.exp() * (student_logmass - teacher_logmass)
        else:
            total = total + math.exp(teacher_logmass) * (teacher_logmass - student_logmass)
    return total


def aggregate(losses: list[list[Tensor]], aggregation: str, weights: list[float] | None = None) -> Tensor:
    """Mean over the tokens of each completion, then over completions; or mean over all tokens. Of weighted rows."""
    weights = weights or [1.0] * len(losses)
    rows = list(zip(weights, losses, strict=True))
    if aggregation == "sequence":
        return sum(weight * sum(row) / len(row) for weight, row in rows) / sum(weights)
    return sum(weight * sum(row) for weight, row in rows) / sum(weight * len(row) for weight, row in rows)

"""
The divergences of trust-region distillation and the shared stop event in slow, plain float64, as `tests/reference.py`.

A row of logits has shape `(V,)`. `frozen` is the student's row at which everything under a stop-gradient is evaluated:
a detached copy for autograd, one fixed copy for finite differences.
"""

import math

import torch
from torch import Tensor

from tests.reference import entropy, log_softmax, log_sum_exp


def canonical_logprobs(row: Tensor, temperature: float, eos: tuple[int, list[int]] | None) -> Tensor:
    """`log p` at the temperature, with the probabilities of `eos = (target, merged ids)` added up at the target."""
    logprobs = log_softmax(row / temperature)
    if eos is None:
        return logprobs
    target, merged = eos
    impossible = torch.tensor(-math.inf, dtype=torch.float64)
    stop = [v for v in range(len(row)) if v == target or v in merged]
    entries = [impossible if v in stop else logprobs[v] for v in range(len(row))]
    entries[target] = log_sum_exp(torch.stack([logprobs[v] for v in stop]))
    return torch.stack(entries)


def veto_target(teacher_logprobs: Tensor, student_logprobs: Tensor, veto_weight: float) -> Tensor:
    """`log Q = log p_T + w log p_S - log Z`; what is impossible for one is impossible for `Q`, but for `p_S^0 = 1`."""
    products = [
        teacher if veto_weight == 0.0 else teacher + veto_weight * student
        for teacher, student in zip(teacher_logprobs, student_logprobs, strict=True)
    ]
    return log_softmax(torch.stack(products))


def interpolated_target(teacher_logprobs: Tensor, reference_logprobs: Tensor, teacher_weight: float) -> Tensor:
    """
    `log Q = a log p_T + (1 - a) log p_ref - log Z`. What is impossible for one is impossible for `Q`, but for
    `p^0 = 1`.
    """
    products = []
    for teacher, reference in zip(teacher_logprobs, reference_logprobs, strict=True):
        terms = [(teacher_weight, teacher), (1.0 - teacher_weight, reference)]
        terms = [(weight, logprob) for weight, logprob in terms if weight != 0.0]
        impossible = any(logprob.item() == -math.inf for _, logprob in terms)
        products.append(
            torch.tensor(-math.inf, dtype=torch.float64)
            if impossible
            else torch.stack([weight * logprob for weight, logprob in terms]).sum()
        )
    return log_softmax(torch.stack(products))


def forward_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """`KL(p_T‖p_S) = Σ p_T (log p_T - log p_S)`."""
    total = torch.zeros((), dtype=torch.float64)
    for student, teacher in zip(student_logprobs, teacher_logprobs, strict=True):
        if teacher.item() > -math.inf:
            total = total + torch.exp(teacher) * (teacher - student)
    return total


def reverse_kl_loss(
    student: Tensor,
    teacher: Tensor,
    frozen: Tensor,
    *,
    reference: Tensor | None = None,
    target_weight: float = 1.0,
    forward_kl_entropy: float | None = None,
    temperature: float = 1.0,
    veto_weight: float = 0.0,
    top_k: int | None = None,
    eos: tuple[int, list[int]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, entropy of `p_S` and the divergence to read, of one token. Rows have the common vocabulary already."""
    student_logprobs = canonical_logprobs(student, temperature, eos)
    fixed = canonical_logprobs(frozen.detach(), temperature, eos)
    of_teacher = canonical_logprobs(teacher.detach(), temperature, eos)
    if reference is not None:
        of_teacher = interpolated_target(
            of_teacher, canonical_logprobs(reference.detach(), temperature, eos), target_weight
        )
    target = veto_target(of_teacher, fixed, veto_weight)
    if top_k is None:
        loss = torch.zeros((), dtype=torch.float64)
        for v in range(len(fixed)):
            if fixed[v].item() > -math.inf:
                loss = loss + torch.exp(student_logprobs[v]) * (student_logprobs[v] - target[v])
        divergence = loss
        if forward_kl_entropy is not None and entropy(of_teacher).item() > forward_kl_entropy:
            loss = loss + forward_kl(student_logprobs, of_teacher)
        return loss, entropy(student_logprobs), divergence
    support = sorted(range(len(fixed)), key=lambda v: -fixed[v].item())[:top_k]
    support = [v for v in support if fixed[v].item() > -math.inf]
    mass = sum(torch.exp(fixed[v]) for v in support)
    loss, total = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for v in support:
        coefficient = torch.exp(fixed[v]) / mass * (fixed[v] - target[v])
        loss, total = loss + coefficient * student_logprobs[v], total + coefficient
    return loss, entropy(student_logprobs), total


def iw_opd_weights(advantages: list[float], gamma: float) -> list[float]:
    """`1 + γ (1 - Σ_{s<t} |A_s| / Σ_s |A_s|)` of the tokens of one rollout."""
    total = sum(abs(advantage) for advantage in advantages)
    return [1 + gamma * (1 - sum(abs(a) for a in advantages[:t]) / total) for t in range(len(advantages))]


def iw_opd_losses(
    student: list[Tensor],
    teacher: list[Tensor],
    tokens: list[int],
    gamma: float,
    *,
    behavior_logps: list[float] | None = None,
    temperature: float = 1.0,
    eos: tuple[int, list[int]] | None = None,
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """`-sg[r_t w_t A_t] log p_θ(y_t)` of the tokens of one rollout, `r` 1 or `p_θ / μ`; `log p_θ(y_t)`, and `w`."""
    logps, advantages = [], []
    for own, other, token in zip(student, teacher, tokens, strict=True):
        place = eos[0] if eos is not None and token in eos[1] else token
        logps.append(canonical_logprobs(own, temperature, eos)[place])
        advantages.append((canonical_logprobs(other, temperature, eos)[place] - logps[-1]).item())
    weights = iw_opd_weights(advantages, gamma)
    ratios = [1.0] * len(tokens)
    if behavior_logps is not None:
        ratios = [math.exp(logp.item() - behavior) for logp, behavior in zip(logps, behavior_logps, strict=True)]
    rows = zip(ratios, weights, advantages, logps, strict=True)
    return [-r * w * a * logp for r, w, a, logp in rows], logps, weights


def quantile(values: list[float], share: float) -> float:
    """Between the two values that are nearest to that share of all, linearly."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def tip_kept(
    entropies: list[float], divergences: list[float], entropy_quantile: float, divergence_quantile: float
) -> list[bool]:
    """Positions with a high entropy of the student; with a low one, those of the highest divergence."""
    threshold = quantile(entropies, entropy_quantile)
    sure = [n for n, entropy in enumerate(entropies) if entropy < threshold]
    bound = quantile([divergences[n] for n in sure], divergence_quantile) if sure else math.inf
    return [n not in sure or divergences[n] >= bound for n in range(len(entropies))]


def truncated_sum(student: Tensor, teacher: Tensor, support: list[int]) -> Tensor:
    """`Σ_{v in S} p_S (log p_S - log p_T)` without renormalisation: what must not be differentiated."""
    student_logprobs, teacher_logprobs = log_softmax(student), log_softmax(teacher)
    return sum(torch.exp(student_logprobs[v]) * (student_logprobs[v] - teacher_logprobs[v]) for v in support)

"""
The formulas of the papers in slow, plain float64: one row, one token, one sequence at a time.

Nothing of `trl_blend` is imported, and of torch only elementary arithmetic (`exp`, `log`, `+`, indexing), so that a
mistake cannot be shared with the code under test. Where inputs require grad, autograd gives the reference gradient.

Rows have shape `(V,)`, logits of a batch `(B, T, V)`, in float64. Per-token values are nested lists `[b][t]`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


# ---------------------------------------------------------------- distributions over one row


def log_sum_exp(row: Tensor) -> Tensor:
    """`log Σ_v e^(z_v)`; entries of `-inf` are skipped."""
    finite = [z for z in row if z.item() > -math.inf]
    if not finite:
        return torch.tensor(-math.inf, dtype=torch.float64)
    largest = max(z.item() for z in finite)
    return largest + torch.log(sum(torch.exp(z - largest) for z in finite))


def log_softmax(row: Tensor) -> Tensor:
    """`log p_v = z_v - log Σ e^z`."""
    return row - log_sum_exp(row)


def softmax(row: Tensor) -> Tensor:
    """`p_v = e^(z_v) / Σ e^z`."""
    return torch.exp(log_softmax(row))


def mix_logits(student: Tensor, partners: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`z_mix = (1 - Σ w_i) z_S + Σ w_i z_i`, without the terms of weight 0."""
    student_weight = 1.0 - sum(weights)
    terms = [w * z for w, z in zip([student_weight, *weights], [student, *partners], strict=True) if w > 1e-12]
    mixed = terms[0]
    for term in terms[1:]:
        mixed = mixed + term
    return mixed


def mix_probs(student: Tensor, partners: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`log p_mix(v)` with `p_mix = (1 - Σ w_i) p_S + Σ w_i p_i`, without the terms of weight 0."""
    student_weight = 1.0 - sum(weights)
    terms = [
        math.log(w) + log_softmax(z)
        for w, z in zip([student_weight, *weights], [student, *partners], strict=True)
        if w > 1e-12
    ]
    return torch.stack([log_sum_exp(torch.stack([term[v] for term in terms])) for v in range(len(student))])


def add_logits(student: Tensor, partners: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """
    `z_S + Σ w_i z_i`: DExperts (arXiv 2105.03023) with `w = (α, -α)`, proxy tuning (arXiv 2401.08565) with
    `(1, -1)`. A token that any model with a weight excludes is excluded [ours].
    """
    models = [(student, 1.0), *((z, w) for z, w in zip(partners, weights, strict=True) if w != 0)]
    added = []
    for v in range(len(student)):
        if any(z[v].item() == -math.inf for z, _ in models):
            added.append(torch.tensor(-math.inf, dtype=torch.float64))
        else:
            added.append(sum(w * z[v] for z, w in models))
    return torch.stack(added)


def mixed_logprobs(
    student: Tensor, partners: Sequence[Tensor], weights: Sequence[float], temperature: float, space: str
) -> Tensor:
    """`log p_mix` of one row. Logits are mixed and then divided by the temperature; probabilities the other way."""
    if space in ("logits", "arithmetic"):
        combine = mix_logits if space == "logits" else add_logits
        return log_softmax(combine(student, partners, weights) / temperature)
    return mix_probs(student / temperature, [partner / temperature for partner in partners], weights)


def entropy(logprobs: Tensor) -> Tensor:
    """`-Σ_v p_v log p_v` with `0 log 0 = 0`."""
    total = torch.zeros((), dtype=torch.float64)
    for logprob in logprobs:
        if logprob.item() > -math.inf:
            total = total - torch.exp(logprob) * logprob
    return total


def kl_divergence(logprobs: Tensor, other: Tensor) -> Tensor:
    """`KL(p‖q) = Σ_v p_v (log p_v - log q_v)` with `0 log 0 = 0`."""
    total = torch.zeros((), dtype=torch.float64)
    for logprob, other_logprob in zip(logprobs, other, strict=True):
        if logprob.item() > -math.inf:
            total = total + torch.exp(logprob) * (logprob - other_logprob)
    return total


# ---------------------------------------------------------------- one output layer


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Logits of one token, `(V,)`: the projection, plus the bias, times the scale, then the softcap."""
    logits = []
    for v in range(weight.shape[0]):
        z = (weight[v] * hidden).sum()
        if bias is not None:
            z = z + bias[v]
        z = z * logit_scale
        if softcap is not None:
            up, down = torch.exp(z / softcap), torch.exp(-z / softcap)
            z = softcap * (up - down) / (up + down)
        logits.append(z)
    return torch.stack(logits)


def resize(row: Tensor, vocab_size: int) -> Tensor:
    """The first `vocab_size` entries, missing ones `-inf`."""
    missing = [torch.tensor(-math.inf, dtype=torch.float64)] * (vocab_size - len(row))
    return torch.stack([*row[:vocab_size], *missing])


# ---------------------------------------------------------------- GRPO


def token_logps(
    student_logits: Tensor,
    partner_logits: Sequence[Tensor],
    weights: Sequence[float],
    tokens: Sequence[Sequence[int]],
    temperature: float = 1.0,
    space: str = "logits",
) -> list[list[Tensor]]:
    """`log p_mix(y_t)` at every position. No partners: `log p_S(y_t)`."""

    def logp(b: int, t: int) -> Tensor:
        partners = [logits[b][t] for logits in partner_logits]
        return mixed_logprobs(student_logits[b][t], partners, weights, temperature, space)[int(tokens[b][t])]

    return [[logp(b, t) for t in range(len(tokens[b]))] for b in range(len(tokens))]


def ratios(logps: list, old_logps: list, mask: Sequence, level: str) -> list[list[Tensor]]:
    """`e^(log π - log μ)` per token, or per sequence with the mean log ratio of its valid tokens (at every token)."""
    result = []
    for new, old, valid in zip(logps, old_logps, mask, strict=True):
        log_ratio = [torch.as_tensor(n - o, dtype=torch.float64) for n, o in zip(new, old, strict=True)]
        if level == "sequence":
            kept = [r for r, m in zip(log_ratio, valid, strict=True) if m]
            mean = sum(kept, torch.zeros((), dtype=torch.float64)) / max(len(kept), 1)
            log_ratio = [mean] * len(log_ratio)
        result.append([torch.exp(r) for r in log_ratio])
    return result


def token_loss(
    ratio: Tensor, advantage: float, clip_mode: str, epsilon: tuple[float, float], clip_max: float
) -> Tensor:
    """
    `ppo`: `-min(r A, clip(r, 1 - ε_low, 1 + ε_high) A)`. `none`: `-r A`. `max`: `-min(r, clip_max) A`. `floor`: value
    `-c A` and gradient `-c A ∇ log r` with `c = clip(r, 1, clip_max)` where `A > 0` and `min(r, clip_max)` elsewhere.
    """
    if clip_mode == "floor":
        coefficient = min(ratio.item(), clip_max)
        coefficient = max(coefficient, 1.0) if advantage > 0 else coefficient
        return -coefficient * advantage * torch.exp(torch.log(ratio) - math.log(ratio.item()))
    if clip_mode == "none":
        return -ratio * advantage
    if clip_mode == "max":
        return -(ratio if ratio.item() <= clip_max else clip_max * ratio.new_ones(())) * advantage
    clipped = min(max(ratio.item(), 1.0 - epsilon[0]), 1.0 + epsilon[1]) * ratio.new_ones(())
    return -(ratio if ratio.item() * advantage <= clipped.item() * advantage else clipped) * advantage


def aggregate(
    losses: list, mask: Sequence, aggregation: str, num_items: float | None = None, max_length: int | None = None
) -> Tensor:
    """
    `grpo`: mean over each sequence, then over sequences. `bnpo`: mean over the batch's tokens. `dapo`: sum over
    `num_items`, the tokens of the whole step. `dr_grpo`: sum over `B · max_length`.
    """
    sums, counts = [], []
    for row, valid in zip(losses, mask, strict=True):
        kept = [loss for loss, m in zip(row, valid, strict=True) if m]
        sums.append(sum(kept, torch.zeros((), dtype=torch.float64)))
        counts.append(len(kept))
    if aggregation == "grpo":
        means = [s / max(c, 1) for s, c in zip(sums, counts, strict=True)]
        return sum(means) / len(means)
    denominators = {"bnpo": max(sum(counts), 1), "dapo": num_items, "dr_grpo": len(sums) * (max_length or 0)}
    return sum(sums) / denominators[aggregation]


def grpo_mixed_loss(
    student_logits: Tensor,
    partner_logits: Sequence[Tensor],
    weights: Sequence[float],
    tokens: Sequence[Sequence[int]],
    mask: Sequence,
    advantages: Sequence[float],
    old_logps: list | None = None,
    *,
    temperature: float = 1.0,
    space: str = "logits",
    epsilon: tuple[float, float] = (0.2, 0.2),
    level: str = "token",
    aggregation: str = "dapo",
    num_items: float | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Objective on the mixed policy: clipped `p_mix,θ / p_mix,θ_old`. `old_logps=None` is the current policy."""
    logps = token_logps(student_logits, partner_logits, weights, tokens, temperature, space)
    old = [[logp.item() for logp in row] for row in logps] if old_logps is None else old_logps
    losses = [
        [token_loss(r, float(advantage), "ppo", epsilon, math.inf) for r in row]
        for row, advantage in zip(ratios(logps, old, mask, level), advantages, strict=True)
    ]
    return aggregate(losses, mask, aggregation, num_items, max_length)


def grpo_student_loss(
    student_logits: Tensor,
    tokens: Sequence[Sequence[int]],
    mask: Sequence,
    advantages: Sequence[float],
    behavior_logps: list,
    *,
    is_clip_mode: str = "none",
    is_clip_max: float = 3.0,
    temperature: float = 1.0,
    epsilon: tuple[float, float] = (0.2, 0.2),
    level: str = "token",
    aggregation: str = "dapo",
    num_items: float | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Objective on the student: `p_S,θ / μ` with the behaviour policy's log-probabilities as denominator."""
    logps = token_logps(student_logits, [], [], tokens, temperature)
    losses = [
        [token_loss(r, float(advantage), is_clip_mode, epsilon, is_clip_max) for r in row]
        for row, advantage in zip(ratios(logps, behavior_logps, mask, level), advantages, strict=True)
    ]
    return aggregate(losses, mask, aggregation, num_items, max_length)


# ---------------------------------------------------------------- teacher weight


def linear_weight(step: int, initial: float, decay_steps: int) -> float:
    """`w0 (1 - min(s, D) / D)`."""
    return initial * (1.0 - min(step, decay_steps) / decay_steps)


def cosine_weight(step: int, initial: float, decay_steps: int) -> float:
    """`w0 ½ (1 + cos(π min(s, D) / D))`."""
    return initial * 0.5 * (1.0 + math.cos(math.pi * min(step, decay_steps) / decay_steps))


def adaptive_weight(
    mixed_right: Sequence[bool], student_right: Sequence[bool], scale: float, offset: float
) -> tuple[float, float]:
    """Net gain of the mixed policy over the student on the same prompts, and `sigmoid(scale (net_gain - offset))`."""
    gained = sum(m and not s for m, s in zip(mixed_right, student_right, strict=True))
    lost = sum(s and not m for m, s in zip(mixed_right, student_right, strict=True))
    net_gain = (gained - lost) / len(mixed_right)
    return net_gain, 1.0 / (1.0 + math.exp(-scale * (net_gain - offset)))

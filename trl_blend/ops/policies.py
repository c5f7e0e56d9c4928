"""What two policies over one vocabulary have to do with each other, from logits that are in memory."""

import math

import torch
from torch import Tensor

from trl_blend.errors import ConfigError


def log_normalizer(logits: Tensor, probs: Tensor | None = None) -> Tensor:
    """
    `logsumexp(logits)` in nats over the last dimension of logits of shape `(..., V)`, from the softmax. Use it where
    log-probabilities of a few tokens are needed beside probabilities of all, `probs`.

    `log Z = max(z) - log max(p)`: a softmax and two maxima, which is faster than `torch.logsumexp` and as accurate,
    because the largest probability is at least `1 / V`. At least one logit per row must be finite.
    """
    probs = logits.softmax(dim=-1) if probs is None else probs
    return logits.amax(dim=-1) - probs.amax(dim=-1).log()


@torch.no_grad()
def kl_and_normalizer(logits: Tensor, other_logits: Tensor) -> tuple[Tensor, Tensor]:
    """
    `KL(softmax(logits) ‖ softmax(other_logits))` and `logsumexp(logits)`, both in nats and of shape `(...)` for logits
    of shape `(..., V)`, without gradient. Infinite where the first gives mass to a token that the second excludes.
    """
    probs = logits.softmax(dim=-1)
    normalizer = log_normalizer(logits, probs)
    # Where the first excludes a token the difference is -inf or NaN, and the term is 0 by the limit of p·log p
    difference = (logits - other_logits).nan_to_num_(nan=0.0, neginf=0.0, posinf=math.inf)
    divergence = difference.mul_(probs).sum(dim=-1) - normalizer + log_normalizer(other_logits)
    # 0·inf: a mass too small for a float on a token that the second excludes
    excluded = divergence.isnan() & normalizer.isfinite()
    return divergence.masked_fill_(excluded, math.inf).clamp_(min=0.0), normalizer


def path_logits(student_logits: Tensor, teacher_logits: Tensor, weight: Tensor) -> Tensor:
    """
    `(1 - w) z_S + w z_T` with one weight per row, of shape `(...)` for logits of shape `(..., V)`. Rows of weight 0
    are exactly the student's, rows of weight 1 exactly the teacher's.
    """
    weight = weight.unsqueeze(-1)
    # 0·(-inf) is NaN: at the ends of the path the model of weight 0 is left out
    logits = torch.addcmul(student_logits * (1.0 - weight), teacher_logits, weight)
    return torch.where(weight == 0.0, student_logits, torch.where(weight == 1.0, teacher_logits, logits))


def speculative_mixture(
    student_logits: Tensor, teacher_logits: Tensor, top_k: int, teacher_temperature: float
) -> tuple[Tensor, Tensor]:
    r"""
    The policy of a student whose draws are replaced by the teacher's where the teacher finds them unlikely. Use it as
    the behaviour policy of speculative knowledge distillation; the paper sweeps a `top_k` of 15, 25 and 50.

    $$
    \mu(v) = p_S(v)\,1[v \in \mathrm{top}_k(p_T)] + m\,q(v), \qquad m = \sum_{v \notin \mathrm{top}_k(p_T)} p_S(v),
    \qquad q = \mathrm{softmax}(z_T / \tau_T)
    $$

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the student, at least float32.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the teacher in the same type. A token that it excludes (`-inf`) is in no top `k`.
        top_k (`int`):
            Number `k` of the teacher's tokens, from 1 to `V`.
        teacher_temperature (`float`):
            Temperature `τ_T` of the replacement, positive.

    Returns:
        `log μ` of shape `(..., V)` and `m` of shape `(...)`; only the first has a gradient.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If `top_k` exceeds the vocabulary.
    """
    if top_k > student_logits.shape[-1]:
        raise ConfigError(
            f"`top_k` is {top_k} for a vocabulary of {student_logits.shape[-1]} tokens. Set it to at most that."
        )
    student_logprobs = student_logits.log_softmax(dim=-1)
    top = teacher_logits.topk(top_k, dim=-1)
    excluded = top.values == -math.inf
    kept = student_logprobs.gather(-1, top.indices)
    # The mass off the top k is summed there: as 1 minus the rest it would lose its digits
    outside = student_logprobs.exp().scatter(-1, top.indices, kept.exp().masked_fill(~excluded, 0.0))
    replaced = outside.sum(dim=-1, keepdim=True)
    kept = kept.masked_fill(excluded, -math.inf)
    logprobs = (teacher_logits / teacher_temperature).log_softmax(dim=-1) + replaced.log()
    logprobs = logprobs.scatter(-1, top.indices, torch.logaddexp(logprobs.gather(-1, top.indices), kept))
    return logprobs, replaced.detach().squeeze(-1)


def contrastive_logits(expert_logits: Tensor, amateur_logits: Tensor, alpha: float, beta: float) -> Tensor:
    r"""
    Logits of contrastive decoding: what the expert prefers more than the amateur does, among the tokens that the
    expert finds plausible. Use it to sharpen a strong model by a weak one; the papers use `alpha` 0.1 and `beta` 0.5.

    $$
    z(v) = (1 + \beta)\, z_E(v) - \beta\, z_A(v) \quad\text{where}\quad p_E(v) \ge \alpha \max_u p_E(u), \qquad
    -\infty \ \text{elsewhere}
    $$

    (Contrastive decoding, arXiv 2210.15097, in the form of arXiv 2309.09117.) A token that one of the two excludes is
    excluded, which is our choice.

    Args:
        expert_logits, amateur_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of both at the sampling temperature, at least float32.
        alpha (`float`):
            Plausibility relative to the expert's most likely token, in `(0, 1]`. 1 keeps that token alone.
        beta (`float`):
            Strength of the contrast, 0 or more. 0 is the expert, cut off.

    Returns:
        `torch.Tensor` of shape `(..., V)`: Logits, not normalised.
    """
    implausible = expert_logits < expert_logits.amax(dim=-1, keepdim=True) + math.log(alpha)
    excluded = implausible | (amateur_logits == -math.inf)
    contrast = (1.0 + beta) * expert_logits - beta * amateur_logits
    # Without a token that both allow there is no contrast: the expert's own choice
    excluded = torch.where(excluded.all(dim=-1, keepdim=True), implausible, excluded)
    contrast = torch.where(amateur_logits == -math.inf, expert_logits, contrast)
    return contrast.masked_fill(excluded, -math.inf)

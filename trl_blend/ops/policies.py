"""What two policies over one vocabulary have to do with each other, from logits that are in memory."""

import math

import torch
from torch import Tensor


def log_normalizer(logits: Tensor, probs: Tensor | None = None) -> Tensor:
    """
    `logsumexp(logits)` over the last dimension, from the softmax.

    `log Z = max(z) - log max(p)`: a softmax and two maxima, which is faster than `torch.logsumexp` and as accurate,
    because the largest probability is at least `1 / V`.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`):
            Logits, of which at least one per row is finite.
        probs (`torch.Tensor` of shape `(..., V)`, *optional*):
            `softmax(logits)`, where it is known already.

    Returns:
        `torch.Tensor` of shape `(...)`: Logarithm of the normaliser, in nats.
    """
    probs = logits.softmax(dim=-1) if probs is None else probs
    return logits.amax(dim=-1) - probs.amax(dim=-1).log()


@torch.no_grad()
def _kl_and_normalizer(behavior_logits: Tensor, student_logits: Tensor) -> tuple[Tensor, Tensor]:
    """`KL(softmax(behavior_logits) ‖ softmax(student_logits))` in nats and `logsumexp(behavior_logits)`."""
    probs = behavior_logits.softmax(dim=-1)
    normalizer = log_normalizer(behavior_logits, probs)
    # Where the behaviour excludes a token the difference is -inf or NaN, and the term is 0 by the limit of p·log p
    difference = (behavior_logits - student_logits).nan_to_num_(nan=0.0, neginf=0.0, posinf=math.inf)
    divergence = difference.mul_(probs).sum(dim=-1) - normalizer + log_normalizer(student_logits)
    # 0·inf: a mass too small for a float on a token the student excludes
    excluded = divergence.isnan() & normalizer.isfinite()
    return divergence.masked_fill_(excluded, math.inf).clamp_(min=0.0), normalizer

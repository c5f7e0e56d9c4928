"""
Importance ratios of a trained policy to the one that has sampled: what they are limited to, and their statistics, kept
as sums so that they can be reduced over ranks and batches.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trl_blend.errors import ConfigError
from trl_blend.ops.reduction import masked_mean


# exp(300)^2 is far above any ratio of interest and still finite in float64
_MAX_ABS_LOG_RATIO = 300.0
# Tokens that the behaviour policy was sure of, and ratios that leave next to nothing of their gradient (our choice)
_CERTAIN, _SUPPRESSED = 0.5, 0.1


def floored_log_ratio(log_ratio: Tensor, advantages: Tensor, clip_max: float) -> Tensor:
    r"""
    Logarithm of the importance ratio, limited so that a rewarded token counts as if the trained policy had drawn it.
    Use it where the behaviour policy finds rewards that the trained one does not: with a plain ratio it would hardly
    learn them.

    The policy gradient of a token is \\( r A \nabla \log \pi = A \nabla \pi / \mu \\), which vanishes with
    \\( \pi \\): the less likely a rewarded token is for the policy, the less is learned of it. This replaces \\( r \\)
    by \\( \mathrm{clip}(r, 1, c) \\) where \\( A > 0 \\) and by \\( \min(r, c) \\) elsewhere. The price is bias: where
    \\( A > 0 \\) and \\( r < 1 \\) the policy follows the behaviour policy's rewarded tokens, as if by maximum
    likelihood, whether or not that raises its own expected reward. Penalties keep their ratio, and where all ratios
    are between 1 and the cap there is no bias; measured in `examples/reproduce/importance_ratios.py`. The form is our
    choice, no paper states it.

    Args:
        log_ratio (`torch.Tensor`):
            \\( \log \pi - \log \mu \\) in nats, of any shape.
        advantages (`torch.Tensor`):
            Broadcastable to it.
        clip_max (`float`):
            Cap \\( c \\) of the ratio, at least 1.

    Returns:
        `torch.Tensor`: Of the shape of `log_ratio`, without gradient.
    """
    log_ratio = log_ratio.detach()
    raised = torch.where(advantages > 0, log_ratio.clamp(min=0.0), log_ratio)
    return raised.clamp(max=math.log(clip_max))


class ImportanceSums(NamedTuple):
    """
    Sums over the ratios `r` of one batch, 0-dim float64 tensors without gradient.

    Combine several (ranks, micro-batches) by adding every field except `ratio_max`, of which take the maximum; only
    then call [`summarize_importance`]. Averaging finished statistics instead would be wrong wherever counts differ.

    Args:
        count (`torch.Tensor`):
            Number of ratios: valid tokens, or sequences with at least one valid token.
        ratio_sum (`torch.Tensor`):
            `Σ r`.
        ratio_sq_sum (`torch.Tensor`):
            `Σ r²`.
        ratio_max (`torch.Tensor`):
            `max r`; 0 where there is no ratio.
        clipped_count (`torch.Tensor`):
            Number of ratios above `clip_max`; 0 without one.
        certain_count (`torch.Tensor`):
            Number of tokens of a positive advantage whose behaviour probability is above 1/2.
        suppressed_count (`torch.Tensor`):
            Number of these with a token ratio below 1/10.
    """

    count: Tensor  # type: ignore[assignment]  # `tuple.count` is of no use here
    ratio_sum: Tensor
    ratio_sq_sum: Tensor
    ratio_max: Tensor
    clipped_count: Tensor
    certain_count: Tensor
    suppressed_count: Tensor


@torch.no_grad()
def importance_statistics(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    level: Literal["token", "sequence"] = "token",
    clip_max: float | None = None,
    behavior_logps: Tensor | None = None,
    advantages: Tensor | None = None,
) -> ImportanceSums:
    """
    Sums up the importance ratios `r = exp(log_ratio)` of one batch. Use it with [`summarize_importance`] to log how
    far the trained policy is from the one that has sampled.

    At `level="sequence"` a sequence has one ratio, the exponential of its mean log ratio over valid tokens (length
    normalised, as in GSPO and in TRL's `GRPOTrainer`). Log ratios are limited to ±300 so that the squares stay finite.

    Args:
        log_ratio (`torch.Tensor` of shape `(B, T)`):
            `log π(y_t) - log μ(y_t)` in nats. Detached; values in masked places are ignored, NaN included.
        mask (`torch.Tensor` of shape `(B, T)`):
            Nonzero at valid tokens.
        level (`str`, *optional*, defaults to `"token"`):
            `"token"` or `"sequence"`.
        clip_max (`float`, *optional*):
            Ratios strictly above it count as clipped.
        behavior_logps (`torch.Tensor` of shape `(B, T)`, *optional*):
            `log μ(y_t)`, with `advantages` of shape `(B,)` or `(B, T)`: for the last two sums, which are of tokens at
            either level.

    Returns:
        [`ImportanceSums`]: Sums for [`summarize_importance`].

    Raises:
        [`~trl_blend.errors.ConfigError`]: If `level` is unknown.
    """
    log_ratio, valid = log_ratio.double(), mask != 0
    zero = log_ratio.new_zeros(())
    certain_count = suppressed_count = zero
    if behavior_logps is not None and advantages is not None:
        rewarded = (advantages[:, None] if advantages.dim() == 1 else advantages) > 0
        certain = valid & rewarded & (behavior_logps > math.log(_CERTAIN))
        certain_count = certain.sum().double()
        suppressed_count = (certain & (log_ratio < math.log(_SUPPRESSED))).sum().double()
    if level == "sequence":
        log_ratio, valid = masked_mean(log_ratio, valid, dim=-1), valid.any(dim=-1)
    elif level != "token":
        raise ConfigError(f"`level` is {level!r}. Set it to 'token' or 'sequence'.")
    # Zeros in masked places are neutral in every sum below, and need no synchronisation with the device
    ratio = torch.where(valid, log_ratio.clamp(-_MAX_ABS_LOG_RATIO, _MAX_ABS_LOG_RATIO).exp(), zero)
    return ImportanceSums(
        count=valid.sum().double(),
        ratio_sum=ratio.sum(),
        ratio_sq_sum=ratio.square().sum(),
        ratio_max=torch.cat([ratio.flatten(), zero[None]]).max(),
        clipped_count=zero if clip_max is None else (ratio > clip_max).sum().double(),
        certain_count=certain_count,
        suppressed_count=suppressed_count,
    )


def summarize_importance(sums: ImportanceSums) -> dict[str, float]:
    """
    Turns (reduced) sums into numbers to log. Use it once per logged step, after adding up ranks and micro-batches.

    Args:
        sums ([`ImportanceSums`]):
            Sums of one or, combined, of several batches.

    Returns:
        `dict[str, float]`: `ratio_mean`; `ratio_max`; `effective_sample_size`, Kish's `(Σr)² / Σr²` divided by the
        count, in `(0, 1]` and 1 when all ratios are equal; `clipped_share`, in `[0, 1]`; `suppressed_share`, the share
        of ratios below 1/10 among rewarded tokens that the behaviour policy was sure of, in `[0, 1]`. All are 0
        without a ratio.
    """
    count, ratio_sum, ratio_sq_sum, ratio_max, clipped, certain, suppressed = (float(value) for value in sums)
    count, certain = max(count, 1.0), max(certain, 1.0)  # without any, all sums are 0
    return {
        "ratio_mean": ratio_sum / count,
        "ratio_max": ratio_max,
        "effective_sample_size": ratio_sum**2 / (ratio_sq_sum * count) if ratio_sq_sum else 0.0,
        "clipped_share": clipped / count,
        "suppressed_share": suppressed / certain,
    }

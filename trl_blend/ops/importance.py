"""Statistics of importance ratios for logging, kept as sums so that they can be reduced over ranks and batches."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trl_blend.errors import ConfigError
from trl_blend.ops.reduction import masked_mean


# exp(300)^2 is far above any ratio of interest and still finite in float64
_MAX_ABS_LOG_RATIO = 300.0


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
    """

    count: Tensor  # type: ignore[assignment]  # `tuple.count` is of no use here
    ratio_sum: Tensor
    ratio_sq_sum: Tensor
    ratio_max: Tensor
    clipped_count: Tensor


@torch.no_grad()
def importance_statistics(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    level: Literal["token", "sequence"] = "token",
    clip_max: float | None = None,
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

    Returns:
        [`ImportanceSums`]: Sums for [`summarize_importance`].

    Raises:
        [`~trl_blend.errors.ConfigError`]: If `level` is unknown.
    """
    log_ratio, valid = log_ratio.double(), mask != 0
    if level == "sequence":
        log_ratio, valid = masked_mean(log_ratio, valid, dim=-1), valid.any(dim=-1)
    elif level != "token":
        raise ConfigError(f"`level` is {level!r}. Set it to 'token' or 'sequence'.")
    zero = log_ratio.new_zeros(())
    # Zeros in masked places are neutral in every sum below, and need no synchronisation with the device
    ratio = torch.where(valid, log_ratio.clamp(-_MAX_ABS_LOG_RATIO, _MAX_ABS_LOG_RATIO).exp(), zero)
    return ImportanceSums(
        count=valid.sum().double(),
        ratio_sum=ratio.sum(),
        ratio_sq_sum=ratio.square().sum(),
        ratio_max=torch.cat([ratio.flatten(), zero[None]]).max(),
        clipped_count=zero if clip_max is None else (ratio > clip_max).sum().double(),
    )


def summarize_importance(sums: ImportanceSums) -> dict[str, float]:
    """
    Turns (reduced) sums into numbers to log. Use it once per logged step, after adding up ranks and micro-batches.

    Args:
        sums ([`ImportanceSums`]):
            Sums of one or, combined, of several batches.

    Returns:
        `dict[str, float]`: `ratio_mean`; `ratio_max`; `effective_sample_size`, Kish's `(Σr)² / Σr²` divided by the
        count, in `(0, 1]` and 1 when all ratios are equal; `clipped_share`, in `[0, 1]`. All are 0 without a ratio.
    """
    count, ratio_sum, ratio_sq_sum, ratio_max, clipped_count = (float(value) for value in sums)
    if count == 0.0:
        return {"ratio_mean": 0.0, "ratio_max": 0.0, "effective_sample_size": 0.0, "clipped_share": 0.0}
    return {
        "ratio_mean": ratio_sum / count,
        "ratio_max": ratio_max,
        "effective_sample_size": ratio_sum**2 / (ratio_sq_sum * count),
        "clipped_share": clipped_count / count,
    }

"""Which token positions of a batch a distillation loss is taken over."""

import torch
from torch import Tensor

from trl_blend.errors import ConfigError


def tip_selection(
    student_entropy: Tensor, divergence: Tensor, *, entropy_quantile: float, divergence_quantile: float
) -> Tensor:
    """
    Chooses the positions that teach most, by [TIP](https://huggingface.co/papers/2604.14084): where the student is
    uncertain, and where it is sure and far from the teacher. Use it to leave the rest out of the loss, with an
    `entropy_quantile` of 0.5, where the paper keeps the upper half.

    Kept are the positions whose entropy is at least the `entropy_quantile` of all entropies; of the others those whose
    divergence is at least the `divergence_quantile` of *theirs*: a share of about
    `1 - entropy_quantile * divergence_quantile`. A sure student mostly diverges little, so that hardly one of its
    positions would be above a quantile of all divergences. Both thresholds are ours.

    No gradient: the result is boolean. Quantiles between two positions are interpolated linearly.

    Args:
        student_entropy (`torch.Tensor`):
            Entropy of the student at each position, of any shape; NaN where a position does not count.
        divergence (`torch.Tensor`):
            Divergence from the teacher there, of the same shape.
        entropy_quantile (`float`):
            In `[0, 1]`. At 0 every position is kept.
        divergence_quantile (`float`):
            In `[0, 1]`. At 0 every position is kept.

    Returns:
        `torch.Tensor`: Boolean, of the same shape: false where a position does not count.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a quantile is not in `[0, 1]`.
    """
    for name, quantile in (("entropy_quantile", entropy_quantile), ("divergence_quantile", divergence_quantile)):
        if not 0.0 <= quantile <= 1.0:
            raise ConfigError(f"`{name}` is {quantile}. Set it to a number in [0, 1].")
    # Comparisons with NaN are false, be it a position or the quantile of none
    is_uncertain = student_entropy >= student_entropy.nanquantile(entropy_quantile)
    of_the_sure = divergence.masked_fill(is_uncertain | student_entropy.isnan(), torch.nan)
    return is_uncertain | (of_the_sure >= of_the_sure.nanquantile(divergence_quantile))

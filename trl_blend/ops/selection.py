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

    Kept are the positions from the `entropy_quantile` of all entropies on; of the others those from the
    `divergence_quantile` of *their* divergences on: a share of about `1 - entropy_quantile * divergence_quantile`. A
    sure student mostly diverges little, so that hardly one of its positions would be above a quantile of all
    divergences. Both thresholds are ours.

    No gradient: the result is boolean. As many are kept as without ties: of equal entropies those of the larger
    divergence, and of those the earlier ones.

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
    by_divergence = _descending(divergence.flatten())
    is_uncertain = _from_quantile(student_entropy, by_divergence, entropy_quantile)
    of_the_sure = divergence.masked_fill(is_uncertain | student_entropy.isnan(), torch.nan)
    return is_uncertain | _from_quantile(of_the_sure, by_divergence, divergence_quantile)


def _from_quantile(values: Tensor, order: Tensor, quantile: float) -> Tensor:
    """Where `values` are among the largest from a quantile on, the first in `order` of equal ones; never NaN."""
    known = ~values.isnan()
    count = known.sum()
    kept = count - (quantile * (count - 1)).ceil()
    ranks = order[_descending(values.flatten()[order])].argsort()
    return (ranks.view_as(values) < kept) & known


def _descending(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argsort(descending=True, stable=True)

"""Masked sums and means that stay finite when nothing is valid and when masked places hold NaN or infinity."""

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """
    Sum of `values` where `mask` is nonzero; 0 where nothing is valid. Use it on padded batches.

    Masked places are replaced rather than multiplied by 0, so NaN or infinity there changes neither the value nor the
    gradient (which is exactly 0 in those places).

    Args:
        values (`torch.Tensor`):
            Values of any shape.
        mask (`torch.Tensor`):
            Nonzero where a value counts. Broadcasts against `values`.
        dim (`int`, *optional*):
            Dimension to reduce. All of them if not given.

    Returns:
        `torch.Tensor`: The sum, float32 or, for float64 values, float64. The mask carries no gradient.
    """
    kept, _ = _keep_valid(values, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """
    Mean of `values` where `mask` is nonzero; 0 where nothing is valid. Use it on padded batches.

    The mask selects, it does not weight: any nonzero entry counts once.

    Args:
        values (`torch.Tensor`):
            Values of any shape.
        mask (`torch.Tensor`):
            Nonzero where a value counts. Broadcasts against `values`.
        dim (`int`, *optional*):
            Dimension to reduce. All of them if not given.

    Returns:
        `torch.Tensor`: The mean, float32 or, for float64 values, float64. The mask carries no gradient.
    """
    kept, valid = _keep_valid(values, mask)
    if dim is None:
        return kept.sum() / valid.sum().clamp(min=1)
    return kept.sum(dim) / valid.sum(dim).clamp(min=1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 where it has fewer bits."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _keep_valid(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    # Half precision cannot count past 256 (bf16) or 2048 (fp16)
    values = at_least_float32(values)
    kept = torch.where(mask != 0, values, torch.zeros((), dtype=values.dtype, device=values.device))
    return kept, (mask != 0).expand_as(kept)

"""How well the teacher's support of a rollout tells right rollouts from wrong ones."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def auroc(scores: Tensor, right: Tensor) -> float:
    r"""
    Probability that a right rollout has a higher score than a wrong one, ties counting half: the area under the ROC
    curve (Fig. 7 of [Trust-region behaviour blending](https://huggingface.co/papers/2605.31159)).

    Args:
        scores (`torch.Tensor` of shape `(N,)`):
            Scores, such as the mean over tokens of \\( \log p_T - \log p_S \\).
        right (`torch.Tensor` of shape `(N,)`):
            1 for a right rollout, 0 for a wrong one. Rollouts where it or the score is NaN are left out.

    Returns:
        `float`: AUROC, NaN where all rollouts are right or all are wrong.
    """
    known = ~(scores.isnan() | right.isnan())
    positive, negative = scores[known & (right > 0.5)], scores[known & (right <= 0.5)]
    if not len(positive) or not len(negative):
        return math.nan
    negative = negative.sort().values
    below = torch.searchsorted(negative, positive.contiguous(), side="left")
    not_above = torch.searchsorted(negative, positive.contiguous(), side="right")
    return ((below + not_above).double().mean() / (2 * len(negative))).item()


class SupportScores:
    """Support score and verdict of each rollout, gathered over ranks, until [`SupportScores.pop_auroc`]."""

    def __init__(self) -> None:
        self._pairs: list[Tensor] = []

    def add(self, scores: Tensor, right: Tensor, gather: Callable[[Tensor], Tensor]) -> None:
        """Add the rollouts of a micro-batch, both `(B,)`, of all ranks. Every rank must call it."""
        pairs = torch.stack([scores.float(), right.float()], dim=1)
        self._pairs.append(gather(pairs).cpu())

    def pop_auroc(self) -> float:
        """AUROC of what was added, NaN where it is undefined. Forgets it."""
        pairs, self._pairs = self._pairs, []
        return auroc(*torch.cat(pairs).unbind(dim=1)) if pairs else math.nan

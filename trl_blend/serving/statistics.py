"""Sums of what a rule reports, over the rows that an engine draws tokens from."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trl_blend.generation.rules import BlendStep
from trl_blend.ops.policies import kl_and_normalizer


class Statistic(NamedTuple):
    """Sum and number of the finite values of one quantity, and the largest of them (0 of none)."""

    total: float
    count: int
    largest: float


def row_statistics(step: BlendStep, partner_logits: Sequence[Tensor]) -> dict[str, Tensor]:
    r"""
    What one decoding step tells of its rows, each of shape `(N,)`, in nats: the statistics of the rule, and for
    partner `i` `kl_behavior_teacher_i`, `teacher_logp_i` and `teacher_entropy_i`.

    An engine draws the token after the logits are gone, so the log-probability is not that of the token but its mean
    over what may be drawn, \\( \sum_v \mu(v) \log p_i(v) = -H(\mu) - KL(\mu \| p_i) \\): the same expectation, with
    less variance.

    Args:
        step ([`BlendStep`]):
            What the tokens are drawn from.
        partner_logits (`Sequence[torch.Tensor]`, each of shape `(N, V)`):
            Logits of the partners at the sampling temperature.
    """
    values = dict(step.statistics)
    entropy = _entropy(step.logits)
    for index, logits in enumerate(partner_logits):
        divergence, _ = kl_and_normalizer(step.logits, logits)
        values[f"kl_behavior_teacher_{index}"] = divergence
        values[f"teacher_logp_{index}"] = -entropy - divergence
        values[f"teacher_entropy_{index}"] = _entropy(logits)
    return values


def _entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)


class RunningSums:
    """Adds rows up on their device, without waiting for it, until they are asked for."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None  # (3, number of names): total, count, largest

    def add(self, values: dict[str, Tensor], mask: Tensor) -> None:
        """Add `values`, each of shape `(N,)`, where `mask` is true and they are finite."""
        rows = torch.stack([value.double() for value in values.values()])
        kept = mask & rows.isfinite()
        largest = rows.masked_fill(~kept, -math.inf).amax(dim=1)
        sums = torch.stack([rows.masked_fill(~kept, 0.0).sum(dim=1), kept.sum(dim=1).double(), largest])
        if self._sums is not None:
            sums = torch.stack([*(self._sums[:2] + sums[:2]), torch.maximum(self._sums[2], sums[2])])
        self._names, self._sums = list(values), sums

    def pop(self) -> dict[str, Statistic]:
        """What was added since the last call, by name."""
        sums, self._sums = self._sums, None
        if sums is None:
            return {}
        columns = zip(self._names, *sums.tolist(), strict=True)
        return {
            name: Statistic(total, int(count), largest if count else 0.0) for name, total, count, largest in columns
        }

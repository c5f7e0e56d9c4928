"""Sums of what a rule reports, over the rows that an engine draws tokens from."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trl_blend.generation.rules import BlendStep
from trl_blend.ops.policies import kl_and_normalizer


OF_DRAFTS = ("draft_acceptance", "accepted_drafts", "passes_per_token", "draft_tokens")
"""What an engine that drafts sums up beside the statistics of the rule, see [`drawn_tokens`]."""


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


def drawn_tokens(ended: Tensor, ends: Tensor, drawn: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """
    Which rows of one step a token of a completion was drawn from, and what that tells of the drafts, on their device
    without waiting for it.

    A step gives each request a run of rows: one behind its last token, and one behind each draft. Tokens are drawn
    from the first rows of a run: up to the one whose draft is refused, in place of which another is drawn.

    Args:
        ended (`torch.Tensor` of shape `(N,)`):
            Whether the token in front of a row ended the completion.
        ends (`torch.Tensor` of shape `(R,)`):
            Index behind the last row of each request, whose rows lie one after the other.
        drawn (`torch.Tensor` of shape `(R,)`):
            Number of tokens drawn for each request.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: A mask of the rows `(N,)`, and of each row, NaN where it says
        nothing: `draft_acceptance` (1 if its draft was accepted, 0 if refused), `accepted_drafts` (their number, at
        the first row of a run with drafts), `passes_per_token` (1 at the first row, else 0: the models run once for
        all rows of a run), `draft_tokens` (how many drafts a run with drafts has, at its first row).
    """
    sizes = ends.diff(prepend=ends.new_zeros(1))
    request = torch.arange(len(ends), device=ends.device).repeat_interleave(sizes, output_size=len(ended))
    first = (ends - sizes)[request]
    place = torch.arange(len(ended), device=ends.device) - first
    seen = ended.cumsum(0)
    over = seen - seen[first] + ended[first].long() > 0
    drawn, sizes = drawn[request], sizes[request]
    mask = (place < drawn) & ~over
    accepted = mask & (place < drawn - 1)
    numbers = torch.zeros(len(ends), device=ends.device).index_add(0, request, accepted.float())
    heads = (place == 0) & (sizes > 1)
    unsaid = torch.full(ended.shape, math.nan, device=ends.device)
    return mask, {
        "draft_acceptance": torch.where(place < sizes - 1, accepted.float(), unsaid),
        "accepted_drafts": torch.where(heads, numbers[request], unsaid),
        "passes_per_token": (place == 0).float(),
        "draft_tokens": torch.where(heads, (sizes - 1).float(), unsaid),
    }


class RunningSums:
    """
    Adds rows up on their device, without waiting for it, until they are asked for.

    Args:
        drafts (`bool`, *optional*, defaults to `False`):
            Whether the engine drafts. Rows that it looks at are then only added when it is known which of them tokens
            were drawn from.
    """

    def __init__(self, drafts: bool = False) -> None:
        self.drafts = drafts
        self._step: tuple[dict[str, Tensor], Tensor] | None = None  # of the last rows: values, and which ended before
        self._names: list[str] = []
        self._sums: Tensor | None = None  # (3, number of names): total, count, largest

    def add_step(self, values: dict[str, Tensor], ended: Tensor) -> None:
        """Add the rows of a step, but those behind the end of a completion: `ended` of shape `(N,)` says which."""
        if not self.drafts:
            self.add(values, ~ended)
            return
        self.settle()
        self._step = values, ended

    def settle(self, ends: Tensor | None = None, drawn: Tensor | None = None) -> None:
        """
        Add the rows of the last step that tokens were drawn from, see [`drawn_tokens`]. Without arguments there were
        no drafts in it, and a request had one row.
        """
        if self._step is None:
            return
        (values, ended), self._step = self._step, None
        if ends is None or drawn is None:
            ends = torch.arange(1, len(ended) + 1, device=ended.device)
            drawn = torch.ones_like(ends)
        mask, of_drafts = drawn_tokens(ended, ends, drawn)
        self.add(values | of_drafts, mask)

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
        self.settle()
        sums, self._sums = self._sums, None
        if sums is None:
            return {}
        columns = zip(self._names, *sums.tolist(), strict=True)
        return {
            name: Statistic(total, int(count), largest if count else 0.0) for name, total, count, largest in columns
        }

"""Sums over ranks, for metrics that are means over tokens rather than means of means."""

from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor


class TokenMeans:
    """
    Token means of per-token quantities, and maxima beside them, collected over several calls.

    [`TokenMeans.sync`] is the only collective: every rank must call it, having added the same names in the same order.
    """

    def __init__(self) -> None:
        self._local: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        self._local_maxima: dict[str, float] = {}
        self._totals: dict[str, Tensor] = {}
        self._maxima: dict[str, float] = {}

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add `values` where `mask` is true; both of one shape."""
        kept = values[mask].double().cpu()
        self.add_sum(name, kept.sum().item(), kept.numel())

    def add_max(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Keep the maximum of `values` where `mask` is true; both of one shape. Values are at least 0."""
        self.add_largest(name, values.masked_fill(~mask, 0.0).max().item())

    def add_sum(self, name: str, total: float, count: int) -> None:
        """Add values of which only their sum and number are known."""
        self._local[name] = self._local[name] + torch.tensor([total, count], dtype=torch.float64)

    def add_largest(self, name: str, largest: float) -> None:
        """Keep a maximum that is known already, at least 0."""
        self._local_maxima[name] = max(self._local_maxima.get(name, 0.0), largest)

    def sync(self, accelerator: Accelerator) -> None:
        """Add what all ranks have collected since the last call."""
        if self._local:
            # float32 on the wire: not every backend reduces float64
            local = torch.stack(list(self._local.values())).float().to(accelerator.device)
            for name, total in zip(
                self._local, accelerator.reduce(local, reduction="sum").double().cpu(), strict=True
            ):
                self._totals[name] = self._totals.get(name, torch.zeros_like(total)) + total
        if self._local_maxima:
            local = torch.tensor([list(self._local_maxima.values())], device=accelerator.device)
            for name, value in zip(self._local_maxima, accelerator.gather(local).amax(dim=0).tolist(), strict=True):
                self._maxima[name] = max(self._maxima.get(name, 0.0), value)
        self._local.clear()
        self._local_maxima = {}

    def pop(self) -> dict[str, float]:
        """Means and maxima of what was synchronised; 0 where nothing was counted. Forgets it."""
        means = {name: (total / count.clamp(min=1.0)).item() for name, (total, count) in self._totals.items()}
        means |= self._maxima
        self._totals, self._maxima = {}, {}
        return means

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """[`TokenMeans.sync`], then [`TokenMeans.pop`]."""
        self.sync(accelerator)
        return self.pop()

"""Sums over ranks, for metrics that are means over tokens rather than means of means."""

from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor


class TokenMeans:
    """
    Token means of per-token quantities, collected over several calls and reduced over ranks once.

    Every rank must add the same names, in the same order, before [`TokenMeans.reduce`]; maxima only beside means.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        self._maxima: dict[str, float] = {}

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add `values` where `mask` is true; both `(B, T)`."""
        kept = values[mask].double().cpu()
        self._sums[name] = self._sums[name] + torch.stack([kept.sum(), torch.tensor(float(kept.numel()))])

    def add_max(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Keep the maximum of `values` where `mask` is true; both `(B, T)`. Values are at least 0."""
        largest = values.masked_fill(~mask, 0.0).max().item()
        self._maxima[name] = max(self._maxima.get(name, 0.0), largest)

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """Means and maxima over all ranks; 0 where nothing was counted. Clears them."""
        if not self._sums:
            return {}
        names = list(self._sums)
        # float32 on the wire: not every backend reduces float64
        local = torch.stack([self._sums[name] for name in names]).float().to(accelerator.device)
        totals = accelerator.reduce(local, reduction="sum").tolist()
        self._sums.clear()
        means = {name: total / max(count, 1.0) for name, (total, count) in zip(names, totals, strict=True)}
        if self._maxima:
            local = torch.tensor([list(self._maxima.values())], device=accelerator.device)
            largest = accelerator.gather(local).amax(dim=0).tolist()
            means |= dict(zip(self._maxima, largest, strict=True))
            self._maxima = {}
        return means

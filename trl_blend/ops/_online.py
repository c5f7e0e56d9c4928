"""Statistics of a row that is seen tile by tile: a softmax whose maximum grows, and the largest entries."""

from collections.abc import Iterator

import torch
from torch import Tensor

from trl_blend.ops._tiles import NO_MAXIMUM, Scratch


class RunningSoftmax:
    """
    The maximum `m` of each row so far, with `Σ e^(z - m)` and `Σ e^(z - m) (z - m)`, rescaled whenever `m` grows.

    Args:
        count (`int`):
            Number of rows, `N`.
        scratch ([`~trl_blend.ops._tiles.Scratch`]):
            Device and dtype of the statistics.
    """

    def __init__(self, count: int, scratch: Scratch) -> None:
        self.maximum = torch.full((count,), NO_MAXIMUM, dtype=scratch.dtype, device=scratch.device)
        self.total = torch.zeros_like(self.maximum)
        self._weighted = torch.zeros_like(self.maximum)

    def shift_(self, rows: slice, tile: Tensor) -> Tensor:
        """Let the maximum see a tile `(n, v)` and subtract it from the tile. Returns old minus new maximum, `(n,)`."""
        maximum = torch.maximum(self.maximum[rows], tile.amax(dim=1))
        shift = self.maximum[rows] - maximum
        self.maximum[rows] = maximum
        tile.sub_(maximum.unsqueeze(1))
        return shift

    def rescaled(self, rows: slice, weighted: Tensor, shift: Tensor, offset: Tensor) -> Tensor:
        """`Σ e^(z - m) x` of the earlier tiles for the new maximum, where every `x` has grown by `offset`, `(n,)`."""
        return (weighted[rows] + offset * self.total[rows]) * shift.exp()

    def add_total_(self, rows: slice, probs: Tensor, shift: Tensor) -> None:
        """Count a tile of `e^(z - m)`. Comes last: [`rescaled`] reads the total of the earlier tiles."""
        self.total[rows] = self.total[rows] * shift.exp() + probs.sum(dim=1)

    def add_(self, rows: slice, tile: Tensor, probs: Tensor, shift: Tensor) -> None:
        """Count a tile of `z - m` and `e^(z - m)`, and overwrite the first."""
        self._weighted[rows] = self.rescaled(rows, self._weighted, shift, shift) + tile.mul_(probs).sum(dim=1)
        self.add_total_(rows, probs, shift)

    @property
    def log_norm(self) -> Tensor:
        return self.maximum + self.total.log()

    @property
    def entropy(self) -> Tensor:
        """Of what was counted with [`add_`]."""
        return self.total.log() - self._weighted / self.total


class RunningTopK:
    """
    The `k` largest entries of each row so far, with their column and the value of another tile there, each `(N, k)`.

    Args:
        count (`int`):
            Number of rows, `N`.
        k (`int`):
            How many entries are kept. At least as many must be seen in the end.
        scratch ([`~trl_blend.ops._tiles.Scratch`]):
            Device and dtype of the values.
    """

    def __init__(self, count: int, k: int, scratch: Scratch) -> None:
        self.values = torch.full((count, k), -torch.inf, dtype=scratch.dtype, device=scratch.device)
        self.others = torch.zeros_like(self.values)
        self.columns = torch.full((count, k), -1, dtype=torch.long, device=scratch.device)

    def fold(self, rows: slice, tile: Tensor, other: Tensor, first_column: int) -> None:
        """See a tile `(n, v)` that starts at `first_column`, and the other tile of the same shape."""
        k = self.values.shape[1]
        values, local = tile.topk(min(k, tile.shape[1]), dim=1)
        values, order = torch.cat([self.values[rows], values], dim=1).topk(k, dim=1)
        self.values[rows] = values
        for kept, new in ((self.others, other.gather(1, local)), (self.columns, local + first_column)):
            kept[rows] = torch.cat([kept[rows], new], dim=1).gather(1, order)


def eos_columns(ids: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Position in `ids` and column of every EOS id in the block from `start` to `stop`."""
    return ((index, token - start) for index, token in enumerate(ids) if start <= token < stop)


class EosColumns:
    """
    The EOS coordinates of one model's rows: read from the tiles, where they are then excluded, and merged into one
    virtual column at the end.

    Args:
        ids (`tuple[int, ...]`):
            EOS ids, the one that carries the stop event first. Empty: nothing is merged.
        count (`int`):
            Number of rows, `N`.
        scratch ([`~trl_blend.ops._tiles.Scratch`]):
            Device and dtype of the logits.
    """

    def __init__(self, ids: tuple[int, ...], count: int, scratch: Scratch) -> None:
        self.ids = ids
        self.logits = torch.empty((count, len(ids)), dtype=scratch.dtype, device=scratch.device)

    def take_(self, rows: slice, tile: Tensor, start: int) -> None:
        """Read and exclude the EOS columns of a tile that starts at column `start`."""
        for index, column in eos_columns(self.ids, start, start + tile.shape[1]):
            self.logits[rows, index] = tile[:, column]
            tile[:, column] = NO_MAXIMUM

    def merged(self) -> Tensor:
        """Logits of the virtual column, `(N, 1)`."""
        return self.logits.logsumexp(dim=1, keepdim=True)

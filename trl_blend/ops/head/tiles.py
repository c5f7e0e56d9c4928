"""
Tiles of tokens x vocabulary: projections, softmax statistics and logits gradients, all in reused buffers.

Everything here runs without autograd; [`~trl_blend.ops.mixed_log_probs`] makes it differentiable.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


# Tokens x vocabulary entries of one tile: 64 MiB in float32. A narrow vocabulary side keeps the buffers small next to
# `(N, V)` when there are few tokens, too.
TOKEN_TILE = 4096
VOCAB_TILE = 4096
# A log-probability whose exponential is exactly 0, in float64 too; stands in where -inf would give 0 * -inf = NaN
LOG_ZERO = -1e4
# A finite "nothing seen yet" for running maxima
NO_MAXIMUM = -1e30


@dataclass(frozen=True)
class TiledModel:
    """
    One model of the mixture, with the fields of [`~trl_blend.ops.LMHead`]. Tiles hold its logits times `factor`.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Hidden states.
        weight (`torch.Tensor` of shape `(V, H)`):
            Weight of the output layer.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias of the output layer.
        logit_scale (`float`):
            Multiplier of the logits, before the softcap.
        softcap (`float`, *optional*):
            Softcap of the scaled logits.
        dtype (`torch.dtype`):
            Dtype of the projection.
        factor (`float`):
            Multiplier after the softcap: the inverse temperature, times the model's weight where logits are mixed.
        log_weight (`float`):
            Logarithm of the model's weight, for the mixture of probabilities.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    dtype: torch.dtype
    factor: float
    log_weight: float


class Block(NamedTuple):
    """Columns `start` to `stop` of the vocabulary, with every model's weight and bias rows for them, cast."""

    start: int
    stop: int
    weights: list[Tensor]
    biases: list[Tensor | None]


@dataclass
class Scratch:
    """Reused flat buffers, one per name and dtype, handed out as contiguous views. `dtype` is that of statistics."""

    device: torch.device
    dtype: torch.dtype
    buffers: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)

    def take(self, name: str, rows: int, columns: int, *, dtype: torch.dtype | None = None) -> Tensor:
        key, size = (name, dtype or self.dtype), rows * columns
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[key] = torch.empty(size, dtype=key[1], device=self.device)
        return buffer[:size].view(rows, columns)


def vocab_blocks(models: Sequence[TiledModel], vocab: int) -> Iterator[Block]:
    """Blocks of the vocabulary. It is the outer loop, so that each weight row is cast once per pass."""
    for start in range(0, vocab, VOCAB_TILE):
        stop = min(start + VOCAB_TILE, vocab)
        weights = [model.weight[start:stop].to(model.dtype) for model in models]
        biases = [None if model.bias is None else model.bias[start:stop].to(model.dtype) for model in models]
        yield Block(start, stop, weights, biases)


def token_rows(count: int) -> Iterator[slice]:
    """Slices of tokens, the inner loop."""
    for start in range(0, count, TOKEN_TILE):
        yield slice(start, min(start + TOKEN_TILE, count))


def target_columns(targets: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Column of each target, clamped into the block, and whether the target lies in the block, both `(n, 1)`."""
    local = (targets - block.start).unsqueeze(1)
    width = block.stop - block.start
    return local.clamp(0, width - 1), (local >= 0) & (local < width)


def project(
    out: Tensor,
    models: Sequence[TiledModel],
    index: int,
    block: Block,
    rows: slice,
    scratch: Scratch,
    *,
    accumulate: bool = False,
    tanh: Tensor | None = None,
    rounded: bool = True,
) -> None:
    """
    Write one model's tile, `factor * logits`, to `out` or add it there. Columns past its vocabulary become `-inf`.

    With `tanh` (of `out`'s shape), the hyperbolic tangent of the softcap is left there for the gradient. With
    `rounded=False`, products in half precision are kept in the dtype of `out`. Overwrites the scratch buffers
    `"product"` and, to add softcapped logits, `"aux"`.
    """
    model, weight, bias = models[index], block.weights[index], block.biases[index]
    columns = weight.shape[0]
    out[:, columns:] = -torch.inf
    out = out[:, :columns]
    hidden = model.hidden[rows].to(model.dtype)
    alpha = model.factor * (model.logit_scale if model.softcap is None else model.softcap)
    if model.softcap is None and model.dtype == out.dtype:
        out.addmm_(hidden, weight.t(), beta=int(accumulate), alpha=alpha)
        if bias is not None:
            out.add_(bias, alpha=alpha)
        return
    # Like TRL's kernels, round the projection to its own dtype (log-probabilities) or not (divergences) and compute
    # the rest in float32
    wide = tanh
    if wide is None:
        wide = scratch.take("aux", *out.shape) if accumulate and model.softcap is not None else out
    widens = not rounded and model.dtype in (torch.float16, torch.bfloat16)
    product = wide if widens or model.dtype == out.dtype else scratch.take("product", *out.shape, dtype=model.dtype)
    if widens:
        # CUDA multiplies half precision into a float32 result; elsewhere the factors have to be cast
        left = hidden if wide.is_cuda and wide.dtype == torch.float32 else hidden.to(wide.dtype)
        add_product_(wide.zero_(), left, weight.t())
    else:
        torch.mm(hidden, weight.t(), out=product)
    if bias is not None:
        product.add_(bias)
    if model.softcap is not None:
        if wide is not product:
            wide.copy_(product)
        product = wide.mul_(model.logit_scale / model.softcap).tanh_()
    if accumulate:
        out.add_(product, alpha=alpha)
    else:
        (out if product is out else out.copy_(product)).mul_(alpha)


def softmax_statistics(
    models: Sequence[TiledModel], vocab: int, targets: Tensor, scratch: Scratch, *, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    Log-sum-exp, target log-probability and (on request) entropy of the summed tiles of `models`, each `(N,)`.

    One pass: a running maximum `m`, `Σ e^(z - m)` and `Σ e^(z - m) (z - m)` are rescaled whenever `m` grows.
    """
    maximum = torch.full(targets.shape, NO_MAXIMUM, dtype=scratch.dtype, device=scratch.device)
    total, weighted = torch.zeros_like(maximum), torch.zeros_like(maximum)
    target_logit = torch.full_like(maximum, -torch.inf)
    for block in vocab_blocks(models, vocab):
        for rows in token_rows(targets.shape[0]):
            shape = (rows.stop - rows.start, block.stop - block.start)
            tile = scratch.take("tile", *shape)
            for index in range(len(models)):
                project(tile, models, index, block, rows, scratch, accumulate=index > 0)
            local, inside = target_columns(targets[rows], block)
            target_logit[rows] = torch.where(inside, tile.gather(1, local), target_logit[rows, None]).squeeze(1)

            new_maximum = torch.maximum(maximum[rows], tile.amax(dim=1))
            shift = maximum[rows] - new_maximum
            probs = torch.exp(tile.sub_(new_maximum.unsqueeze(1)), out=scratch.take("aux", *shape))
            if entropy:
                old = (weighted[rows] + shift * total[rows]) * shift.exp()
                weighted[rows] = old + tile.clamp_(min=LOG_ZERO).mul_(probs).sum(dim=1)
            total[rows] = total[rows] * shift.exp() + probs.sum(dim=1)
            maximum[rows] = new_maximum
    log_total = total.log()
    log_norm = maximum + log_total
    return log_norm, target_logit - log_norm, log_total - weighted / total if entropy else None


def mixed_logits_tile(
    models: Sequence[TiledModel], log_norm: Tensor, block: Block, rows: slice, scratch: Scratch, tanh: Tensor | None
) -> Tensor:
    """`log p_mix` of one tile where logits are mixed, in the buffer `"tile"`. `tanh` is that of the first model."""
    tile = scratch.take("tile", rows.stop - rows.start, block.stop - block.start)
    for index in range(len(models)):
        project(tile, models, index, block, rows, scratch, accumulate=index > 0, tanh=None if index else tanh)
    return tile.sub_(log_norm[rows, None]).clamp_(min=LOG_ZERO)


def mixed_probs_tile(
    models: Sequence[TiledModel],
    log_norms: Sequence[Tensor],
    block: Block,
    rows: slice,
    scratch: Scratch,
    tanh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    `log p_mix` of one tile where probabilities are mixed, in the buffer `"tile"`, and `log p` of the first model, in
    the buffer `"first"`. `tanh` is that of the first model. Overwrites the buffer `"term"`.
    """
    shape = (rows.stop - rows.start, block.stop - block.start)
    tile, first = scratch.take("tile", *shape), scratch.take("first", *shape)
    project(first, models, 0, block, rows, scratch, tanh=tanh)
    first.sub_(log_norms[0][rows, None])
    torch.add(first, models[0].log_weight, out=tile)
    for index in range(1, len(models)):
        term = scratch.take("term", *shape)
        project(term, models, index, block, rows, scratch)
        term.add_(models[index].log_weight - log_norms[index][rows, None])
        torch.logaddexp(tile, term, out=tile)
    return tile.clamp_(min=LOG_ZERO), first


def mixed_probs_entropy(
    models: Sequence[TiledModel], log_norms: Sequence[Tensor], vocab: int, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """`-Σ p_mix log p_mix`, and `Σ p log p_mix` for the first model's `p`, each `(N,)`."""
    entropy, cross = torch.zeros_like(log_norms[0]), torch.zeros_like(log_norms[0])
    for block in vocab_blocks(models, vocab):
        for rows in token_rows(entropy.shape[0]):
            tile, first = mixed_probs_tile(models, log_norms, block, rows, scratch)
            entropy[rows] -= torch.exp(tile, out=scratch.take("term", *tile.shape)).mul_(tile).sum(dim=1)
            cross[rows] += first.exp_().mul_(tile).sum(dim=1)
    return entropy, cross


def logits_gradient_(
    log_mix: Tensor,
    probs: Tensor,
    at_target: Tensor,
    at_entropy: Tensor | None,
    center: Tensor | None,
    columns: tuple[Tensor, Tensor],
) -> Tensor:
    """
    Overwrite `log_mix` with `a (1[target] - p) - b p (log p_mix - c)`, one row per token.

    Args:
        log_mix (`torch.Tensor` of shape `(n, v)`):
            Tile of `log p_mix`. Without `at_entropy` its values are not read.
        probs (`torch.Tensor` of shape `(n, v)`):
            `p`, the distribution whose logits are differentiated.
        at_target (`torch.Tensor` of shape `(n,)`):
            `a`, gradient of `log p_mix(target)` times its derivative.
        at_entropy (`torch.Tensor` of shape `(n,)`, *optional*):
            `b`, gradient of the entropy times its derivative.
        center (`torch.Tensor` of shape `(n,)`, *optional*):
            `c = Σ p log p_mix`.
        columns (`tuple[torch.Tensor, torch.Tensor]`):
            Result of [`target_columns`].
    """
    local, inside = columns
    at_target = at_target.unsqueeze(1)
    if at_entropy is None or center is None:
        torch.mul(probs, -at_target, out=log_mix)
    else:
        at_entropy = at_entropy.unsqueeze(1)
        # a + b (log p_mix - c), as b log p_mix + (a - b c)
        log_mix.mul_(at_entropy).add_(at_target - at_entropy * center.unsqueeze(1)).mul_(probs).neg_()
    return log_mix.scatter_add_(1, local, torch.where(inside, at_target, torch.zeros_like(at_target)))


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` for a wide `total`, without rounding the product to the dtype of the factors first."""
    if left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)  # CUDA only
    else:
        total.addmm_(left, right.to(total.dtype))


class RunningSoftmax:
    """
    The maximum `m` of each row so far, with `Σ e^(z - m)` and `Σ e^(z - m) (z - m)`, rescaled whenever `m` grows.

    Args:
        count (`int`):
            Number of rows, `N`.
        scratch ([`~trl_blend.ops.head.tiles.Scratch`]):
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
        scratch ([`~trl_blend.ops.head.tiles.Scratch`]):
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
        scratch ([`~trl_blend.ops.head.tiles.Scratch`]):
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


class StudentGradients:
    """Gradients of the student's hidden states, weight and bias, in the dtype of the statistics while summed."""

    def __init__(
        self, tensors: tuple[Tensor, Tensor, Tensor | None], needed: tuple[bool, bool, bool], dtype: torch.dtype
    ) -> None:
        hidden, weight, bias = tensors
        needs_hidden, needs_weight, needs_bias = needed
        self.hidden = torch.zeros_like(hidden, dtype=dtype) if needs_hidden else None
        # Finished block by block, so it can have its final dtype at once; only one block is ever wider
        self.weight = torch.zeros_like(weight) if needs_weight else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if needs_bias and bias is not None else None
        self._dtypes = (hidden.dtype, None if bias is None else bias.dtype)
        self._wide = dtype

    def weight_block(self, block: Block) -> Tensor | None:
        """Where to add up the weight gradient of a block."""
        if self.weight is None:
            return None
        rows = self.weight[block.start : block.stop]
        return rows if rows.dtype == self._wide else torch.zeros_like(rows, dtype=self._wide)

    def add_tile(
        self,
        grad: Tensor,
        student: TiledModel,
        block: Block,
        rows: slice,
        weight_block: Tensor | None,
        scratch: Scratch,
    ) -> None:
        """Add the share of one tile, given the gradient with respect to its projection. The student comes first."""
        if grad.is_cuda and student.dtype in (torch.float16, torch.bfloat16):
            grad = scratch.take("product", *grad.shape, dtype=student.dtype).copy_(grad)
        if self.hidden is not None:
            add_product_(self.hidden[rows], grad, block.weights[0])
        if weight_block is not None:
            add_product_(weight_block, grad.t(), student.hidden[rows].to(student.dtype))
        if self.bias is not None:
            self.bias[block.start : block.stop] += grad.sum(dim=0, dtype=self.bias.dtype)

    def close_block(self, block: Block, weight_block: Tensor | None) -> None:
        """Round a finished block of the weight gradient to the dtype of the weight."""
        if self.weight is not None and weight_block is not None and weight_block.dtype != self.weight.dtype:
            self.weight[block.start : block.stop] = weight_block

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        hidden = None if self.hidden is None else self.hidden.to(self._dtypes[0])
        bias = None if self.bias is None else self.bias.to(self._dtypes[1])
        return hidden, self.weight, bias

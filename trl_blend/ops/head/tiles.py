"""
The engine of this folder: tiles of tokens x vocabulary, projected into reused buffers, folded into online statistics
and, in the backward, turned into gradients of the student's output layer.

Everything here runs without autograd; the files beside this one make it differentiable.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trl_blend.errors import ConfigError
from trl_blend.ops.head.layer import GatherParameters, LMHead, projection_dtype


# Tokens x vocabulary entries of one tile: 64 MiB in float32. A narrow vocabulary side keeps the buffers small next to
# `(N, V)` when there are few tokens, too.
TOKEN_TILE = 4096
VOCAB_TILE = 4096
# A log-probability whose exponential is exactly 0, in float64 too; stands in where -inf would give 0 * -inf = NaN
LOG_ZERO = -1e4
# A finite "nothing seen yet" for running maxima
NO_MAXIMUM = -1e30


class TiledModel(NamedTuple):
    """
    One output layer: the fields of [`~trl_blend.ops.LMHead`], the dtype of its projection, the multiplier of its
    logits after the softcap (the inverse temperature, times the weight where logits are mixed), and its weight in a
    mixture. Tiles hold its logits times `factor`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    dtype: torch.dtype
    factor: float
    share: float


def tiled(head: LMHead, factor: float = 1.0, share: float = 1.0) -> TiledModel:
    return TiledModel(*head, projection_dtype(head.hidden), factor, share)


def vocabulary(head: LMHead, vocab_size: int | None) -> int:
    """Rows that count: the first `vocab_size` where that is given and there are more."""
    rows = head.weight.shape[0]
    if vocab_size is not None and vocab_size < 1:
        raise ConfigError(f"`vocab_size` is {vocab_size}. Pass the number of rows that are tokens, or None for all.")
    return rows if vocab_size is None else min(rows, vocab_size)


def parameters_of(models: Sequence[TiledModel]) -> list[Tensor]:
    """Each once: a model may be there with and without its adapters, which share an output layer."""
    found = [tensor for model in models for tensor in (model.weight, model.bias) if tensor is not None]
    return list({id(tensor): tensor for tensor in found}.values())


@dataclass
class Scratch:
    """Reused flat buffers, one per name and dtype, handed out as contiguous views. `dtype` is that of statistics."""

    device: torch.device
    dtype: torch.dtype
    buffers: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, models: Sequence[TiledModel]) -> "Scratch":
        wide = any(model.dtype == torch.float64 for model in models)
        return cls(models[0].hidden.device, torch.float64 if wide else torch.float32)

    def take(self, name: str, rows: int, columns: int, *, dtype: torch.dtype | None = None) -> Tensor:
        key, size = (name, dtype or self.dtype), rows * columns
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[key] = torch.empty(size, dtype=key[1], device=self.device)
        return buffer[:size].view(rows, columns)


class Block(NamedTuple):
    """Columns `start` to `stop` of the vocabulary, and the models with their weight and bias rows for them, cast."""

    start: int
    stop: int
    models: list[TiledModel]


def vocab_blocks(models: Sequence[TiledModel], vocab: int, width: int | None = None) -> Iterator[Block]:
    """Blocks of the vocabulary. It is the outer loop, so that each weight row is cast once per pass."""
    width = width or VOCAB_TILE
    for start in range(0, vocab, width):
        stop = min(start + width, vocab)
        parts = []
        for model in models:
            bias = None if model.bias is None else model.bias[start:stop].to(model.dtype)
            parts.append(model._replace(weight=model.weight[start:stop].to(model.dtype), bias=bias))
        yield Block(start, stop, parts)


def token_rows(count: int, height: int | None = None) -> Iterator[slice]:
    """Slices of tokens, the inner loop."""
    height = height or TOKEN_TILE
    for start in range(0, count, height):
        yield slice(start, min(start + height, count))


def local_columns(columns: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """`columns` of the vocabulary as columns of the block, clamped into it, and whether they lie there."""
    local, width = columns - block.start, block.stop - block.start
    return local.clamp(0, width - 1), (local >= 0) & (local < width)


def project(
    out: Tensor,
    model: TiledModel,
    rows: slice,
    scratch: Scratch,
    *,
    accumulate: bool = False,
    tanh: Tensor | None = None,
    rounded: bool = True,
) -> None:
    """
    Write a tile of one model of a block, `factor * logits`, to `out` or add it there. Columns past its vocabulary
    become `-inf`, as do those of a bias of `-inf`, also with a negative factor.

    With `tanh` (of `out`'s shape), the hyperbolic tangent of the softcap is left there for the gradient. With
    `rounded=False`, products in half precision are kept in the dtype of `out`. Overwrites the scratch buffers
    `"product"` and, to add softcapped logits, `"aux"`.
    """
    weight, bias, columns = model.weight, model.bias, model.weight.shape[0]
    out[:, columns:] = -torch.inf
    out = out[:, :columns]
    hidden = model.hidden[rows].to(model.dtype)
    alpha = model.factor * (model.logit_scale if model.softcap is None else model.softcap)
    if bias is not None and model.softcap is None and alpha < 0.0:
        bias = bias.masked_fill(bias == -torch.inf, torch.inf)
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
        _add_product_(wide.zero_(), left, weight.t())
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


def logits_tile(
    block: Block,
    rows: slice,
    scratch: Scratch,
    index: int = 0,
    name: str = "tile",
    *,
    tanh: Tensor | None = None,
    rounded: bool = True,
) -> Tensor:
    """The tile of one model of a block, in the buffer `name`."""
    tile = scratch.take(name, rows.stop - rows.start, block.stop - block.start)
    project(tile, block.models[index], rows, scratch, tanh=tanh, rounded=rounded)
    return tile


# Given block, rows, and where to leave the hyperbolic tangent of the student's softcap: the gradient with respect to
# the capped logits of a tile, which is overwritten
TileGradient: TypeAlias = Callable[[Block, slice, Tensor | None], Tensor]


class Kernel(ABC):
    """What one differentiable function of the student's output layer adds to the engine: see [`run`]."""

    vocab: int  # columns that count

    @abstractmethod
    def forward(self, models: list[TiledModel], scratch: Scratch) -> tuple[Sequence[Tensor | None], list[Any]]:
        """Outputs, each `(N,)`, and the tensors that the gradient needs."""

    @abstractmethod
    def tile_gradient(
        self, models: list[TiledModel], saved: list[Any], grads: Sequence[Tensor | None], scratch: Scratch
    ) -> TileGradient:
        """How to find the student's gradient, given those of the outputs."""

    def is_differentiable(self, output: int) -> bool:
        return output == 0

    def reads_partners(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether the gradient needs the partners' tiles again."""
        return True

    def tile_shape(self) -> tuple[int, int]:
        return TOKEN_TILE, VOCAB_TILE


def run(kernel: Kernel, models: Sequence[TiledModel], gather_parameters: GatherParameters) -> tuple[Any, ...]:
    """Outputs of a kernel. Their gradients reach the first model, the student; parameters are whole here."""
    tensors = [tensor for model in models for tensor in model[:3]]
    # Without this, a partner weight that requires grad would make the outputs require it, too
    tracking = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:3])
    with torch.set_grad_enabled(tracking):
        settings = [model[3:] for model in models]
        return _Function.apply(kernel, settings, gather_parameters, *tensors)  # type: ignore[no-untyped-call]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, settings: list[Any], gather_parameters: GatherParameters, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # An output that is only logged then costs nothing in the backward
        ctx.set_materialize_grads(False)
        models = _rebuilt(settings, tensors)
        scratch = Scratch.of(models)
        outputs, saved = kernel.forward(models, scratch)
        ctx.kernel, ctx.settings, ctx.gather_parameters = kernel, settings, gather_parameters
        ctx.tensor_count, ctx.dtype = len(tensors), scratch.dtype
        ctx.save_for_backward(*tensors, *saved)
        ctx.mark_non_differentiable(*(x for i, x in enumerate(outputs) if not kernel.is_differentiable(i)))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kernel, count = ctx.kernel, ctx.tensor_count
        gradients: tuple[Tensor | None, ...] = (None, None, None)
        tensors, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        models = _rebuilt(ctx.settings, tensors if kernel.reads_partners(grads) else tensors[:3])
        if any(grad is not None for grad in grads):
            with ctx.gather_parameters(*parameters_of(models)):
                scratch = Scratch(models[0].hidden.device, ctx.dtype)
                tile_gradient = kernel.tile_gradient(models, saved, grads, scratch)
                gradients = _student_gradients(kernel, models, tile_gradient, ctx.needs_input_grad[3:6], scratch)
        return None, None, None, *gradients, *[None] * (count - 3)


def _rebuilt(settings: list[Any], tensors: Sequence[Any]) -> list[TiledModel]:
    """The first models, as many as there are tensors for."""
    return [TiledModel(*tensors[3 * index : 3 * index + 3], *settings[index]) for index in range(len(tensors) // 3)]


def _student_gradients(
    kernel: Kernel,
    models: Sequence[TiledModel],
    tile_gradient: TileGradient,
    needed: tuple[bool, bool, bool],
    scratch: Scratch,
) -> tuple[Tensor | None, ...]:
    """Gradients of the student's hidden states, weight and bias, in the dtype of the statistics while summed."""
    student, wide = models[0], scratch.dtype
    token_tile, vocab_tile = kernel.tile_shape()
    hidden = torch.zeros_like(student.hidden, dtype=wide) if needed[0] else None
    # Finished block by block, so it can have its final dtype at once; only one block is ever wider
    weight = torch.zeros_like(student.weight) if needed[1] else None
    bias = torch.zeros_like(student.bias, dtype=wide) if needed[2] and student.bias is not None else None
    # A student of weight 0 takes no part
    for block in vocab_blocks(models, kernel.vocab if student.share else 0, vocab_tile):
        total = None if weight is None else weight[block.start : block.stop]
        if total is not None and total.dtype != wide:
            total = torch.zeros_like(total, dtype=wide)
        for rows in token_rows(len(student.hidden), token_tile):
            shape = rows.stop - rows.start, block.stop - block.start
            tanh = None if student.softcap is None else scratch.take("tanh", *shape)
            grad = tile_gradient(block, rows, tanh)
            if tanh is not None:
                grad.mul_(tanh.square_().neg_().add_(1.0))
            if grad.is_cuda and student.dtype in (torch.float16, torch.bfloat16):
                grad = scratch.take("product", *shape, dtype=student.dtype).copy_(grad)
            if hidden is not None:
                _add_product_(hidden[rows], grad, block.models[0].weight)
            if total is not None:
                _add_product_(total, grad.t(), student.hidden[rows].to(student.dtype))
            if bias is not None:
                bias[block.start : block.stop] += grad.sum(dim=0, dtype=wide)
        if weight is not None and total is not None and weight.dtype != wide:
            weight[block.start : block.stop] = total
    hidden = None if hidden is None else hidden.to(student.hidden.dtype)
    return hidden, weight, None if bias is None or student.bias is None else bias.to(student.bias.dtype)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` for a wide `total`, without rounding the product to the dtype of the factors first."""
    if left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)  # CUDA only
    else:
        total.addmm_(left, right.to(total.dtype))


class RunningSoftmax:
    """
    Of `count` rows, the maximum `m` so far, with `Σ e^(z - m)` and, for the entropy, `Σ e^(z - m) (z - m)`. Both are
    rescaled whenever `m` grows.
    """

    def __init__(self, count: int, scratch: Scratch) -> None:
        self.maximum = torch.full((count,), NO_MAXIMUM, dtype=scratch.dtype, device=scratch.device)
        self.total = torch.zeros_like(self.maximum)
        self._weighted = torch.zeros_like(self.maximum)
        self._scratch = scratch

    def fold_(self, rows: slice, tile: Tensor, *, entropy: bool = False) -> None:
        """Count a tile `(n, v)`, which is overwritten, as is the buffer `"aux"` for the entropy."""
        shift = self.shift_(rows, tile)
        if entropy:
            probs = torch.exp(tile, out=self._scratch.take("aux", *tile.shape))
            self.add_(rows, tile.clamp_(min=LOG_ZERO), probs, shift)
        else:
            self.add_total_(rows, tile.exp_(), shift)

    def shift_(self, rows: slice, tile: Tensor) -> Tensor:
        """Let the maximum see a tile and subtract it from the tile. Returns old minus new maximum, `(n,)`."""
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
        """Count a tile of finite `z - m` and `e^(z - m)`, and overwrite the first."""
        self._weighted[rows] = self.rescaled(rows, self._weighted, shift, shift) + tile.mul_(probs).sum(dim=1)
        self.add_total_(rows, probs, shift)

    @property
    def log_norm(self) -> Tensor:
        return self.maximum + self.total.log()

    @property
    def entropy(self) -> Tensor:
        """Of what was counted with its entropy."""
        return self.total.log() - self._weighted / self.total


class RunningTopK:
    """
    Of `count` rows, the `k` largest entries so far, with their column and the value of another tile there, each
    `(N, k)`. Of equal entries in different tiles the earlier one is kept.
    """

    def __init__(self, count: int, k: int, scratch: Scratch) -> None:
        self.values = torch.full((count, k), -torch.inf, dtype=scratch.dtype, device=scratch.device)
        self.others = torch.zeros_like(self.values)
        self.columns = torch.zeros((count, k), dtype=torch.long, device=scratch.device)

    def fold(self, rows: slice, tile: Tensor, first_column: int, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        See a tile `(n, v)` that starts at `first_column`, and another of the same shape. Returns the columns of the
        tile that were candidates, and the values that are not, or no longer, among the largest.
        """
        k = self.values.shape[1]
        values, local = tile.topk(min(k, tile.shape[1]), dim=1)
        values, order = torch.cat([self.values[rows], values], dim=1).sort(dim=1, descending=True, stable=True)
        self.values[rows] = values[:, :k]
        kept = order[:, :k]
        self.columns[rows] = torch.cat([self.columns[rows], local + first_column], dim=1).gather(1, kept)
        if other is not None:
            self.others[rows] = torch.cat([self.others[rows], other.gather(1, local)], dim=1).gather(1, kept)
        return local, values[:, k:]


class EosColumns:
    """
    The EOS coordinates of one model's `count` rows: read from the tiles, where they are then excluded, and merged into
    one virtual column at the end. Of `ids` the first carries the stop event; without any nothing is merged.
    """

    def __init__(self, ids: tuple[int, ...], count: int, scratch: Scratch) -> None:
        self.ids = ids
        self.logits = torch.empty((count, len(ids)), dtype=scratch.dtype, device=scratch.device)

    def take_(self, rows: slice, tile: Tensor, block: Block) -> None:
        """Read and exclude the EOS columns of a tile."""
        for index, column in eos_columns(self.ids, block):
            self.logits[rows, index] = tile[:, column]
            tile[:, column] = NO_MAXIMUM

    def merged(self) -> Tensor:
        """Logits of the virtual column, `(N, 1)`."""
        return self.logits.logsumexp(dim=1, keepdim=True)


def eos_columns(ids: tuple[int, ...], block: Block) -> Iterator[tuple[int, int]]:
    """Position in `ids` and column of every EOS id in the block."""
    return ((index, token - block.start) for index, token in enumerate(ids) if block.start <= token < block.stop)


def softmax_statistics(
    models: Sequence[TiledModel],
    vocab: int,
    targets: Tensor,
    scratch: Scratch,
    tile_logits: Callable[[Block, slice, Scratch], Tensor],
    *,
    entropy: bool,
    eos_ids: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    Log-sum-exp, target log-probability and (on request) entropy of the tiles that `tile_logits` returns, each `(N,)`.
    One pass over the vocabulary. The tokens `eos_ids` are one event, of which the first is the target.
    """
    count = targets.shape[0]
    softmax, eos = RunningSoftmax(count, scratch), EosColumns(eos_ids, count, scratch)
    targets = targets.unsqueeze(1)
    logits = torch.full((count, 1), -torch.inf, dtype=scratch.dtype, device=scratch.device)
    for block in vocab_blocks(models, vocab):
        for rows in token_rows(count):
            tile = tile_logits(block, rows, scratch)
            eos.take_(rows, tile, block)
            local, inside = local_columns(targets[rows], block)
            logits[rows] = torch.where(inside, tile.gather(1, local), logits[rows])
            softmax.fold_(rows, tile, entropy=entropy)
    if eos_ids:
        stop = eos.merged()
        logits = torch.where(targets == eos_ids[0], stop, logits)
        softmax.fold_(slice(0, count), stop, entropy=entropy)
    return softmax.log_norm, logits.squeeze(1) - softmax.log_norm, softmax.entropy if entropy else None

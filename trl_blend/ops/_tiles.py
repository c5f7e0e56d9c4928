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

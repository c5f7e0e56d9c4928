"""Log-probabilities of given tokens, and the most probable ones beside them, without ever building `(N, V)` logits."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trl_blend.errors import ConfigError
from trl_blend.ops.head.layer import LMHead, projection_dtype
from trl_blend.ops.head.tiles import (
    NO_MAXIMUM,
    Scratch,
    TiledModel,
    project,
    softmax_statistics,
    target_columns,
    token_rows,
    vocab_blocks,
)


class TokenLogProbs(NamedTuple):
    """
    Result of [`score_tokens`]. All log-probabilities are in nats, at temperature 1 and normalised over all of `V`.

    Args:
        logps (`torch.Tensor` of shape `(N,)`):
            `log p(target)`.
        topk_ids (`torch.Tensor` of shape `(N, K)`, *optional*):
            Ids of the `K` most probable tokens, most probable first, the last one replaced by the target where that
            is not among them: the target is always one of them.
        topk_logps (`torch.Tensor` of shape `(N, K)`, *optional*):
            `log p` of those ids.
        tail_logmass (`torch.Tensor` of shape `(N,)`, *optional*):
            Logarithm of the probability of all other tokens together.
    """

    logps: Tensor
    topk_ids: Tensor | None
    topk_logps: Tensor | None
    tail_logmass: Tensor | None


def _no_gather(*params: Tensor) -> AbstractContextManager[Any]:
    return nullcontext()


@torch.no_grad()
def score_tokens(
    head: LMHead,
    targets: Tensor,
    top_k: int | None = None,
    *,
    gather_parameters: Callable[..., AbstractContextManager[Any]] = _no_gather,
) -> TokenLogProbs:
    r"""
    `log p(target)` under one output layer and, on request, its `K` most probable tokens with the mass of the rest:

    $$
    \log p(v) = z_v - \log\sum_u e^{z_u}, \qquad
    S = \{y\} \cup \mathrm{top}_{K-1}(V \setminus y), \qquad
    \log m = \log\sum_{v \notin S} p(v)
    $$

    One pass over the vocabulary: tiles of tokens x vocabulary are projected into buffers of bounded size and folded
    into an online log-sum-exp. `S` is the top `K`, with the last one replaced by the target `y` where `y` is not in
    it. The mass outside `S` is summed from its own terms; `1 - sum(S)` would lose it to rounding where it is small.

    Projections run in the dtype of the hidden states (under autocast, in its dtype) as in TRL's
    `ChunkedLogProbFunction`; sums and statistics in float32, or in float64 where hidden states are float64.

    Nothing here has a gradient. Left out on purpose: temperature (scores are those of the model as it is), masking.

    Args:
        head ([`~trl_blend.ops.LMHead`]):
            Output layer with hidden states of shape `(N, H)`, one per scored token.
        targets (`torch.Tensor` of shape `(N,)`):
            Token ids in `[0, V)`. Out-of-range ids give `-inf`.
        top_k (`int`, *optional*):
            `K`, at least 1 and less than `V`. Only the targets are scored by default.
        gather_parameters (`Callable`, *optional*):
            Context-manager factory, entered with weight and bias (ZeRO-3: TRL's `maybe_gather_lm_head_ctx`). Does
            nothing by default.

    Returns:
        [`TokenLogProbs`]: Of dtype float32 (float64 for float64 hidden states); ids are int64.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If `top_k` is not in `[1, V)`, or the shapes do not fit together.
    """
    hidden, weight = head.hidden, head.weight
    vocab = weight.shape[0]
    _check_arguments(head, targets, top_k)
    dtype = projection_dtype(hidden)
    scratch = Scratch(hidden.device, torch.float64 if dtype == torch.float64 else torch.float32)
    model = TiledModel(hidden, weight, head.bias, head.logit_scale, head.softcap, dtype, 1.0, 0.0)
    parameters = [weight] if head.bias is None else [weight, head.bias]
    with gather_parameters(*parameters), torch.autocast(hidden.device.type, enabled=False):
        if top_k is None:
            _, logps, _ = softmax_statistics([model], vocab, targets, scratch, entropy=False)
            return TokenLogProbs(logps.clamp_(max=0.0), None, None, None)
        return _score_with_top_k(model, vocab, targets, top_k, scratch)


def _check_arguments(head: LMHead, targets: Tensor, top_k: int | None) -> None:
    hidden, weight = head.hidden, head.weight
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ConfigError(
            f"`head` has hidden states of shape {tuple(hidden.shape)} and a weight of shape {tuple(weight.shape)}. "
            "Pass `(N, H)` and `(V, H)`."
        )
    if targets.shape != hidden.shape[:1]:
        raise ConfigError(
            f"`targets` has shape {tuple(targets.shape)}, expected {tuple(hidden.shape[:1])}: one id per hidden state."
        )
    if top_k is not None and not 1 <= top_k < weight.shape[0]:
        raise ConfigError(
            f"`top_k={top_k}` must be at least 1 and less than the vocabulary size {weight.shape[0]}. Use None to "
            "score the given tokens only."
        )


class _OnlineSum:
    """Running `log Σ e^z` per token, rescaled whenever its maximum grows."""

    def __init__(self, like: Tensor) -> None:
        self.maximum = torch.full_like(like, NO_MAXIMUM)
        self.total = torch.zeros_like(like)

    def add_(self, rows: slice, logits: Tensor) -> None:
        """Adds the columns of `logits`, which it overwrites."""
        if logits.shape[1] == 0:
            return
        maximum = torch.maximum(self.maximum[rows], logits.amax(dim=1))
        scale = (self.maximum[rows] - maximum).exp_()
        self.total[rows] = self.total[rows] * scale + logits.sub_(maximum.unsqueeze(1)).exp_().sum(dim=1)
        self.maximum[rows] = maximum

    def log(self) -> Tensor:
        return self.maximum + self.total.log()


def _score_with_top_k(model: TiledModel, vocab: int, targets: Tensor, top_k: int, scratch: Scratch) -> TokenLogProbs:
    # The target is always kept, so only the top K - 1 of the others have to be found, and what falls out is the tail
    num_tokens, others = targets.shape[0], top_k - 1
    options: dict[str, Any] = {"dtype": scratch.dtype, "device": scratch.device}
    target_logit = torch.full((num_tokens,), -torch.inf, **options)
    values = torch.full((num_tokens, others), -torch.inf, **options)
    ids = torch.zeros(num_tokens, others, dtype=torch.long, device=scratch.device)
    tail = _OnlineSum(target_logit)
    for block in vocab_blocks([model], vocab):
        width = block.stop - block.start
        for rows in token_rows(num_tokens):
            tile = scratch.take("tile", rows.stop - rows.start, width)
            project(tile, [model], 0, block, rows, scratch)
            local, inside = target_columns(targets[rows], block)
            at_target = tile.gather(1, local)
            target_logit[rows] = torch.where(inside, at_target, target_logit[rows, None]).squeeze(1)
            tile.scatter_(1, local, at_target.masked_fill(inside, -torch.inf))
            found, columns = tile.topk(min(others, width), dim=1)
            tile.scatter_(1, columns, -torch.inf)
            merged, order = torch.cat([values[rows], found], dim=1).sort(dim=1, descending=True, stable=True)
            ids[rows] = torch.cat([ids[rows], columns + block.start], dim=1).gather(1, order[:, :others])
            values[rows] = merged[:, :others]
            tail.add_(rows, tile)
            tail.add_(rows, merged[:, others:])
    log_tail = tail.log()
    values, order = torch.cat([values, target_logit[:, None]], dim=1).sort(dim=1, descending=True, stable=True)
    ids = torch.cat([ids, targets[:, None]], dim=1).gather(1, order)
    log_norm = torch.logaddexp(values.logsumexp(dim=1), log_tail)
    return TokenLogProbs(
        (target_logit - log_norm).clamp_(max=0.0),
        ids,
        (values - log_norm[:, None]).clamp_(max=0.0),
        (log_tail - log_norm).clamp_(max=0.0),
    )

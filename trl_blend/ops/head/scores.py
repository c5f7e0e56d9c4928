"""Log-probabilities of given tokens, and the most probable ones beside them, without ever building `(N, V)` logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from trl_blend.errors import ConfigError
from trl_blend.ops.head import tiles
from trl_blend.ops.head.layer import GatherParameters, LMHead, no_gather
from trl_blend.ops.head.tiles import RunningSoftmax, RunningTopK, Scratch, TiledModel


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


@torch.no_grad()
def score_tokens(
    head: LMHead,
    targets: Tensor,
    top_k: int | None = None,
    *,
    vocab_size: int | None = None,
    gather_parameters: GatherParameters = no_gather,
) -> TokenLogProbs:
    r"""
    Scores given tokens under one model and, on request, keeps its `K` most probable tokens with the mass of the rest.
    Use it to store what a frozen teacher thinks of a rollout; for a top-k loss, a `K` of 16 to 64 is usual.

    $$
    \log p(v) = z_v - \log\sum_u e^{z_u}, \qquad
    S = \{y\} \cup \mathrm{top}_{K-1}(V \setminus y), \qquad
    \log m = \log\sum_{v \notin S} p(v)
    $$

    `S` is the top `K`, with the last one replaced by the target `y` where `y` is not in it. The mass outside `S` is
    summed from its own terms; `1 - sum(S)` would lose it to rounding where it is small. One pass over the vocabulary,
    in tiles of tokens x vocabulary.

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
        vocab_size (`int`, *optional*):
            Rows of the output layer that are tokens; the others have no probability, and `V` is this number.
            All of them by default.
        gather_parameters (`Callable`, *optional*):
            Context-manager factory, entered with weight and bias (ZeRO-3: TRL's `maybe_gather_lm_head_ctx`). Does
            nothing by default.

    Returns:
        [`TokenLogProbs`]: Of dtype float32 (float64 for float64 hidden states); ids are int64.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If `top_k` is not in `[1, V)`, or the shapes do not fit together.
    """
    model = tiles.tiled(head)
    scratch = Scratch.of([model])
    with gather_parameters(*tiles.parameters_of([model])), torch.autocast(head.hidden.device.type, enabled=False):
        vocab = tiles.vocabulary(head, vocab_size)
        _check_arguments(head, targets, top_k, vocab)
        if top_k is not None:
            return _score_with_top_k(model, targets, top_k, vocab, scratch)
        _, logps, _ = tiles.softmax_statistics([model], vocab, targets, scratch, tiles.logits_tile, entropy=False)
        return TokenLogProbs(logps.clamp_(max=0.0), None, None, None)


@torch.no_grad()
def score_logits(
    logits: Tensor, targets: Tensor, top_k: int | None = None, *, vocab_size: int | None = None
) -> TokenLogProbs:
    """
    [`score_tokens`] of logits that are in memory. Use it where a model's logits are more than its output layer's.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`):
            Logits of the model, at least float32.
        targets, top_k, vocab_size:
            See [`score_tokens`].
    """
    logits = logits[:, :vocab_size]
    logprobs, targets = logits.log_softmax(dim=-1), targets.unsqueeze(1)
    logps = logprobs.gather(1, targets)
    if top_k is None:
        return TokenLogProbs(logps.squeeze(1), None, None, None)
    others = logprobs.scatter(1, targets, -torch.inf)
    best = others.topk(top_k - 1, dim=1)
    values, order = torch.cat([best.values, logps], dim=1).sort(dim=1, descending=True, stable=True)
    ids = torch.cat([best.indices, targets], dim=1).gather(1, order)
    tail = others.scatter(1, best.indices, -torch.inf).logsumexp(dim=1)
    return TokenLogProbs(logps.squeeze(1), ids, values, tail)


def _check_arguments(head: LMHead, targets: Tensor, top_k: int | None, vocab: int) -> None:
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
    if top_k is not None and not 1 <= top_k < vocab:
        raise ConfigError(
            f"`top_k={top_k}` must be at least 1 and less than the vocabulary size {vocab}. Use None to "
            "score the given tokens only."
        )


def _score_with_top_k(model: TiledModel, targets: Tensor, top_k: int, vocab: int, scratch: Scratch) -> TokenLogProbs:
    # The target is always kept, so only the top K - 1 of the others have to be found, and what falls out is the tail
    count, targets = targets.shape[0], targets.unsqueeze(1)
    best, tail = RunningTopK(count, top_k - 1, scratch), RunningSoftmax(count, scratch)
    target_logit = torch.full((count, 1), -torch.inf, dtype=scratch.dtype, device=scratch.device)
    for block in tiles.vocab_blocks([model], vocab):
        for rows in tiles.token_rows(count):
            tile = tiles.logits_tile(block, rows, scratch)
            local, inside = tiles.local_columns(targets[rows], block)
            at_target = tile.gather(1, local)
            target_logit[rows] = torch.where(inside, at_target, target_logit[rows])
            tile.scatter_(1, local, at_target.masked_fill(inside, -torch.inf))
            candidates, dropped = best.fold(rows, tile, block.start)
            tail.fold_(rows, tile.scatter_(1, candidates, -torch.inf))
            if top_k > 1:
                tail.fold_(rows, dropped)
    values, order = torch.cat([best.values, target_logit], dim=1).sort(dim=1, descending=True, stable=True)
    ids = torch.cat([best.columns, targets], dim=1).gather(1, order)
    log_norm = torch.logaddexp(values.logsumexp(dim=1), tail.log_norm).unsqueeze(1)
    return TokenLogProbs(
        (target_logit - log_norm).clamp_(max=0.0).squeeze(1),
        ids,
        (values - log_norm).clamp_(max=0.0),
        (tail.log_norm - log_norm.squeeze(1)).clamp_(max=0.0),
    )

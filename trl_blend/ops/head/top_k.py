"""KL divergence between a student and the stored most probable tokens of a teacher, from hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trl_blend.errors import ConfigError
from trl_blend.ops.head import tiles
from trl_blend.ops.head.layer import GatherParameters, LMHead, no_gather
from trl_blend.ops.head.tiles import Block, Kernel, Scratch, TiledModel, TileGradient


DIRECTIONS = ("reverse", "forward")

# A stored tail can be exactly 0 (`-inf`): no finite student would have a finite reverse KL to it
_LOG_MIN_MASS = -30.0


class TopKDivergence(NamedTuple):
    """
    Result of [`top_k_divergence`], one value per token.

    Args:
        loss (`torch.Tensor` of shape `(N,)`):
            The divergence, in nats. Carries the gradient.
        student_logps (`torch.Tensor` of shape `(N,)`):
            `log p_S(target)`, in nats. No gradient.
        student_entropy (`torch.Tensor` of shape `(N,)`):
            Entropy of `p_S`, in nats. No gradient.
        is_top1 (`torch.Tensor` of shape `(N,)`):
            1 where the target is the student's most probable token. No gradient.
    """

    loss: Tensor
    student_logps: Tensor
    student_entropy: Tensor
    is_top1: Tensor


def top_k_divergence(
    student: LMHead,
    targets: Tensor,
    topk_ids: Tensor,
    topk_logps: Tensor,
    tail_logmass: Tensor,
    *,
    direction: str = "reverse",
    vocab_size: int | None = None,
    gather_parameters: GatherParameters = no_gather,
) -> TopKDivergence:
    r"""
    Pulls the student towards the `K` stored tokens of a teacher, and its probability of all others towards the rest of
    the teacher's. Use it for distillation from a file, where [`~trl_blend.ops.score_tokens`] has stored the teacher;
    more stored tokens lose less of it.

    KL divergence over `K + 1` events, the `K` tokens and "any other token":

    $$
    \text{reverse: } \sum_{c} p_S(c) \log \frac{p_S(c)}{p_T(c)}, \qquad
    \text{forward: } \sum_{c} p_T(c) \log \frac{p_T(c)}{p_S(c)}
    $$

    where the last event has mass \\( 1 - \sum_k p(k) \\). Both are lower bounds of the divergences over all tokens,
    equal to them where the student shares the teacher's odds within the tail, and are 0 where all `K + 1`
    masses agree. Every term is exact: nothing is sampled. Merging the tail into one event is our choice.

    Gradient with respect to the student's logit of token `j` in event `c`: `p_S(j) (log p_S(c) - log p_T(c) - KL)` for
    the reverse, `p_S(j) Σ_c' p_T(c') - p_T(c) p_S(j|c)` for the forward direction. Logits are built for a few rows at
    a time, forward and backward: a tensor of them has at most 2^24 elements (64 MB in float32) whatever `N`, and a few
    are alive at once. Beside them the backward holds the gradient of the weight in float32, and under autocast both
    directions hold the weight in the lower precision.

    Args:
        student ([`LMHead`]):
            The student's output layer, `N` rows.
        targets (`torch.Tensor` of shape `(N,)`):
            Sampled tokens, for `student_logps` and `is_top1` only.
        topk_ids (`torch.Tensor` of shape `(N, K)`):
            Distinct token ids of each row.
        topk_logps (`torch.Tensor` of shape `(N, K)`):
            Teacher's log-probabilities of these tokens, in nats.
        tail_logmass (`torch.Tensor` of shape `(N,)`):
            Log of the teacher's probability of all other tokens, in nats; values below -30 are raised to that.
        direction (`str`, *optional*, defaults to `"reverse"`):
            `"reverse"` (`KL(p_S‖p_T)`) or `"forward"` (`KL(p_T‖p_S)`).
        vocab_size (`int`, *optional*):
            Rows of the output layer that are tokens; those behind them have no probability. All of them by default.
        gather_parameters (`Callable`, *optional*):
            Context in which sharded parameters are whole.

    Returns:
        [`TopKDivergence`]: The divergence with its gradient, and statistics without one.

    Raises:
        [`~trl_blend.errors.ConfigError`]:
            If `direction` is unknown, or `K` is not smaller than the student's vocabulary.
    """
    if direction not in DIRECTIONS:
        raise ConfigError(f"`direction={direction!r}` is unknown. Use 'reverse' or 'forward'.")
    model = tiles.tiled(student)
    tail = tail_logmass.clamp(min=_LOG_MIN_MASS).unsqueeze(-1)
    teacher = torch.cat([topk_logps, tail], dim=-1).to(Scratch.of([model]).dtype)
    # Before the weight is gathered, its number of rows is unknown under ZeRO-3
    with gather_parameters(*tiles.parameters_of([model])):
        vocab = tiles.vocabulary(student, vocab_size)
        if topk_ids.shape[-1] >= vocab:
            raise ConfigError(
                f"`topk_ids` has {topk_ids.shape[-1]} tokens per position, but the student has {vocab}: no other "
                "token is left. Score with a smaller `top_k`."
            )
        kernel = _TopKDivergence(vocab, targets, topk_ids, teacher, direction)
        return TopKDivergence(*tiles.run(kernel, [model], gather_parameters))


@dataclass(frozen=True)
class _TopKDivergence(Kernel):
    vocab: int
    targets: Tensor
    topk_ids: Tensor
    teacher: Tensor  # log-masses of the `K + 1` events
    direction: str

    def tile_shape(self) -> tuple[int, int]:
        # Whole rows, as many as fit: the tail of a row is a sum over its vocabulary
        return max(1, tiles.TOKEN_TILE * tiles.VOCAB_TILE // self.vocab), self.vocab

    def forward(self, models: list[TiledModel], scratch: Scratch) -> tuple[Sequence[Tensor | None], list[Any]]:
        token_tile, vocab_tile = self.tile_shape()
        loss, logps, entropy, is_top1 = (self.teacher.new_empty(len(self.targets)) for _ in range(4))
        for block in tiles.vocab_blocks(models, self.vocab, vocab_tile):
            for rows in tiles.token_rows(len(self.targets), token_tile):
                logprobs = tiles.logits_tile(block, rows, scratch).log_softmax(-1)
                events, teacher, targets = (
                    _events(logprobs, self.topk_ids[rows]),
                    self.teacher[rows],
                    self.targets[rows],
                )
                first, second = (events, teacher) if self.direction == "reverse" else (teacher, events)
                loss[rows] = (first.exp() * (first - second)).sum(-1)
                logps[rows] = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
                entropy[rows] = torch.special.entr(logprobs.exp()).sum(-1)
                is_top1[rows] = (logprobs.argmax(-1) == targets).to(logprobs.dtype)
        return (loss, logps, entropy, is_top1), []

    def tile_gradient(
        self, models: list[TiledModel], saved: list[Any], grads: Sequence[Tensor | None], scratch: Scratch
    ) -> TileGradient:
        assert grads[0] is not None
        scale = grads[0].unsqueeze(-1)

        def gradient(block: Block, rows: slice, tanh: Tensor | None) -> Tensor:
            logprobs = tiles.logits_tile(block, rows, scratch, tanh=tanh).log_softmax(-1)
            grad = self._logits_gradient(logprobs, self.topk_ids[rows], self.teacher[rows])
            return grad.mul_(scale[rows]).mul_(models[0].logit_scale)

        return gradient

    def _logits_gradient(self, logprobs: Tensor, topk_ids: Tensor, teacher: Tensor) -> Tensor:
        events, probs = _events(logprobs, topk_ids), logprobs.exp()
        if self.direction == "reverse":
            gap = events - teacher
            centered = gap - (events.exp() * gap).sum(-1, keepdim=True)
            return probs * centered[:, -1:].expand_as(probs).scatter(-1, topk_ids, centered[:, :-1])
        mass = teacher.exp()
        tail_share = (logprobs - events[:, -1:] + teacher[:, -1:]).exp()  # p_T(tail) p_S(j|tail)
        return probs * mass.sum(-1, keepdim=True) - tail_share.scatter(-1, topk_ids, mass[:, :-1])


def _events(logprobs: Tensor, topk_ids: Tensor) -> Tensor:
    """Log-masses of the `K` tokens and of all others, `(n, K + 1)`."""
    tail = logprobs.scatter(-1, topk_ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, topk_ids), tail], dim=-1).clamp(min=torch.finfo(torch.float32).min)

"""KL divergence between a student and the stored most probable tokens of a teacher, from hidden states."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trl_blend.errors import ConfigError
from trl_blend.ops.head.layer import LMHead, _no_gather, projection_dtype


DIRECTIONS = ("reverse", "forward")

# Logits alive at a time: 64 MB in float32
_ELEMENTS_PER_CHUNK = 2**24
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
    gather_parameters: Callable[..., AbstractContextManager[Any]] = _no_gather,
) -> TopKDivergence:
    r"""
    KL divergence over `K + 1` events, the `K` stored tokens of the teacher and "any other token":

    $$
    \text{reverse: } \sum_{c} p_S(c) \log \frac{p_S(c)}{p_T(c)}, \qquad
    \text{forward: } \sum_{c} p_T(c) \log \frac{p_T(c)}{p_S(c)}
    $$

    where the last event has mass \\( 1 - \sum_k p(k) \\). Both are lower bounds of the divergences over all tokens,
    equal to them where the student shares the teacher's odds within the tail, and are 0 where all `K + 1`
    masses agree. Every term is exact: nothing is sampled. Merging the tail into one event is [ours].

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
    if topk_ids.shape[-1] >= student.weight.shape[0]:
        raise ConfigError(
            f"`topk_ids` has {topk_ids.shape[-1]} tokens per position, but the student has {student.weight.shape[0]}: "
            "no other token is left. Score with a smaller `top_k`."
        )
    tail = tail_logmass.clamp(min=_LOG_MIN_MASS).unsqueeze(-1)
    teacher = torch.cat([topk_logps, tail], dim=-1).to(_wide(student.hidden).dtype)
    plan = _Plan(student.logit_scale, student.softcap, projection_dtype(student.hidden), direction, gather_parameters)
    result = _TopKFunction.apply(  # type: ignore[no-untyped-call]
        plan, targets, topk_ids, teacher, student.hidden, student.weight, student.bias
    )
    return TopKDivergence(*result)


class _Plan(NamedTuple):
    logit_scale: float
    softcap: float | None
    dtype: torch.dtype
    direction: str
    gather_parameters: Callable[..., AbstractContextManager[Any]]

    def cast(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.to(self.dtype), None if bias is None else bias.to(self.dtype)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = _wide(torch.nn.functional.linear(hidden.to(self.dtype), weight, bias)) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def projection_grad(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient of the projection, given that of the logits."""
        if self.softcap is not None:
            grad = grad * (1.0 - (logits / self.softcap) ** 2)
        return grad * self.logit_scale

    def divergence(self, events: Tensor, teacher: Tensor) -> Tensor:
        """Divergence of each row, from the log-masses of the `K + 1` events of both."""
        if self.direction == "reverse":
            return (events.exp() * (events - teacher)).sum(-1)
        return (teacher.exp() * (teacher - events)).sum(-1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _events(logprobs: Tensor, topk_ids: Tensor) -> Tensor:
    """Log-masses of the `K` tokens and of all others, `(n, K + 1)`."""
    tail = logprobs.scatter(-1, topk_ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, topk_ids), tail], dim=-1).clamp(min=torch.finfo(torch.float32).min)


class _TopKFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        targets: Tensor,
        topk_ids: Tensor,
        teacher: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        rows = []
        with plan.gather_parameters(*[p for p in (weight, bias) if p is not None]):
            cast = plan.cast(weight, bias)
            for chunk in _chunks(hidden, weight):
                logprobs = plan.logits(hidden[chunk], *cast).log_softmax(-1)
                divergence = plan.divergence(_events(logprobs, topk_ids[chunk]), teacher[chunk])
                target_logps = logprobs.gather(-1, targets[chunk].unsqueeze(-1)).squeeze(-1)
                entropy = torch.special.entr(logprobs.exp()).sum(-1)
                is_top1 = (logprobs.argmax(-1) == targets[chunk]).to(logprobs.dtype)
                rows.append(torch.stack([divergence, target_logps, entropy, is_top1]))
        ctx.plan = plan
        ctx.save_for_backward(topk_ids, teacher, hidden, weight, bias)
        empty = _wide(hidden.new_zeros(4, 0))
        loss, *statistics = [row.clone() for row in (torch.cat(rows, dim=-1) if rows else empty)]
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        topk_ids, teacher, hidden, weight, bias = ctx.saved_tensors
        plan, needed = ctx.plan, ctx.needs_input_grad[4:]
        if grad_loss is None:
            return (None,) * 7
        wide = _wide(hidden).dtype
        grads = [
            torch.zeros_like(tensor, dtype=wide) if need and tensor is not None else None
            for tensor, need in zip((hidden, weight, bias), needed, strict=True)
        ]
        with plan.gather_parameters(*[p for p in (weight, bias) if p is not None]):
            cast = plan.cast(weight, bias)
            for chunk in _chunks(hidden, weight):
                logits = plan.logits(hidden[chunk], *cast)
                grad = _logit_grad(plan.direction, logits.log_softmax(-1), topk_ids[chunk], teacher[chunk])
                grad = plan.projection_grad(grad * grad_loss[chunk].unsqueeze(-1), logits).to(plan.dtype)
                if grads[0] is not None:
                    grads[0][chunk] = (grad @ cast[0]).to(wide)
                if grads[1] is not None:
                    grads[1] += grad.t() @ hidden[chunk].to(plan.dtype)
                if grads[2] is not None:
                    grads[2] += grad.sum(0)
        like = (hidden, weight, bias)
        return None, None, None, None, *(g if g is None else g.to(t.dtype) for g, t in zip(grads, like, strict=True))


def _logit_grad(direction: str, logprobs: Tensor, topk_ids: Tensor, teacher: Tensor) -> Tensor:
    events = _events(logprobs, topk_ids)
    probs = logprobs.exp()
    if direction == "reverse":
        gap = events - teacher
        centered = gap - (events.exp() * gap).sum(-1, keepdim=True)
        factor = centered[:, -1:].expand_as(probs).scatter(-1, topk_ids, centered[:, :-1])
        return probs * factor
    mass = teacher.exp()
    tail_share = (logprobs - events[:, -1:] + teacher[:, -1:]).exp()  # p_T(tail) p_S(j|tail)
    return probs * mass.sum(-1, keepdim=True) - tail_share.scatter(-1, topk_ids, mass[:, :-1])


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    rows = max(1, _ELEMENTS_PER_CHUNK // weight.shape[0])
    return [slice(start, start + rows) for start in range(0, hidden.shape[0], rows)]

"""Reverse KL of a student against a teacher or a Veto target from hidden states, without building `(N, V)` logits."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trl_blend.errors import ConfigError
from trl_blend.ops.head import tiles
from trl_blend.ops.head.layer import LMHead, _frozen, _no_gather, parameters_of, projection_dtype
from trl_blend.ops.head.tiles import (
    NO_MAXIMUM,
    Block,
    EosColumns,
    RunningSoftmax,
    RunningTopK,
    Scratch,
    StudentGradients,
    TiledModel,
    eos_columns,
)
from trl_blend.ops.vocab import EosMap


class ReverseKL(NamedTuple):
    """
    Result of [`reverse_kl`], one value per token, in nats.

    Args:
        loss (`torch.Tensor` of shape `(N,)`):
            What is minimised.
        student_entropy (`torch.Tensor` of shape `(N,)`):
            Entropy of `p_S`. No gradient.
        reverse_kl (`torch.Tensor` of shape `(N,)`):
            The divergence to read and log: `loss` itself over the full support, `Σ_k c_k` over the student's top-k,
            whose loss is no divergence by value. No gradient.
    """

    loss: Tensor
    student_entropy: Tensor
    reverse_kl: Tensor


class SupportStatistics(NamedTuple):
    """
    Result of [`support_statistics`], one value per token, in nats.

    Args:
        student_logps (`torch.Tensor` of shape `(N,)`):
            `log p_S(target)`.
        teacher_logps (`torch.Tensor` of shape `(N,)`):
            `log p_T(target)`.
        teacher_entropy (`torch.Tensor` of shape `(N,)`):
            Entropy of `p_T`.
    """

    student_logps: Tensor
    teacher_logps: Tensor
    teacher_entropy: Tensor


def reverse_kl(
    student: LMHead,
    teacher: LMHead,
    *,
    temperature: float = 1.0,
    veto_weight: float = 0.0,
    top_k: int | None = None,
    eos: EosMap | None = None,
    vocab_size: int | None = None,
    gather_parameters: Callable[..., AbstractContextManager[Any]] = _no_gather,
) -> ReverseKL:
    r"""
    Reverse KL of every token, `KL(p_S‖Q)`, towards the teacher or the target of
    [Veto](https://huggingface.co/papers/2601.07155), which is a product and not an interpolation:

    $$
    \log Q = \log p_T + w \,\mathrm{sg}[\log p_S] - \log Z, \qquad
    Q \propto p_T\,\mathrm{sg}[p_S]^{w}, \qquad w = \text{veto\_weight}
    $$

    Full support, with gradient `p_S (log p_S - log Q - KL)` with respect to the student's logits (`Q` is a constant):

    $$
    L = \sum_v p_S(v) \bigl(\log p_S(v) - \log Q(v)\bigr)
    $$

    Support `S_k` of the `k` tokens that the student finds most probable, the form of the public code of
    [on-policy distillation on a top-k support](https://huggingface.co/papers/2604.13016) (thunlp/OPD):

    $$
    L = \sum_{v \in S_k} \mathrm{sg}[c_v] \log p_S(v), \qquad
    c_v = w_v \bigl(\log p_S(v) - \log Q(v)\bigr), \qquad w = \mathrm{softmax}_{S_k}(\log p_S)
    $$

    with gradient `Σ_k c_k (1[v = k] - p_S(v))`. Weights are renormalised over the support; the log-probabilities
    inside `c` and outside are those of the full vocabulary (the paper's own formula renormalises both sides inside,
    too). With `k = V` the gradient equals that of the full support. What is deliberately not done is to differentiate
    the truncated sum `Σ_{S_k} p_S (log p_S - log Q)`: wherever it is positive, its gradient also lowers the mass of
    `S_k`, which makes the sum smaller without bringing the student any closer to the target.

    `p_S` and `p_T` are softmaxes of the first `vocab_size` logits, divided by the temperature, then with the stop
    event on one token ([`~trl_blend.ops.canonicalize_eos`]). The gradients are those of these distributions: those of
    a merged token go to all logits that were merged, in proportion to their probabilities.

    As in TRL's `ChunkedDivergenceFunction`, which is the full support with `veto_weight=0`, tiles of tokens x
    vocabulary are folded into online statistics and recomputed in the backward. Projections per tile: one of each
    model in the forward and in the backward; the backward of the top-k support skips the teacher's. Projections
    multiply in the dtype of the hidden states (under autocast, in its dtype) without rounding the result to it;
    everything else is float32, or float64 where hidden states are float64.

    The gradient of `loss` reaches `student.hidden`, `student.weight` and `student.bias`. Teacher tensors get none, nor
    have the other outputs any. Where the teacher excludes a token with a logit of `-inf` and the student does not, the
    loss is huge but finite. Not done here: masking, reduction over tokens, double backward.

    Args:
        student ([`LMHead`]):
            Output layer of the student, `V_S` rows.
        teacher ([`LMHead`]):
            Output layer of the teacher, `V_T` rows, with any hidden size.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of both softmaxes.
        veto_weight (`float`, *optional*, defaults to `0.0`):
            Exponent of the student in the target, in `[0, 1)`. At 0 the target is the teacher. At 1 the student's
            entropy would cancel out of the loss.
        top_k (`int`, *optional*):
            Size of the student's support. Every token if not given.
        eos ([`EosMap`], *optional*):
            Tokens that are one stop event. None are merged if not given.
        vocab_size (`int`, *optional*):
            Rows of both output layers that count. `min(V_S, V_T)` if not given.
        gather_parameters (`Callable`, *optional*):
            Context-manager factory, entered with the weights and biases in use around the forward and again in the
            backward (ZeRO-3: TRL's `maybe_gather_lm_head_ctx`). Does nothing by default.

    Returns:
        [`ReverseKL`]: `loss`, `student_entropy` and `reverse_kl` of shape `(N,)`, in float32 (float64 for float64
        hidden states).

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the temperature, the Veto weight, `top_k`, the vocabulary size, the
            EOS map or a shape is invalid.
    """
    if not 0.0 <= veto_weight < 1.0:
        raise ConfigError(
            f"`veto_weight` is {veto_weight}. Set it to at least 0 and below 1: from 1 on the loss no longer contains "
            "the entropy of the student."
        )
    heads = [student, _frozen(teacher)]
    tensors = [tensor for head in heads for tensor in head[:3]]
    # Without this, a teacher weight that requires grad would make the outputs require it, too
    tracking = nullcontext() if any(t is not None and t.requires_grad for t in student[:3]) else torch.no_grad()
    with gather_parameters(*parameters_of(tensors)), tracking:
        plan = _plan(heads, temperature, eos, vocab_size, gather_parameters, veto_weight=veto_weight, top_k=top_k)
        loss, entropy, statistic = ReverseKLFunction.apply(plan, *tensors)  # type: ignore[no-untyped-call]
    return ReverseKL(loss, entropy, statistic)


@torch.no_grad()
def support_statistics(
    student: LMHead,
    teacher: LMHead,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    eos: EosMap | None = None,
    vocab_size: int | None = None,
    gather_parameters: Callable[..., AbstractContextManager[Any]] = _no_gather,
) -> SupportStatistics:
    """
    `log p_S(target)`, `log p_T(target)` and the entropy of `p_T`, for the diagnostics of a rollout. No gradient.

    The distributions are those of [`reverse_kl`]. One pass over the vocabulary, one projection of each model per tile.

    Args:
        student ([`LMHead`]):
            Output layer of the student.
        teacher ([`LMHead`]):
            Output layer of the teacher.
        targets (`torch.Tensor` of shape `(N,)`):
            Token ids in `[0, vocab_size)`; every EOS id reads the merged token. Out-of-range ids give `-inf`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of both softmaxes.
        eos ([`EosMap`], *optional*):
            Tokens that are one stop event. None are merged if not given.
        vocab_size (`int`, *optional*):
            Rows of both output layers that count. `min(V_S, V_T)` if not given.
        gather_parameters (`Callable`, *optional*):
            Context-manager factory, entered with the weights and biases around the pass. Does nothing by default.

    Returns:
        [`SupportStatistics`]: Three tensors of shape `(N,)`, in float32 (float64 for float64 hidden states).

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the temperature, the vocabulary size, the EOS map or a shape is invalid.
    """
    if targets.shape != student.hidden.shape[:1]:
        raise ConfigError(
            f"`targets` has shape {tuple(targets.shape)} and `hidden` has shape {tuple(student.hidden.shape)}. "
            "Flatten them to (N,) and (N, H), with the same tokens."
        )
    if eos is not None:
        targets = torch.where(torch.isin(targets, torch.tensor(eos.merged).to(targets)), eos.target, targets)
    tensors = [tensor for head in (student, teacher) for tensor in head[:3]]
    with gather_parameters(*parameters_of(tensors)):
        plan = _plan([student, teacher], temperature, eos, vocab_size, gather_parameters)
        models, scratch = plan.models(tensors), plan.scratch(targets.device)
        student_logps, _ = _log_probs(plan, models[0], targets, scratch)
        teacher_logps, teacher_entropy = _log_probs(plan, models[1], targets, scratch)
    return SupportStatistics(student_logps, teacher_logps, teacher_entropy)


def _log_probs(plan: "DivergencePlan", model: TiledModel, targets: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """`log p(target)` and entropy of one model, each `(N,)`."""
    count = targets.shape[0]
    softmax, eos = RunningSoftmax(count, scratch), EosColumns(plan.eos_ids, count, scratch)
    logits = torch.full_like(softmax.total, -math.inf)

    def fold(rows: slice, tile: Tensor) -> None:
        shift = softmax.shift_(rows, tile)
        softmax.add_(rows, tile, torch.exp(tile, out=scratch.take("aux", *tile.shape)), shift)

    for block in tiles.vocab_blocks([model], plan.vocab_size):
        for rows in tiles.token_rows(count):
            tile = logits_tile("tile", [model], 0, block, rows, scratch)
            eos.take_(rows, tile, block.start)
            local, inside = tiles.target_columns(targets[rows], block)
            logits[rows] = torch.where(inside, tile.gather(1, local), logits[rows, None]).squeeze(1)
            fold(rows, tile)
    if plan.eos_ids:
        stop = eos.merged()
        logits = torch.where(targets == plan.eos_ids[0], stop.squeeze(1), logits)
        fold(slice(0, count), stop)
    return logits - softmax.log_norm, softmax.entropy


def _plan(
    heads: Sequence[LMHead],
    temperature: float,
    eos: EosMap | None,
    vocab_size: int | None,
    gather_parameters: Callable[..., AbstractContextManager[Any]],
    *,
    veto_weight: float = 0.0,
    top_k: int | None = None,
) -> "DivergencePlan":
    # Called with the weights gathered: before that, their number of rows is unknown under ZeRO-3
    if not 0.0 < temperature < math.inf:
        raise ConfigError(f"`temperature` is {temperature}. Set it to a positive number.")
    shapes = [tuple(head.hidden.shape) for head in heads]
    if any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise ConfigError(
            f"`hidden` has shape {shapes[0]} in the student and {shapes[1]} in the teacher. Flatten both to (N, H), "
            "with the same tokens."
        )
    rows = [head.weight.shape[0] for head in heads]
    vocab_size = min(rows) if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= min(rows):
        raise ConfigError(
            f"`vocab_size` is {vocab_size}, but the student has {rows[0]} logits and the teacher {rows[1]}. Set it "
            "to at most the smaller number."
        )
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ConfigError(
            f"`top_k` is {top_k} and the vocabulary has {vocab_size} entries. Set it to a number from 1 to the "
            "size of the vocabulary, or to None for all of them."
        )
    eos_ids = () if eos is None else tuple(eos.ids(vocab_size))
    return DivergencePlan(
        heads=tuple((head.logit_scale, head.softcap, projection_dtype(head.hidden)) for head in heads),
        temperature=temperature,
        vocab_size=vocab_size,
        eos_ids=eos_ids if len(eos_ids) > 1 else (),
        veto_weight=veto_weight,
        top_k=top_k,
        gather_parameters=gather_parameters,
    )


@dataclass(frozen=True)
class DivergencePlan:
    """Everything about a call that is not a tensor. The student comes first, then the teacher."""

    heads: tuple[tuple[float, float | None, torch.dtype], ...]  # logit scale, softcap, dtype of the projection
    temperature: float
    vocab_size: int
    eos_ids: tuple[int, ...]  # the one that carries the stop event first; empty where there is nothing to merge
    veto_weight: float
    top_k: int | None
    gather_parameters: Callable[..., AbstractContextManager[Any]]

    def models(self, tensors: Sequence[Tensor | None]) -> list[TiledModel]:
        models = []
        for index in range(len(tensors) // 3):
            hidden, weight, bias = tensors[3 * index : 3 * index + 3]
            scale, softcap, dtype = self.heads[index]
            assert hidden is not None and weight is not None
            models.append(TiledModel(hidden, weight, bias, scale, softcap, dtype, 1.0 / self.temperature, 0.0))
        return models

    def scratch(self, device: torch.device) -> Scratch:
        wide = any(dtype == torch.float64 for _, _, dtype in self.heads)
        return Scratch(device, torch.float64 if wide else torch.float32)


def logits_tile(
    name: str,
    models: Sequence[TiledModel],
    index: int,
    block: Block,
    rows: slice,
    scratch: Scratch,
    tanh: Tensor | None = None,
) -> Tensor:
    """One model's logits over the temperature, in the buffer `name`; very negative instead of `-inf`."""
    tile = scratch.take(name, rows.stop - rows.start, block.stop - block.start)
    tiles.project(tile, models, index, block, rows, scratch, tanh=tanh, rounded=False)
    return tile.clamp_(min=NO_MAXIMUM)


class ReverseKLFunction(torch.autograd.Function):
    """Loss of every token, and without gradient the student's entropy and the reverse KL, each `(N,)`."""

    @staticmethod
    def forward(ctx: Any, plan: DivergencePlan, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        models = plan.models(tensors)
        count, scratch = models[0].hidden.shape[0], plan.scratch(models[0].hidden.device)
        student_eos, teacher_eos = (EosColumns(plan.eos_ids, count, scratch) for _ in range(2))
        statistics = _Statistics(count, plan.top_k, scratch)
        for block in tiles.vocab_blocks(models, plan.vocab_size):
            for rows in tiles.token_rows(count):
                student = logits_tile("student", models, 0, block, rows, scratch)
                target = logits_tile("target", models, 1, block, rows, scratch)
                student_eos.take_(rows, student, block.start)
                teacher_eos.take_(rows, target, block.start)
                if plan.veto_weight:
                    target.add_(student, alpha=plan.veto_weight)
                statistics.fold(rows, student, target, block.start, scratch)
        at_eos = torch.empty_like(student_eos.logits)
        if plan.eos_ids:
            stop = student_eos.merged()
            stop_target = teacher_eos.merged().add_(stop, alpha=plan.veto_weight)
            # As one more column of the vocabulary, `(N, 1)`, which the fold overwrites
            statistics.fold(slice(0, count), stop.clone(), stop_target.clone(), plan.eos_ids[0], scratch)
            at_stop = statistics.gradient_at(stop.squeeze(1), stop_target.squeeze(1), plan.eos_ids[0])
            at_eos = at_stop.unsqueeze(1) * torch.exp(student_eos.logits - stop)
        loss, entropy, reverse_kl = statistics.loss(), statistics.student.entropy, statistics.reverse_kl()
        ctx.plan, ctx.tensor_count = plan, len(tensors)
        ctx.save_for_backward(*tensors, at_eos, *statistics.saved())
        ctx.mark_non_differentiable(entropy, reverse_kl)
        return loss, entropy, reverse_kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        plan, count = ctx.plan, ctx.tensor_count
        if grad_loss is None:
            return None, *[None] * count
        tensors, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if plan.top_k is not None:
            tensors = tensors[:3]  # the teacher is in the coefficients of the tokens already
        models, scratch = plan.models(tensors), plan.scratch(grad_loss.device)
        # From the tile back to the output layer: temperature and scale
        scale = grad_loss.to(scratch.dtype).unsqueeze(1) * (models[0].factor * models[0].logit_scale)
        with plan.gather_parameters(*parameters_of(tensors)):
            gradients = StudentGradients(tensors[:3], ctx.needs_input_grad[1:4], scratch.dtype)
            for block in tiles.vocab_blocks(models, plan.vocab_size):
                weight_block = gradients.weight_block(block)
                for rows in tiles.token_rows(scale.shape[0]):
                    grad = _projection_gradient(plan, models, saved, scale[rows], block, rows, scratch)
                    gradients.add_tile(grad, models[0], block, rows, weight_block, scratch)
                gradients.close_block(block, weight_block)
            return None, *gradients.finish(), *[None] * (count - 3)


class _Statistics:
    """
    Online statistics of the student's logits `s` against those of the target, `q = z_T + veto_weight * s`: softmaxes,
    entropy, and the KL over all columns or the student's top-k of them.
    """

    def __init__(self, count: int, top_k: int | None, scratch: Scratch) -> None:
        self.student, self.target = RunningSoftmax(count, scratch), RunningSoftmax(count, scratch)
        self.support = None if top_k is None else RunningTopK(count, top_k, scratch)
        self._gap_sum = torch.zeros_like(self.student.total)  # Σ e^(s - m) ((s - m) - (q - m_q))

    def fold(self, rows: slice, student: Tensor, target: Tensor, first_column: int, scratch: Scratch) -> None:
        """Count a tile, and overwrite it."""
        if self.support is not None:
            self.support.fold(rows, student, target, first_column)
        shift, target_shift = self.student.shift_(rows, student), self.target.shift_(rows, target)
        probs = scratch.take("aux", *student.shape)
        self.target.add_total_(rows, torch.exp(target, out=probs), target_shift)
        torch.exp(student, out=probs)
        if self.support is None:
            earlier = self.student.rescaled(rows, self._gap_sum, shift, shift - target_shift)
            self._gap_sum[rows] = earlier + target.neg_().add_(student).mul_(probs).sum(dim=1)
        self.student.add_(rows, student, probs, shift)

    def reverse_kl(self) -> Tensor:
        if self.support is not None:
            return self.coefficients().sum(dim=1)
        return self._gap_sum / self.student.total - self.student.total.log() + self.target.total.log()

    def coefficients(self) -> Tensor:
        """`c_k = w_k (log p_S,k - log Q_k)` of the support, with `w` renormalised over it; `(N, k)`."""
        assert self.support is not None
        log_target = self.support.others - self.target.log_norm.unsqueeze(1)
        return self.support.values.softmax(dim=1) * (self._support_logps() - log_target)

    def loss(self) -> Tensor:
        if self.support is None:
            return self.reverse_kl()
        return (self.coefficients() * self._support_logps()).sum(dim=1)

    def _support_logps(self) -> Tensor:
        assert self.support is not None
        return self.support.values - self.student.log_norm.unsqueeze(1)

    def gradient_at(self, student: Tensor, target: Tensor, column: int) -> Tensor:
        """Gradient of the loss with respect to `s` in one column, given `s` and `q` there; `(N,)`."""
        logp = student - self.student.log_norm
        if self.support is None:
            return logp.exp() * (logp - (target - self.target.log_norm) - self.reverse_kl())
        chosen = torch.where(self.support.columns == column, self.coefficients(), 0.0).sum(dim=1)
        return chosen - self.reverse_kl() * logp.exp()

    def saved(self) -> tuple[Tensor, ...]:
        """What the gradient of a recomputed tile needs."""
        if self.support is None:
            return self.student.log_norm, self.reverse_kl(), self.target.log_norm
        return self.student.log_norm, self.reverse_kl(), self.coefficients(), self.support.columns


def _projection_gradient(
    plan: DivergencePlan,
    models: list[TiledModel],
    saved: Sequence[Tensor],
    scale: Tensor,
    block: Block,
    rows: slice,
    scratch: Scratch,
) -> Tensor:
    """
    Gradient with respect to one tile of the student's projection, in a scratch buffer. With respect to the logits it
    is `p (log p - log Q - KL)` over the full support, `Σ_k c_k (1[v = k] - p)` over the top-k.
    """
    at_eos, log_norm, reverse_kl, *rest = (tensor[rows] for tensor in saved)
    tanh = None if models[0].softcap is None else scratch.take("tanh", len(scale), block.stop - block.start)
    grad = logits_tile("student", models, 0, block, rows, scratch, tanh)
    if plan.top_k is None:
        target = logits_tile("target", models, 1, block, rows, scratch)
        if plan.veto_weight:
            target.add_(grad, alpha=plan.veto_weight)
        log_probs = grad.sub_(log_norm.unsqueeze(1))
        probs = torch.exp(log_probs, out=scratch.take("aux", *grad.shape))
        target.sub_((rest[0] - reverse_kl).unsqueeze(1))
        log_probs.sub_(target).mul_(probs)
    else:
        coefficients, columns = rest
        local = columns - block.start
        inside = (local >= 0) & (local < grad.shape[1])
        grad.sub_(log_norm.unsqueeze(1)).exp_().mul_(-reverse_kl.unsqueeze(1))
        grad.scatter_add_(1, local.clamp(0, grad.shape[1] - 1), torch.where(inside, coefficients, 0.0))
    # The columns that were merged into one share its gradient
    for index, column in eos_columns(plan.eos_ids, block.start, block.stop):
        grad[:, column] = at_eos[:, index]
    grad.mul_(scale)
    return grad if tanh is None else grad.mul_(tanh.square_().neg_().add_(1.0))

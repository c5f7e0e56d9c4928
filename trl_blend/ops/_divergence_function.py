"""The tiled passes behind [`~trl_blend.ops.reverse_kl`] and [`~trl_blend.ops.support_statistics`]."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trl_blend.ops import _tiles
from trl_blend.ops._gradients import StudentGradients
from trl_blend.ops._mixed_function import parameters_of
from trl_blend.ops._online import EosColumns, RunningSoftmax, RunningTopK, eos_columns
from trl_blend.ops._tiles import NO_MAXIMUM, Block, Scratch, TiledModel


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
    _tiles.project(tile, models, index, block, rows, scratch, tanh=tanh, rounded=False)
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
        for block in _tiles.vocab_blocks(models, plan.vocab_size):
            for rows in _tiles.token_rows(count):
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
            for block in _tiles.vocab_blocks(models, plan.vocab_size):
                weight_block = gradients.weight_block(block)
                for rows in _tiles.token_rows(scale.shape[0]):
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

"""The differentiable function behind [`~trl_blend.ops.mixed_log_probs`]."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trl_blend.ops import _tiles
from trl_blend.ops._gradients import StudentGradients
from trl_blend.ops._tiles import Block, Scratch, TiledModel


def projection_dtype(hidden: Tensor) -> torch.dtype:
    device_type = hidden.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype


def parameters_of(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    # `tensors` holds (hidden, weight, bias) of one model after the other
    return [tensor for index, tensor in enumerate(tensors) if index % 3 and tensor is not None]


@dataclass(frozen=True)
class Plan:
    """Everything about a call that is not a tensor. The student comes first, also when its weight is 0."""

    heads: tuple[tuple[float, float | None, torch.dtype], ...]  # logit scale, softcap, dtype of the projection
    weights: tuple[float, ...]
    temperature: float
    mixes_logits: bool
    computes_entropy: bool
    gather_parameters: Callable[..., AbstractContextManager[Any]]

    def models(self, tensors: Sequence[Tensor | None]) -> list[TiledModel]:
        """The models of positive weight, the student first if it is one of them."""
        models = []
        for index in range(len(tensors) // 3):
            hidden, head_weight, bias = tensors[3 * index : 3 * index + 3]
            (scale, softcap, dtype), weight = self.heads[index], self.weights[index]
            if weight > 0.0 and hidden is not None and head_weight is not None:
                factor = (weight if self.mixes_logits else 1.0) / self.temperature
                models.append(
                    TiledModel(hidden, head_weight, bias, scale, softcap, dtype, factor, log_weight=math.log(weight))
                )
        return models

    def scratch(self, device: torch.device) -> Scratch:
        wide = any(dtype == torch.float64 for _, _, dtype in self.heads)
        return Scratch(device, torch.float64 if wide else torch.float32)


class MixedLogProbFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, targets: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # An entropy that is only logged then costs nothing in the backward
        ctx.set_materialize_grads(False)
        hidden, weight = tensors[:2]
        assert hidden is not None and weight is not None
        vocab = weight.shape[0]
        models, scratch = plan.models(tensors), plan.scratch(hidden.device)
        entropy: Tensor | None = None
        if plan.mixes_logits:
            log_norm, logps, entropy = _tiles.softmax_statistics(
                models, vocab, targets, scratch, entropy=plan.computes_entropy
            )
            saved = [log_norm, entropy]
        else:
            stats = [_tiles.softmax_statistics([model], vocab, targets, scratch, entropy=False) for model in models]
            log_norms = [log_norm for log_norm, _, _ in stats]
            terms = torch.stack([model.log_weight + logp for model, (_, logp, _) in zip(models, stats, strict=True)])
            logps = terms.logsumexp(dim=0)
            cross = None
            if plan.computes_entropy:
                entropy, cross = _tiles.mixed_probs_entropy(models, log_norms, vocab, scratch)
            # d log p_mix(target) / d log p_S(target); 0 for a target that no model can produce
            responsibility = torch.where(logps > -math.inf, (terms[0] - logps).exp(), 0.0)
            saved = [responsibility, cross, *log_norms]
        ctx.plan, ctx.tensor_count = plan, len(tensors)
        ctx.save_for_backward(targets, *tensors, *saved)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, count = ctx.plan, ctx.tensor_count
        targets, *rest = ctx.saved_tensors
        tensors, saved = rest[:count], rest[count:]
        if not plan.mixes_logits and grad_entropy is None:
            tensors = tensors[:3]  # the student's own distribution is all that is needed
        scratch = plan.scratch(targets.device)
        with plan.gather_parameters(*parameters_of(tensors)):
            gradients = StudentGradients(tensors[:3], ctx.needs_input_grad[2:5], scratch.dtype)
            if plan.weights[0] > 0.0:
                models = plan.models(tensors)
                factors = _TokenFactors.build(plan, models[0], saved, grad_logps, grad_entropy)
                _accumulate(gradients, models, factors, targets, scratch)
            return None, None, *gradients.finish(), *[None] * (count - 3)


@dataclass(frozen=True)
class _TokenFactors:
    """
    Per-token factors of the logits gradient, each `(N,)`; see [`~trl_blend.ops._tiles.logits_gradient_`].

    With logits mixed, `p` there is `p_mix` and `c = -entropy`. With probabilities mixed, `p` is `p_S` and `c` its
    negative cross entropy against `p_mix`; `a` has the student's share of the target's probability, `b` its weight.
    """

    at_target: Tensor
    at_entropy: Tensor | None
    center: Tensor | None
    log_norms: list[Tensor]
    mixes_logits: bool

    @classmethod
    def build(
        cls, plan: Plan, student: TiledModel, saved: list[Any], grad_logps: Tensor | None, grad_entropy: Tensor | None
    ) -> "_TokenFactors":
        statistic, center, *log_norms = saved
        # From the tile back to the output layer: temperature, scale and, with logits mixed, the weight
        factor = student.factor * student.logit_scale
        at_target = torch.zeros_like(statistic) if grad_logps is None else grad_logps.to(statistic.dtype) * factor
        at_entropy = None if grad_entropy is None else grad_entropy.to(statistic.dtype) * factor
        if plan.mixes_logits:
            center, log_norms = None if center is None else -center, [statistic]
        else:
            at_target = at_target * statistic
            at_entropy = None if at_entropy is None else at_entropy * plan.weights[0]
        return cls(at_target, at_entropy, center, log_norms, plan.mixes_logits)


def _accumulate(
    gradients: StudentGradients,
    models: list[TiledModel],
    factors: _TokenFactors,
    targets: Tensor,
    scratch: Scratch,
) -> None:
    student = models[0]
    for block in _tiles.vocab_blocks(models, student.weight.shape[0]):
        weight_block = gradients.weight_block(block)
        for rows in _tiles.token_rows(targets.shape[0]):
            grad = _logits_gradient(models, factors, block, rows, targets, scratch)
            gradients.add_tile(grad, student, block, rows, weight_block, scratch)
        gradients.close_block(block, weight_block)


def _logits_gradient(
    models: list[TiledModel], factors: _TokenFactors, block: Block, rows: slice, targets: Tensor, scratch: Scratch
) -> Tensor:
    """Gradient with respect to one tile of the student's projection, in a scratch buffer."""
    shape = (rows.stop - rows.start, block.stop - block.start)
    tanh = None if models[0].softcap is None else scratch.take("tanh", *shape)
    at_entropy = None if factors.at_entropy is None else factors.at_entropy[rows]
    center = None if factors.center is None else factors.center[rows]
    if factors.mixes_logits or at_entropy is None:
        # Without an entropy gradient, mixed probabilities leave the student as the only model here: the same code
        log_mix = _tiles.mixed_logits_tile(models, factors.log_norms[0], block, rows, scratch, tanh)
        probs = log_mix.exp_() if at_entropy is None else torch.exp(log_mix, out=scratch.take("aux", *shape))
    else:
        log_mix, log_probs = _tiles.mixed_probs_tile(models, factors.log_norms, block, rows, scratch, tanh)
        probs = log_probs.exp_()
    columns = _tiles.target_columns(targets[rows], block)
    grad = _tiles.logits_gradient_(log_mix, probs, factors.at_target[rows], at_entropy, center, columns)
    return grad if tanh is None else grad.mul_(tanh.square_().neg_().add_(1.0))

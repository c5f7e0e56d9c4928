"""Log-probabilities and entropy of a mixed policy from hidden states, without ever building `(N, V)` logits."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trl_blend.errors import ConfigError
from trl_blend.ops.head import tiles
from trl_blend.ops.head.layer import LMHead, _frozen, _no_gather, parameters_of, projection_dtype
from trl_blend.ops.head.tiles import Block, Scratch, StudentGradients, TiledModel
from trl_blend.ops.mixing import student_weight, validate_weights


class MixedLogProbs(NamedTuple):
    """
    Result of [`mixed_log_probs`].

    Args:
        logps (`torch.Tensor` of shape `(N,)`):
            `log p_mix(target)` in nats.
        entropy (`torch.Tensor` of shape `(N,)`, *optional*):
            Entropy of `p_mix` in nats.
    """

    logps: Tensor
    entropy: Tensor | None


def mixed_log_probs(
    student: LMHead,
    partners: Sequence[LMHead],
    weights: Sequence[float],
    targets: Tensor,
    *,
    temperature: float = 1.0,
    space: Literal["logits", "probs"] = "logits",
    compute_entropy: bool = True,
    gather_parameters: Callable[..., AbstractContextManager[Any]] = _no_gather,
) -> MixedLogProbs:
    r"""
    `log p_mix(target)` and the entropy of `p_mix`, for a student mixed with frozen partners:

    $$
    \text{logits: } p_{mix} = \mathrm{softmax}\Bigl(\tfrac1\tau \sum_m w_m z_m\Bigr), \qquad
    \text{probs: } p_{mix} = \sum_m w_m\,\mathrm{softmax}(z_m / \tau), \qquad
    w_S = 1 - \sum_i w_i
    $$

    Mixed logits are the logits of one wider output layer, `[W_S ; W_T] · [w_S h_S ; w_T h_T]` concatenated along the
    hidden axis. That identity is evaluated block by block here: tiles of tokens x vocabulary are projected per model,
    summed in a buffer of bounded size and folded into an online log-sum-exp. So there is no concatenated copy of the
    weights and no gradient buffer for the frozen half, and per-model biases, scales, softcaps, hidden sizes and
    vocabulary sizes are allowed. The backward recomputes the tiles. Passes over the vocabulary, one projection per
    model each: logits 1 forward and 1 backward; probs 1 forward (2 with entropy) and 1 backward, which skips the
    partners unless the entropy is differentiated. Models of weight 0 are skipped everywhere.

    Projections run in the dtype of the hidden states (under autocast, in its dtype) as in TRL's
    `ChunkedLogProbFunction`; sums and statistics in float32, or in float64 where hidden states are float64.

    Gradients of both outputs reach `student.hidden`, `student.weight` and `student.bias` (all zero when the partners
    have all the weight). Partner tensors get none, nor do `targets`. Not done here: masking, double backward.

    Args:
        student ([`LMHead`]):
            Output layer of the student; it defines the vocabulary size `V`.
        partners (`Sequence[LMHead]`):
            Output layers of the partners. Entries past a partner's vocabulary have logit `-inf` for it; entries past
            `V` are dropped before its softmax.
        weights (`Sequence[float]`):
            One weight in `[0, 1]` per partner, at most 1 together.
        targets (`torch.Tensor` of shape `(N,)`):
            Token ids in `[0, V)`. Replace ignored labels such as -100 first; out-of-range ids give `-inf`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of `p_mix`. Each model's logits are divided by it.
        space (`str`, *optional*, defaults to `"logits"`):
            What is averaged: `"logits"` or `"probs"`.
        compute_entropy (`bool`, *optional*, defaults to `True`):
            Whether to compute the entropy.
        gather_parameters (`Callable`, *optional*):
            Context-manager factory, entered with the weights and biases in use around the forward and again in the
            backward (ZeRO-3: TRL's `maybe_gather_lm_head_ctx`). Does nothing by default.

    Returns:
        [`MixedLogProbs`]: `logps` and `entropy` of shape `(N,)`, in float32 (float64 for float64 hidden states).

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the weights, the temperature, the space or a shape is invalid.
    """
    checked = validate_weights(weights)
    _check_arguments(student, partners, checked, targets, temperature, space)
    share = student_weight(checked)
    active = [(partner, weight) for partner, weight in zip(partners, checked, strict=True) if weight > 0.0]
    heads = [student, *(_frozen(partner) for partner, _ in active)]
    plan = Plan(
        heads=tuple((head.logit_scale, head.softcap, projection_dtype(head.hidden)) for head in heads),
        weights=(share, *(weight for _, weight in active)),
        temperature=temperature,
        # With one model left both spaces are its own softmax, and the logits path needs one pass fewer
        mixes_logits=space == "logits" or len(active) + (share > 0.0) == 1,
        computes_entropy=compute_entropy,
        gather_parameters=gather_parameters,
    )
    tensors = [tensor for head in heads for tensor in head[:3]]
    # Without this, a partner weight that requires grad would make the outputs require it, too
    tracking = nullcontext() if any(t is not None and t.requires_grad for t in student[:3]) else torch.no_grad()
    with gather_parameters(*parameters_of(tensors)), tracking:
        logps, entropy = MixedLogProbFunction.apply(plan, targets, *tensors)  # type: ignore[no-untyped-call]
    return MixedLogProbs(logps, entropy)


def _check_arguments(
    student: LMHead,
    partners: Sequence[LMHead],
    weights: tuple[float, ...],
    targets: Tensor,
    temperature: float,
    space: str,
) -> None:
    if len(weights) != len(partners):
        raise ConfigError(
            f"`weights` has {len(weights)} entries for {len(partners)} partners. Pass one weight per partner."
        )
    if not 0.0 < temperature < math.inf:
        raise ConfigError(f"`temperature` is {temperature}. Set it to a positive number.")
    if space not in ("logits", "probs"):
        raise ConfigError(f"`space` is {space!r}. Set it to 'logits' or 'probs'.")
    for head in (student, *partners):
        if head.hidden.dim() != 2 or targets.shape != head.hidden.shape[:1]:
            raise ConfigError(
                f"`hidden` has shape {tuple(head.hidden.shape)} and `targets` has shape {tuple(targets.shape)}. "
                "Flatten them to (N, H) and (N,), with the same tokens for every model."
            )


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
            log_norm, logps, entropy = tiles.softmax_statistics(
                models, vocab, targets, scratch, entropy=plan.computes_entropy
            )
            saved = [log_norm, entropy]
        else:
            stats = [tiles.softmax_statistics([model], vocab, targets, scratch, entropy=False) for model in models]
            log_norms = [log_norm for log_norm, _, _ in stats]
            terms = torch.stack([model.log_weight + logp for model, (_, logp, _) in zip(models, stats, strict=True)])
            logps = terms.logsumexp(dim=0)
            cross = None
            if plan.computes_entropy:
                entropy, cross = tiles.mixed_probs_entropy(models, log_norms, vocab, scratch)
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
    Per-token factors of the logits gradient, each `(N,)`; see [`~trl_blend.ops.head.tiles.logits_gradient_`].

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
    for block in tiles.vocab_blocks(models, student.weight.shape[0]):
        weight_block = gradients.weight_block(block)
        for rows in tiles.token_rows(targets.shape[0]):
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
        log_mix = tiles.mixed_logits_tile(models, factors.log_norms[0], block, rows, scratch, tanh)
        probs = log_mix.exp_() if at_entropy is None else torch.exp(log_mix, out=scratch.take("aux", *shape))
    else:
        log_mix, log_probs = tiles.mixed_probs_tile(models, factors.log_norms, block, rows, scratch, tanh)
        probs = log_probs.exp_()
    columns = tiles.target_columns(targets[rows], block)
    grad = tiles.logits_gradient_(log_mix, probs, factors.at_target[rows], at_entropy, center, columns)
    return grad if tanh is None else grad.mul_(tanh.square_().neg_().add_(1.0))

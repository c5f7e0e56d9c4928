"""Reverse KL of a student against a teacher or a Veto target from hidden states, without building `(N, V)` logits."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trl_blend.errors import ConfigError
from trl_blend.ops import _tiles
from trl_blend.ops._divergence_function import DivergencePlan, ReverseKLFunction, logits_tile
from trl_blend.ops._mixed_function import parameters_of, projection_dtype
from trl_blend.ops._online import EosColumns, RunningSoftmax
from trl_blend.ops._tiles import Scratch, TiledModel
from trl_blend.ops.mixed_head import LMHead, _frozen, _no_gather
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


def _log_probs(plan: DivergencePlan, model: TiledModel, targets: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """`log p(target)` and entropy of one model, each `(N,)`."""
    count = targets.shape[0]
    softmax, eos = RunningSoftmax(count, scratch), EosColumns(plan.eos_ids, count, scratch)
    logits = torch.full_like(softmax.total, -math.inf)

    def fold(rows: slice, tile: Tensor) -> None:
        shift = softmax.shift_(rows, tile)
        softmax.add_(rows, tile, torch.exp(tile, out=scratch.take("aux", *tile.shape)), shift)

    for block in _tiles.vocab_blocks([model], plan.vocab_size):
        for rows in _tiles.token_rows(count):
            tile = logits_tile("tile", [model], 0, block, rows, scratch)
            eos.take_(rows, tile, block.start)
            local, inside = _tiles.target_columns(targets[rows], block)
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
) -> DivergencePlan:
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

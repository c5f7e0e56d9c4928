"""Log-probabilities and entropy of a mixed policy from hidden states, without ever building `(N, V)` logits."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trl_blend.errors import ConfigError
from trl_blend.ops._mixed_function import MixedLogProbFunction, Plan, parameters_of, projection_dtype
from trl_blend.ops.mixing import student_weight, validate_weights


class LMHead(NamedTuple):
    """
    Inputs of one output layer. Its logits are `z = (hidden @ weight.T + bias) * logit_scale`, then, with a softcap,
    `softcap * tanh(z / softcap)`.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Hidden states, one row per scored token.
        weight (`torch.Tensor` of shape `(V, H)`):
            Weight of the output layer, a plain tensor: call `full_tensor()` on a DTensor first.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias of the output layer.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Multiplier of the logits.
        softcap (`float`, *optional*):
            Softcap of the scaled logits (`final_logit_softcapping`).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


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


def _no_gather(*params: Tensor) -> AbstractContextManager[Any]:
    return nullcontext()


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


def _frozen(partner: LMHead) -> LMHead:
    # Only a leaf can be a parameter that a gather recognises; it gets no gradient. Anything else is cut off, because
    # autograd would run the graph behind it, with zeros.
    def cut(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_leaf else tensor.detach()

    bias = None if partner.bias is None else cut(partner.bias)
    return partner._replace(hidden=partner.hidden.detach(), weight=cut(partner.weight), bias=bias)


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

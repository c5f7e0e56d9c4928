"""
Log-linear and probability mixing of a student with frozen partners, on logits that are already in memory.

Both functions mix distributions at temperature 1. For another temperature the caller divides every logits tensor by it
first. (For [`mix_logits`] dividing the result is the same thing; for [`mix_probs`] it is not.)
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trl_blend.errors import ConfigError
from trl_blend.ops.reduction import at_least_float32


SPACES = ("logits", "probs", "arithmetic")
"""What a mixture can be of: averaged logits, averaged probabilities, or logits added with weights of any sign."""

# Rounding slack of a weight sum, on either side of 1
_SUM_TOLERANCE = 1e-9


def validate_weights(weights: Sequence[float], name: str = "weights", space: str = "logits") -> tuple[float, ...]:
    """
    Checks partner weights: each in `[0, 1]`, together at most 1. Use it where a setting is read, before models are.

    Args:
        weights (`Sequence[float]`):
            One weight per partner. The student has the rest, `1 - sum(weights)`.
        name (`str`, *optional*, defaults to `"weights"`):
            Name of the setting, used in the error messages.
        space (`str`, *optional*, defaults to `"logits"`):
            One of [`SPACES`]. With `"arithmetic"` a weight is any finite number, and the student's is 1.

    Returns:
        `tuple[float, ...]`: The weights as Python floats.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a weight is NaN or outside its range, or the sum is above `1 + 1e-9`.
    """
    checked = tuple(float(weight) for weight in weights)
    any_sign = space == "arithmetic"
    for index, weight in enumerate(checked):
        if not (math.isfinite(weight) if any_sign else 0.0 <= weight <= 1.0):  # also catches NaN
            wanted = "finite number" if any_sign else "number between 0 and 1"
            raise ConfigError(f"`{name}[{index}]` is {weight}. Set it to a {wanted}.")
    total = math.fsum(checked)
    if not any_sign and total > 1.0 + _SUM_TOLERANCE:
        raise ConfigError(
            f"`{name}` is {list(checked)}, which sums to {total}. Lower them to at most 1 together: the student "
            "has the rest."
        )
    return checked


def student_weight(weights: Sequence[float], space: str = "logits") -> float:
    """
    Weight left for the student, `1 - sum(weights)`; exactly 0 when the sum is within `1e-9` of 1. With
    `space="arithmetic"` it is 1.
    """
    if space == "arithmetic":
        return 1.0
    rest = 1.0 - math.fsum(weights)
    return 0.0 if rest <= _SUM_TOLERANCE else rest


def mix_logits(student_logits: Tensor, partner_logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    r"""
    Averages the logits of a student and its partners: the renormalised geometric mean of their distributions, a
    product of experts. Use it where all models should agree on a token, with partner weights of typically 0.1 to 0.5.

    $$
    z_{mix} = \Bigl(1 - \sum_i w_i\Bigr) z_S + \sum_i w_i z_i, \qquad
    \mathrm{softmax}(z_{mix}) \propto p_S^{1 - \sum_i w_i} \prod_i p_i^{w_i}
    $$

    A model of weight exactly 0 is left out, so its `-inf` logits change nothing. Elsewhere a token that one model
    excludes (`-inf`) is excluded from the mixture. Not done here: normalisation, temperature (divide the result by it)
    and vocabulary alignment ([`~trl_blend.ops.align_vocab`]).

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Raw logits of the student.
        partner_logits (`Sequence[torch.Tensor]`, each of shape `(..., V)`):
            Raw logits of the partners. They are detached: no gradient flows to a partner.
        weights (`Sequence[float]`):
            One weight in `[0, 1]` per partner, at most 1 together.

    Returns:
        `torch.Tensor` of shape `(..., V)`: Mixed logits in float32, or float64 where an input is float64.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the weights are invalid or their number differs from the partners'.
    """
    mixed: Tensor | None = None
    weights = validate_weights(weights)
    for logits, weight in _active_models(student_logits, partner_logits, student_weight(weights), weights):
        term = logits if weight == 1.0 else logits * weight
        mixed = term if mixed is None else mixed + term
    assert mixed is not None  # the weights sum to 1
    return mixed


def mix_probs(student_logits: Tensor, partner_logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    r"""
    Averages the probabilities of a student and its partners, as normalised log-probabilities. Use it where a token
    that one of the models likes should stay possible, with partner weights of typically 0.1 to 0.5.

    $$
    \log p_{mix} = \log\Bigl[\Bigl(1 - \sum_i w_i\Bigr) p_S + \sum_i w_i p_i\Bigr]
    = \mathrm{logsumexp}_m\,(\log w_m + \log p_m)
    $$

    Computed from log-softmaxes, never as the logarithm of a probability, so it stays finite and exact far below the
    smallest float. A token is excluded (`-inf`) only if every model of positive weight excludes it. The softmaxes are
    those of the logits as given: divide all of them by the temperature first.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the student, already divided by the temperature.
        partner_logits (`Sequence[torch.Tensor]`, each of shape `(..., V)`):
            Logits of the partners, already divided by the temperature. They are detached: no gradient flows to a
            partner.
        weights (`Sequence[float]`):
            One weight in `[0, 1]` per partner, at most 1 together.

    Returns:
        `torch.Tensor` of shape `(..., V)`: `log p_mix` in nats, float32 or, where an input is float64, float64.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the weights are invalid or their number differs from the partners'.
    """
    weights = validate_weights(weights)
    terms = [
        torch.log_softmax(logits, dim=-1) + math.log(weight)
        for logits, weight in _active_models(student_logits, partner_logits, student_weight(weights), weights)
    ]
    if len(terms) == 1:
        return terms[0]
    stacked = torch.stack(terms)
    # The gradient of a log-sum-exp of nothing but -inf would be NaN, for every entry of the row
    excluded = (stacked == -math.inf).all(dim=0)
    return stacked.masked_fill(excluded, 0.0).logsumexp(dim=0).masked_fill(excluded, -math.inf)


def arithmetic_logits(
    student_logits: Tensor, partner_logits: Sequence[Tensor], student_weight: float, weights: Sequence[float]
) -> Tensor:
    r"""
    Weighs the logits of a student and its partners by any numbers, negative ones included. Use it to push away from a
    model: DExperts has weights 1, α, -α, proxy tuning 1, 1, -1, and classifier-free guidance 1 + γ, -γ.

    $$
    z = w_S z_S + \sum_i w_i z_i
    $$

    (arXiv 2105.03023, 2401.08565.) A model of weight 0 is left out; a token that any other excludes (`-inf`) is
    excluded, whatever the sign of its weight, which is our choice.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Raw logits of the student.
        partner_logits (`Sequence[torch.Tensor]`, each of shape `(..., V)`):
            Raw logits of the partners. They are detached: no gradient flows to a partner.
        student_weight (`float`):
            Weight of the student.
        weights (`Sequence[float]`):
            One weight per partner. They need not sum to anything.

    Returns:
        `torch.Tensor` of shape `(..., V)`: Logits in float32, or float64 where an input is float64.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the number of weights differs from the partners', or all are 0.
    """
    active = _active_models(student_logits, partner_logits, student_weight, weights)
    if not active:
        raise ConfigError("`student_weight` and `weights` are all 0. Give at least one model a weight.")
    excluded = torch.stack([logits == -math.inf for logits, _ in active]).any(dim=0)
    total = sum(logits.masked_fill(excluded, 0.0) * weight for logits, weight in active)
    return torch.as_tensor(total).masked_fill(excluded, -math.inf)


def _active_models(
    student_logits: Tensor, partner_logits: Sequence[Tensor], own: float, weights: Sequence[float]
) -> list[tuple[Tensor, float]]:
    """Logits and weights of the models whose weight is not 0. `own` is the student's."""
    if len(weights) != len(partner_logits):
        raise ConfigError(
            f"`weights` has {len(weights)} entries for {len(partner_logits)} partners. Pass one weight per partner."
        )
    models = [(student_logits, own), *zip((logits.detach() for logits in partner_logits), weights, strict=True)]
    # Logits of half precision have too few bits to be averaged in
    return [(at_least_float32(logits), weight) for logits, weight in models if weight != 0.0]

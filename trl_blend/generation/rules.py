"""
Blend rules: what the behaviour policy of one decoding step is, given the logits of the student and of its partners.

A rule is any callable of the [`BlendRule`] signature. To add one, write a single class: a frozen dataclass that holds
the settings, checks them in `__post_init__` (raise [`~trl_blend.errors.ConfigError`]) and computes a [`BlendStep`] in
`__call__` with a function of `trl_blend.ops`. Nothing has to be registered: `blended_generation` takes any rule.

A rule sees logits that are already divided by the sampling temperature and aligned to the student's vocabulary. It is
pure: it changes none of its inputs, keeps no state between calls, and works for any leading dimensions, so that the
same object serves one decoding step `(B, V)` and a whole teacher-forced sequence `(B, T, V)`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from trl_blend.ops.mixing import mix_logits, mix_probs, validate_weights


class BlendStep(NamedTuple):
    """
    Output of a blend rule.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`):
            Behaviour logits at temperature 1: `softmax(logits)` is the policy that tokens are sampled from. They may
            be unnormalised.
        statistics (`dict[str, torch.Tensor]`, each of shape `(...)`):
            Per-prefix quantities to log, without gradient.
        log_normalizer (`torch.Tensor` of shape `(...)`, *optional*):
            `logsumexp(logits)` without gradient, where the rule has computed it: recording then saves a softmax.
    """

    logits: Tensor
    statistics: dict[str, Tensor]
    log_normalizer: Tensor | None = None


@runtime_checkable
class BlendRule(Protocol):
    """
    A map from the logits of a student and its partners to a behaviour policy.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the student, divided by the sampling temperature.
        partner_logits (`Sequence[torch.Tensor]`, each of shape `(..., V)`):
            Logits of the partners, divided by the sampling temperature. A token that a partner does not have is
            `-inf`.

    Returns:
        [`BlendStep`]: The behaviour logits and the statistics.
    """

    def __call__(self, student_logits: Tensor, partner_logits: Sequence[Tensor]) -> BlendStep: ...


@dataclass(frozen=True)
class _WeightedMixing:
    """Partner weights, held as given and checked once. See [`LogitMixing`]."""

    weight: float | tuple[float, ...]

    def __post_init__(self) -> None:
        checked = validate_weights(_as_tuple(self.weight), name="weight")
        object.__setattr__(self, "weight", checked if isinstance(self.weight, Sequence) else checked[0])

    @property
    def weights(self) -> tuple[float, ...]:
        """One weight per partner."""
        return _as_tuple(self.weight)


@dataclass(frozen=True)
class LogitMixing(_WeightedMixing):
    r"""
    Samples from the log-linear mixture `softmax((1 - Σ w_i)·z_S + Σ w_i·z_i)`, a product of experts.

    Statistic `kl_behavior_student` (nats, shape `(...)`): the exact `KL(μ‖p_S)` of the behaviour policy `μ` against
    the student, over the whole vocabulary; infinite where `μ` gives mass to a token the student excludes.

    Args:
        weight (`float` or `tuple[float, ...]`):
            Weight of each partner, in `[0, 1]`; one number for a single partner. The student has the rest. A model of
            weight 0 is left out.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a weight is outside `[0, 1]` or they sum to more than 1; when called, if
            their number differs from the partners'.
    """

    def __call__(self, student_logits: Tensor, partner_logits: Sequence[Tensor]) -> BlendStep:
        return step_with_kl(mix_logits(student_logits, partner_logits, self.weights), student_logits)


@dataclass(frozen=True)
class ProbabilityMixing(_WeightedMixing):
    r"""
    Samples from the probability mixture `(1 - Σ w_i)·p_S + Σ w_i·p_i`; its logits are normalised log-probabilities.

    Argument, statistic and errors are those of [`LogitMixing`].
    """

    def __call__(self, student_logits: Tensor, partner_logits: Sequence[Tensor]) -> BlendStep:
        return step_with_kl(mix_probs(student_logits, partner_logits, self.weights), student_logits)


def log_normalizer(logits: Tensor, probs: Tensor | None = None) -> Tensor:
    """
    `logsumexp(logits)` over the last dimension, from the softmax.

    `log Z = max(z) - log max(p)`: a softmax and two maxima, which is faster than `torch.logsumexp` and as accurate,
    because the largest probability is at least `1 / V`.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`):
            Logits, of which at least one per row is finite.
        probs (`torch.Tensor` of shape `(..., V)`, *optional*):
            `softmax(logits)`, where it is known already.

    Returns:
        `torch.Tensor` of shape `(...)`: Logarithm of the normaliser, in nats.
    """
    probs = logits.softmax(dim=-1) if probs is None else probs
    return logits.amax(dim=-1) - probs.amax(dim=-1).log()


def step_with_kl(behavior_logits: Tensor, student_logits: Tensor) -> BlendStep:
    """
    A step that reports `kl_behavior_student`, the exact `KL(μ‖p_S)` over the whole vocabulary.

    Args:
        behavior_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the behaviour policy `μ`.
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the student.

    Returns:
        [`BlendStep`]: The behaviour logits, with the statistic (nats) and the normaliser.
    """
    divergence, normalizer = _kl_and_normalizer(behavior_logits, student_logits)
    return BlendStep(behavior_logits, {"kl_behavior_student": divergence}, normalizer)


@torch.no_grad()
def _kl_and_normalizer(behavior_logits: Tensor, student_logits: Tensor) -> tuple[Tensor, Tensor]:
    """`KL(softmax(behavior_logits) ‖ softmax(student_logits))` in nats and `logsumexp(behavior_logits)`."""
    probs = behavior_logits.softmax(dim=-1)
    normalizer = log_normalizer(behavior_logits, probs)
    # Where the behaviour excludes a token the difference is -inf or NaN, and the term is 0 by the limit of p·log p
    difference = (behavior_logits - student_logits).nan_to_num_(nan=0.0, neginf=0.0, posinf=math.inf)
    divergence = difference.mul_(probs).sum(dim=-1) - normalizer + log_normalizer(student_logits)
    # 0·inf: a mass too small for a float on a token the student excludes
    excluded = divergence.isnan() & normalizer.isfinite()
    return divergence.masked_fill_(excluded, math.inf).clamp_(min=0.0), normalizer


def _as_tuple(weight: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(weight) if isinstance(weight, Sequence) else (weight,)

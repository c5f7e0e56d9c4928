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

from trl_blend.errors import ConfigError
from trl_blend.ops.chernoff import chernoff_weight
from trl_blend.ops.mixing import arithmetic_logits, mix_logits, mix_probs, student_weight, validate_weights
from trl_blend.ops.policies import contrastive_logits, kl_and_normalizer, path_logits, speculative_mixture
from trl_blend.ops.trust_region import solve_with_statistics, validate_trust_region


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


def step_with_kl(behavior_logits: Tensor, student_logits: Tensor) -> BlendStep:
    """
    A step that reports `kl_behavior_student`, the exact `KL(μ‖p_S)` over the whole vocabulary. Use it in a rule that
    knows its behaviour logits and nothing else.

    Args:
        behavior_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the behaviour policy `μ`.
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the student.

    Returns:
        [`BlendStep`]: The behaviour logits, with the statistic (nats) and the normaliser.
    """
    divergence, normalizer = kl_and_normalizer(behavior_logits, student_logits)
    return BlendStep(behavior_logits, {"kl_behavior_student": divergence}, normalizer)


@dataclass(frozen=True)
class _WeightedMixing:
    """Partner weights, held as given and checked once. See [`LogitMixing`]."""

    weight: float | tuple[float, ...]

    def __post_init__(self) -> None:
        checked = validate_weights(self.weights, name="weight")
        object.__setattr__(self, "weight", checked if isinstance(self.weight, Sequence) else checked[0])

    @property
    def weights(self) -> tuple[float, ...]:
        """One weight per partner."""
        return tuple(self.weight) if isinstance(self.weight, Sequence) else (self.weight,)


@dataclass(frozen=True)
class LogitMixing(_WeightedMixing):
    r"""
    Samples from the log-linear mixture of the models, a product of experts. Use it where all of them should agree on a
    token, with a partner weight of typically 0.1 to 0.5.

    The policy is `softmax((1 - Σ w_i)·z_S + Σ w_i·z_i)`. Statistic `kl_behavior_student` (nats, shape `(...)`): the
    exact `KL(μ‖p_S)` of the behaviour policy `μ` against the student, over the whole vocabulary; infinite where `μ`
    gives mass to a token the student excludes.

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
    Samples from the probability mixture of the models. Use it where a token that one of them likes should stay
    possible, with weights as in [`LogitMixing`].

    The policy is `(1 - Σ w_i)·p_S + Σ w_i·p_i`; its logits are normalised log-probabilities. Argument, statistic and
    errors are those of [`LogitMixing`].
    """

    def __call__(self, student_logits: Tensor, partner_logits: Sequence[Tensor]) -> BlendStep:
        return step_with_kl(mix_probs(student_logits, partner_logits, self.weights), student_logits)


@dataclass(frozen=True)
class TrustRegion:
    r"""
    Samples from the policy closest to the teacher whose KL to the student is within a budget. Use it to let a teacher
    lead the rollouts without leaving what the student knows; the paper uses budgets of 0.001 to 0.05 nats.

    $$
    \mu^* = \arg\min_\mu \mathrm{KL}(\mu \| p_T) \ \text{s.t.}\ \mathrm{KL}(\mu \| p_S) \le \varepsilon, \qquad
    \mu^* = \mathrm{softmax}((1 - \beta^*) z_S + \beta^* z_T)
    $$

    (Eq. 1-2 of arXiv 2605.31159.) The weight is found per prefix by [`~trl_blend.ops.solve_trust_region`]. Rows of
    weight 0 have exactly the student's logits, rows of weight 1 exactly the teacher's. Both policies are those at the
    sampling temperature, so the budget is too.

    Statistics, each of shape `(...)`, without gradient:

    * `teacher_weight`: `β*`, in `[0, 1]`.
    * `teacher_feasible`: 1 where the teacher itself is within the budget, else 0.
    * `kl_behavior_student`, `kl_behavior_teacher` (nats): the realised `KL(μ‖p_S)` and `KL(μ‖p_T)` over the whole
      vocabulary; the latter is infinite where the student is kept and allows a token that the teacher excludes.

    Args:
        kl_budget (`float`):
            Budget `ε` in nats: 0 gives the student, `inf` the teacher.
        rtol (`float`, *optional*, defaults to `1e-3`):
            Relative tolerance of the realised KL, from 1e-6 to 0.1.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the budget is negative or NaN or `rtol` is out of range; when called, if
            there is not exactly one partner.
    """

    kl_budget: float
    rtol: float = 1e-3

    def __post_init__(self) -> None:
        validate_trust_region(self.kl_budget, self.rtol)

    def __call__(self, student_logits: Tensor, partner_logits: Sequence[Tensor]) -> BlendStep:
        student, teacher = _two_policies(self, student_logits, partner_logits)
        solution, kl_teacher, normalizer = solve_with_statistics(student, teacher, self.kl_budget, rtol=self.rtol)
        statistics = {
            "teacher_weight": solution.weight,
            "teacher_feasible": solution.feasible.to(solution.weight.dtype),
            "kl_behavior_student": solution.kl,
            "kl_behavior_teacher": kl_teacher,
        }
        return BlendStep(path_logits(student, teacher, solution.weight), statistics, normalizer)


@dataclass(frozen=True)
class SpeculativeKD:
    r"""
    The student draws a token, and one outside the teacher's top `k` is replaced by a draw from the teacher:
    speculative knowledge distillation with `γ = 1`. Use it as the baseline that corrects rollouts token by token.

    A single draw from the mixture of [`~trl_blend.ops.policies.speculative_mixture`] is exactly this two-stage
    procedure (arXiv 2410.11325; App. A.2 of arXiv 2605.31159). The replacement covers the whole vocabulary. The logits
    are already divided by the sampling temperature when a rule sees them, and `teacher_temperature` acts on that
    policy: the teacher's raw logits are divided by the product of the two.

    Statistics, each of shape `(...)`: `replaced_share`, the probability of a replacement, without gradient, and
    `kl_behavior_student` (nats), the exact `KL(μ‖p_S)`; it has no bound, and is infinite where the replacement gives
    mass to a token that the student excludes.

    Args:
        top_k (`int`):
            Number of the teacher's tokens that a student's draw must be among. The paper sweeps 15, 25 and 50.
        teacher_temperature (`float`):
            Temperature of the replacement. The paper sweeps 0.2, 0.6 and 1.0.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If `top_k` is below 1 or the temperature is not positive and finite; when
            called, if `top_k` exceeds the vocabulary or there is not exactly one partner.
    """

    top_k: int
    teacher_temperature: float

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"`top_k` is {self.top_k}. Set it to 1 or more.")
        if not 0.0 < self.teacher_temperature < math.inf:  # also catches NaN
            raise ConfigError(f"`teacher_temperature` is {self.teacher_temperature}. Set it to a positive number.")

    def __call__(self, student_logits: Tensor, partner_logits: Sequence[Tensor]) -> BlendStep:
        student, teacher = _two_policies(self, student_logits, partner_logits)
        logprobs, replaced = speculative_mixture(student, teacher, self.top_k, self.teacher_temperature)
        step = step_with_kl(logprobs, student)
        return step._replace(statistics={"replaced_share": replaced, **step.statistics})


@dataclass(frozen=True)
class ChernoffBlend:
    r"""
    Samples from the policy between student and teacher that is as far from the one as from the other. Use it where no
    KL budget is to be chosen; `scale` anneals it, from 1 (the whole way to the middle) to 0 (the student).

    $$
    \mu = \mathrm{softmax}((1 - s\beta^*) z_S + s\beta^* z_T), \qquad
    \mathrm{KL}(\mu_{\beta^*} \| p_S) = \mathrm{KL}(\mu_{\beta^*} \| p_T)
    $$

    The weight `β*` is found per prefix by [`~trl_blend.ops.chernoff.chernoff_weight`]. Statistics, each of shape
    `(...)`, without gradient: `teacher_weight`, the weight `s·β*`; `kl_behavior_student` and `kl_behavior_teacher`
    (nats), exact over the whole vocabulary.

    Args:
        scale (`float`, *optional*, defaults to `1.0`):
            Factor `s` of the weight, in `[0, 1]`.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the scale is out of range; when called, if there is not exactly one
            partner.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.scale <= 1.0:  # also catches NaN
            raise ConfigError(f"`scale` is {self.scale}. Set it to a number between 0 and 1.")

    def __call__(self, student_logits: Tensor, partner_logits: Sequence[Tensor]) -> BlendStep:
        student, teacher = _two_policies(self, student_logits, partner_logits)
        weight = self.scale * chernoff_weight(student, teacher)
        step = step_with_kl(path_logits(student, teacher, weight), student)
        kl_teacher, _ = kl_and_normalizer(step.logits, teacher)
        return step._replace(
            statistics={"teacher_weight": weight, **step.statistics, "kl_behavior_teacher": kl_teacher}
        )


@dataclass(frozen=True)
class ContrastiveDecoding:
    r"""
    Samples what an expert prefers more than an amateur does, among the tokens that the expert finds plausible. Use it
    with the teacher as the expert and the student as the amateur, or with two partners, the expert first.

    The logits are `(1 + β) z_E - β z_A` where `p_E >= α max p_E` and `-inf` elsewhere, see
    [`~trl_blend.ops.policies.contrastive_logits`] (arXiv 2210.15097, 2309.09117). With two partners the student is not
    part of the policy, and only `kl_behavior_student` knows it. That statistic is exact, in nats.

    Args:
        alpha (`float`, *optional*, defaults to `0.1`):
            Plausibility relative to the expert's most likely token, in `(0, 1]`.
        beta (`float`, *optional*, defaults to `0.5`):
            Strength of the contrast, 0 or more.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a setting is out of range; when called, if there are not one or two
            partners.
    """

    alpha: float = 0.1
    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha <= 1.0:
            raise ConfigError(f"`alpha` is {self.alpha}. Set it to a number above 0, at most 1 (the papers use 0.1).")
        if not 0.0 <= self.beta < math.inf:
            raise ConfigError(f"`beta` is {self.beta}. Set it to a number of 0 or more (the paper uses 0.5).")

    def __call__(self, student_logits: Tensor, partner_logits: Sequence[Tensor]) -> BlendStep:
        if len(partner_logits) not in (1, 2):
            raise ConfigError(
                f"`ContrastiveDecoding` got the logits of {len(partner_logits)} partners. Pass the expert, or the "
                "expert and the amateur."
            )
        student, expert = _two_policies(self, student_logits, partner_logits[:1])
        amateur = partner_logits[1].detach().to(expert.dtype) if len(partner_logits) == 2 else student
        return step_with_kl(contrastive_logits(expert, amateur, self.alpha, self.beta), student)


@dataclass(frozen=True)
class LogitArithmetic:
    r"""
    Samples from any weighted sum of the models' logits, negative weights included. Use it to push away from a model:
    DExperts (1, α, -α), proxy tuning (1, 1, -1) and classifier-free guidance (1 + γ, -γ) are of this form.

    The policy is `softmax(w_S z_S + Σ w_i z_i)`, see [`~trl_blend.ops.mixing.arithmetic_logits`] (arXiv 2105.03023,
    2401.08565). Statistic `kl_behavior_student` (nats): the exact `KL(μ‖p_S)`.

    Args:
        student_weight (`float`):
            Weight of the student.
        weights (`tuple[float, ...]`):
            Weight of each partner.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a weight is not finite or all are 0; when called, if their number differs
            from the partners'.
    """

    student_weight: float
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        given = (self.student_weight, *self.weights)
        if not all(map(math.isfinite, given)) or not any(given):
            raise ConfigError(f"the weights are {list(given)}. Set them to finite numbers that are not all 0.")

    def __call__(self, student_logits: Tensor, partner_logits: Sequence[Tensor]) -> BlendStep:
        logits = arithmetic_logits(student_logits, partner_logits, self.student_weight, self.weights)
        return step_with_kl(logits, student_logits)


def mixing_rule(space: str, weights: Sequence[float]) -> BlendRule:
    """The rule of a mixture in one of [`~trl_blend.ops.mixing.SPACES`], with one weight per partner."""
    if space == "arithmetic":
        return LogitArithmetic(student_weight(weights, space), tuple(weights))
    return (LogitMixing if space == "logits" else ProbabilityMixing)(tuple(weights))


def _two_policies(rule: object, student_logits: Tensor, partner_logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Student and teacher in one precision, at least float32: half precision has too few bits to be blended in."""
    if len(partner_logits) != 1:
        raise ConfigError(
            f"`{type(rule).__name__}` got the logits of {len(partner_logits)} partners. Pass one teacher to it."
        )
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, partner_logits[0].dtype), torch.float32)
    return student_logits.to(dtype), partner_logits[0].detach().to(dtype)

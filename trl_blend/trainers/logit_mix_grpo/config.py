"""Configuration of [`LogitMixGRPOTrainer`]."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from trl import GRPOConfig

from trl_blend.errors import ConfigError
from trl_blend.generation.rules import BlendRule, mixing_rule
from trl_blend.generation.settings import check_one_sequence, distribution_warpers
from trl_blend.ops.mixing import student_weight, validate_weights
from trl_blend.schedules import DECAYING_SCHEDULES, make_schedule
from trl_blend.trainers._options import (
    ABOVE_ZERO,
    Range,
    check_choices,
    check_drafts,
    check_generation_kwargs,
    check_ranges,
    check_run,
    refuse_unread,
    with_help,
)
from trl_blend.trainers._settings import TokensUnwritten


# Which TRL compares in the first step, when models are loaded and rollouts are drawn
WORDS_OF_TRL = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
}
# Losses whose per-token term is the clipped surrogate that `is_clip_mode` reshapes
_CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")

_ADAPTIVE = (
    "adaptive_num_prompts",
    "adaptive_interval",
    "adaptive_scale",
    "adaptive_offset",
    "adaptive_max_weight",
    "adaptive_success_threshold",
)
# Settings that only some values of another setting read, in the order in which they are looked at
_READ_BY = (
    (("teacher_weight_decay_steps",), "teacher_weight_schedule", ("linear", "cosine", "reward")),
    (_ADAPTIVE, "teacher_weight_schedule", ("adaptive",)),
    (("teacher_weight_min_reward",), "teacher_weight_schedule", ("reward",)),
    (("is_clip_mode", "is_clip_max"), "objective", ("student",)),
    (("is_clip_max",), "is_clip_mode", ("max", "floor")),
)
# And those that no run without a teacher reads
_MIXING = ("teacher_weight_schedule", "mixing_space", "is_clip_mode", "is_clip_max", "eval_policy")

_RANGES: dict[str, Range] = {
    "teacher_weight_decay_steps": (1, math.inf, "at least 1 (the optimizer step at which the weight reaches 0)"),
    "adaptive_num_prompts": (1, math.inf, "at least 1"),
    "adaptive_interval": (1, math.inf, "at least 1"),
    "adaptive_scale": (ABOVE_ZERO, math.inf, "positive and finite"),
    "adaptive_offset": (-math.inf, math.inf, "a finite number"),
    "adaptive_max_weight": (ABOVE_ZERO, 1.0, "above 0 and at most 1"),
}


@with_help
@dataclass
class LogitMixGRPOConfig(TokensUnwritten, GRPOConfig):
    r"""
    Configuration class for the [`LogitMixGRPOTrainer`].

    This class includes only the parameters that are specific to logit mixing. For a full list of training arguments,
    please refer to the [`~trl.GRPOConfig`] and [`~transformers.TrainingArguments`] documentation.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the teacher

        teacher_model_name_or_path (`list[str]`, *optional*):
            Model id or path of each teacher, where the trainer is given no `teacher_model`.
        teacher_model_revision (`str`, *optional*):
            Revision of the teacher (branch, tag or commit), used when the teacher is given as a string.
        teacher_model_init_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`] when the teacher is given as a
            string. `dtype` and `attn_implementation` default to the student's.

        > Parameters that control the mixture

        teacher_weight (`float` or `list[float]`, *optional*, defaults to `0.5`):
            Weight \\( w \\) of the teacher in the mixed policy, at step 0 if it moves: a number in `[0, 1]`, or one
            per teacher with a sum of at most 1; with `mixing_space="arithmetic"` any numbers. `0` reproduces
            [`~trl.GRPOTrainer`]. The default is the logit-fusion code's starting value. On the test-bed a larger
            weight gives a better mixture.
        teacher_weight_schedule (`str`, *optional*, defaults to `"constant"`):
            How the weight moves with the optimizer step: `"constant"`, `"linear"` or `"cosine"` decay to 0 in
            `teacher_weight_decay_steps` steps, `"reward"` is the linear decay with a pause after every step whose
            rollouts had a mean reward below `teacher_weight_min_reward` (our choice, for a student that learns more
            slowly than a fixed decay goes; its weight may be above 0 in the end), or `"adaptive"` (Algorithm 2 of the
            logit-averaging paper).
        teacher_weight_decay_steps (`int`, *optional*):
            Optimizer steps until the weight is 0. Required by the decaying schedules (the logit-fusion code uses
            1000). With `"reward"`, those in which it falls: pauses do not count.
        teacher_weight_min_reward (`float`, *optional*, defaults to `0.5`):
            Reward, as in the metric `reward`, from which the weight of `teacher_weight_schedule="reward"` goes on
            falling.
        mixing_space (`str`, *optional*, defaults to `"logits"`):
            `"logits"` mixes logits (a renormalised geometric mean of the policies), `"probs"` mixes probabilities,
            `"arithmetic"` adds logits, \\( z_S + \sum_i w_i z_i \\), with weights of any sign. Weights `[1, -1]` for
            a tuned and an untuned teacher are proxy tuning (arXiv 2401.08565), `[α, -α]` for an expert and an
            anti-expert DExperts (arXiv 2105.03023). Another weight of the student, if positive, is the same as
            dividing all weights and the temperature by it.

        > Parameters that control the objective

        objective (`str`, *optional*, defaults to `"mixed"`):
            Policy that the GRPO objective is written on. `"mixed"` (logit averaging): the mixed policy, on both sides
            of the ratio; the mixed policy is also what is meant to be deployed. `"student"` (logit fusion): the
            student, with the sampling (mixed) policy in the denominator; the student alone is deployed.
        is_clip_mode (`str`, *optional*, defaults to `"floor"`):
            Treatment of the importance ratio `r` for `objective="student"` while the weight is positive: `"floor"`
            (our choice: the coefficient of `A` times the gradient of the log-prob is `r` limited to `[1, c]` where
            `A > 0` and to at most `c` elsewhere, so that rewarded tokens which the student hardly knows are learned;
            biased, see [`~trl_blend.ops.importance.floored_log_ratio`]), `"max"` (loss `-min(r, c)A` for either sign
            of `A`; the logit-fusion code uses it with token-level ratios), `"none"` (loss `-rA`; used there with
            sequence-level ratios), `"ppo"` (TRL's clipping). Once the weight is 0, ordinary clipping applies. On the
            test-bed the floor was above `"max"`, with a student that gets no reward at the start and with one that
            gets some.
        is_clip_max (`float`, *optional*, defaults to `3.0`):
            The cap `c` of `is_clip_mode="floor"` and `"max"`.

        > Parameters that control the adaptive weight

        adaptive_num_prompts (`int`, *optional*, defaults to `64`):
            Number of validation prompts, the first ones of `eval_dataset`, decoded twice (mixed policy and student,
            greedily) for each update of the weight. The paper's number is unknown; this is our choice.
        adaptive_interval (`int`, *optional*, defaults to `1`):
            Optimizer steps between two updates of the weight.
        adaptive_scale (`float`, *optional*, defaults to `5.0`):
            Scale in `sigmoid(scale * (net_gain - offset))`. Our choice, the paper's value is unknown.
        adaptive_offset (`float`, *optional*, defaults to `0.1`):
            Offset in `sigmoid(scale * (net_gain - offset))`. Our choice, the paper's value is unknown.
        adaptive_max_weight (`float`, *optional*, defaults to `1.0`):
            Bound of the weight, in `(0, 1]`. The paper has none (1). The gradient of the mixed objective is
            proportional to `1 - w`: where the student cannot do the task at all, an unbounded weight rises towards 1
            and leaves it nothing to learn from.
        adaptive_success_threshold (`float`, *optional*, defaults to `1.0`):
            Weighted reward from which a validation response counts as right.

        > Parameters that control the evaluation

        eval_policy (`str`, *optional*):
            Policy that `evaluate` samples from: `"mixed"`, `"student"` or `"both"`. Defaults to the deployed policy of
            the objective. Metrics of each policy are logged under `eval_mixed/…` and `eval_student/…`.

        > Parameters that control the engine

        vllm_draft_tokens (`int` or `str`, *optional*):
            With `use_vllm=True` and `vllm_mode="colocate"`, how many tokens the student drafts before all models look
            at them together (speculative decoding), which draws from the same policy with fewer passes of the
            teacher. `"auto"`: up to 8, chosen before each generation from how many were accepted. `None`: none. While
            no teacher takes part nothing is drafted. The drafts have a cache of their own.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    # Parameters that control the teacher
    teacher_model_name_or_path: list[str] | None = None
    teacher_model_revision: str | None = None
    teacher_model_init_kwargs: dict[str, Any] | str | None = None

    # Parameters that control the mixture
    teacher_weight: list[float] = field(default_factory=lambda: [0.5])
    teacher_weight_schedule: Literal["constant", "linear", "cosine", "reward", "adaptive"] = "constant"
    teacher_weight_decay_steps: int | None = None
    teacher_weight_min_reward: float = 0.5
    mixing_space: Literal["logits", "probs", "arithmetic"] = "logits"

    # Parameters that control the objective
    objective: Literal["mixed", "student"] = "mixed"
    is_clip_mode: Literal["floor", "max", "none", "ppo"] = "floor"
    is_clip_max: float = 3.0

    # Parameters that control the adaptive weight
    adaptive_num_prompts: int = 64
    adaptive_interval: int = 1
    adaptive_scale: float = 5.0
    adaptive_offset: float = 0.1
    adaptive_max_weight: float = 1.0
    adaptive_success_threshold: float = 1.0

    # Parameters that control the evaluation
    eval_policy: Literal["mixed", "student", "both"] | None = None

    # Parameters that control the engine
    vllm_draft_tokens: int | str | None = None

    def __post_init__(self):
        # A single name or weight may be given bare; several come as a list
        if isinstance(self.teacher_model_name_or_path, str):
            self.teacher_model_name_or_path = [self.teacher_model_name_or_path]
        weights = self.teacher_weight if isinstance(self.teacher_weight, (list, tuple)) else [self.teacher_weight]
        check_choices(self)
        self.teacher_weight = list(validate_weights(weights, "teacher_weight", self.mixing_space))
        check_choices(self, WORDS_OF_TRL)
        check_run(self)
        check_ranges(self, _RANGES)
        self._check_schedule()
        self._check_unread()
        if self.eval_policy is None and self.mixes:
            self.eval_policy = self.objective
        super().__post_init__()  # also parses the dictionaries that the command line passes as strings
        self._check_objective()

    @property
    def mixes(self) -> bool:
        """Whether any step of this run can use a teacher."""
        return self.teacher_weight_schedule == "adaptive" or any(self.teacher_weight)

    @property
    def decays(self) -> bool:
        """Whether the weight can reach 0."""
        return self.teacher_weight_schedule in (*DECAYING_SCHEDULES, "reward")

    def weights_at(self, step: int) -> tuple[float, ...]:
        """
        Teacher weights at an optimizer step. Of `"reward"` after so many steps in which the weight fell; of
        `"adaptive"`, which knows no others, those of step 0.
        """
        schedule = {"adaptive": "constant", "reward": "linear"}.get(
            self.teacher_weight_schedule, self.teacher_weight_schedule
        )
        steps = self.teacher_weight_decay_steps
        return tuple(make_schedule(schedule, weight, steps)(step) for weight in self.teacher_weight)

    def rule_at(self, step: int) -> BlendRule | None:
        """What the tokens of a step are drawn from; `None` where that is the student alone."""
        return self.rule_of(self.weights_at(step))

    def rule_of(self, weights: Sequence[float]) -> BlendRule | None:
        """The mixture with the given teacher weights; `None` where all are 0."""
        if not any(weights):
            return None
        return mixing_rule(self.mixing_space, weights)

    def _check_schedule(self):
        schedule = self.teacher_weight_schedule
        if self.decays and self.teacher_weight_decay_steps is None:
            raise ConfigError(
                f"`teacher_weight_schedule={schedule!r}` needs `teacher_weight_decay_steps`. Set it to the optimizer "
                "step at which the weight should reach 0 (the logit-fusion code uses 1000)."
            )
        if schedule == "adaptive":
            if self.mixing_space == "arithmetic":
                raise ConfigError(
                    "`teacher_weight_schedule='adaptive'` moves a weight in (0, 1), the teacher's share, and "
                    "`mixing_space='arithmetic'` has no shares. Use `mixing_space='logits'`, or another schedule."
                )
            if len(self.teacher_weight) > 1:
                raise ConfigError(
                    "`teacher_weight_schedule='adaptive'` moves a single weight, got "
                    f"`teacher_weight={self.teacher_weight}`. Use one teacher, or another schedule."
                )

    def _check_unread(self):
        if not self.mixes:
            refuse_unread(self, _MIXING, "teacher_weight")
        for names, switch, values in _READ_BY:
            if getattr(self, switch) not in values:
                refuse_unread(self, names, switch, *values)

    def _check_objective(self):
        check_drafts(self, self.mixes)
        if self.mixes:
            check_generation_kwargs(self)
            check_one_sequence(self.generation_kwargs, "num_generations")
        share = student_weight(self.teacher_weight, self.mixing_space)
        if self.objective == "mixed" and self.teacher_weight_schedule == "constant" and share == 0:
            raise ConfigError(
                f"`teacher_weight={self.teacher_weight}` with `objective='mixed'` leaves the student no part in what "
                "is trained. Lower it, or let it fall with `teacher_weight_schedule`."
            )
        if self.objective != "student" or not self.mixes:
            return
        if self.is_clip_mode != "ppo" and self.loss_type not in _CLIPPED_LOSSES:
            raise ConfigError(
                f"`is_clip_mode={self.is_clip_mode!r}` reshapes the clipped surrogate, which `loss_type="
                f"{self.loss_type!r}` does not have. Set `is_clip_mode='ppo'` to keep that loss's own treatment of "
                f"the ratio, or choose `loss_type` among {', '.join(map(repr, _CLIPPED_LOSSES))}."
            )
        if self.is_clip_mode != "ppo" and self.delta is not None:
            raise ConfigError(
                f"`delta={self.delta}` bounds the ratio of TRL's clipping, which `is_clip_mode={self.is_clip_mode!r}` "
                "replaces. Drop `delta`, or set `is_clip_mode='ppo'`."
            )
        # A constant weight never reaches 0, from where on TRL's clipping would apply, nor does an adaptive one
        if self.is_clip_mode != "ppo" and not self.decays:
            refuse_unread(self, ("epsilon", "epsilon_high"), "is_clip_mode", "ppo")
        if self.is_clip_max != math.inf:  # which is no cap
            check_ranges(self, {"is_clip_max": (ABOVE_ZERO, math.inf, "positive (the logit-fusion code uses 3.0)")})
        if self.is_clip_mode == "floor" and self.is_clip_max < 1:
            raise ConfigError(
                f"`is_clip_max={self.is_clip_max}` is below the floor of `is_clip_mode='floor'`. Set it to 1 or more, "
                "or `is_clip_mode='max'`."
            )
        if self.is_clip_mode == "floor" and self.beta and self.use_bias_correction_kl:
            raise ConfigError(
                f"`use_bias_correction_kl=True` would multiply the KL term of `beta={self.beta}` by the floored ratio "
                "of `is_clip_mode='floor'`, which corrects nothing. Set `use_bias_correction_kl=False`, "
                "`beta=0` or `is_clip_mode='max'`."
            )
        for name, value in distribution_warpers(self).items():
            raise ConfigError(
                f"`{name}={value}` changes the distribution that tokens are drawn from, so the importance ratio of "
                f"`objective='student'` would be wrong. Leave `{name}` at its neutral value, or use "
                "`objective='mixed'`."
            )

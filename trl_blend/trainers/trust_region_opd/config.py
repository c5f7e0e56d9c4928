"""Configuration of [`TrustRegionOPDTrainer`]."""

import math
from dataclasses import dataclass
from typing import Literal

from trl import DistillationConfig

from trl_blend.errors import ConfigError
from trl_blend.generation.rules import (
    BlendRule,
    ChernoffBlend,
    ContrastiveDecoding,
    LogitMixing,
    SpeculativeKD,
    TrustRegion,
)
from trl_blend.generation.settings import AFTER_THE_BLEND, check_one_sequence, distribution_warpers
from trl_blend.schedules import make_schedule
from trl_blend.trainers._options import (
    ABOVE_ZERO,
    BELOW_ONE,
    Range,
    check_choices,
    check_drafts,
    check_generation_kwargs,
    check_ranges,
    check_run,
    is_default,
    refuse_selecting_by_loss,
    refuse_unread,
    set_direction,
    with_help,
)
from trl_blend.trainers._settings import TokensUnwritten


# Settings that only one value of another setting reads, with what they become there when left at None
_READ_BY = {
    "kl_budget": ("rollout_policy", "trust_region", 0.01),
    "teacher_weight": ("rollout_policy", "fixed_weight", 0.5),
    "skd_top_k": ("rollout_policy", "speculative_kd", 15),
    "skd_teacher_temperature": ("rollout_policy", "speculative_kd", 0.2),
    "contrastive_alpha": ("rollout_policy", "contrastive", 0.1),
    "contrastive_beta": ("rollout_policy", "contrastive", 0.5),
    "veto_weight_start": ("distillation_target", "veto", 0.4),
    "veto_warmup_steps": ("distillation_target", "veto", 50),
    "target_weight": ("distillation_target", "interpolated", 0.5),
    "tip_entropy_quantile": ("token_selection", "tip", 0.5),
    "tip_divergence_quantile": ("token_selection", "tip", 0.9),
    "iw_opd_gamma": ("distillation_objective", "iw_opd", 0.5),
}

_STEPS = (1, math.inf, "at least 1 (a number of optimizer steps)")
_QUANTILE = (0.0, 1.0, "between 0 and 1 (0 keeps all positions)")
_RANGES: dict[str, Range] = {
    # An infinite budget would be annealed to NaN
    "kl_budget": (0.0, math.inf, "finite and at least 0 (in nats; 0 means student rollouts)"),
    "blend_warmup_steps": _STEPS,
    "teacher_weight": (0.0, 1.0, "between 0 and 1 (0 is the student, 1 the teacher)"),
    "skd_top_k": (1, math.inf, "at least 1 (the paper uses 15, 25 and 50)"),
    "skd_teacher_temperature": (ABOVE_ZERO, math.inf, "positive and finite (the paper uses .2, .6, 1)"),
    "contrastive_alpha": (ABOVE_ZERO, 1.0, "above 0 and at most 1 (the papers use 0.1)"),
    "contrastive_beta": (0.0, math.inf, "finite and at least 0 (the paper uses 0.5)"),
    "temperature_warmup_steps": _STEPS,
    "num_rollouts_per_prompt": (1, math.inf, "at least 1 (the paper uses 4)"),
    "kl_top_k": (1, math.inf, "at least 1 (the paper uses 16)"),
    "veto_weight_start": (
        0.0,
        BELOW_ONE,
        "at least 0 and below 1 (the paper uses .2, .4, .6, .8): at 1 the student's entropy cancels out of the loss, "
        "and its optimum is a single token",
    ),
    "veto_warmup_steps": _STEPS,
    "target_weight": (
        ABOVE_ZERO,
        math.inf,
        "positive and finite (1 is the teacher): at 0 the target is the student at step 0, and nothing would be "
        "trained",
    ),
    "tip_entropy_quantile": _QUANTILE,
    "tip_divergence_quantile": _QUANTILE,
    "forward_kl_entropy": (0.0, math.inf, "finite and at least 0 (an entropy in nats)"),
    "iw_opd_gamma": (0.0, math.inf, "finite and at least 0 (TRL uses 0.5)"),
}


@with_help
@dataclass
class TrustRegionOPDConfig(TokensUnwritten, DistillationConfig):
    r"""
    Configuration class for the [`TrustRegionOPDTrainer`].

    This class includes only the parameters that are specific to trust-region rollouts and to the methods they are
    compared with. For a full list of training arguments, please refer to the [`~trl.DistillationConfig`] and
    [`~transformers.TrainingArguments`] documentation.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    A setting that belongs to one method and has no default here (`kl_budget`, `skd_top_k`, ...) is an error with
    another one, so that no run is labelled with a setting it did not use. Left at `None` it takes the value given
    below.

    Parameters:
        > Parameters that control the rollouts

        rollout_policy (`str`, *optional*, defaults to `"trust_region"`):
            Policy that training rollouts are drawn from: `"trust_region"` (the policy closest to the teacher inside a
            KL ball around the student), `"fixed_weight"` (the log-linear mixture with a constant weight, fixed-β in
            the paper), `"speculative_kd"` (student tokens outside the teacher's top-k are replaced by teacher
            samples), `"chernoff"` (at every prefix the policy as far from the student as from the teacher; ours, after
            VESPO's optimal sampling), `"contrastive"` (contrastive decoding with the teacher as expert and the student
            as amateur), `"student"` (ordinary on-policy distillation).
        kl_budget (`float`, *optional*):
            Bound on `KL(behaviour‖student)` at every prefix, in nats per token, at step 0.
            `0.01` for the trust region; the paper sweeps .001 to .05. `0` means student rollouts.
        kl_budget_schedule (`str`, *optional*, defaults to `"linear"`):
            How the budget moves with the optimizer step: `"linear"` (Eq. 3 of the paper) or `"cosine"` to 0 in
            `blend_warmup_steps` steps, or `"constant"` (fixed-ε in the paper).
        blend_warmup_steps (`int`, *optional*):
            Optimizer steps after which rollouts are the student's own. Required with an annealed `kl_budget`; `50` if
            that is not given either (the paper sweeps 15, 25, 50). With any other policy, or a constant budget, `None`
            means the whole run, as in the paper's baselines. `"chernoff"` falls linearly towards the student in them.
        teacher_weight (`float`, *optional*):
            Weight of the teacher for `rollout_policy="fixed_weight"`, in `[0, 1]`. `0.5` there, which is our choice.
        skd_top_k (`int`, *optional*):
            Number of teacher tokens that a student token must be among for `rollout_policy="speculative_kd"`. `15`
            there; the paper sweeps 15, 25, 50.
        skd_teacher_temperature (`float`, *optional*):
            Temperature of the teacher samples for `rollout_policy="speculative_kd"`, on top of `temperature`. `0.2`
            there; the paper sweeps .2, .6, 1.
        contrastive_alpha (`float`, *optional*):
            Plausibility for `rollout_policy="contrastive"`: a token needs this share of the teacher's largest
            probability, in `(0, 1]`. `0.1` there, as in the papers.
        contrastive_beta (`float`, *optional*):
            Strength of the contrast to the student for `rollout_policy="contrastive"`, 0 or more. `0.5` there, as in
            the paper.
        temperature_warmup_start (`float`, *optional*):
            Student sampling temperature at step 0, at most `temperature`, for `rollout_policy="student"`. It rises
            linearly to `temperature` in `temperature_warmup_steps` steps; the loss always uses `temperature`. `0.9`
            if only the steps are given; the paper sweeps .8, .9, .95.
        temperature_warmup_steps (`int`, *optional*):
            Optimizer steps of the temperature warmup. `25` if only the start is given; the paper uses 15 and 25.
        num_rollouts_per_prompt (`int`, *optional*, defaults to `1`):
            Rollouts of each prompt in a generation batch, which it must divide. The paper uses 4.

        > Parameters that control the loss

        distillation_objective (`str`, *optional*, defaults to `"jsd"`):
            What training minimises: `"jsd"`, the divergence that the settings below describe, or `"iw_opd"`, the
            sampled-token loss of TRL's experimental `IWOPDTrainer`, whose weights fall with the disagreement that a
            rollout has accumulated. Blended rollouts are corrected by `p_S / μ`, which is our choice.
        iw_opd_gamma (`float`, *optional*):
            How far the weights rise above 1 for `distillation_objective="iw_opd"`, 0 or more; 0 is the plain
            sampled-token loss. `0.5` there, as in TRL.
        kl_support (`str`, *optional*, defaults to `"full"`):
            Tokens the reverse KL is taken over: `"full"` (TRL's chunked divergence, unless the models differ in
            vocabulary size or end-of-sequence tokens) or `"student_top_k"`, the `kl_top_k` most probable tokens of the
            student (the paper's choice).
        kl_top_k (`int`, *optional*, defaults to `16`):
            Number of tokens for `kl_support="student_top_k"`.
        distillation_target (`str`, *optional*, defaults to `"teacher"`):
            Distribution the student is trained to match: `"teacher"`, `"veto"` for
            `Q ∝ p_T · sg[p_S]^w` (with `rollout_policy="student"` in the paper), or `"interpolated"` for
            `Q ∝ p_ref^(1 - w) · p_T^w`, where `p_ref` is the student at step 0 (the trust-region teacher of SDPO).
        veto_weight_start (`float`, *optional*):
            Exponent \\( w \\) of the student in the Veto target at step 0, in `[0, 1)`. `0.4` for Veto; the paper
            sweeps .2, .4, .6, .8, and does not say which is best.
        veto_warmup_steps (`int`, *optional*):
            Optimizer steps in which the exponent decays linearly to 0. `50` for Veto, which is our choice.
        target_weight (`float`, *optional*):
            Exponent \\( w \\) of the teacher in the interpolated target, above 0: 1 is the teacher, below 1 the target
            lies on the way to it, above 1 beyond it (reward extrapolation). `0.5` there, which is our choice.
        token_selection (`str`, *optional*, defaults to `"all"`):
            Token positions that training takes the loss over: `"all"`, or `"tip"` for those where the student is
            uncertain, and of the others those where it is farthest from the target.
        tip_entropy_quantile (`float`, *optional*):
            Share of positions that are not uncertain, in `[0, 1]`: quantile of the student's entropy over the
            micro-batch of all processes. `0.5` for TIP, as in the paper's abstract.
        tip_divergence_quantile (`float`, *optional*):
            Share of those that are left out, in `[0, 1]`: quantile of their divergence. `0.9` for TIP, which is our
            choice.
        forward_kl_entropy (`float`, *optional*):
            Entropy of the teacher in nats, above which the forward KL is added to the loss of a position
            (entropy-aware distillation; implementations of the paper use .8). By default it never is.

        > Parameters that control the end-of-sequence token

        canonicalize_eos (`bool`, *optional*, defaults to `True`):
            Whether to treat the end-of-sequence tokens of both models as one event wherever their sets differ (App. D
            of the paper). The student then stops at each of them, also in its saved `generation_config`. Without a
            difference it does nothing.
        teacher_eos_token_id (`int` or `list[int]`, *optional*):
            End-of-sequence tokens of the teacher. Read from its `generation_config` and tokenizer by default.

        > Parameters that control the logging

        log_teacher_statistics (`bool`, *optional*, defaults to `False`):
            Whether to measure the teacher's entropy and log-probability on the student's own training rollouts too, at
            the cost of one more pass over the vocabulary per step. Blended rollouts, evaluation and runs with
            `reward_funcs` have them anyway.
        success_threshold (`float`, *optional*, defaults to `1.0`):
            Value of the first reward function from which a rollout counts as right in `blend/auroc`.

        > Parameters that control the engine

        vllm_draft_tokens (`int` or `str`, *optional*):
            With `use_vllm=True` and `vllm_mode="colocate"`, how many tokens the student drafts before all models look
            at them together (speculative decoding), which draws from the same policy with fewer passes of the
            teacher. `"auto"`: up to 8, chosen before each generation from how many were accepted. `None`: none. While
            no teacher takes part nothing is drafted. The drafts have a cache of their own.
    """

    # Parameters that control the rollouts
    rollout_policy: Literal["trust_region", "fixed_weight", "speculative_kd", "chernoff", "contrastive", "student"] = (
        "trust_region"
    )
    kl_budget: float | None = None
    kl_budget_schedule: Literal["linear", "constant", "cosine"] = "linear"
    blend_warmup_steps: int | None = None
    teacher_weight: float | None = None
    skd_top_k: int | None = None
    skd_teacher_temperature: float | None = None
    contrastive_alpha: float | None = None
    contrastive_beta: float | None = None
    temperature_warmup_start: float | None = None
    temperature_warmup_steps: int | None = None
    num_rollouts_per_prompt: int = 1

    # Parameters that control the loss
    distillation_objective: Literal["jsd", "iw_opd"] = "jsd"
    iw_opd_gamma: float | None = None
    kl_support: Literal["full", "student_top_k"] = "full"
    kl_top_k: int = 16
    distillation_target: Literal["teacher", "veto", "interpolated"] = "teacher"
    veto_weight_start: float | None = None
    veto_warmup_steps: int | None = None
    target_weight: float | None = None
    token_selection: Literal["all", "tip"] = "all"
    tip_entropy_quantile: float | None = None
    tip_divergence_quantile: float | None = None
    forward_kl_entropy: float | None = None

    # Parameters that control the end-of-sequence token
    canonicalize_eos: bool = True
    teacher_eos_token_id: list[int] | None = None

    # Parameters that control the logging
    log_teacher_statistics: bool = False
    success_threshold: float = 1.0

    # Parameters that control the engine
    vllm_draft_tokens: int | str | None = None

    def __post_init__(self):
        if isinstance(self.teacher_eos_token_id, int):
            self.teacher_eos_token_id = [self.teacher_eos_token_id]
        check_choices(self)
        check_run(self)
        self._resolve()
        check_ranges(self, _RANGES)
        start = f"positive and at most `temperature={self.temperature}`"
        check_ranges(self, {"temperature_warmup_start": (ABOVE_ZERO, self.temperature, start)})
        set_direction(self)
        super().__post_init__()  # also parses the dictionaries that the command line passes as strings
        self._check_sampling()
        self._check_divergence()

    def _resolve(self):
        """Fill in what the chosen method reads, and refuse what it does not."""
        annealed = self.kl_budget_schedule != "constant"
        if self.rollout_policy == "trust_region" and annealed and self.blend_warmup_steps is None:
            if self.kl_budget:
                raise ConfigError(
                    f"`kl_budget={self.kl_budget}` is annealed by `kl_budget_schedule={self.kl_budget_schedule!r}`, "
                    "which needs `blend_warmup_steps`. Set it to the optimizer step at which the budget should reach "
                    "0 (the paper uses 15, 25 and 50), or set `kl_budget_schedule='constant'`."
                )
            self.blend_warmup_steps = 50 if self.kl_budget is None else None
        for name, (switch, value, default) in _READ_BY.items():
            if getattr(self, switch) != value:
                refuse_unread(self, (name,), switch, value)
            elif getattr(self, name) is None:
                setattr(self, name, default)
        if self.rollout_policy == "student":
            refuse_unread(self, ("blend_warmup_steps",), "rollout_policy")
        if self.rollout_policy != "trust_region":
            refuse_unread(self, ("kl_budget_schedule",), "rollout_policy", "trust_region")
        if self.kl_support == "full":
            refuse_unread(self, ("kl_top_k",), "kl_support", "student_top_k")
        amount = {"trust_region": "kl_budget", "fixed_weight": "teacher_weight"}.get(self.rollout_policy)
        if amount and getattr(self, amount) == 0:
            refuse_unread(self, ("kl_budget_schedule", "blend_warmup_steps"), amount)
        if not self.canonicalize_eos:
            refuse_unread(self, ("teacher_eos_token_id",), "canonicalize_eos", True)
        if self.temperature_warmup_start is not None or self.temperature_warmup_steps is not None:
            if self.rollout_policy != "student":
                raise ConfigError(
                    f"`temperature_warmup_start={self.temperature_warmup_start}` and `temperature_warmup_steps="
                    f"{self.temperature_warmup_steps}` warm up the student's own sampling, but `rollout_policy="
                    f"{self.rollout_policy!r}`. Set `rollout_policy='student'`, or leave both unset."
                )
            if self.temperature_warmup_start is None:
                self.temperature_warmup_start = 0.9
            if self.temperature_warmup_steps is None:
                self.temperature_warmup_steps = 25

    def _check_sampling(self):
        temperature = (self.generation_kwargs or {}).get("temperature", self.temperature)
        if self.temperature_warmup_steps is not None and temperature != self.temperature:
            raise ConfigError(
                f"`generation_kwargs` has `temperature={temperature}`, which overrides the temperature warmup towards "
                f"`temperature={self.temperature}`. Set `temperature` only."
            )
        check_drafts(self, self.blends)
        if not self.blends:
            return
        check_generation_kwargs(self)
        check_one_sequence(self.generation_kwargs, "num_rollouts_per_prompt")
        found = distribution_warpers(self)
        if self.use_vllm:
            given = {"vllm_structured_outputs_regex": self.vllm_structured_outputs_regex}
            given |= {name: (self.generation_kwargs or {}).get(name) for name in AFTER_THE_BLEND}
            found |= {name: value for name, value in given.items() if value}
        for name, value in found.items():
            raise ConfigError(
                f"`{name}={value}` cuts or reshapes the distribution after the blend, but `rollout_policy="
                f"{self.rollout_policy!r}` is defined on full distributions, and its KL to the student would not be "
                f"what is asked for. Leave `{name}` at its neutral value, or set `rollout_policy='student'`."
            )

    def _check_divergence(self):
        own = ("kl_support", "distillation_target", "token_selection", "forward_kl_entropy")
        for name in own if self.distillation_objective == "iw_opd" else ():
            if not is_default(self, name):
                raise ConfigError(
                    f"`{name}={getattr(self, name)!r}` changes the divergence over the vocabulary, but "
                    "`distillation_objective='iw_opd'` is a loss of sampled tokens. Drop one of them."
                )
        for name in ("distillation_objective", *own) if self.beta != 1.0 else ():
            if not is_default(self, name):
                raise ConfigError(
                    f"`{name}={getattr(self, name)!r}` is defined for the reverse KL, but `beta={self.beta}` selects "
                    "another divergence. Set `beta=1.0`."
                )
        for name in ("kl_support", "distillation_target") if self.forward_kl_entropy is not None else ():
            if not is_default(self, name):
                raise ConfigError(
                    f"`forward_kl_entropy={self.forward_kl_entropy}` adds the KL of the whole teacher, but `{name}="
                    f"{getattr(self, name)!r}` compares the student with something else. Drop one of them."
                )

        if self.kl_support == "student_top_k" or self.distillation_objective == "iw_opd":
            refuse_selecting_by_loss(self, "top-k" if self.kl_support != "full" else "IW-OPD", "eval_blend/reverse_kl")

    @property
    def uses_reference(self) -> bool:
        """Whether the loss needs the student at step 0."""
        return self.distillation_target == "interpolated" and self.target_weight != 1.0

    @property
    def uses_own_loss(self) -> bool:
        """Whether the loss has something that TRL's does not."""
        target = self.uses_reference or self.distillation_target == "veto"
        selects = self.token_selection != "all" or self.forward_kl_entropy is not None
        return self.distillation_objective == "iw_opd" or self.kl_support != "full" or target or selects

    @property
    def blends(self) -> bool:
        """Whether any step of this run can draw tokens with the teacher."""
        return self.rule_at(0) is not None

    def rule_at(self, step: int) -> BlendRule | None:
        """What the tokens of an optimizer step are drawn from; `None` where that is the student alone."""
        steps = self.blend_warmup_steps
        if self.rollout_policy == "student" or (steps is not None and step >= steps):
            return None
        if self.rollout_policy == "trust_region":
            budget = make_schedule(self.kl_budget_schedule, self.kl_budget, steps)(step) if self.kl_budget else 0.0
            return TrustRegion(budget) if budget else None
        if self.rollout_policy == "fixed_weight":
            return LogitMixing(self.teacher_weight) if self.teacher_weight else None
        if self.rollout_policy == "chernoff":
            return ChernoffBlend(1.0 if steps is None else make_schedule("linear", 1.0, steps)(step))
        if self.rollout_policy == "contrastive":
            return ContrastiveDecoding(self.contrastive_alpha, self.contrastive_beta)
        return SpeculativeKD(self.skd_top_k, self.skd_teacher_temperature)

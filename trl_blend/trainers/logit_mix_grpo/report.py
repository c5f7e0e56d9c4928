"""What a [`LogitMixGRPOTrainer`] run shows: its plot, and its model card beside what the papers do."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trl_blend.reports.cards import CardTeacher, PaperValue, code
from trl_blend.reports.curves import NATS, Curve, Panel
from trl_blend.trainers import _cards
from trl_blend.trainers._record import RunParts
from trl_blend.trainers.logit_mix_grpo.config import LogitMixGRPOConfig


PANELS = (
    Panel(
        "Teacher weight",
        (Curve("mixing/teacher_weight", "teacher", progress="teacher_weight"),),
        "weight in the mixture",
        evaluation=False,  # the same schedule, or 0 for the student alone
    ),
    Panel("KL(behaviour ‖ student)", (Curve("mixing/kl_behavior_student"),), NATS),
    Panel(
        "Reward",
        (
            Curve("reward"),
            Curve("eval_mixed/reward", "evaluation, mixed policy"),
            Curve("eval_student/reward", "evaluation, student alone"),
        ),
        "mean reward",
    ),
    Panel(
        "Net gain of mixing",
        (
            Curve("adaptive/mixed_accuracy", "mixed policy is right"),
            Curve("adaptive/student_accuracy", "student is right"),
            Curve("adaptive/net_gain", "net gain"),
        ),
        "share of validation prompts",
    ),
    Panel(
        "Importance sampling",
        (
            Curve("importance/effective_sample_size", "effective sample size"),
            Curve("importance/clipped_share", "clipped"),
        ),
        "share",
    ),
    Panel("Importance ratio", (Curve("importance/ratio_mean"),), "mean of student / behaviour"),
    Panel("Teacher log-prob of the rollouts", (Curve("mixing/teacher_logp", "teacher"),), NATS),
    Panel("KL to TRL's reference model", (Curve("kl"),), NATS),
    Panel("Entropy", (Curve("entropy"),), NATS),
    Panel("Completion length", (Curve("completions/mean_length"),), "mean tokens"),
)


def panels(num_teachers: int) -> tuple[Panel, ...]:
    """[`PANELS`]; where there are several teachers, with a curve of each."""
    if num_teachers == 1:
        return PANELS
    found = []
    for panel in PANELS:
        curve = panel.curves[0]
        if curve.label == "teacher":
            panel = replace(panel, curves=tuple(_of_teacher(curve, index) for index in range(num_teachers)))
        found.append(panel)
    return tuple(found)


def _of_teacher(curve: Curve, index: int) -> Curve:
    progress = curve.progress and f"{curve.progress}_{index}"
    return Curve(f"{curve.metric}_{index}", f"teacher {index}", progress)


def run_parts(config: LogitMixGRPOConfig, teachers: str, rewards: Sequence[tuple[str, float]]) -> RunParts:
    """What a run is made of, in words; `rewards` with their weights."""
    weights = ", ".join(f"{weight:g}" for weight in config.teacher_weight)
    schedule, steps = config.teacher_weight_schedule, config.teacher_weight_decay_steps
    course = {
        "constant": "",
        "adaptive": ", adaptive",
        "reward": f", to 0 in {steps} steps with a reward of {config.teacher_weight_min_reward:g}",
    }.get(schedule, f", {schedule} to 0 in {steps} steps")
    reward = ", ".join(name if weight == 1.0 else f"{name} (weight {weight:g})" for name, weight in rewards)
    if not config.mixes:
        return RunParts("none (`teacher_weight=0`)", reward, "objective of GRPO", "the student alone")
    mixture = "the student alone, to which the mixture decays" if steps else "the mixture of student and teacher"
    if schedule == "reward":
        mixture += " once the weight is 0"
    deployed = mixture if config.objective == "mixed" else "the student alone"
    return RunParts(teachers, reward, f"objective {config.objective}, teacher weight {weights}{course}", deployed)


_UNKNOWN = "not known to us"

# Gan and Zhu, arXiv 2605.20555, sections 2 and 4. Our copy of the paper lacks its formulas, and with them its numbers.
AVERAGING = {
    "mixing_space": PaperValue("mixing space", ("logits",), "Section 2"),
    "teacher_weight_schedule": PaperValue(
        "schedule of the teacher weight", ("constant", "adaptive"), "Algorithms 1 and 2"
    ),
    "teacher_weight": PaperValue("teacher weight", text=_UNKNOWN),
    "beta": PaperValue("KL coefficient", (0.0,), "Section 2"),
    "num_iterations": PaperValue("updates per rollout batch", (1,), "Algorithm 1"),
    "num_generations": PaperValue("rollouts per prompt", text=_UNKNOWN),
    "prompts_per_step": PaperValue("prompts per step", text=_UNKNOWN),
    "learning_rate": PaperValue("learning rate", text=_UNKNOWN),
    "temperature": PaperValue("temperature", text=_UNKNOWN),
}
AVERAGING_ADAPTIVE = {
    "adaptive_interval": PaperValue("steps between updates of the weight", (1,), "Algorithm 2"),
    "adaptive_num_prompts": PaperValue("validation prompts of the weight", text=_UNKNOWN),
    "adaptive_scale": PaperValue("scale of the adaptive weight", text=_UNKNOWN),
    "adaptive_offset": PaperValue("offset of the adaptive weight", text=_UNKNOWN),
}

# Zhang et al., blog post of 25 February 2026, and the authors' code, github.com/juzhengz/logit-fusion
FUSION = {
    "mixing_space": PaperValue("mixing space", ("logits",), "blog post"),
    "teacher_weight": PaperValue("teacher weight at step 0", (0.5,), "code"),
    "teacher_weight_schedule": PaperValue("schedule of the teacher weight", ("linear", "cosine"), "code"),
    "teacher_weight_decay_steps": PaperValue("steps until the weight is 0", (1000,), "code"),
    "beta": PaperValue("KL coefficient", (0.0,), "code"),
    "adapter": PaperValue("trained weights", ("LoRA on all linear layers",), "code"),
    "learning_rate": PaperValue("learning rate", (1e-5,), "code"),
    "num_generations": PaperValue("rollouts per prompt", (8,), "code"),
    "temperature": PaperValue("temperature", (1.0,), "code"),
    "prompts_per_step": PaperValue("prompts per step", text=_UNKNOWN),
}


def paper_values(config: LogitMixGRPOConfig) -> dict[str, PaperValue]:
    """What the public sources of the configured objective do."""
    if config.objective == "mixed":
        return AVERAGING | (AVERAGING_ADAPTIVE if config.teacher_weight_schedule == "adaptive" else {})
    values = dict(FUSION)
    if config.mixes:
        level = config.importance_sampling_level
        label, known = f"clipping of {level}-level ratios", {"token": ("max",), "sequence": ("none",)}
        values["is_clip_mode"] = PaperValue(label, known[level], "code") if level in known else PaperValue(label)
        if config.is_clip_mode in ("max", "floor"):
            values["is_clip_max"] = PaperValue("cap of the importance ratio", (3.0,), "code")
    return values


def choices(config: LogitMixGRPOConfig) -> list[str]:
    """What is chosen here or by the user because no public source says it."""
    if not config.mixes:
        return []
    found = []
    if config.mixing_space == "arithmetic":
        found.append("Training on a sum of logits: DExperts and proxy tuning decode with it, and train nothing.")
    if config.objective == "mixed":
        found.append(
            "The teacher weight: the paper's fixed weight was not known to us, so that of this run is a choice of "
            "`trl_blend` or of its user."
        )
        if config.teacher_weight_schedule == "adaptive":
            found.append(
                "Scale, offset and number of validation prompts of the adaptive weight, for the same reason, and the "
                f"reward from which a response counts as right ({config.adaptive_success_threshold:g})."
            )
    elif config.is_clip_mode == "floor":
        found.append("The floor under the importance ratio of rewarded tokens, which biases the gradient.")
    if config.teacher_weight_schedule == "reward":
        found.append(
            f"The decay of the teacher weight, which waits for a reward of {config.teacher_weight_min_reward:g}."
        )
    if config.objective == "student" and config.teacher_weight_schedule in ("constant", "adaptive"):
        found.append(
            f"The {config.teacher_weight_schedule} teacher weight with an objective on the student: logit fusion "
            "decays it to 0."
        )
    return found


def card_fields(
    config: LogitMixGRPOConfig,
    *,
    teachers: Sequence[CardTeacher],
    weights: Sequence[float],
    rewards: Sequence[tuple[str, float]],
    num_prompts: int | None,
) -> dict[str, Any]:
    """Fields of `model_cards/logit_mix_grpo.md`, see [`~trl_blend.trainers._run.RunMixin.card_fields`]."""
    averages, rollouts = config.objective == "mixed", _cards.rows_per_step(config)
    mixes = averages and config.mixes
    return {
        "paper_name": "the logit-averaging paper" if averages else "logit fusion",
        "paper": paper_values(config),
        "settings": {"prompts_per_step": rollouts // config.num_generations},
        "choices": choices(config),
        "teachers": list(teachers),
        "data_rows": num_prompts,
        "data_unit": "prompts",
        "per_step": _cards.rollouts_text(rollouts, config.num_generations),
        "result_metrics": r"((mixed|student)/)?(reward|rewards/.+/mean)",
        "curves_text": "The teacher weight, rewards and other metrics against the optimizer step",
        "mixed": mixes and any(weights),  # where `MixedPolicyFiles` are written
        "was_mixed": mixes and not any(weights),
        "last_weights": [f"{weight:.4g}" for weight in weights],
        "rewards": ", ".join(f"{code(name)} ({weight:g})" for name, weight in rewards),
    }

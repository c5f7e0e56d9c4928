"""What a [`TrustRegionOPDTrainer`] run shows, whichever method it uses: its plot, and its card beside the paper."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trl_blend.ops.vocab import EosMap
from trl_blend.reports.cards import CardTeacher, PaperValue
from trl_blend.reports.curves import NATS, Curve, Panel
from trl_blend.trainers import _cards
from trl_blend.trainers._record import RunParts
from trl_blend.trainers.trust_region_opd.config import TrustRegionOPDConfig


PANELS = (
    Panel(
        "KL(behaviour ‖ student)",
        (
            Curve("blend/kl_behavior_student", "realised"),
            Curve("blend/kl_budget", "budget ε", progress="kl_budget", is_bound=True),
        ),
        NATS,
    ),
    Panel(
        "Teacher weight β*",
        (
            Curve("blend/teacher_weight/mean", "mean", progress="teacher_weight"),
            Curve("blend/teacher_weight/max", "maximum"),
        ),
        "weight in the blend",
    ),
    Panel(
        "Speculative KD",
        (Curve("blend/replaced_share", progress="replaced_share"),),
        "share of tokens replaced",
    ),
    Panel("Sampling temperature", (Curve("blend/temperature", progress="temperature"),), "student's own rollouts"),
    Panel("Veto weight", (Curve("blend/veto_weight", progress="veto_weight"),), "exponent of the student"),
    Panel("Reward", (), "mean reward (diagnostic)"),
    Panel("Reverse KL(student ‖ teacher)", (Curve("blend/reverse_kl"),), NATS),
    Panel(
        "Token positions",
        (Curve("blend/kept_share", "in the loss"), Curve("blend/forward_kl_share", "with the forward KL")),
        "share of positions",
    ),
    Panel("IW-OPD weight", (Curve("blend/iw_opd_weight"),), "mean weight of a token"),
    Panel("Loss", (Curve("loss"),), "loss"),
    Panel(
        "Log-prob of the rollouts",
        (Curve("blend/teacher_logp", "teacher"), Curve("blend/student_logp", "student")),
        NATS,
    ),
    Panel("Entropy", (Curve("blend/teacher_entropy", "teacher"), Curve("entropy", "student")), NATS),
    Panel("KL(behaviour ‖ teacher)", (Curve("blend/kl_behavior_teacher"),), NATS),
    Panel("Teacher within the budget", (Curve("blend/teacher_feasible"),), "share of prefixes"),
    Panel("AUROC of the teacher's support", (Curve("blend/auroc"),), "AUROC"),
    Panel("Completion length", (Curve("completions/mean_length"),), "mean tokens"),
)


def panels(rewards: Sequence[str]) -> tuple[Panel, ...]:
    """[`PANELS`] with a curve of each reward: the names of the run's functions."""
    curves = tuple(Curve(f"rewards/{name}/mean", name) for name in rewards)
    return tuple(replace(panel, curves=curves) if panel.title == "Reward" else panel for panel in PANELS)


def run_parts(config: TrustRegionOPDConfig, teacher: str, rewards: str) -> RunParts:
    """What a run is made of, in words."""
    steps = config.blend_warmup_steps
    amounts = {
        "trust_region": f" with a KL budget of {config.kl_budget} nats, {config.kl_budget_schedule}",
        "fixed_weight": f" with teacher weight {config.teacher_weight}",
        "speculative_kd": f" with the teacher's top {config.skd_top_k}",
        "chernoff": ", annealed" if steps else "",
        "contrastive": f" with alpha {config.contrastive_alpha} and beta {config.contrastive_beta}",
        "student": "",
    }
    amount = amounts[config.rollout_policy] + (f", for {steps} steps" if config.blends and steps else "")
    target = "" if config.distillation_target == "teacher" else f", target {config.distillation_target}"
    if config.target_weight is not None:
        target += f" with weight {config.target_weight}"
    if config.distillation_objective == "iw_opd":
        target += f", loss of sampled tokens (IW-OPD) with gamma {config.iw_opd_gamma}"
    if config.token_selection == "tip":
        target += ", loss over the positions of TIP"
    if config.forward_kl_entropy is not None:
        target += f", forward KL above {config.forward_kl_entropy} nats"
    policy = f"policy {config.rollout_policy}{amount}{target}"
    return RunParts(teacher, f"{rewards} (measured only)" if rewards else "", policy, "the student alone")


_SWEEP = (0.001, 0.005, 0.01, 0.02, 0.05)
# Table 2, and Appendix A where it says so
COMMON = {
    "divergence": PaperValue("divergence", ("reverse KL",), "Table 2"),
    "kl_support": PaperValue("tokens of the divergence", ("student_top_k",), "Table 2"),
    "num_rollouts_per_prompt": PaperValue("rollouts per prompt", (4,), "Table 2"),
    "prompts_per_step": PaperValue("prompts per step", (64,), "Table 2"),
    "temperature": PaperValue("temperature", (1.0,), "Table 2"),
    "max_completion_length": PaperValue("completion length", (7168,), "Table 2"),
    "optimizer": PaperValue("optimizer", ("AdamW",), "Table 2"),
    "learning_rate": PaperValue("learning rate", (1e-5,), "Table 2"),
    "learning_rate_schedule": PaperValue(
        "learning-rate schedule", source="Table 2", text="constant after a cosine warmup of 15 steps"
    ),
    "weight_decay": PaperValue("weight decay", (0.01,), "Table 2"),
    "adam_betas": PaperValue("betas of Adam", ((0.9, 0.999),), "Table 2", text="0.9, 0.999"),
    "max_grad_norm": PaperValue("gradient clipping", (1.0,), "Table 2"),
    "length": PaperValue("length of the training", ("1 epoch",), "Table 2"),
    "canonicalize_eos": PaperValue("end-of-sequence tokens made one", (True,), "Appendix D"),
}
TOP_K = {"kl_top_k": PaperValue("tokens of the divergence per prefix", (16,), "Table 2")}
POLICIES = {
    "trust_region": {
        "kl_budget": PaperValue("KL budget at step 0", _SWEEP, "swept, Appendix A"),
        "kl_budget_schedule": PaperValue("schedule of the budget", ("linear", "constant"), "Appendix A"),
    },
    "fixed_weight": {"teacher_weight": PaperValue("teacher weight")},
    "speculative_kd": {
        "skd_top_k": PaperValue("teacher top-k", (15, 25, 50), "swept, Appendix A.2"),
        "skd_teacher_temperature": PaperValue("teacher temperature", (0.2, 0.6, 1.0), "swept, Appendix A.2"),
    },
    "student": {},
}
WARMUP = {"blend_warmup_steps": PaperValue("steps until the budget is 0", (15, 25, 50), "swept, Appendix A")}
WHOLE_RUN = {
    "blend_warmup_steps": PaperValue("steps of blended rollouts", (None,), "Appendix A.2", text="the whole run")
}
TEMPERATURE_WARMUP = {
    "temperature_warmup_start": PaperValue("sampling temperature at step 0", (0.8, 0.9, 0.95), "swept, Appendix A.2"),
    "temperature_warmup_steps": PaperValue("steps of the temperature warmup", (15, 25), "Appendix A.2"),
}
VETO = {
    "veto_weight_start": PaperValue("Veto exponent at step 0", (0.2, 0.4, 0.6, 0.8), "swept, Appendix A.2"),
    "veto_warmup_steps": PaperValue("steps of the Veto exponent"),
}


def is_baseline(config: TrustRegionOPDConfig) -> bool:
    """Whether the run is one of the methods that the paper compares its own with."""
    own = config.rollout_policy == "trust_region" and config.kl_budget_schedule != "constant"
    return config.rollout_policy in POLICIES and not own and not other_losses(config)


def other_losses(config: TrustRegionOPDConfig) -> list[str]:
    """What the run does in its loss that the paper, baselines included, does not."""
    found = []
    if config.distillation_objective == "iw_opd":
        found.append("The sampled-token loss of IW-OPD, with its weights")
    if config.distillation_target == "interpolated":
        found.append("The target between the student at step 0 and the teacher, or beyond, with its weight")
    if config.token_selection == "tip":
        found.append("The selection of token positions, with its quantiles")
    if config.forward_kl_entropy is not None:
        found.append("The forward KL where the teacher is uncertain, over the whole vocabulary")
    return found


def paper_values(config: TrustRegionOPDConfig, merges_eos: bool) -> dict[str, PaperValue]:
    """What the paper does for the configured rollouts and loss."""
    values = dict(POLICIES.get(config.rollout_policy, {}))
    if config.rollout_policy == "trust_region" and config.kl_budget_schedule != "constant":
        values |= WARMUP
    elif config.rollout_policy in ("trust_region", "speculative_kd"):
        values |= WHOLE_RUN
    if config.temperature_warmup_steps:
        values |= TEMPERATURE_WARMUP
    if config.distillation_target == "veto":
        values |= VETO
    values |= COMMON | (TOP_K if config.kl_support == "student_top_k" else {})
    if config.canonicalize_eos and not merges_eos:  # the models have the same
        del values["canonicalize_eos"]
    return values


def choices(config: TrustRegionOPDConfig, merges_eos: bool) -> list[str]:
    """What is chosen here or by the user because no public source says it."""
    found = []
    if config.rollout_policy == "fixed_weight":
        found.append("The teacher weight is a choice of `trl_blend` or of its user: the paper gives none.")
    if config.rollout_policy in ("chernoff", "contrastive"):
        found.append(
            f"Rollouts of the policy `{config.rollout_policy}` in on-policy distillation: the paper has no such arm."
        )
    if config.rollout_policy == "trust_region" and config.kl_budget_schedule == "cosine":
        found.append("The cosine schedule of the budget: the paper's is linear.")
    found += [f"{loss}: the paper has no such loss." for loss in other_losses(config)]
    if config.distillation_target == "veto":
        found.append(
            "The number of steps of the Veto exponent is a choice of `trl_blend` or of its user: the paper gives none."
        )
    if merges_eos:
        found.append(
            "Merging the end-of-sequence tokens of both models in both models is a choice of `trl_blend`: the paper "
            "maps each model's own."
        )
    return found


def card_fields(
    config: TrustRegionOPDConfig,
    *,
    teacher: CardTeacher,
    eos: EosMap | None,
    num_prompts: int | None,
    log_history: list[dict[str, Any]],
) -> dict[str, Any]:
    """Fields of `model_cards/trust_region_opd.md`, see [`~trl_blend.trainers._run.RunMixin.card_fields`]."""
    rollouts, per_prompt = _cards.rows_per_step(config), config.num_rollouts_per_prompt
    divergence = "reverse KL" if config.beta == 1.0 else f"generalised Jensen-Shannon, beta {config.beta:g}"
    if config.distillation_objective == "iw_opd":
        divergence += ", from sampled tokens"
    return {
        "paper_name": "the trust-region paper",
        "paper": paper_values(config, merges_eos=eos is not None),
        "settings": {"prompts_per_step": rollouts // per_prompt, "divergence": divergence},
        "choices": choices(config, merges_eos=eos is not None),
        "teachers": [teacher],
        "data_rows": num_prompts,
        "data_unit": "prompts",
        "per_step": _cards.rollouts_text(rollouts, per_prompt),
        "result_metrics": r"(?:.+_)?(loss|blend/reverse_kl|rewards/.+/mean)",
        "curves_text": "The budget, the teacher weight it allows, and other metrics against the optimizer step",
        "is_baseline": is_baseline(config),
        "has_other_loss": bool(other_losses(config)),
        "realised": [entry for entry in log_history if "blend/kl_behavior_student" in entry],
        "eos": eos,
    }

"""What the plot of an [`OfflineOPDTrainer`] run shows."""

from typing import Any

from trl_blend.reports.cards import PaperValue
from trl_blend.reports.curves import NATS, Curve, Panel
from trl_blend.trainers.offline_opd.config import OfflineOPDConfig


PANELS = (
    Panel("Drift: KL(student ‖ its start)", (Curve("offline/drift_kl", progress="drift"),), NATS),
    Panel("Reverse KL(student ‖ teacher)", (Curve("offline/reverse_kl", progress="reverse_kl"),), NATS),
    Panel("Loss", (Curve("loss"),), "loss"),
    Panel("Divergence over the teacher's top k", (Curve("offline/divergence"),), NATS),
    Panel("Advantage", (Curve("offline/advantage"),), "mean, " + NATS),
    Panel("Spread of the advantage", (Curve("offline/advantage_std"),), "std, " + NATS),
    Panel("Importance ratio", (Curve("offline/importance_ratio"),), "mean of student / rollouts"),
    Panel("Tokens unlikely for the teacher", (Curve("offline/unlikely_share"),), "share below $e^{-10}$"),
    Panel("Entropy", (Curve("entropy"),), NATS),
)


_CODE = "code"
TRAINING = {
    "offline_loss": PaperValue("loss", ("sampled_token",), _CODE),
    "importance_correction": PaperValue("ratio to the policy of the rollouts", ("none",), _CODE),
    "loss_aggregation": PaperValue("mean of the loss", ("sequence",), _CODE, text="per completion, then over them"),
    "learning_rate": PaperValue("learning rate", (2e-6,), _CODE),
    "learning_rate_schedule": PaperValue("learning-rate schedule", ("constant",), _CODE),
    "adam_betas": PaperValue("betas of Adam", ((0.9, 0.98),), _CODE, text="0.9, 0.98"),
    "weight_decay": PaperValue("weight decay", (0.1,), _CODE),
    "max_grad_norm": PaperValue("gradient clipping", (1.0,), _CODE),
    "rows_per_step": PaperValue("rollouts per step", (256,), _CODE),
    "steps": PaperValue("steps", source=_CODE, text="about 150"),
}
ROLLOUTS = {
    "num_rollouts_per_prompt": PaperValue("rollouts per prompt", (1,), _CODE),
    "rollout_temperature": PaperValue("temperature of the rollouts", (0.7,), _CODE),
    "rollout_top_p": PaperValue("top-p of the rollouts", (0.9,), _CODE),
    "rollout_length": PaperValue("length of the rollouts", (4096,), _CODE),
}


def rollout_settings(sampling: dict[str, Any] | None) -> dict[str, Any]:
    """The settings of [`ROLLOUTS`] in a run, from the manifest of its data; empty where they are not recorded."""
    names = {
        "num_rollouts_per_prompt": "num_rollouts_per_prompt",
        "rollout_temperature": "temperature",
        "rollout_top_p": "top_p",
        "rollout_length": "max_new_tokens",
    }
    return {ours: sampling[theirs] for ours, theirs in names.items() if theirs in sampling} if sampling else {}


def paper_values(sampling: dict[str, Any] | None) -> dict[str, PaperValue]:
    """What the authors do for the loss, and for the rollouts as far as those of the run are known."""
    known = rollout_settings(sampling)
    return TRAINING | {name: value for name, value in ROLLOUTS.items() if name in known}


def choices(config: OfflineOPDConfig) -> list[str]:
    """What goes beyond the method, chosen here."""
    found = []
    if config.importance_correction == "token":
        found.append("The ratio to the policy of the rollouts is a choice of `trl_blend`: the paper leaves it out.")
    if config.uses_top_k:
        found.append(
            "The loss over the teacher's stored top-k tokens, with one event for all other tokens, is a choice of "
            "`trl_blend`: the paper has the sampled token only."
        )
    if config.max_policy_drift is not None:
        what = "ends" if config.policy_drift_action == "stop" else "warns about"
        found.append(
            f"A bound of {config.max_policy_drift:g} nats per token on the drift from the policy of the rollouts, "
            f"which {what} the training."
        )
    return found

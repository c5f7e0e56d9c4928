"""What the plot of an [`OfflineOPDTrainer`] run shows."""

from ...hub.curves import NATS, Curve, Panel


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

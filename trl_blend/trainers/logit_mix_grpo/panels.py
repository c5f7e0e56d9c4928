"""What the plot of a [`LogitMixGRPOTrainer`] run shows."""

from ...hub.curves import NATS, Curve, Panel


PANELS = (
    Panel(
        "Teacher weight",
        (
            Curve("mixing/teacher_weight", "teacher", progress="teacher_weight"),
            Curve("mixing/teacher_weight_*", "teacher *", progress="teacher_weight_*"),
        ),
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
    Panel(
        "Teacher log-prob of the rollouts",
        (Curve("mixing/teacher_logp", "teacher"), Curve("mixing/teacher_logp_*", "teacher *")),
        NATS,
    ),
    Panel("KL to TRL's reference model", (Curve("kl"),), NATS),
    Panel("Entropy", (Curve("entropy"),), NATS),
    Panel("Completion length", (Curve("completions/mean_length"),), "mean tokens"),
)

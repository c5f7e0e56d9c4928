"""What the plot of a [`TrustRegionOPDTrainer`] run shows, whichever of its methods it uses."""

from ...hub.curves import NATS, Curve, Panel


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
    Panel("Reward", (Curve("rewards/*/mean", "*"),), "mean reward (diagnostic)"),
    Panel("Reverse KL(student ‖ teacher)", (Curve("blend/reverse_kl"),), NATS),
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

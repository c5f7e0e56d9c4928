"""
Verdicts on the claims of the Lightning OPD paper (https://huggingface.co/papers/2604.13010), computed from the runs of
`offline_opd.py`. Accuracies differ where they do by more than 2 standard errors.
"""

from collections.abc import Iterator

from reproduce.offline_opd_runs import DECODINGS, Runs
from reproduce.runs import Estimate
from reproduce.trust_region_claims import HELD, NOT_HELD, UNTESTABLE, Claim, all_of, verdict


MEASURES = {"sampled": "T = 1", "greedy": "greedy"}
SPEEDUP_BAR = 3.0
# Norm of the difference of both gradients by that of the live one
DISCREPANCY_BAR = 0.5
# Below this rate a policy has forgotten the task, and two such policies cannot be told apart
FLOOR = 0.02


def not_worse(gap: Estimate) -> str:
    """Verdict on the claim that a method is at least as good as another, from the difference."""
    return NOT_HELD if gap.value < -2 * gap.error else HELD


def worse(gap: Estimate) -> str:
    """Verdict on the claim that a method is worse than another, from the difference."""
    return verdict(Estimate(-gap.value, gap.error))


def claims(runs: Runs) -> Iterator[Claim]:
    """Triples (claim, verdict, numbers); claims whose runs are not finished are left out."""
    like = "With a consistent teacher, offline distillation performs like live distillation"
    for offline, live, where in (
        ("offline", "live", "early student"),
        ("late_offline", "late_live", "late student"),
        ("gentle_offline", "gentle_live", "late student, a tenth of the learning rate, the paper's sampling"),
    ):
        if runs.has(offline, live):
            yield _comparison(runs, f"{like}: {where}.", [(offline, live)], not_worse)
    if runs.has("offline", "live", "offline_second", "live_second"):
        yield _comparison(
            runs,
            "Another teacher than that of the SFT stage is worse, live and offline.",
            [("live_second", "live"), ("offline_second", "offline")],
            worse,
        )
        yield _comparison(
            runs,
            "With an inconsistent teacher, offline distillation does not match live distillation.",
            [("offline_second", "live_second")],
            worse,
        )
    yield from _gradients(runs)
    yield from _drift(runs)
    yield from _efficiency(runs)
    yield (
        "Results on mathematics and code, up to a 30B mixture of experts.",
        UNTESTABLE,
        "One synthetic task and small models.",
    )


OURS = (
    (
        "Offline, the reverse KL over the teacher's stored top tokens performs like TRL's live full KL.",
        ("offline_topk", "live_full"),
        not_worse,
    ),
    (
        "It performs at least as well as live distillation on sampled tokens.",
        ("offline_topk", "live"),
        not_worse,
    ),
    (
        "The same from the late student, against live distillation on sampled tokens.",
        ("late_offline_topk", "late_live"),
        not_worse,
    ),
    (
        "What sets the paper's loss apart from live distillation is the missing ratio to the rollout policy: with "
        "it, offline distillation on sampled tokens performs like live distillation.",
        ("offline_ratio", "live"),
        not_worse,
    ),
    (
        "Offline, it performs at least as well as the loss on sampled tokens.",
        ("offline_topk", "offline"),
        not_worse,
    ),
    (
        "With that loss, too, the second teacher is worse.",
        ("offline_topk_second", "offline_topk"),
        worse,
    ),
    (
        "As many rollouts of a quarter of the prompts, 4 each, perform as well.",
        ("offline_4", "offline"),
        not_worse,
    ),
    (
        "Rollouts at temperature 0.7 and top-p 0.9 perform at least as well as at temperature 1.",
        ("offline_paper", "offline"),
        not_worse,
    ),
)


def ours(runs: Runs) -> Iterator[Claim]:
    """The same for what this package adds."""
    for claim, pair, judge in OURS:
        if runs.has(*pair):
            yield _comparison(runs, claim, [pair], judge)
    offline = [name for name in runs.by_arm if runs.arm(name).offline]
    wrong = [name for name in offline if runs.arm(name).data.teacher == "second"]
    if wrong:
        caught = [name for name in wrong if "teacher" in runs.findings(name)]
        false_alarms = [name for name in offline if name not in wrong and runs.findings(name)]
        yield (
            "`check_teacher_consistency` tells the second teacher from the first before training.",
            HELD if len(caught) == len(wrong) and not false_alarms else NOT_HELD,
            f"An error in {len(caught)} of {len(wrong)} arms with the second teacher, and in {len(false_alarms)} of "
            f"{len(offline) - len(wrong)} with the first.",
        )


def _comparison(runs: Runs, claim: str, pairs: list[tuple[str, str]], judge) -> Claim:
    words, numbers = [], []
    for first, second in pairs:
        gaps = {decoding: runs.gap(first, second, decoding) for decoding in DECODINGS}
        at_floor = all(runs.rate(name, decoding).value < FLOOR for name in (first, second) for decoding in DECODINGS)
        words += [UNTESTABLE if at_floor else judge(gap) for gap in gaps.values()]
        shown = ", ".join(f"{MEASURES[decoding]} {gap.signed()}" for decoding, gap in gaps.items())
        floor = " (neither can do the task any more)" if at_floor else ""
        numbers.append(f"{runs.arm(first).label} minus {runs.arm(second).label}: {shown}{floor}")
    return claim, all_of(words), f"{'. '.join(numbers)}."


def _gradients(runs: Runs) -> Iterator[Claim]:
    names = [name for name in runs.by_arm if runs.arm(name).probed]
    consistent = [name for name in names if runs.arm(name).data.teacher == "first"]
    if not consistent:
        return
    last = runs.points[-1]
    far = [name for name in consistent if runs.probe(name, last, "relative").value > DISCREPANCY_BAR]
    parts = []
    for name in names:
        shown = [
            f"step {step} {runs.probe(name, step, 'relative')} (chance {runs.probe(name, step, 'chance_relative')}, "
            f"cosine {runs.probe(name, step, 'cosine')})"
            for step in (0, last)
        ]
        parts.append(f"{runs.arm(name).label}: {', '.join(shown)}")
    yield (
        "With a consistent teacher the offline gradient stays close to the live one (the paper bounds the gap without "
        f"a number; bar of ours after training: {DISCREPANCY_BAR:g} of the norm of the live gradient).",
        all_of([NOT_HELD if name in far else HELD for name in consistent]),
        f"Norm of the difference by that of the live gradient: {'; '.join(parts)}.",
    )


def _drift(runs: Runs) -> Iterator[Claim]:
    pairs = [(f"{start}offline", f"{start}live") for start in ("", "late_", "gentle_")]
    pairs = [pair for pair in pairs if runs.has(*pair)]
    if not pairs:
        return
    gaps = {pair: runs.policy_gap(*pair, "kl_to_start") for pair in pairs}
    shown = [
        f"{runs.arm(first).label} {runs.policy(first, 'kl_to_start')}, {runs.arm(second).label} "
        f"{runs.policy(second, 'kl_to_start')}"
        for first, second in pairs
    ]
    yield (
        "Offline distillation regularises by itself: it drifts less from the SFT student than live distillation.",
        all_of([worse(gap) for gap in gaps.values()]),
        f"KL to the student before training, nats per token: {'; '.join(shown)}.",
    )


def _efficiency(runs: Runs) -> Iterator[Claim]:
    if not runs.has("offline", "live", "live_full"):
        return
    ratios = {live: runs.speedup("offline", live) for live in ("live", "live_full")}
    total = {live: runs.speedup("offline", live, one_time=True) for live in ("live", "live_full")}
    yield (
        f"Training is several times as efficient without a live teacher (4.0 times in the paper; bar here: "
        f"{SPEEDUP_BAR:g} times the tokens per second, without one-time costs).",
        HELD if all(ratio.value >= SPEEDUP_BAR for ratio in ratios.values()) else NOT_HELD,
        "; ".join(
            f"against {runs.arm(live).label} {ratios[live]}, with collecting and scoring {total[live]}"
            for live in ratios
        )
        + " (CPU time).",
    )

"""
Verdicts on the papers' claims, computed from the runs. A difference counts above 2 standard errors, see
[`~reproduce.runs.difference`]; "comparable" means a difference below that.
"""

from collections.abc import Iterator

import numpy as np

from reproduce.runs import Estimate, Runs, difference


HELD, NOT_HELD, UNTESTABLE = "held", "did not hold", "not testable here"
PAPER_ARM = "base_sft_0.5"  # the logit-averaging paper's setting: base policy trained, its SFT version as the anchor
ANCHOR_ARM = "base_base_0.5"
# Share of problems that exactly one policy solves from which we call it non-trivial; the paper's bar is not known
NONTRIVIAL = 0.05


def larger(gap: Estimate) -> bool:
    return gap.value > 2 * gap.error


def comparable(gap: Estimate) -> bool:
    return abs(gap.value) <= 2 * gap.error


def _verdict(held: bool) -> str:
    return HELD if held else NOT_HELD


def claims(runs: Runs) -> Iterator[tuple[str, str, str]]:
    """Triples (claim, verdict, numbers); claims whose arms have no finished run are left out."""
    for needed, check in _CHECKS:
        if all(name in runs.by_arm for name in needed):
            yield check(runs)
    yield (
        "The same holds for three datasets and three model sizes (Figures 2-5).",
        UNTESTABLE,
        "One synthetic task and one pair of small models.",
    )


def _against(runs: Runs, other: str) -> tuple[Estimate, str]:
    gap = difference(runs.final(PAPER_ARM, "mixed"), runs.final(other, "deployed"))
    ours, theirs = runs.rate(PAPER_ARM, "mixed"), runs.rate(other, "deployed")
    return gap, f"{ours} against {theirs} ({gap.signed()})"


def _kl_grpo(runs: Runs) -> tuple[str, str, str]:
    gap, numbers = _against(runs, "grpo_kl")
    kind = "higher" if larger(gap) else "comparable" if comparable(gap) else "lower"
    return (
        "Fixed mixing, base policy with SFT anchor, is higher than or comparable to KL-regularised GRPO that starts "
        "from the SFT policy (Figures 2-5).",
        _verdict(kind != "lower"),
        f"{numbers}: {kind}.",
    )


def _plain_grpo(runs: Runs) -> tuple[str, str, str]:
    (sft, sft_text), (base, base_text) = _against(runs, "grpo"), _against(runs, "base_grpo")
    return (
        "Fixed mixing outperforms GRPO without a KL term, whether GRPO starts from the SFT or from the base policy "
        "(Figure 3).",
        _verdict(larger(sft) and larger(base)),
        f"From SFT: {sft_text}. From base: {base_text}; plain GRPO from the base policy got a mean rollout reward of "
        f"{_rollout_reward(runs, 'base_grpo'):.3f}.",
    )


def _anchor(runs: Runs) -> tuple[str, str, str]:
    gap, numbers = _against(runs, ANCHOR_ARM)
    return (
        "An SFT anchor beats the base model as anchor (Figure 8).",
        _verdict(larger(gap)),
        f"{numbers}. The mean rollout reward with the base anchor was {_rollout_reward(runs, ANCHOR_ARM):.3f}"
        + (": this base model never writes the box, so nothing could be learned, a starker case than the paper's."
           if _rollout_reward(runs, ANCHOR_ARM) < 0.005 else "."),
    )  # fmt: skip


def _training_helps(runs: Runs) -> tuple[str, str, str]:
    before, after = runs.before(PAPER_ARM, "mixed"), runs.final(PAPER_ARM, "mixed")
    gap = difference(after, before)
    return (
        "Training the mixed objective improves the mixed policy over mixing without training.",
        _verdict(larger(gap)),
        f"{before.mean():.3f} before, {runs.rate(PAPER_ARM, 'mixed')} after ({gap.signed()}).",
    )


def _pattern_1(runs: Runs) -> tuple[str, str, str]:
    reference = runs.arms[PAPER_ARM].reference
    fmt = difference(runs.alone(reference, "format"), runs.final(PAPER_ARM, "student", "format"))
    solve = difference(runs.final(PAPER_ARM, "student"), runs.alone(reference))
    answer = difference(runs.final(PAPER_ARM, "student", "answer"), runs.alone(reference, "answer"))
    return (
        "Pattern 1: the SFT reference is better at format, the trained policy at reasoning (Tables 1, 2).",
        f"format half {_verdict(larger(fmt))}, reasoning half {_verdict(larger(solve))} as the paper scores it",
        f"Format: reference − trained {fmt.signed()}. Right and in the format (the paper's measure): trained − "
        f"reference {solve.signed()}. Right in any format: {answer.signed()}, "
        f"{'where the trained policy is the better reasoner' if larger(answer) else 'not larger either'}.",
    )


def _pattern_2(runs: Runs) -> tuple[str, str, str]:
    student, reference = runs.final(PAPER_ARM, "student"), runs.alone(runs.arms[PAPER_ARM].reference)
    only_student = float(np.mean(student * (1 - reference)))
    only_reference = float(np.mean((1 - student) * reference))
    return (
        "Pattern 2: exactly one of the two policies is right on a non-trivial share of problems (Table 3).",
        _verdict(only_student + only_reference >= NONTRIVIAL),
        f"{only_student + only_reference:.3f} of the problems (only the trained policy {only_student:.3f}, only the "
        f"reference {only_reference:.3f}); our bar is {NONTRIVIAL}.",
    )


def _adaptive(runs: Runs) -> tuple[str, str, str]:
    fixed = [name for name in ("mixed_0.1", "mixed_0.3", "mixed_0.5") if name in runs.by_arm]
    gaps = {name: difference(runs.final("adaptive", "mixed"), runs.final(name, "mixed")) for name in fixed}
    numbers = "; ".join(f"minus {runs.arms[name].label} {gap.signed()}" for name, gap in gaps.items())
    weights = np.mean([run["teacher_weight"][-1] for run in runs.by_arm["adaptive"]])
    best = max(fixed, key=lambda name: runs.rate(name, "mixed").value)
    return (
        "Adaptive and fixed mixing end comparable (Figure 6; here with the stronger reference).",
        _verdict(comparable(gaps[best])),
        f"Adaptive {runs.rate('adaptive', 'mixed')}, {numbers} (judged against {runs.arms[best].label}); last weight "
        f"{weights:.2f}.",
    )


def _overhead(runs: Runs) -> tuple[str, str, str]:
    tokens = runs.cost("adaptive", "validation_tokens") / runs.cost("adaptive", "rollout_tokens")
    return (
        "The validation decodes of adaptive mixing add only a small overhead to the rollouts.",
        UNTESTABLE,
        f"The share is set by the sizes chosen: 2 x 32 validation decodes to 128 rollouts add {tokens:.0%} to the "
        "decoded tokens here.",
    )


def _logits_or_probs(runs: Runs) -> tuple[str, str, str]:
    gap = difference(runs.final("mixed_0.3", "mixed"), runs.final("probs_0.3", "mixed"))
    start = difference(runs.before("mixed_0.3", "mixed"), runs.before("probs_0.3", "mixed"))
    return (
        "Logit mixing beats probability mixing inside training (Figure 9; here at equal weight 0.3, stronger "
        "reference).",
        _verdict(larger(gap)),
        f"{runs.rate('mixed_0.3', 'mixed')} against {runs.rate('probs_0.3', 'mixed')} ({gap.signed()}); before "
        f"training {start.signed()}.",
    )


def _fusion(runs: Runs) -> tuple[str, str, str]:
    gap = difference(runs.final("decay_0.5", "student"), runs.final("grpo", "student"))
    return (
        "Logit fusion: the student alone, trained with a decaying teacher weight, ends above plain GRPO of equal "
        "steps.",
        _verdict(larger(gap)),
        f"{runs.rate('decay_0.5', 'student')} against {runs.rate('grpo', 'student')} ({gap.signed()}).",
    )


def _rollout_reward(runs: Runs, name: str) -> float:
    return float(np.mean([run["rollout_reward"] for run in runs.by_arm[name]]))


_CHECKS = [
    ((PAPER_ARM, "grpo_kl"), _kl_grpo),
    ((PAPER_ARM, "grpo", "base_grpo"), _plain_grpo),
    ((PAPER_ARM, ANCHOR_ARM), _anchor),
    ((PAPER_ARM,), _training_helps),
    ((PAPER_ARM,), _pattern_1),
    ((PAPER_ARM,), _pattern_2),
    (("adaptive", "mixed_0.1"), _adaptive),
    (("adaptive",), _overhead),
    (("mixed_0.3", "probs_0.3"), _logits_or_probs),
    (("decay_0.5", "grpo"), _fusion),
]

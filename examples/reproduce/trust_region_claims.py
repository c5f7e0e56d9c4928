"""
Verdicts on the claims of the trust-region paper (https://huggingface.co/papers/2605.31159), computed from the runs of
`trust_region.py`. A difference counts above 2 standard errors; where the paper ranks methods, a difference below that
is "did not hold: no difference", and one above it in the other direction "did not hold: the reverse".
"""

from collections.abc import Iterator

from reproduce.runs import Estimate, difference, over_seeds
from reproduce.trust_region_runs import Runs


HELD, NO_DIFFERENCE, REVERSE = "held", "did not hold: no difference", "did not hold: the reverse"
NOT_HELD, UNTESTABLE = "did not hold", "not testable here"
MEASURES = {"sampled": "T = 1", "greedy": "greedy"}
# Teacher entropies after the warmup that are closer than this share of vanilla OPD's count as aligned
ALIGNED = 0.1
Claim = tuple[str, str, str]


def verdict(gap: Estimate) -> str:
    """What a difference says about the claim that it is positive."""
    if gap.value > 2 * gap.error:
        return HELD
    return REVERSE if gap.value < -2 * gap.error else NO_DIFFERENCE


def all_of(verdicts: list[str]) -> str:
    """Verdict of a claim that makes several comparisons."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    reversed_ones = f", {count} the reverse" if (count := verdicts.count(REVERSE)) else ""
    return f"{NOT_HELD} throughout: {verdicts.count(HELD)} of {len(verdicts)} comparisons did{reversed_ones}"


def trend(gaps: list[Estimate], overall: Estimate) -> str:
    """Verdict of a claim that a quantity rises: overall, and with no step down."""
    if verdict(overall) == HELD and any(verdict(gap) == REVERSE for gap in gaps):
        return f"{NOT_HELD}: it rises overall but not at every step"
    return verdict(overall)


def claims(runs: Runs) -> Iterator[Claim]:
    """Triples (claim, verdict, numbers); claims whose runs are not finished are left out."""
    if runs.by_arm:
        yield from _training(runs)
    if runs.probes:
        yield from _support(runs)
        yield from _prefixes(runs)
    yield (
        "The advantage holds for two pairs of Qwen3 models and seven benchmarks (Table 1).",
        UNTESTABLE,
        "One synthetic task and one pair of small models.",
    )


# Training


def _training(runs: Runs) -> Iterator[Claim]:
    if not runs.trust_regions():
        return
    if rivals := [name for name in runs.by_arm if name not in runs.trust_regions()]:
        yield _best(runs, rivals)
    if "vanilla" in runs.by_arm:
        yield _above(runs, "vanilla", "Trust-region rollouts end above vanilla OPD (Table 1).", "best")
    if "fixed_0.01" in runs.by_arm:
        claim = "Annealing the budget is better than keeping it fixed: trust region above fixed ε (Table 1)."
        yield _above(runs, "fixed_0.01", claim, "best", like="trust_0.01")
        claim = "A persistent fixed ε does not finish as high as the annealed trust region (Figure 2)."
        yield _above(runs, "fixed_0.01", claim, "last", like="trust_0.01")
    if "sft" in runs.by_arm:
        claim = "SFT warmup does not finish as high as the trust region (Figure 2)."
        yield _above(runs, "sft", claim, "last")
    if "skd" in runs.by_arm:
        claim = "The strongest trust region is above SKD (Figures 5, 6; here with one setting of SKD)."
        yield _above(runs, "skd", claim, "best")
    if "vanilla" in runs.by_arm:
        yield _early(runs)
        yield from _entropy(runs)


def _best(runs: Runs, rivals: list[str]) -> Claim:
    ours = runs.best_trust_region("sampled", "best")
    gaps = {name: runs.gap(ours, name, "sampled", "best") for name in rivals}
    strongest = max(rivals, key=lambda name: runs.rate(name, "sampled", "best").value)
    first = runs.gap(ours, strongest, "sampled", "best").value > 0
    word = all_of([verdict(gap) for gap in gaps.values()])
    numbers = "; ".join(f"minus {runs.arms[name].label} {gap.signed()}" for name, gap in gaps.items())
    greedy = runs.best_trust_region("greedy", "best")
    top = max(runs.by_arm, key=lambda name: runs.rate(name, "greedy", "best").value)
    return (
        "The trust region attains the best score among the compared methods (Table 1).",
        word,
        f"T = 1, best checkpoint: {runs.arms[ours].label} {runs.rate(ours, 'sampled', 'best')}, "
        f"{'ranked first' if first else 'behind ' + runs.arms[strongest].label}; {numbers}. Greedy: "
        f"{runs.arms[greedy].label} {runs.rate(greedy, 'greedy', 'best')}, the best of all arms is "
        f"{runs.arms[top].label} with {runs.rate(top, 'greedy', 'best')}.",
    )


def _above(runs: Runs, other: str, claim: str, checkpoint: str, like: str | None = None) -> Claim:
    """The best budget, or the one `like` it, against another arm; with the numbers of all budgets and of greedy."""
    ours = like if like in runs.by_arm else runs.best_trust_region("sampled", checkpoint)
    parts = []
    for decoding, label in MEASURES.items():
        gaps = [
            f"{runs.arms[name].settings['kl_budget']:g}: {runs.gap(name, other, decoding, checkpoint).signed()}"
            for name in runs.trust_regions()
        ]
        parts.append(f"{label}: {runs.arms[other].label} {runs.rate(other, decoding, checkpoint)}, "
                     f"trust region minus that at budget {', '.join(gaps)}")  # fmt: skip
    gap = runs.gap(ours, other, "sampled", checkpoint)
    return (
        claim,
        verdict(gap),
        f"Judged at T = 1, {checkpoint} checkpoint, with {runs.arms[ours].label}: {gap.signed()}. "
        + ". ".join(parts)
        + ".",
    )


def _early(runs: Runs) -> Claim:
    step = runs.points[0]
    gaps = {}
    for name in (name for name in runs.by_arm if name != "vanilla"):
        gaps[name] = _at_step(runs, name, "sampled", step)
    faster = [name for name, gap in gaps.items() if verdict(gap) == HELD]
    numbers = "; ".join(f"{runs.arms[name].label} {gap.signed()}" for name, gap in gaps.items())
    return (
        "Several interventions rise faster than vanilla OPD at the start (Figure 2).",
        HELD if len(faster) > 1 else NOT_HELD,
        f"T = 1 after {step} steps, minus vanilla OPD: {numbers}.",
    )


def _at_step(runs: Runs, name: str, decoding: str, step: int) -> Estimate:
    return difference(runs.scores(name, decoding, step), runs.scores("vanilla", decoding, step))


def _entropy(runs: Runs) -> Iterator[Claim]:
    during, after = slice(0, runs.warmup), slice(runs.warmup, None)
    vanilla = runs.metric("vanilla", "blend/teacher_entropy")
    gaps, later = {}, {}
    for name in runs.trust_regions():
        label = f"{runs.arms[name].settings['kl_budget']:g}"
        gaps[label] = runs.metric_gap(name, "vanilla", "blend/teacher_entropy", during)
        later[label] = runs.metric_gap(name, "vanilla", "blend/teacher_entropy", after)
    lower = [verdict(Estimate(-gap.value, gap.error)) for gap in gaps.values()]
    yield (
        "During the warmup the teacher's entropy on the visited prefixes is lower under the trust region than under "
        "vanilla OPD (Figure 3).",
        all_of(lower),
        f"Vanilla OPD {vanilla[:, during].mean():.4f} nats over steps 1-{runs.warmup}; trust region minus that, by "
        f"budget: {_listed(gaps)}.",
    )
    if runs.steps > runs.warmup:
        level = float(vanilla[:, after].mean())
        aligned = [abs(gap.value) <= max(2 * gap.error, ALIGNED * level) for gap in later.values()]
        yield (
            "After the warmup the two entropies are largely aligned (Figure 3).",
            HELD if all(aligned) else NOT_HELD,
            f"Vanilla OPD {level:.4f} nats; trust region minus that, by budget: {_listed(later)}. Our bar: within 2 "
            f"standard errors or {ALIGNED:.0%}.",
        )
    points = [step for step in runs.points if step > runs.warmup]
    if points:
        ours = runs.best_trust_region("sampled", "best")
        above = {step: _at_step(runs, ours, "sampled", step) for step in points}
        numbers = "; ".join(f"step {step} {gap.signed()}" for step, gap in above.items())
        yield (
            "After the warmup the accuracy stays above that of vanilla OPD (Figure 3).",
            all_of([verdict(gap) for gap in above.values()]),
            f"T = 1, {runs.arms[ours].label} minus vanilla OPD: {numbers}.",
        )


def _listed(gaps: dict[str, Estimate]) -> str:
    return "; ".join(f"{label} {gap.value:+.4f} ± {gap.error:.4f}" for label, gap in gaps.items())


# Probes


def _support(runs: Runs) -> Iterator[Claim]:
    budgets = [policy for policy in runs.policies if policy != "teacher"]
    quantities = {
        "teacher_logp": ("The teacher's log-probability of the rollouts rises with the budget (Figure 7).", 1),
        "reward": ("The reward of the rollouts rises with the budget (Figure 7).", 1),
        "auroc": ("The AUROC of the teacher's support score falls as the budget rises (Figure 7).", -1),
    }
    for key, (claim, sign) in quantities.items():
        steps = [runs.support_gap(b, a, key) for a, b in zip(budgets, budgets[1:], strict=False)]
        overall = runs.support_gap(budgets[-1], budgets[0], key)
        word = trend([_signed(gap, sign) for gap in steps], _signed(overall, sign))
        values = "; ".join(f"{budget} {over_seeds(runs.support(budget, key))}" for budget in budgets)
        yield (
            claim,
            word if sign > 0 else word.replace("it rises", "it falls"),
            f"By budget: {values}; from the first to the last {overall.signed()}. The teacher's own rollouts: "
            f"{over_seeds(runs.support('teacher', key))}.",
        )


def _signed(gap: Estimate, sign: int) -> Estimate:
    return Estimate(sign * gap.value, gap.error)


def _prefixes(runs: Runs) -> Iterator[Claim]:
    for model in ("teacher", "student"):
        gains = {
            (policy, length): runs.prefix_gain(policy, model, length)
            for policy in runs.prefix_policies
            for length in runs.lengths
        }
        numbers = ". ".join(
            f"Budget {policy}: "
            + ", ".join(f"{length} tokens {gains[policy, length].signed()}" for length in runs.lengths)
            for policy in runs.prefix_policies
        )
        yield (
            f"Trust-region prefixes give higher success than vanilla ones at all lengths when the {model} continues "
            "them (Figure 4).",
            all_of([verdict(gain) for gain in gains.values()]),
            f"{numbers}.",
        )

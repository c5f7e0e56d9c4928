"""
Trust-region behaviour blending and speculative distillation in slow, plain float64: lists, loops and `math`.

Written from arXiv 2605.31159 (Eq. 1-2, App. A.2, App. G). Nothing of `trl_blend` or torch is imported. A row of logits
is a list of floats, of which some may be `-inf`.
"""

import math
from collections.abc import Sequence


Row = Sequence[float]


def log_softmax(logits: Row) -> list[float]:
    """`log p_v = z_v - log Σ e^z`."""
    top = max(logits)
    total = math.fsum(math.exp(z - top) for z in logits)
    return [z - top - math.log(total) for z in logits]


def softmax(logits: Row) -> list[float]:
    return [math.exp(logprob) for logprob in log_softmax(logits)]


def kl(logprobs: Row, other: Row) -> float:
    """`KL(p‖q) = Σ p (log p - log q)` of two rows of log-probabilities, with `0 log 0 = 0`."""
    terms = []
    for p, q in zip(logprobs, other, strict=True):
        if p == -math.inf:
            continue
        if q == -math.inf:
            return math.inf
        terms.append(math.exp(p) * (p - q))
    return math.fsum(terms)


def path(student: Row, teacher: Row, weight: float) -> list[float] | None:
    """
    `log μ_w` with `μ_w ∝ p_S^(1-w) p_T^w` (Eq. 2) and `0^0 = 1`; None where the product has no mass.

    The exponents are taken of log-probabilities relative to the path's largest one, so that nothing underflows.
    """
    if weight == 0.0:
        return log_softmax(student)
    if weight == 1.0:
        return log_softmax(teacher)
    allowed = [s > -math.inf and t > -math.inf for s, t in zip(student, teacher, strict=True)]
    if not any(allowed):
        return None
    mixed = [(1.0 - weight) * s + weight * t if a else -math.inf for s, t, a in zip(student, teacher, allowed)]
    return log_softmax(mixed)


def path_kl(student: Row, teacher: Row, weight: float) -> float:
    """`KL(μ_w‖p_S)`."""
    mu = path(student, teacher, weight)
    return math.inf if mu is None else kl(mu, log_softmax(student))


def path_teacher_kl(student: Row, teacher: Row, weight: float) -> float:
    """`KL(μ_w‖p_T)`."""
    mu = path(student, teacher, weight)
    return math.inf if mu is None else kl(mu, log_softmax(teacher))


def path_slope(student: Row, teacher: Row, weight: float) -> float:
    """`d KL(μ_w‖p_S) / dw = w·Var_{μ_w}[log p_T - log p_S]` (Eq. 13-14), for `0 < w < 1`."""
    mu = path(student, teacher, weight)
    assert mu is not None
    terms = [(math.exp(m), t - s) for m, s, t in zip(mu, student, teacher, strict=True) if m > -math.inf]
    mean = math.fsum(p * r for p, r in terms)
    return weight * math.fsum(p * (r - mean) ** 2 for p, r in terms)


def largest_weight(student: Row, teacher: Row, budget: float, halvings: int = 50) -> float:
    """`β* = max {w in [0, 1] : KL(μ_w‖p_S) <= budget}`, the paper's binary search; 0 at budget 0."""
    if budget == 0.0:
        return 0.0
    if path_kl(student, teacher, 1.0) <= budget:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = 0.5 * (low + high)
        if path_kl(student, teacher, middle) <= budget:
            low = middle
        else:
            high = middle
    return low


def chernoff_weight(student: Row, teacher: Row, halvings: int = 60) -> float:
    """The `w` in `[0, 1]` with `E_{μ_w}[log p_T - log p_S] = 0`, by bisection; the nearer end where there is none."""
    p, q = log_softmax(student), log_softmax(teacher)

    def mean(weight: float) -> float:
        both = [s if s == -math.inf or t > -math.inf else -math.inf for s, t in zip(p, q, strict=True)]
        other = [t if t == -math.inf or s > -math.inf else -math.inf for s, t in zip(p, q, strict=True)]
        mu = path(both, other, weight)
        assert mu is not None
        return math.fsum(math.exp(m) * (t - s) for m, s, t in zip(mu, p, q, strict=True) if m > -math.inf)

    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if mean(middle) < 0 else (low, middle)
    return 0.5 * (low + high)


def contrastive_distribution(expert: Row, amateur: Row, alpha: float, beta: float) -> list[float]:
    """
    Probability of each token under contrastive decoding (arXiv 2309.09117): `p_E (p_E / p_A)^beta`, normalised over
    the tokens with `p_E >= alpha max p_E`. One that the amateur excludes is excluded, unless none is left.
    """
    p, q = softmax(expert), softmax(amateur)
    plausible = [pe >= alpha * max(p) for pe in p]
    kept = [yes and qa > 0 for yes, qa in zip(plausible, q, strict=True)]
    if any(kept):
        mass = [pe * (pe / qa) ** beta if keep else 0.0 for pe, qa, keep in zip(p, q, kept, strict=True)]
    else:
        mass = [pe if yes else 0.0 for pe, yes in zip(p, plausible, strict=True)]
    return [one / math.fsum(mass) for one in mass]


def speculative_distribution(student: Row, teacher: Row, top_k: int, teacher_temperature: float) -> list[float]:
    """
    Probability of each token under interleaved sampling with `γ = 1`, by following both stages.

    Every token the student may draw is kept if it is among the teacher's `top_k`, else replaced by each token of the
    tempered teacher with its probability.
    """
    p, q = softmax(student), softmax([t / teacher_temperature for t in teacher])
    ranked = sorted((v for v in range(len(teacher)) if teacher[v] > -math.inf), key=lambda v: -teacher[v])
    outcome: list[list[float]] = [[] for _ in p]
    for drawn, probability in enumerate(p):
        if drawn in ranked[:top_k]:
            outcome[drawn].append(probability)
            continue
        for replacement, share in enumerate(q):
            outcome[replacement].append(probability * share)
    return [math.fsum(shares) for shares in outcome]

"""
The KL trust region around the student: how far towards the teacher a behaviour policy may go at one prefix.

Paper: Trust-Region behavior Blending for On-Policy Distillation, arXiv 2605.31159, Eq. 1-2 and App. E. The paper finds
the weight by binary search; here a bracketed Newton iteration on `√KL` needs far fewer passes over the vocabulary.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trl_blend.errors import ConfigError
from trl_blend.ops._tilt import TiltPath, TiltPoint, evaluate, exceeds_float32, tilt_path


# Elements per block of rows and thread: small enough for a cache, large enough to hide the cost of the scalar steps
_CPU_BLOCK = 2**19
_DEVICE_BLOCK = 2**28
_START_STEPS = 2


class TrustRegionSolution(NamedTuple):
    """
    Output of [`solve_trust_region`]. No entry carries a gradient.

    Args:
        weight (`torch.Tensor` of shape `(...)`):
            Teacher weight `β*` of each row, in `[0, 1]`; float32, or float64 where an input is.
        kl (`torch.Tensor` of shape `(...)`):
            `KL(μ‖p_S)` at that weight, in nats.
        feasible (`torch.Tensor` of shape `(...)`, `bool`):
            Whether the teacher itself lies in the trust region, so that `weight` is 1. False at budget 0.
        iterations (`torch.Tensor` of shape `(...)`, `int32`):
            Passes over the vocabulary: one per point `μ_w` that was evaluated, the two ends `w = 0` and `w = 1`
            included.
    """

    weight: Tensor
    kl: Tensor
    feasible: Tensor
    iterations: Tensor


class TrustRegionStatistics(NamedTuple):
    """Output of [`solve_with_statistics`]: a solution, and what else its passes have measured, of shape `(...)`."""

    solution: TrustRegionSolution
    kl_teacher: Tensor  # `KL(μ‖p_T)`; infinite where the student is kept and allows a token the teacher excludes
    log_normalizer: Tensor  # `logsumexp((1 - w) z_S + w z_T)`


def solve_trust_region(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kl_budget: float | Tensor,
    *,
    rtol: float = 1e-3,
    max_iterations: int = 60,
) -> TrustRegionSolution:
    r"""
    Finds how far towards the teacher a behaviour policy may go without leaving a KL budget of the student, per row.
    Use it to blend rollouts at a fixed distance from the student; the paper uses budgets of 0.001 to 0.05 nats.

    $$
    \mu^* = \arg\min_\mu \mathrm{KL}(\mu \| p_T) \ \text{s.t.}\ \mathrm{KL}(\mu \| p_S) \le \varepsilon
    \quad\Rightarrow\quad \mu_\beta \propto p_S^{1-\beta} p_T^{\beta}, \qquad
    \beta^* = \max \{\beta \in [0, 1] : \mathrm{KL}(\mu_\beta \| p_S) \le \varepsilon\}
    $$

    (Eq. 1-2 of arXiv 2605.31159.) The behaviour logits are `(1 - w) z_S + w z_T`; at weight 0 the student's and at
    weight 1 the teacher's own, also where a model excludes tokens (`-inf`).

    What holds, for any finite or `-inf` logits:

    * `KL(μ‖p_S) <= kl_budget·(1 + rtol)`, evaluated in float64 at the returned weight.
    * The weight is exactly 0 at budget 0, and exactly 1 where the teacher is feasible.
    * Elsewhere the weight is within `rtol` of `β*`, unless the KL hardly depends on it (`β·dKL/dβ` below a fiftieth of
      the KL; then neither does `μ`), and the KL is within `rtol` of the budget, unless that takes more digits of the
      weight than its type has (log-ratios of thousands).
    * Up to these tolerances both grow with the budget.

    A token that one model excludes has no mass inside the path. If the teacher excludes so much of the student's mass
    that `-log` of the rest reaches the budget, the weight is 0. If it allows a token that the student excludes, its KL
    is infinite, and where all of the path up to it is feasible the weight is the largest number below 1.

    With `r = log p_T - log p_S` and `A(β) = log Σ p_S e^{βr}` the divergence is `βA'(β) - A(β)` and its derivative
    `β·Var_{μ_β}[r]` (Eq. 12-14). The root is found by Newton's method on `√KL`, which is nearly linear in `β`, inside
    a bracket, with bisection whenever a step leaves it. It starts from `√(2ε / Var_{p_S}[r])`, corrected for the
    skewness of `r`. Rows are solved in float32; those it is too coarse for (log-ratios above 48, or a budget below
    `1e-12 / rtol²`) in float64. On an accelerator nothing waits for the device but one check before the iterations and
    one per iteration. Not done here: temperature (divide both logits by it first) and vocabulary alignment.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the student at the sampling temperature.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the teacher at the sampling temperature.
        kl_budget (`float` or `torch.Tensor`):
            Budget `ε` in nats, one or one per row (broadcast to the leading shape); `inf` gives the teacher. Entries
            of a tensor are not checked: one that is not positive gives weight 0.
        rtol (`float`, *optional*, defaults to `1e-3`):
            Relative tolerance, from 1e-6 to 0.1.
        max_iterations (`int`, *optional*, defaults to `60`):
            Largest number of Newton or bisection steps. The guarantee on the KL holds however few they are.

    Returns:
        [`TrustRegionSolution`]: Weight, KL, feasibility and passes of each row. No gradient flows. A row that is no
        distribution (NaN, `inf` or all `-inf`) has weight and KL NaN.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the budget is negative or NaN, `rtol` or `max_iterations` is out of
            range, or the two logits differ in shape.
    """
    return solve_with_statistics(
        student_logits, teacher_logits, kl_budget, rtol=rtol, max_iterations=max_iterations
    ).solution


def acceptance_bound(kl_budget: float) -> float:
    r"""
    Smallest probability with which a token that the student drafts is accepted as one of the blend, by speculative
    sampling, or 0 where that is negative:

    $$
    \sum_v \min(\mu(v), p_S(v)) = 1 - TV(\mu, p_S) \ge 1 - \sqrt{KL(\mu \,\|\, p_S) / 2} \ge 1 - \sqrt{\varepsilon / 2}
    $$

    at every prefix, by Pinsker's inequality.

    Args:
        kl_budget (`float`):
            Budget ε, in nats.
    """
    return max(0.0, 1.0 - math.sqrt(kl_budget / 2.0))


@torch.no_grad()
def solve_with_statistics(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kl_budget: float | Tensor,
    *,
    rtol: float = 1e-3,
    max_iterations: int = 60,
) -> TrustRegionStatistics:
    """[`solve_trust_region`], with the by-products that a rule reports. Arguments and errors are the same."""
    validate_trust_region(kl_budget, rtol)
    if max_iterations < 0:
        raise ConfigError(f"`max_iterations` is {max_iterations}. Set it to 0 or more.")
    if student_logits.shape != teacher_logits.shape:
        raise ConfigError(
            f"`student_logits` has shape {tuple(student_logits.shape)} and `teacher_logits` "
            f"{tuple(teacher_logits.shape)}. Align their vocabularies with `align_vocab` first."
        )
    shape, vocab_size = student_logits.shape[:-1], student_logits.shape[-1]
    dtype = torch.float64 if torch.float64 in (student_logits.dtype, teacher_logits.dtype) else torch.float32
    student, teacher = (logits.reshape(-1, vocab_size) for logits in (student_logits, teacher_logits))
    if not isinstance(kl_budget, Tensor):
        kl_budget = torch.full((), kl_budget, device=student.device, dtype=dtype)
    budget = kl_budget.to(device=student.device, dtype=dtype).expand(shape).reshape(-1)
    block = _CPU_BLOCK * torch.get_num_threads() if student.device.type == "cpu" else _DEVICE_BLOCK
    rows = max(1, block // vocab_size)
    blocks = [
        _solve_rows(s.to(dtype), t.to(dtype), e, rtol, max_iterations, dtype)
        for s, t, e in zip(*(torch.split(all_rows, rows) for all_rows in (student, teacher, budget)), strict=True)
    ]
    columns = [torch.cat(column).view(shape) for column in zip(*blocks, strict=True)]
    weight, kl, feasible, iterations, kl_teacher, normalizer = columns
    solution = TrustRegionSolution(weight, kl, feasible.bool(), iterations.int())
    return TrustRegionStatistics(solution, kl_teacher, normalizer)


def validate_trust_region(kl_budget: float | Tensor, rtol: float) -> None:
    """Refuse a budget or a tolerance out of range. A tensor of budgets is not read: its device would be waited for."""
    if not isinstance(kl_budget, Tensor) and not kl_budget >= 0.0:  # also catches NaN
        raise ConfigError(f"`kl_budget` is {kl_budget}. Set it to a number of nats, 0 or more.")
    if not 1e-6 <= rtol <= 0.1:
        raise ConfigError(f"`rtol` is {rtol}. Set it to a number between 1e-6 and 0.1.")


def _solve_rows(
    student: Tensor, teacher: Tensor, budget: Tensor, rtol: float, max_iterations: int, weight_dtype: torch.dtype
) -> list[Tensor]:
    """Weight, KL, feasibility, passes, KL to the teacher and log-normaliser of one block of rows."""
    exact = student.dtype == torch.float64
    path = tilt_path(student, teacher, exact)
    is_distribution = path.student_normalizer.isfinite() & path.teacher_normalizer.isfinite()
    # Rounding must not cost a row its teacher, whose KL may be no more than this
    room = budget * (1.0 + 8 * torch.finfo(budget.dtype).eps) - path.restriction_kl
    active = is_distribution & (room > 0.0)
    coarse = None
    if not exact:
        is_coarse = active & (exceeds_float32(path, rtol) | (budget < 1e-12 / rtol**2))
        coarse = is_coarse.nonzero().squeeze(-1)
        active &= ~is_coarse
    found = _search(path, budget, room, active, rtol, max_iterations, weight_dtype)
    weight, kl, feasible, *rest = _results(path, budget, *found, weight_dtype)
    broken = ~is_distribution
    results = [weight.masked_fill(broken, math.nan), kl.masked_fill(broken, math.nan), feasible & ~broken, *rest]
    if coarse is not None and len(coarse):
        z_s, z_t, e = (rows[coarse].double() for rows in (student, teacher, budget))
        for result, value in zip(results, _solve_rows(z_s, z_t, e, rtol, max_iterations, weight_dtype), strict=True):
            result[coarse] = value.to(result.dtype)
    return results


def _search(
    path: TiltPath,
    budget: Tensor,
    room: Tensor,
    active: Tensor,
    rtol: float,
    max_iterations: int,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, TiltPoint, Tensor]:
    """The weight of each row, the path's point there, and the passes it took."""
    slack = budget * (0.5 * rtol)
    result = low = torch.zeros_like(room)
    high = torch.ones_like(room)
    best = TiltPoint(low, low, path.moments[0], low)
    passes = torch.full_like(room, 2.0)
    guess, maybe_feasible = _start(path, room, slack)
    weight = torch.where(maybe_feasible, 1.0, guess)
    root_of_room = room.sqrt()
    buffer = torch.empty_like(path.probs)
    for _ in range(max_iterations):
        if not bool(active.any()):
            break
        # Evaluated at a number of the type that is returned, so that the result is what was evaluated
        weight = weight.to(weight_dtype).to(room.dtype)
        point = evaluate(path, weight, buffer)
        passes += active
        is_below = point.kl <= room
        low, high = torch.where(is_below, weight, low), torch.where(is_below, high, weight)
        root = point.kl.sqrt()
        proposal = weight + (root_of_room - root) * 2.0 * root / (weight * point.variance)
        # The KL in the budget's tolerance, and the weight in its own
        is_settled = (proposal - weight).abs() <= 0.5 * rtol * weight
        is_done = (point.kl <= room + slack) & (((point.kl >= room - slack) & is_settled) | (weight == 1.0))
        # Without convergence it is the feasible end of the bracket that counts
        is_kept = active & (is_below | is_done)
        result = torch.where(is_kept, weight, result)
        best = TiltPoint(*(torch.where(is_kept, new, old) for new, old in zip(point, best, strict=True)))
        active = active & ~is_done & (high - low > 0.5 * rtol * low)
        # An infeasible teacher says less about the weight than the student's moments do
        proposal = torch.where(weight == 1.0, guess, proposal)
        inside = (proposal > low) & (proposal < high)
        weight = torch.where(inside, proposal, 0.5 * (low + high))
    return result, best, passes


def _start(path: TiltPath, room: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """A first weight below 1, and whether the teacher may be feasible: those rows go to 1 first and never miss it."""
    first, second, third = path.moments
    variance = second - first.square()
    end = path.teacher_normalizer - path.restricted_normalizer
    teacher_kl = path.teacher_mean - (end - path.offset)
    # The first sweep gives the teacher's KL only roughly, as a difference of numbers of this size
    scale = path.teacher_normalizer.abs() + path.restricted_normalizer.abs() + path.offset.abs() + second.sqrt()
    rounding = 1e-5 + 4e-7 * scale
    maybe_feasible = ~(teacher_kl > room + slack + rounding)
    # A third moment makes the variance grow along the path, roughly as V e^(ct) with c = κ_3 / V. Then
    # KL(w) ≈ V ∫_0^w t e^(ct) dt, whose root a few steps on the logarithms find without touching the vocabulary
    growth = (third - 3.0 * first * second) / variance
    weight = (2.0 * room / variance).sqrt().clamp(max=1.0)
    for _ in range(_START_STEPS):
        x = (growth * weight).clamp(-30.0, 30.0)
        slope = x.exp()
        series = 0.5 + x * (1.0 / 3.0 + x * (0.125 + x / 30.0))
        shape = torch.where(x.abs() < 0.1, series, ((x - 1.0) * slope + 1.0) / x.square())
        step = (room / (variance * weight.square() * shape)).log() * shape / slope
        weight = weight * step.clamp(-2.0, 1.0).exp()
    chord = (room / teacher_kl).sqrt()
    weight = torch.where((weight > 0.0) & (weight < 1.0), weight, chord)
    return torch.where((weight > 0.0) & (weight < 1.0), weight, 0.5), maybe_feasible


def _results(
    path: TiltPath, budget: Tensor, weight: Tensor, point: TiltPoint, passes: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    # All of the path is feasible, its end is not: an infinite KL fits no budget but an infinite one
    below = math.nextafter(1.0, 0.0) if dtype == torch.float64 else 1.0 - 2.0**-24
    weight = torch.where(path.teacher_is_outside & (weight == 1.0), below, weight)
    weight = torch.where(budget == math.inf, 1.0, weight)
    is_student, is_teacher = weight == 0.0, weight == 1.0
    kl = torch.where(is_student, 0.0, point.kl + path.restriction_kl)
    kl = torch.where(is_teacher & path.teacher_is_outside, math.inf, kl)
    # KL(μ‖p_T) = KL(μ‖p_S) - E_μ[log p_T - log p_S]
    ratio = point.mean + path.offset - (path.teacher_normalizer - path.student_normalizer)
    kl_teacher = torch.where(is_student & (path.restriction_kl > 0.0), math.inf, (kl - ratio).clamp(min=0.0))
    kl_teacher = torch.where(is_teacher, 0.0, kl_teacher)
    normalizer = path.restricted_normalizer + weight * path.offset + point.log_partition
    normalizer = torch.where(is_student, path.student_normalizer, normalizer)
    normalizer = torch.where(is_teacher, path.teacher_normalizer, normalizer)
    return [weight.to(dtype), kl.to(dtype), is_teacher, passes, kl_teacher.to(dtype), normalizer.to(dtype)]

"""The policy between student and teacher that is as far from the one as from the other: no budget has to be chosen."""

import torch
from torch import Tensor

from trl_blend.ops._tilt import evaluate, exceeds_float32, tilt_path


_TOLERANCE = 1e-4  # of the weight
_MAX_PASSES = 60  # over the vocabulary


@torch.no_grad()
def chernoff_weight(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""
    Finds the member of the path from student to teacher that is equally far from both, per row. Use it to blend
    without choosing a KL budget: where the two agree it costs nothing, where they do not it goes half of the way.

    $$
    \mu_\beta \propto p_S^{1-\beta} p_T^{\beta}, \qquad
    \mathrm{KL}(\mu_\beta \| p_S) = \mathrm{KL}(\mu_\beta \| p_T)
    \quad\Leftrightarrow\quad \mathbb{E}_{\mu_\beta}[\log p_T - \log p_S] = 0
    $$

    This is the minimum over `β` of `A(β) = log Σ p_S^{1-β} p_T^β`, whose negative is the Chernoff information of the
    two. `A` is convex with `A(0) = A(1) = 0`, so there is one root; it is found by Newton's method (the derivative is
    the variance of the log-ratio) inside a bracket, with bisection whenever a step leaves it. A token that one model
    excludes (`-inf`) has no mass inside the path; where the condition then has no root the weight is the nearer end.

    Args:
        student_logits, teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of both at the sampling temperature, with the same vocabulary.

    Returns:
        `torch.Tensor` of shape `(...)`: `β` in `[0, 1]`, to within 1e-4, float32 or, where an input is float64,
        float64, without gradient; NaN in a row that is no distribution. Where both policies are the same, any number.
    """
    shape, vocab_size = student_logits.shape[:-1], student_logits.shape[-1]
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    student, teacher = (logits.reshape(-1, vocab_size).to(dtype) for logits in (student_logits, teacher_logits))
    return _solve(student, teacher).view(shape)


def _solve(student: Tensor, teacher: Tensor) -> Tensor:
    exact = student.dtype == torch.float64
    path = tilt_path(student, teacher, exact)
    # E[log p_T - log p_S] is that of the centred ratio, and this
    shift = path.offset - (path.teacher_normalizer - path.student_normalizer)
    low, high = torch.zeros_like(shift), torch.ones_like(shift)
    weight = torch.full_like(shift, 0.5)
    active = torch.ones_like(shift, dtype=torch.bool)
    buffer = torch.empty_like(path.probs)
    for _ in range(_MAX_PASSES):
        point = evaluate(path, weight, buffer)
        mean = point.mean + shift
        low, high = torch.where(mean < 0, weight, low), torch.where(mean < 0, high, weight)
        proposal = weight - mean / point.variance
        proposal = torch.where((proposal > low) & (proposal < high), proposal, 0.5 * (low + high))
        active = active & ((proposal - weight).abs() > 0.1 * _TOLERANCE)
        weight = torch.where(active, proposal, weight)
        if not bool(active.any()):
            break
    broken = ~(path.student_normalizer.isfinite() & path.teacher_normalizer.isfinite())
    weight = weight.masked_fill(broken, torch.nan)
    if not exact:
        # The normalisers' difference is rounded to this: nothing where the policies differ, all where they hardly do
        rounding = 4e-7 * (path.student_normalizer.abs() + path.teacher_normalizer.abs() + path.offset.abs())
        is_coarse = exceeds_float32(path, _TOLERANCE) | (rounding > _TOLERANCE * path.moments[1])
        coarse = (is_coarse & ~broken).nonzero().squeeze(-1)
        if len(coarse):
            weight[coarse] = _solve(student[coarse].double(), teacher[coarse].double()).to(weight.dtype)
    return weight

"""
The path from student to teacher, `μ_w ∝ p_S^(1-w) p_T^w`, as an exponential tilt of the student.

With the centred log-ratio `r = z_T - z_S - c` the path is `μ_w = p_S e^(w r - A(w))`, and every quantity of one of its
points comes from three sums over the vocabulary. A KL of 1e-5 is the difference of terms of 1e-2 there, so the sums
are those of `p_S (e^(w r) - 1)`: near `w = 0` both the terms and their rounding errors vanish with `w`. Nothing here
carries a gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trl_blend.ops.policies import log_normalizer


# Beyond this log-ratio, float32 could lose a token whose student probability underflows and whose tilt does not
MAX_FLOAT32_RATIO = 48.0


class TiltPath(NamedTuple):
    """`N` rows of the path, and the sums of its two ends: tensors of shape `(N, V)` first, then of shape `(N,)`."""

    probs: Tensor  # the student, restricted to the tokens that both models allow and normalised there
    log_ratio: Tensor  # `z_T - z_S - offset` there, 0 elsewhere
    logprobs: Tensor | None  # logarithm of `probs`, only where the rows are evaluated exactly
    offset: Tensor  # mean of `z_T - z_S` under `probs`
    moments: tuple[Tensor, Tensor, Tensor]  # the first three of `log_ratio` under `probs`
    # `-log` of the student's mass on the common tokens: the KL of the path as `w → 0`, and a constant that every later
    # point pays. 0 where both models allow the same tokens.
    restriction_kl: Tensor
    student_normalizer: Tensor  # `logsumexp` of all logits of a model
    teacher_normalizer: Tensor
    restricted_normalizer: Tensor  # `logsumexp` of the student's logits on the common tokens
    teacher_mean: Tensor  # mean of `log_ratio` under the teacher, restricted to the common tokens
    teacher_is_outside: Tensor  # the teacher allows a token that the student excludes: `KL(p_T‖p_S)` is infinite


class TiltPoint(NamedTuple):
    """Points `μ_w` of `N` rows, each entry of shape `(N,)`."""

    kl: Tensor  # `KL(μ_w‖p_S)` without the path's `restriction_kl`, in nats
    variance: Tensor  # `Var_{μ_w}[log_ratio]`; the derivative of the KL by `w` is `w` times this
    mean: Tensor  # `E_{μ_w}[log_ratio]`
    log_partition: Tensor  # `A(w) = log Σ probs·e^(w·log_ratio)`


def tilt_path(student_logits: Tensor, teacher_logits: Tensor, exact: bool) -> TiltPath:
    """
    The path between two models, from one sweep over their logits `(N, V)`, which are left alone; `exact` keeps what
    [`evaluate`] needs for its float64 form. A row that is no distribution (NaN, `inf`, or all `-inf` in a model) has
    normalisers that are not finite.
    """
    log_ratio = teacher_logits - student_logits
    probs = student_logits.softmax(dim=-1)
    student_normalizer = restricted_normalizer = log_normalizer(student_logits, probs)
    offset = torch.linalg.vecdot(probs, log_ratio)
    restriction_kl = torch.zeros_like(offset)
    outside = torch.zeros_like(offset, dtype=torch.bool)
    teacher_probs = teacher_logits.softmax(dim=-1)
    teacher_normalizer = log_normalizer(teacher_logits, teacher_probs)
    excluded = None
    # On the CPU the question costs nothing; elsewhere it would be a synchronisation, and the answer is cheap
    if offset.device.type != "cpu" or not bool(offset.isfinite().all()):
        excluded = (student_logits == -torch.inf) | (teacher_logits == -torch.inf)
        lost = probs.masked_fill(~excluded, 0.0).sum(dim=-1)
        outside = (excluded & (teacher_logits > -torch.inf)).any(dim=-1)
        student_logits = student_logits.masked_fill(excluded, -torch.inf)
        # Without a common token every entry is NaN: such a path is never entered, its KL is infinite from the start
        probs = student_logits.softmax(dim=-1).nan_to_num_(nan=0.0)
        restricted_normalizer = log_normalizer(student_logits, probs).nan_to_num(nan=-torch.inf)
        difference = student_normalizer - restricted_normalizer
        restriction_kl = torch.where(lost < 0.5, -torch.log1p(-lost), difference).clamp_(min=0.0)
        log_ratio.masked_fill_(excluded, 0.0)
        teacher_probs = teacher_logits.masked_fill(excluded, -torch.inf).softmax(dim=-1).nan_to_num_(nan=0.0)
        offset = torch.linalg.vecdot(probs, log_ratio)
    log_ratio -= offset.unsqueeze(-1)
    if excluded is not None:
        log_ratio.masked_fill_(excluded, 0.0)
    teacher_mean = torch.linalg.vecdot(teacher_probs, log_ratio)
    product = torch.mul(probs, log_ratio, out=teacher_probs)
    first = product.sum(dim=-1)
    second = product.mul_(log_ratio).sum(dim=-1)
    third = torch.linalg.vecdot(product, log_ratio)
    logprobs = student_logits - restricted_normalizer.unsqueeze(-1) if exact else None
    return TiltPath(
        probs,
        log_ratio,
        logprobs,
        offset,
        (first, second, third),
        restriction_kl,
        student_normalizer,
        teacher_normalizer,
        restricted_normalizer,
        teacher_mean,
        outside,
    )


def exceeds_float32(path: TiltPath, rtol: float) -> Tensor:
    """
    Rows whose KL float32 cannot give to within a tenth of `rtol`, of shape `(N,)`.

    Those with a huge log-ratio, with an offset between the models' logits that swallows the digits of the ratio, or
    with values that are not finite.
    """
    first, second, _ = path.moments
    digits = path.offset.abs() * 1e-6 < rtol * (second - first.square()).clamp(min=0.0).sqrt()
    return ~(digits & (path.log_ratio.amax(dim=-1) < MAX_FLOAT32_RATIO))


def evaluate(path: TiltPath, weight: Tensor, buffer: Tensor) -> TiltPoint:
    """One pass over the vocabulary, at one weight in `[0, 1]` per row. Overwrites the buffer `(N, V)`."""
    if path.logprobs is not None:
        return _evaluate_exactly(path, path.logprobs, weight, buffer)
    torch.mul(path.log_ratio, weight.unsqueeze(-1), out=buffer)
    gain = buffer.expm1_().mul_(path.probs).sum(dim=-1)
    first = buffer.mul_(path.log_ratio).sum(dim=-1) + path.moments[0]
    second = torch.linalg.vecdot(buffer, path.log_ratio) + path.moments[1]
    partition = 1.0 + gain
    mean = first / partition
    variance = second / partition - mean.square()
    log_partition = gain.log1p()
    return TiltPoint((weight * mean - log_partition).clamp_(min=0.0), variance.clamp_(min=0.0), mean, log_partition)


def _evaluate_exactly(path: TiltPath, logprobs: Tensor, weight: Tensor, buffer: Tensor) -> TiltPoint:
    """[`evaluate`] for any finite logits, in float64: slower."""
    exponent = torch.mul(path.log_ratio, weight.unsqueeze(-1), out=buffer)
    # log(1 + small) from the differences to the student, as long as none of them is large
    small = path.probs * torch.expm1(exponent.clamp(-1.0, 1.0))
    is_small = exponent.abs() < 1.0
    exponent += logprobs
    top = exponent.amax(dim=-1, keepdim=True).nan_to_num_(neginf=0.0).clamp_(min=0.0)
    tilted = exponent.sub_(top).exp_()
    gain = torch.where(is_small, small, tilted - path.probs).sum(dim=-1)
    partition = tilted.sum(dim=-1)
    top = top.squeeze(-1)
    log_partition = torch.where((top > 0) | (gain.abs() > 0.5), top + partition.log(), gain.log1p())
    mean = torch.linalg.vecdot(tilted, path.log_ratio) / partition
    deviation = path.log_ratio - mean.unsqueeze(-1)
    variance = torch.linalg.vecdot(tilted.mul_(deviation), deviation) / partition
    return TiltPoint((weight * mean - log_partition).clamp_(min=0.0), variance, mean, log_partition)

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


# Beyond this log-ratio, float32 could lose a token whose student probability underflows and whose tilt does not
MAX_FLOAT32_RATIO = 48.0


class TiltPath(NamedTuple):
    """
    `N` rows of the path, and the sums of its two ends.

    Args:
        probs (`torch.Tensor` of shape `(N, V)`):
            The student, restricted to the tokens that both models allow and normalised there.
        log_ratio (`torch.Tensor` of shape `(N, V)`):
            `z_T - z_S - offset` there, 0 elsewhere.
        logprobs (`torch.Tensor` of shape `(N, V)`, *optional*):
            Logarithm of `probs`; only where the rows are evaluated exactly.
        offset (`torch.Tensor` of shape `(N,)`):
            Mean of `z_T - z_S` under `probs`.
        moments (`tuple[torch.Tensor, ...]`, each of shape `(N,)`):
            First three moments of `log_ratio` under `probs`.
        restriction_kl (`torch.Tensor` of shape `(N,)`):
            `-log` of the student's mass on the common tokens: the KL of the path as `w → 0`, and a constant that every
            later point pays. 0 where both models allow the same tokens.
        student_normalizer, teacher_normalizer (`torch.Tensor` of shape `(N,)`):
            `logsumexp` of all logits of a model.
        restricted_normalizer (`torch.Tensor` of shape `(N,)`):
            `logsumexp` of the student's logits on the common tokens.
        teacher_mean (`torch.Tensor` of shape `(N,)`):
            Mean of `log_ratio` under the teacher, restricted to the common tokens.
        teacher_is_outside (`torch.Tensor` of shape `(N,)`):
            Whether the teacher allows a token that the student excludes, which makes `KL(p_T‖p_S)` infinite.
    """

    probs: Tensor
    log_ratio: Tensor
    logprobs: Tensor | None
    offset: Tensor
    moments: tuple[Tensor, Tensor, Tensor]
    restriction_kl: Tensor
    student_normalizer: Tensor
    teacher_normalizer: Tensor
    restricted_normalizer: Tensor
    teacher_mean: Tensor
    teacher_is_outside: Tensor


class TiltPoint(NamedTuple):
    """
    Points `μ_w` of `N` rows, each entry of shape `(N,)`.

    Args:
        kl (`torch.Tensor`):
            `KL(μ_w‖p_S)` without the path's `restriction_kl`, in nats.
        variance (`torch.Tensor`):
            `Var_{μ_w}[log_ratio]`; the derivative of the KL by `w` is `w` times this.
        mean (`torch.Tensor`):
            `E_{μ_w}[log_ratio]`.
        log_partition (`torch.Tensor`):
            `A(w) = log Σ probs·e^(w·log_ratio)`.
    """

    kl: Tensor
    variance: Tensor
    mean: Tensor
    log_partition: Tensor


def tilt_path(student_logits: Tensor, teacher_logits: Tensor, exact: bool) -> TiltPath:
    """
    The path between two models, from one sweep over their logits.

    Args:
        student_logits (`torch.Tensor` of shape `(N, V)`):
            Logits of the student, in float32 or float64. Not modified.
        teacher_logits (`torch.Tensor` of shape `(N, V)`):
            Logits of the teacher, in the same type. Not modified.
        exact (`bool`):
            Whether [`evaluate_exactly`] will be used, which needs `logprobs`.

    Returns:
        [`TiltPath`]: The path. A row that is no distribution (NaN, `inf`, or all `-inf` in a model) has normalisers
        that are not finite.
    """
    log_ratio = teacher_logits - student_logits
    probs = student_logits.softmax(dim=-1)
    student_normalizer = restricted_normalizer = _log_normalizer(student_logits, probs)
    offset = torch.linalg.vecdot(probs, log_ratio)
    restriction_kl = torch.zeros_like(offset)
    outside = torch.zeros_like(offset, dtype=torch.bool)
    teacher_probs = teacher_logits.softmax(dim=-1)
    teacher_normalizer = _log_normalizer(teacher_logits, teacher_probs)
    excluded = None
    # On the CPU the question costs nothing; elsewhere it would be a synchronisation, and the answer is cheap
    if offset.device.type != "cpu" or not bool(offset.isfinite().all()):
        excluded = (student_logits == -torch.inf) | (teacher_logits == -torch.inf)
        lost = probs.masked_fill(~excluded, 0.0).sum(dim=-1)
        outside = (excluded & (teacher_logits > -torch.inf)).any(dim=-1)
        student_logits = student_logits.masked_fill(excluded, -torch.inf)
        # Without a common token every entry is NaN: such a path is never entered, its KL is infinite from the start
        probs = student_logits.softmax(dim=-1).nan_to_num_(nan=0.0)
        restricted_normalizer = _log_normalizer(student_logits, probs).nan_to_num(nan=-torch.inf)
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
    """
    One pass over the vocabulary, at one weight per row.

    Args:
        path ([`TiltPath`]):
            The path of `N` rows.
        weight (`torch.Tensor` of shape `(N,)`):
            Weight of the teacher, in `[0, 1]`.
        buffer (`torch.Tensor` of shape `(N, V)`):
            Overwritten.

    Returns:
        [`TiltPoint`]: The points.
    """
    if path.logprobs is not None:
        return evaluate_exactly(path, path.logprobs, weight, buffer)
    torch.mul(path.log_ratio, weight.unsqueeze(-1), out=buffer)
    gain = buffer.expm1_().mul_(path.probs).sum(dim=-1)
    first = buffer.mul_(path.log_ratio).sum(dim=-1) + path.moments[0]
    second = torch.linalg.vecdot(buffer, path.log_ratio) + path.moments[1]
    partition = 1.0 + gain
    mean = first / partition
    variance = second / partition - mean.square()
    log_partition = gain.log1p()
    return TiltPoint((weight * mean - log_partition).clamp_(min=0.0), variance.clamp_(min=0.0), mean, log_partition)


def evaluate_exactly(path: TiltPath, logprobs: Tensor, weight: Tensor, buffer: Tensor) -> TiltPoint:
    """
    [`evaluate`] for any finite logits, in float64: slower.

    Arguments and result are those of [`evaluate`], with the logarithm of `path.probs` as `logprobs`.
    """
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


def _log_normalizer(logits: Tensor, probs: Tensor) -> Tensor:
    return logits.amax(dim=-1) - probs.amax(dim=-1).log()

"""Objectives on sampled tokens: what a student learns from their log-probabilities under it and its teacher."""

from typing import NamedTuple

import torch
from torch import Tensor

from trl_blend.errors import ConfigError


# Of TRL's `IWOPDConfig.iw_opd_epsilon`, for a rollout without any disagreement
_IW_OPD_EPSILON = 1e-8


class SampledTokenLoss(NamedTuple):
    """
    Result of [`sampled_token_loss`], one value per token, in nats.

    Args:
        loss (`torch.Tensor` of any shape):
            What is minimised. Its value is no divergence: read `advantage`.
        advantage (`torch.Tensor` of the same shape):
            `log p_T(y) - log p_S(y)`, with the baseline where there is one. No gradient.
        ratio (`torch.Tensor` of the same shape, *optional*):
            `p_θ(y) / μ(y)`, capped, where the loss is corrected by it. No gradient.
    """

    loss: Tensor
    advantage: Tensor
    ratio: Tensor | None = None


def sampled_token_loss(
    student_logps: Tensor,
    teacher_logps: Tensor,
    rollout_logps: Tensor | None = None,
    ratio_cap: float | None = None,
    divergence: Tensor | None = None,
) -> SampledTokenLoss:
    r"""
    Raises the student's probability of a sampled token where the teacher finds it likelier, and lowers it elsewhere.
    Use it for distillation from stored log-probabilities, one per token; pass `rollout_logps` where the teacher is
    more than about one nat away from the policy that drew the tokens.

    The loss of [Lightning OPD](https://huggingface.co/papers/2604.13010), with the **current** student in the
    advantage:

    $$
    \ell_t = -A_t \log p_\theta(y_t), \qquad
    A_t = \mathrm{sg}\left[\log p_T(y_t) - \log p_\theta(y_t)\right]
    $$

    With `rollout_logps` every token is multiplied by \\( \mathrm{sg}[p_\theta(y_t) / \mu(y_t)] \\), for the policy `μ`
    that drew the tokens, and the expected gradient is that of `KL(p_θ‖p_T)` at every stored prefix, as far as `μ`
    reaches all tokens (our choice; off by default, as in the reference). Without it that is so only where the student
    itself draws `y_t`. On stored rollouts `p_θ = p_T` at the visited prefixes is still a fixed point, whichever policy
    drew them; rollouts cut to a set of tokens (top-p, top-k) fix `p_θ` on that set, and of the tokens outside it only
    their mass together.

    With `divergence` the advantage has the control-variate baseline of [vOPD](https://huggingface.co/papers/2605.07865):
    \\( A_t = \mathrm{sg}[\log p_T(y_t) - \log p_\theta(y_t) + KL(p_\theta \| p_T)] \\), whose mean over tokens of the
    student is 0. The expected gradient is unchanged, and varies less as a rule, where the student draws `y_t` or the
    ratio makes up for who did. On stored rollouts without the ratio it is not: what the baseline adds there raises the
    probability of stored tokens; `p_θ = p_T` remains a fixed point (our choice).

    Left out on purpose, as in the reference: whitening, and KL or entropy terms. The PPO clip of the reference code
    has no effect there (one update per batch) and has none here.

    Why one nat: on stored rollouts, without the ratio, this is the gradient of
    \\( \frac{1}{2} E_\mu[(\log p_T - \log p_\theta)^2] \\). Its Hessian at \\( p_\theta = \mu \\), with respect to the
    logits, is \\( (1 - KL(\mu \| p_T)) \\) times the Fisher information: where the teacher is further away, the loss
    is concave there, and steps in any direction, of noise too, are amplified (our choice).

    Args:
        student_logps (`torch.Tensor` of any shape):
            `log p_θ(y_t)`. Carries the gradient.
        teacher_logps (`torch.Tensor` of the same shape):
            `log p_T(y_t)`. No gradient.
        rollout_logps (`torch.Tensor` of the same shape, *optional*):
            `log μ(y_t)`. Without it the ratio is left out.
        ratio_cap (`float`, *optional*):
            Largest ratio; larger ones are cut to it. `None` means no cap.
        divergence (`torch.Tensor` of the same shape, *optional*):
            `KL(p_θ‖p_T)` at the position. No gradient. Without it there is no baseline.

    Returns:
        [`SampledTokenLoss`]: Loss and advantage of every token.
    """
    advantage = (teacher_logps - student_logps).detach()
    if divergence is not None:
        advantage = advantage + divergence.detach()
    loss = -advantage * student_logps
    if rollout_logps is None:
        return SampledTokenLoss(loss, advantage)
    ratio = (student_logps - rollout_logps).detach().exp()
    ratio = ratio if ratio_cap is None else ratio.clamp(max=ratio_cap)
    return SampledTokenLoss(ratio * loss, advantage, ratio)


def iw_opd_weights(advantages: Tensor, mask: Tensor, gamma: float) -> Tensor:
    r"""
    Weighs the tokens of a rollout by how little the student had disagreed with the teacher before them. Use it with a
    `gamma` of 0.5 where late tokens of long rollouts follow prefixes that the teacher would not have written.

    The weights of IW-OPD ([On the Position Bias of On-Policy Distillation](https://huggingface.co/papers/2606.22600)),
    as in TRL's `IWOPDTrainer`:

    $$
    w_t = 1 + \gamma \left(1 - \frac{\sum_{s < t} |A_s|}{\sum_s |A_s|}\right)
    $$

    They fall from \\( 1 + \gamma \\) at the first token towards 1 at the last, and are no importance ratios. Without
    any disagreement all are \\( 1 + \gamma \\).

    Args:
        advantages (`torch.Tensor` of shape `(B, T)`):
            `A_t = log p_T(y_t) - log p_S(y_t)`. Detached; values in masked places are ignored, NaN included.
        mask (`torch.Tensor` of shape `(B, T)`):
            Nonzero at valid tokens.
        gamma (`float`):
            `γ`, at least 0. At 0 all weights are 1.

    Returns:
        `torch.Tensor` of shape `(B, T)`: No gradient.
    """
    sizes = torch.where(mask != 0, advantages.detach().abs(), 0.0)
    share = (sizes.cumsum(dim=1) - sizes) / sizes.sum(dim=1, keepdim=True).clamp(min=_IW_OPD_EPSILON)
    return 1.0 + gamma * (1.0 - share)


def extrapolated_logps(teacher_logps: Tensor, reference_logps: Tensor, extrapolation: float) -> Tensor:
    r"""
    Moves a target beyond the teacher, in the direction that leads from a reference to it. Use it in the place of the
    teacher's log-probabilities where the student is to gain more than the teacher has over the reference.

    Reward extrapolation of [G-OPD](https://huggingface.co/papers/2602.12125): the advantage is the scaled reward
    \\( \lambda (\log p_T - \log p_{ref}) \\) minus \\( \log p_\theta - \log p_{ref} \\), which is that of
    [`sampled_token_loss`] with the target

    $$
    \log p_T + (\lambda - 1) (\log p_T - \log p_{ref})
    $$

    and, with its ratio, follows the gradient of the reverse KL to the normalised \\( p_T^\lambda p_{ref}^{1 - \lambda}
    \\): the sum over tokens that normalises it is a constant, whose expected gradient is 0. At 1 it is the teacher.

    Args:
        teacher_logps (`torch.Tensor` of any shape):
            `log p_T(y)`.
        reference_logps (`torch.Tensor` of the same shape):
            `log p_ref(y)`, at the same temperature.
        extrapolation (`float`):
            `λ`.

    Returns:
        `torch.Tensor`: Log-probabilities of the target up to a constant, in nats.
    """
    return teacher_logps + (extrapolation - 1.0) * (teacher_logps - reference_logps)


def sampled_kl(logps: Tensor, other_logps: Tensor, rollout_logps: Tensor) -> Tensor:
    r"""
    Estimates `KL(p‖q)` at every visited prefix, from one token that a third policy `μ` drew there. Use it to log how
    far two models are apart on stored rollouts.

    $$
    \frac{p(y)}{\mu(y)} \left( \log \frac{p(y)}{q(y)} - 1 + \frac{q(y)}{p(y)} \right), \qquad y \sim \mu
    $$

    It is never negative and is 0 where `p = q`. Its expectation is `KL(p‖q)` where `μ` reaches every token; where `μ`
    is cut to a set `S` of tokens (top-p, top-k) it is `Σ_{y∈S} p log(p/q) - p + q`, the part of the divergence that
    lies within `S`. This estimator is our choice: with `q` the student that drew the rollouts, and `μ` its
    tempered and cut distribution, it is 0 before the first step, which the plain `log p - log μ` is not.

    Args:
        logps (`torch.Tensor` of any shape):
            `log p(y)`.
        other_logps (`torch.Tensor` of the same shape):
            `log q(y)`.
        rollout_logps (`torch.Tensor` of the same shape):
            `log μ(y)`.

    Returns:
        `torch.Tensor`: One value per token, in nats. No gradient.
    """
    logps, other_logps, rollout_logps = (x.detach().double() for x in (logps, other_logps, rollout_logps))
    # p/μ (log p/q - 1) + q/μ, without the quotient q/p, which overflows first
    return (logps - rollout_logps).exp() * (logps - other_logps - 1.0) + (other_logps - rollout_logps).exp()


def sequence_weights(lengths: list[int], aggregation: str) -> Tensor:
    r"""
    Weighs each token of some sequences laid end to end, so that a loss is `Σ_t w_t ℓ_t / Σ_t w_t` over a batch. Use
    `"token"` where long sequences should count more than short ones.

    `"sequence"` is the reference's: the mean over tokens of each sequence, then the mean over sequences,
    \\( w_t = 1 / n_{seq(t)} \\). `"token"` is the mean over all tokens, \\( w_t = 1 \\), that of
    [`~trl.DistillationTrainer`]. Either way the sum of the weights is the number of items that share the loss.

    Args:
        lengths (`list[int]`):
            Tokens of each sequence that count.
        aggregation (`str`):
            `"sequence"` or `"token"`.

    Returns:
        `torch.Tensor` of shape `(sum(lengths),)`: float32.

    Raises:
        [`~trl_blend.errors.ConfigError`]:
            If `aggregation` is neither.
    """
    if aggregation not in ("sequence", "token"):
        raise ConfigError(f"`aggregation={aggregation!r}` is unknown. Use 'sequence' or 'token'.")
    if aggregation == "token":
        return torch.ones(sum(lengths))
    counts = torch.tensor(lengths)
    return (1.0 / counts.clamp(min=1)).repeat_interleave(counts)

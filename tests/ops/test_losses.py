"""Objectives on stored tokens against float64 loops and against their definitions by enumeration."""

import pytest
import torch

from tests import reference_divergences, reference_offline
from trl_blend.errors import ConfigError
from trl_blend.ops.losses import (
    extrapolated_logps,
    iw_opd_weights,
    sampled_kl,
    sampled_token_loss,
    sequence_weights,
)


N, V = 6, 9


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(N, V, dtype=torch.float64, requires_grad=True)


def test_sampled_token_loss_and_gradient_equal_the_reference(logits):
    tokens = torch.randint(V, (N,))
    teacher = torch.randn(N, V, dtype=torch.float64).log_softmax(-1)
    teacher_logps = teacher.gather(-1, tokens[:, None]).squeeze(-1)
    result = sampled_token_loss(logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1), teacher_logps)
    (grad,) = torch.autograd.grad(result.loss.sum(), logits)
    own = logits.detach().clone().requires_grad_(True)
    expected = torch.stack(
        [
            reference_offline.sampled_token_loss(own[n], own[n], int(tokens[n]), float(teacher_logps[n]))
            for n in range(N)
        ]
    )
    (expected_grad,) = torch.autograd.grad(expected.sum(), own)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert not result.advantage.requires_grad


def test_expected_gradient_over_the_student_is_that_of_the_reverse_kl(logits):
    teacher = torch.randn(N, V, dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    every_token = sampled_token_loss(logprobs, teacher).loss
    (grad,) = torch.autograd.grad((logprobs.detach().exp() * every_token).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - teacher)).sum(), logits)
    torch.testing.assert_close(grad, expected)


def test_with_the_ratio_it_is_so_for_any_rollout_policy(logits):
    teacher, rollout = (torch.randn(N, V, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    logprobs = logits.log_softmax(-1)
    result = sampled_token_loss(logprobs, teacher, rollout)
    (grad,) = torch.autograd.grad((rollout.exp() * result.loss).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - teacher)).sum(), logits, retain_graph=True)
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(result.ratio, (logprobs - rollout).exp().detach())
    plain = sampled_token_loss(logprobs, teacher).loss
    (other,) = torch.autograd.grad((rollout.exp() * plain).sum(), logits)
    assert (other - expected).abs().max() > 0.1


def test_the_ratio_is_capped(logits):
    logprobs = logits.log_softmax(-1)
    teacher, rollout = (torch.randn(N, V, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    capped, free = (sampled_token_loss(logprobs, teacher, rollout, cap) for cap in (1.5, None))
    assert free.ratio.max() > 1.5 and torch.equal(capped.ratio, free.ratio.clamp(max=1.5))
    torch.testing.assert_close(capped.loss, capped.ratio * sampled_token_loss(logprobs, teacher).loss)


def advantage_case(logits):
    """Log-probabilities of student and teacher, every token, and the divergence at every position."""
    teacher = torch.randn(N, V, dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    divergence = (logprobs.exp() * (logprobs - teacher)).sum(-1, keepdim=True)
    return logprobs, teacher, divergence


def test_the_baseline_centres_the_advantage_and_leaves_the_expected_gradient(logits):
    """Over tokens of the student, by enumeration; the spread of the gradient falls."""
    logprobs, teacher, divergence = advantage_case(logits)
    probs = logprobs.detach().exp()
    plain, centred = (sampled_token_loss(logprobs, teacher, divergence=kl) for kl in (None, divergence))
    torch.testing.assert_close((probs * centred.advantage).sum(-1), torch.zeros(N, dtype=torch.float64))
    assert (probs * plain.advantage).sum(-1).max() < -0.1
    gradients, spreads = [], []
    for loss in (plain.loss, centred.loss):
        (grad,) = torch.autograd.grad((probs * loss).sum(), logits, retain_graph=True)
        gradients.append(grad)
        (score,) = torch.autograd.grad(logprobs[0, 0], logits, retain_graph=True)
        assert score[1:].abs().max() == 0
        # Of one token y the gradient is -A (e_y - p), whose squared length is A² (1 - 2 p_y + |p|²)
        lengths = 1 - 2 * probs + probs.square().sum(-1, keepdim=True)
        advantage = loss.detach() / -logprobs.detach()
        spreads.append((probs * advantage.square() * lengths).sum(-1))
    torch.testing.assert_close(*gradients)
    assert (spreads[1] < spreads[0]).float().mean() > 0.8 and spreads[1].sum() < spreads[0].sum()
    assert not centred.advantage.requires_grad


def test_the_baseline_with_the_ratio_leaves_the_expected_gradient_for_any_rollout_policy(logits):
    logprobs, teacher, divergence = advantage_case(logits)
    rollout = torch.randn(N, V, dtype=torch.float64).log_softmax(-1)
    gradients = []
    for ratio in (rollout, None):
        loss = sampled_token_loss(logprobs, teacher, ratio, divergence=divergence).loss
        gradients.append(torch.autograd.grad((rollout.exp() * loss).sum(), logits, retain_graph=True)[0])
    (expected,) = torch.autograd.grad(divergence.sum(), logits)
    torch.testing.assert_close(gradients[0], expected)
    assert (gradients[1] - expected).abs().max() > 0.1


def test_baseline_and_gradient_equal_the_reference(logits):
    logprobs, teacher, _ = advantage_case(logits)
    tokens, kept = [int(token) for token in torch.randint(V, (N,))], [1, 4, 5]
    masses = [[float(mass) for mass in reference_offline.event_logmasses(row, kept)] for row in teacher]
    own = logits.detach().clone().requires_grad_(True)
    kl = torch.stack([reference_offline.top_k_kl(row.detach(), kept, m, "reverse") for row, m in zip(own, masses)])
    at = torch.tensor(tokens)[:, None]
    teacher_logps = teacher.gather(-1, at)[:, 0]
    loss = sampled_token_loss(logprobs.gather(-1, at)[:, 0], teacher_logps, divergence=kl).loss
    expected = torch.stack(
        [
            reference_offline.baseline_loss(row, row, token, float(logp), kept, m)
            for row, token, logp, m in zip(own, tokens, teacher_logps, masses)
        ]
    )
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(value.sum(), leaf)[0] for value, leaf in ((loss, logits), (expected, own))]
    torch.testing.assert_close(*grads)


def test_extrapolation_equals_the_reference_and_1_is_the_teacher(logits):
    logprobs, teacher, _ = advantage_case(logits)
    reference = torch.randn(N, V, dtype=torch.float64).log_softmax(-1)
    assert torch.equal(extrapolated_logps(teacher, reference, 1.0), teacher)
    loss = sampled_token_loss(logprobs, extrapolated_logps(teacher, reference, 1.25)).loss
    own = logits.detach().clone().requires_grad_(True)
    expected = torch.stack(
        [
            torch.stack(
                [
                    reference_offline.extrapolated_loss(own[n], own[n], v, teacher[n, v], reference[n, v], 1.25)
                    for v in range(V)
                ]
            )
            for n in range(N)
        ]
    )
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(value.sum(), leaf)[0] for value, leaf in ((loss, logits), (expected, own))]
    torch.testing.assert_close(*grads)


def test_extrapolation_follows_the_divergence_to_the_tilted_teacher(logits):
    """Over tokens of the student: `KL(p_θ‖q)` with `q ∝ p_T^λ p_ref^(1 - λ)`."""
    logprobs, teacher, _ = advantage_case(logits)
    reference = torch.randn(N, V, dtype=torch.float64).log_softmax(-1)
    tilted = (1.5 * teacher - 0.5 * reference).log_softmax(-1)
    loss = sampled_token_loss(logprobs, extrapolated_logps(teacher, reference, 1.5)).loss
    (grad,) = torch.autograd.grad((logprobs.detach().exp() * loss).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - tilted)).sum(), logits)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("distance", ["near", "far"])
def test_curvature_at_the_rollout_policy(distance):
    """`(1 - KL(μ‖p_T)) F`: negative in every direction where the teacher is more than a nat away."""
    torch.manual_seed(3)
    start = torch.randn(V, dtype=torch.float64)
    teacher = start * {"near": 0.8, "far": -2.0}[distance]
    mu, target = start.softmax(-1), teacher.log_softmax(-1)

    def squared_gap(z):
        return 0.5 * (mu * (target - z.log_softmax(-1)) ** 2).sum()

    z = start.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad((mu * sampled_token_loss(z.log_softmax(-1), target).loss).sum(), z)
    (expected,) = torch.autograd.grad(squared_gap(z), z)
    torch.testing.assert_close(grad, expected)
    divergence = (mu * (mu.log() - target)).sum()
    assert (divergence > 1) == (distance == "far")
    fisher = torch.diag(mu) - torch.outer(mu, mu)
    torch.testing.assert_close(torch.autograd.functional.hessian(squared_gap, start), (1 - divergence) * fisher)


def test_student_equal_to_teacher_gets_no_gradient(logits):
    logprobs = logits.log_softmax(-1)
    loss = sampled_token_loss(logprobs, logprobs.detach()).loss
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.abs().max() == 0 and grad.abs().max() == 0


@pytest.mark.parametrize("kept", [V, 4])
def test_expected_sampled_kl_is_the_divergence_within_the_support(kept):
    torch.manual_seed(1)
    p, q, mu = (torch.randn(V, dtype=torch.float64).mul(2).softmax(-1) for _ in range(3))
    mu = mu.clone()
    mu[kept:] = 0.0
    mu /= mu.sum()
    support = slice(0, kept)
    values = sampled_kl(p.log()[support], q.log()[support], mu.log()[support])
    assert (values >= 0).all()
    expected = (p * (p / q).log() - p + q)[support].sum()
    torch.testing.assert_close((mu[support] * values).sum(), expected)
    if kept == V:
        torch.testing.assert_close(expected, (p * (p / q).log()).sum())


def test_sampled_kl_of_equal_policies_is_zero_whatever_drew_the_tokens():
    logps, mu = torch.randn(5).sub(3), torch.randn(5).sub(1)
    assert sampled_kl(logps, logps, mu).abs().max() < 1e-12


def test_sampled_kl_is_finite_for_a_token_the_student_has_given_up():
    value = sampled_kl(torch.tensor([-200.0]), torch.tensor([-0.5]), torch.tensor([-0.1]))
    torch.testing.assert_close(value, torch.tensor([-0.4]).double().exp(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_weights_give_the_two_means(aggregation):
    lengths = [3, 1, 5]
    losses = [[torch.tensor(float(i + 10 * n), dtype=torch.float64) for i in range(k)] for n, k in enumerate(lengths)]
    weights = sequence_weights(lengths, aggregation).double()
    flat = torch.stack([value for row in losses for value in row])
    expected = reference_offline.aggregate(losses, aggregation)
    torch.testing.assert_close((weights * flat).sum() / weights.sum(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights.sum().item(), {"sequence": 3.0, "token": 9.0}[aggregation])


def test_unknown_aggregation():
    with pytest.raises(ConfigError, match="aggregation='mean'"):
        sequence_weights([1], "mean")


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_iw_opd_weights(gamma):
    advantages = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1] * 7, [1, 0, 0, 1, 1, 1, 0], [0] * 7])  # with a tool's answer, and an empty rollout
    weights = iw_opd_weights(advantages.masked_fill(mask == 0, float("nan")), mask, gamma)
    for row, values, counts in zip(weights, advantages, mask.bool(), strict=True):
        expected = reference_divergences.iw_opd_weights(values[counts].tolist(), gamma)
        torch.testing.assert_close(row[counts], torch.tensor(expected, dtype=torch.float64))
    assert not weights.requires_grad and weights.isfinite().all()
    assert gamma or (weights == 1.0).all()


def test_iw_opd_weights_without_a_disagreement():
    assert iw_opd_weights(torch.zeros(1, 3), torch.ones(1, 3), 0.5).tolist() == [[1.5, 1.5, 1.5]]

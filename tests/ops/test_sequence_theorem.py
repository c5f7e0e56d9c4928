"""
App. G of arXiv 2605.31159 by brute force: every sequence of a tiny autoregressive pair is enumerated.

`KL(P_μ‖P_S) = Σ_t E_{h_t ~ P_μ}[KL(μ_t‖p_t)]` (Eq. 24), which is at most the sum of the budgets (Eq. 25-26).
"""

import itertools
import math

import pytest
import torch

from tests import reference_trust_region as reference
from trl_blend.ops import solve_trust_region


RTOL = 1e-3


def conditional_tables(vocab_size, length, seed, scale=2.0):
    """Logits of the next token after every prefix, `{prefix: (V,)}`: an arbitrary autoregressive model."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = [p for t in range(length) for p in itertools.product(range(vocab_size), repeat=t)]
    return {prefix: scale * torch.randn(vocab_size, generator=generator) for prefix in prefixes}


def behavior_tables(student, teacher, budgets):
    """`log μ` after every prefix, in float64 from the solver's weights, `{prefix: list}`."""
    tables = {}
    for prefix, logits in student.items():
        weight = solve_trust_region(logits, teacher[prefix], budgets[len(prefix)], rtol=RTOL).weight.item()
        tables[prefix] = reference.path(logits.tolist(), teacher[prefix].tolist(), weight)
    return tables


def sequence_logprob(tables, sequence):
    return math.fsum(tables[sequence[:t]][token] for t, token in enumerate(sequence))


@pytest.mark.parametrize("vocab_size, length", [(2, 4), (3, 4), (8, 3), (8, 4)])
@pytest.mark.parametrize("budgets", [[1e-3] * 4, [0.3] * 4, [0.4, 0.1, 0.0, 0.02]], ids=["tight", "wide", "per_step"])
def test_sequence_kl_is_the_sum_of_token_kls_and_within_the_budgets(vocab_size, length, budgets):
    student = conditional_tables(vocab_size, length, seed=0)
    teacher = conditional_tables(vocab_size, length, seed=1)
    mu = behavior_tables(student, teacher, budgets)
    p_s = {prefix: reference.log_softmax(logits.tolist()) for prefix, logits in student.items()}
    sequences = list(itertools.product(range(vocab_size), repeat=length))
    log_mu = [sequence_logprob(mu, sequence) for sequence in sequences]
    assert math.fsum(math.exp(logp) for logp in log_mu) == pytest.approx(1.0, abs=1e-12)
    sequence_kl = reference.kl(log_mu, [sequence_logprob(p_s, sequence) for sequence in sequences])
    token_kls = [0.0] * length
    for prefix in student:
        reached = math.exp(sequence_logprob(mu, prefix))
        token_kls[len(prefix)] += reached * reference.kl(mu[prefix], p_s[prefix])
    assert sequence_kl == pytest.approx(math.fsum(token_kls), rel=1e-9)
    assert sequence_kl <= math.fsum(budgets[:length]) * (1 + RTOL)
    for token_kl, budget in zip(token_kls, budgets, strict=False):
        assert token_kl <= budget * (1 + RTOL)
    # The bound is used, not merely kept: few teachers are feasible here
    assert sequence_kl > 0.5 * math.fsum(budgets[:length])

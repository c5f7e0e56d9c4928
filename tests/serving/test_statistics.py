"""Sums over the rows of an engine, against a float64 computation."""

import math

import pytest
import torch

from trl_blend import LogitMixing, TrustRegion
from trl_blend.serving.statistics import RunningSums, row_statistics


def logits(seed, rows=6, size=9):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("partners", [1, 2])
def test_row_statistics(partners):
    student, others = logits(0), [logits(1 + index) for index in range(partners)]
    step = LogitMixing((0.3, 0.2)[:partners])(student, others)
    values = row_statistics(step, others)
    behavior = step.logits.double().log_softmax(-1)
    assert set(values) == {"kl_behavior_student"} | {
        f"{name}_{index}"
        for name in ("kl_behavior_teacher", "teacher_logp", "teacher_entropy")
        for index in range(partners)
    }
    for index, other in enumerate(others):
        teacher = other.double().log_softmax(-1)
        divergence = (behavior.exp() * (behavior - teacher)).sum(-1)
        torch.testing.assert_close(values[f"kl_behavior_teacher_{index}"].double(), divergence, atol=1e-5, rtol=1e-5)
        mean_logp = (behavior.exp() * teacher).sum(-1)
        torch.testing.assert_close(values[f"teacher_logp_{index}"].double(), mean_logp, atol=1e-5, rtol=1e-5)
        entropy = -(teacher.exp() * teacher).sum(-1)
        torch.testing.assert_close(values[f"teacher_entropy_{index}"].double(), entropy, atol=1e-5, rtol=1e-5)


def test_sums_leave_out_masked_rows_and_infinite_values():
    sums = RunningSums()
    mask = torch.tensor([True, True, False])
    sums.add({"a": torch.tensor([1.0, math.inf, 7.0]), "b": torch.tensor([-1.0, -2.0, 5.0])}, mask)
    sums.add({"a": torch.tensor([2.0]), "b": torch.tensor([-math.inf])}, torch.tensor([True]))
    assert sums.pop() == {"a": (3.0, 2, 2.0), "b": (-3.0, 2, -1.0)}
    assert sums.pop() == {}
    sums.add({"a": torch.tensor([4.0])}, torch.tensor([False]))
    assert sums.pop() == {"a": (0.0, 0, 0.0)}


def test_a_token_that_the_teacher_excludes_is_counted_nowhere():
    student, teacher = logits(0), logits(1)
    teacher[0, 3] = -math.inf
    values = row_statistics(TrustRegion(0.0)(student, [teacher]), [teacher])
    assert values["kl_behavior_teacher_0"][0] == math.inf and values["teacher_logp_0"][0] == -math.inf
    sums = RunningSums()
    sums.add(values, torch.ones(6, dtype=torch.bool))
    assert sums.pop()["teacher_logp_0"].count == 5

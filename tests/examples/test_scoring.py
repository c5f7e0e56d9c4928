"""The scores before and after a run: what too few numbers leave of them."""

import pytest
import torch

from trl_blend.reports.cards import before_after_table, shown_score
from trl_blend.scripts.scoring import means_and_errors, print_table


def test_scores_of_too_few_numbers_are_none():
    rewards = torch.tensor([[0.5, float("nan"), 1.0], [float("nan"), float("nan"), 0.0]])
    half, missing, (mean, error) = means_and_errors(rewards)
    assert half == (0.5, None) and missing == (None, None) and (mean, error) == (0.5, pytest.approx(0.5))
    assert [shown_score(*score) for score in (half, missing, (mean, error))] == [
        "0.500",
        "not measured",
        "0.500 ± 0.500",
    ]
    results = {"rewards": ["r"], "prompts": 1, "before": {"student": [half]}, "after": {"student": [missing]}}
    assert before_after_table(results)[1] == [("student", "r", "0.500", "not measured")]
    print_table(results)

"""The scores before and after a run."""

import pytest
import torch

from trl_blend.reports.cards import before_after_table, shown_score
from trl_blend.scripts.scoring import means_and_errors, print_table


def test_a_score_of_one_number_has_no_error():
    rewards = torch.tensor([[0.5, 1.0], [float("nan"), 0.0]])
    half, (mean, error) = means_and_errors(rewards)
    assert half == (0.5, None) and (mean, error) == (0.5, pytest.approx(0.5))
    assert [shown_score(*score) for score in (half, (mean, error))] == ["0.500", "0.500 ± 0.500"]
    results = {"rewards": ["r"], "prompts": 1, "before": {"student": [half]}, "after": {"student": [(1.0, 0.25)]}}
    assert before_after_table(results)[1] == [("student", "r", "0.500", "1.000 ± 0.250")]
    print_table(results)

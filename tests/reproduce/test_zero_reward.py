"""What the study of students without reward computes itself."""

import pytest
import torch

from reproduce.zero_reward import SHAPE, shaped_log_ratio


def test_shaped_ratios_are_the_gradient_of_the_papers_function():
    behavior = torch.tensor([0.9, 0.5, 0.3, 0.02], dtype=torch.float64)
    policy = torch.tensor([0.01, 0.5, 0.6, 0.4], dtype=torch.float64, requires_grad=True)
    ratio = policy / behavior
    (gradient,) = torch.autograd.grad((ratio / (ratio + SHAPE)).sum(), policy)
    at_one = SHAPE / (1 + SHAPE) ** 2
    expected = gradient * policy / at_one  # of the logarithm, 1 where both policies agree
    found = shaped_log_ratio(ratio.log(), torch.tensor([1.0, -1.0, 1.0, -1.0]), 3.0).exp()
    torch.testing.assert_close(found, expected)
    assert found[1].item() == pytest.approx(1.0) and not found.requires_grad

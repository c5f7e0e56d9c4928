"""The gradients whose bias and noise the study of importance ratios measures."""

import pytest
import torch

from reproduce import importance_ratios as ratios
from testbed.evaluate import load_checkpoint
from testbed.task import build_prompt_dataset


@pytest.fixture
def measured(monkeypatch):
    """Gradients of `student` mixed with a model, by name of the ratio; the rewards do not look at the text."""
    monkeypatch.setattr(ratios, "MAX_NEW_TOKENS", 6)
    monkeypatch.setattr(ratios, "GROUP", 2)
    monkeypatch.setattr(ratios, "format_and_answer_reward", lambda texts, answers: [1.0, 0.0] * (len(texts) // 2))
    student, tokenizer = load_checkpoint("student")
    prompts = build_prompt_dataset("train", 2, 0)

    def gradients(other, weight):
        torch.manual_seed(0)
        return ratios.gradients((student, load_checkpoint(other)[0]), tokenizer, prompts, weight)[0]

    return gradients


def test_beside_itself_every_ratio_is_the_on_policy_gradient(measured):
    on_policy = measured("student", 0.0)[ratios.ON_POLICY]
    assert on_policy.norm() > 0
    for name, gradient in measured("student", 0.5).items():
        torch.testing.assert_close(gradient, on_policy, rtol=1e-4, atol=1e-6, msg=name)


def test_beside_a_teacher_the_ratios_differ(measured):
    found = measured("teacher", 0.5)
    token, floor, none = (found[name] for name in ("token ratios", "floor", "none (ratio 1)"))
    assert set(found) == set(ratios.RATIOS)
    assert not torch.allclose(token, floor, rtol=1e-3) and not torch.allclose(floor, none, rtol=1e-3)

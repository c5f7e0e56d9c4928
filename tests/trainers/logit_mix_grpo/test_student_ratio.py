"""The denominator of `objective="student"`: the log-probability that each token was drawn with, always."""

import pytest
from trl import GRPOTrainer

from tests.trainers import forced, runs


@pytest.mark.parametrize(
    ("teachers", "seeds", "weights", "space", "temperature"),
    [
        (["teacher"], [1], [0.4], "logits", 1.0),
        (["teacher"], [1], [0.7], "probs", 0.7),
        (["teacher", "second"], [1, 2], [0.3, 0.2], "logits", 1.4),
        (["teacher", "second"], [1, 2], [1.0, -1.0], "arithmetic", 1.4),
    ],
)
def test_recorded_logps_are_those_of_the_behavior_policy(build, teachers, seeds, weights, space, temperature):
    mixture = {"temperature": temperature, "mixing_space": space}
    # Aligned steps: TRL itself would leave `old_per_token_logps` out
    settings = {"objective": "student", "teacher": teachers, "teacher_weight": weights, "max_steps": 2, **mixture}
    record = runs.train(build(**settings))
    for call in record.calls:
        student, partners = forced.student_at(call.parameters), [forced.frozen(seed) for seed in seeds]
        expected = forced.logps(student, partners, weights, call.inputs, temperature, space)
        recorded = forced.kept(call.inputs["old_per_token_logps"], call.inputs)
        forced.assert_close_rows(recorded, expected, 1e-4)
        own = forced.logps(student, [], [], call.inputs, temperature)
        distance = sum(abs(a - b) for row, other in zip(recorded, own) for a, b in zip(row, other))
        assert distance > 1.0, "student and behaviour policy agree here, which tests nothing"


def test_mixed_has_ratio_one_on_aligned_steps(build):
    (call,) = runs.train(build(objective="mixed", teacher_weight=0.4)).calls
    assert "old_per_token_logps" not in call.inputs


def test_no_forward_pass_is_spent_on_the_old_logps(build, monkeypatch):
    """They are recorded while decoding; TRL asks for them on misaligned steps."""
    scored = []
    score = GRPOTrainer._get_per_token_logps_and_entropies

    def counting(trainer, *args, **kwargs):
        scored.append(None)
        return score(trainer, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", counting)
    record = runs.train(build(objective="student", teacher_weight=0.4, num_iterations=2, max_steps=2))
    assert len(scored) == len(record.calls) == 2
    scored.clear()
    runs.train(build(objective="mixed", teacher_weight=0.4, num_iterations=2, max_steps=2))
    assert len(scored) == 3

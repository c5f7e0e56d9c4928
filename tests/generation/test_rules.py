import math

import pytest
import torch

from tests.generation.teacher_forced import loop_kl, loop_softmax
from trl_blend.errors import ConfigError
from trl_blend.generation.rules import BlendRule, LogitMixing, ProbabilityMixing
from trl_blend.ops.policies import log_normalizer


RULES = (LogitMixing, ProbabilityMixing)
INF = math.inf


def draw(*shape, models=2, scale=3.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(models)]


def loop_policy(rule, rows):
    """Behaviour probabilities of one prefix; `rows` are the models' logits as lists, the student's first."""
    weights = [1.0 - math.fsum(rule.weights), *rule.weights]
    probs = [loop_softmax(row) for row in rows]
    vocab = range(len(rows[0]))
    if isinstance(rule, ProbabilityMixing):
        return [math.fsum(w * p[v] for w, p in zip(weights, probs)) for v in vocab]
    powers = [math.prod(p[v] ** w for w, p in zip(weights, probs) if w > 0) for v in vocab]
    return [power / math.fsum(powers) for power in powers]


def assert_matches_loops(rule, logits, tolerance=1e-5):
    step = rule(logits[0], logits[1:])
    policy = step.logits.softmax(-1)
    torch.testing.assert_close(step.log_normalizer, step.logits.logsumexp(-1))
    assert step.logits.shape == logits[0].shape
    assert step.statistics["kl_behavior_student"].shape == logits[0].shape[:-1]
    for index in torch.cartesian_prod(*map(torch.arange, logits[0].shape[:-1])).reshape(-1, logits[0].dim() - 1):
        where = tuple(index.tolist())
        rows = [one[where].double().tolist() for one in logits]
        expected = loop_policy(rule, rows)
        torch.testing.assert_close(policy[where], torch.tensor(expected), rtol=tolerance, atol=1e-7)
        divergence = loop_kl(expected, loop_softmax(rows[0]))
        assert step.statistics["kl_behavior_student"][where].item() == pytest.approx(divergence, rel=1e-5, abs=3e-6)


@pytest.mark.parametrize("rule", [cls(weight) for cls in RULES for weight in (0.0, 0.3, 1.0)])
@pytest.mark.parametrize("shape", [(4, 11), (2, 3, 11), (3, 2)])
def test_policy_and_kl_equal_loops(rule, shape):
    assert_matches_loops(rule, draw(*shape))


@pytest.mark.parametrize("rule", [cls(weight) for cls in RULES for weight in ((0.2, 0.5), (0.0, 0.4), (0.5, 0.5))])
def test_two_partners_equal_loops(rule):
    assert_matches_loops(rule, draw(5, 9, models=3))


@pytest.mark.parametrize("cls", RULES)
def test_logits_far_from_zero(cls):
    student, teacher = draw(4, 11)
    shifted = cls(0.3)(student + 1000.0, [teacher - 500.0])
    plain = cls(0.3)(student, [teacher])
    torch.testing.assert_close(shifted.logits.softmax(-1), plain.logits.softmax(-1), rtol=1e-3, atol=1e-6)
    # Sharp policies: a teacher that puts everything on a token the student finds impossible
    student, teacher = torch.tensor([[0.0, -90.0]]), torch.tensor([[-90.0, 0.0]])
    assert cls(1.0)(student, [teacher]).statistics["kl_behavior_student"].item() == pytest.approx(90.0, rel=1e-5)


@pytest.mark.parametrize("cls", RULES)
def test_limits(cls):
    student, teacher = draw(6, 12)
    alone = cls(0.0)(student, [teacher])
    torch.testing.assert_close(alone.logits.log_softmax(-1), student.log_softmax(-1))
    assert alone.statistics["kl_behavior_student"].max() < 1e-6
    taught = cls(1.0)(student, [teacher])
    torch.testing.assert_close(taught.logits.log_softmax(-1), teacher.log_softmax(-1))
    assert taught.statistics["kl_behavior_student"].min() > 0.1


@pytest.mark.parametrize("rule", [LogitMixing(0.3), ProbabilityMixing(0.3), ProbabilityMixing(1.0), LogitMixing(1.0)])
def test_token_that_the_partner_does_not_have(rule):
    student, teacher = draw(4, 10)
    teacher[..., 7:] = -INF
    assert_matches_loops(rule, [student, teacher])


def test_token_that_both_exclude():
    student, teacher = draw(4, 10)
    student[..., 3] = teacher[..., 3] = -INF
    for rule in (LogitMixing(0.3), ProbabilityMixing(0.3)):
        assert_matches_loops(rule, [student, teacher])


def test_kl_is_infinite_where_the_student_excludes_a_token_the_behavior_takes():
    student, teacher = draw(3, 10)
    student[0, 4] = -INF
    kl = ProbabilityMixing(0.3)(student, [teacher]).statistics["kl_behavior_student"]
    assert kl[0] == INF and kl[1:].isfinite().all()
    # A mass below the smallest float is still a mass
    teacher[0, 4] = -500.0
    assert ProbabilityMixing(0.3)(student, [teacher]).statistics["kl_behavior_student"][0] == INF
    # The log-linear mixture excludes the token too, so there is nothing to pay for
    kl = LogitMixing(0.3)(student, [teacher]).statistics["kl_behavior_student"]
    assert kl.isfinite().all()


def test_nan_logits_stay_visible():
    student, teacher = draw(2, 5)
    teacher[0, 1] = math.nan
    for cls in RULES:
        kl = cls(0.3)(student, [teacher]).statistics["kl_behavior_student"]
        assert kl[0].isnan() and kl[1].isfinite()


@pytest.mark.parametrize("rule", [LogitMixing(0.4), ProbabilityMixing(0.4)])
def test_pure_over_leading_dimensions(rule):
    student, teacher = draw(2, 3, 8)
    student.requires_grad_()
    before = student.detach().clone(), teacher.clone()
    whole = rule(student, [teacher])
    for t in range(3):
        step = rule(student[:, t], [teacher[:, t]])
        torch.testing.assert_close(step.logits, whole.logits[:, t], rtol=0, atol=0)
        for name, values in step.statistics.items():
            torch.testing.assert_close(values, whole.statistics[name][:, t], rtol=0, atol=1e-7)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    assert whole.logits.requires_grad and not whole.statistics["kl_behavior_student"].requires_grad
    assert not whole.log_normalizer.requires_grad


@pytest.mark.parametrize("cls", RULES)
def test_settings(cls):
    assert cls(0.25).weights == (0.25,) and cls((0.25, 0.5)).weights == (0.25, 0.5) and cls([0.1]).weights == (0.1,)
    assert cls(0.25) == cls(0.25) and hash(cls([0.1])) == hash(cls((0.1,)))
    assert isinstance(cls(0.5), BlendRule)
    for weight in (-0.1, 1.1, math.nan, (0.6, 0.6)):
        with pytest.raises(ConfigError, match="`weight"):
            cls(weight)
    with pytest.raises(ConfigError, match="2 partners"):
        cls(0.5)(torch.zeros(1, 4), draw(1, 4, models=2))
    with pytest.raises(AttributeError):
        cls(0.5).weight = 0.1


def test_log_normalizer():
    logits = torch.cat([draw(3, 50)[0], 40.0 * draw(3, 50)[1], torch.zeros(1, 50)]) + 7.0
    logits[0, :49] = -INF
    expected = torch.logsumexp(logits.double(), -1)
    torch.testing.assert_close(log_normalizer(logits).double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_normalizer(logits, logits.softmax(-1)), log_normalizer(logits))

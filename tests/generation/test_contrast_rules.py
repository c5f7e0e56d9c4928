"""Rules that push away from a model: contrastive decoding and arithmetic of logits with weights of any sign."""

import math

import pytest
import torch

from tests import reference_trust_region as reference
from tests.generation.teacher_forced import DETAILS, sample, teacher_forced_logits
from trl_blend.errors import ConfigError
from trl_blend.generation import (
    BlendRule,
    ContrastiveDecoding,
    LogitArithmetic,
    LogitMixing,
    blended_generation,
)


INF = math.inf


def draw(*shape, models=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [3.0 * torch.randn(*shape, generator=generator) for _ in range(models)]


def assert_step(step, expected, student, row):
    found = step.logits[row].double().softmax(-1)
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=2e-6)
    kl = reference.kl([math.log(p) if p > 0 else -INF for p in expected], reference.log_softmax(student[row].tolist()))
    assert step.statistics["kl_behavior_student"][row].item() == pytest.approx(kl, rel=1e-4, abs=1e-5)
    assert step.log_normalizer[row].item() == pytest.approx(step.logits[row].logsumexp(-1).item(), abs=1e-4)


@pytest.mark.parametrize("alpha, beta", [(0.1, 0.5), (0.01, 2.0), (0.5, 0.0), (1.0, 0.5)])
@pytest.mark.parametrize("partners", [1, 2])
def test_contrastive_decoding_is_the_papers_formula(alpha, beta, partners):
    student, *others = draw(6, 14, models=3)
    others[0][1, 3] = student[2, 5] = others[1][2, 6] = -INF
    step = ContrastiveDecoding(alpha, beta)(student, others[:partners])
    amateur = others[1] if partners == 2 else student
    for row in range(6):
        expected = reference.contrastive_distribution(others[0][row].tolist(), amateur[row].tolist(), alpha, beta)
        assert_step(step, expected, student, row)


def test_contrastive_decoding_at_its_limits():
    student, teacher = draw(5, 14)
    greedy = ContrastiveDecoding(1.0, 0.5)(student, [teacher]).logits.softmax(-1)
    assert torch.equal(greedy.argmax(-1), teacher.argmax(-1)) and (greedy.amax(-1) == 1).all()
    everything = ContrastiveDecoding(1e-30, 0.0)(student, [teacher]).logits
    torch.testing.assert_close(everything.softmax(-1), teacher.softmax(-1))
    # An amateur that excludes all that the expert finds plausible leaves the expert's own choice
    student[0] = -INF
    student[0, teacher[0].argmin()] = 0.0
    step = ContrastiveDecoding(0.9, 0.5)(student, [teacher])
    assert step.logits[0].argmax() == teacher[0].argmax() and not step.logits.isnan().any()


@pytest.mark.parametrize(
    "student_weight, weights", [(1.0, (0.7, -0.7)), (1.0, (1.0, -1.0)), (0.0, (2.0, -1.0)), (-0.5, (1.5, 0.0))]
)
def test_arithmetic_is_a_weighted_sum(student_weight, weights):
    student, *others = draw(5, 12, models=3)
    student[1, 2] = others[1][2, 4] = -INF
    step = LogitArithmetic(student_weight, weights)(student, others)
    for row in range(5):
        rows = [student[row].tolist(), *(one[row].tolist() for one in others)]
        used = [(z, w) for z, w in zip(rows, (student_weight, *weights), strict=True) if w]
        total = [
            -INF if any(z[v] == -INF for z, _ in used) else math.fsum(w * z[v] for z, w in used) for v in range(12)
        ]
        assert_step(step, reference.softmax(total), student, row)


def test_arithmetic_with_weights_that_sum_to_one_is_mixing():
    student, teacher = draw(5, 12)
    arithmetic, mixing = LogitArithmetic(0.7, (0.3,)), LogitMixing(0.3)
    torch.testing.assert_close(arithmetic(student, [teacher]).logits, mixing(student, [teacher]).logits)


def test_arithmetic_at_its_limits():
    student, teacher = draw(5, 12)
    alone = LogitArithmetic(1.0, (1.5, -1.5))(student, [teacher, teacher])
    torch.testing.assert_close(alone.logits, student, rtol=0, atol=1e-5)
    # `z_S + w z_T` is logit mixing with weight `w / (1 + w)` at a temperature of `1 / (1 + w)` times
    added, mixing = LogitArithmetic(1.0, (0.6,)), LogitMixing(0.6 / 1.6)
    torch.testing.assert_close(added(student, [teacher]).logits, 1.6 * mixing(student, [teacher]).logits)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("rule", [ContrastiveDecoding(0.1, 0.5), LogitArithmetic(1.5, (-0.5,))])
def test_decoding_has_the_temperature_once(student, teacher, prompts, rule, temperature):
    with blended_generation(student, teacher, rule, record=True) as session:
        output = sample(student, prompts, temperature=temperature, **DETAILS)
    models = [
        teacher_forced_logits(model, output.sequences, prompts["attention_mask"]) for model in (student, teacher)
    ]
    z_s, z_t = (logits.double() / temperature for logits in models)
    expected = rule(z_s, [z_t]).logits.log_softmax(-1)
    tokens = output.sequences[:, -z_s.shape[1] :]
    logps = expected.gather(-1, tokens[..., None]).squeeze(-1)
    found = session.records[0].behavior_logps.double()
    kept = logps.isfinite()  # behind the end of a row anything may stand
    assert kept.any() and torch.allclose(found[kept], logps[kept], atol=1e-3)


@pytest.mark.parametrize("rule", [ContrastiveDecoding(), LogitArithmetic(1.5, (-0.5,))])
def test_pure_over_leading_dimensions_and_precise(rule):
    student, teacher = draw(2, 3, 8)
    before = student.clone(), teacher.clone()
    whole = rule(student, [teacher])
    for t in range(3):
        step = rule(student[:, t], [teacher[:, t]])
        torch.testing.assert_close(step.logits, whole.logits[:, t], rtol=0, atol=1e-6)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    half = rule(student.bfloat16(), [teacher.bfloat16()])
    assert half.logits.dtype == torch.float32 and isinstance(rule, BlendRule)
    exact = rule(student.bfloat16().double(), [teacher.bfloat16().double()])
    torch.testing.assert_close(half.logits.softmax(-1).double(), exact.logits.softmax(-1), rtol=0, atol=1e-5)


def test_settings():
    for alpha in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(ConfigError, match="`alpha` is"):
            ContrastiveDecoding(alpha)
    for beta in (-0.1, INF, math.nan):
        with pytest.raises(ConfigError, match="`beta` is"):
            ContrastiveDecoding(0.1, beta)
    for count in (0, 3):
        with pytest.raises(ConfigError, match=f"{count} partners"):
            ContrastiveDecoding()(torch.zeros(1, 4), [torch.zeros(1, 4)] * count)
    for weights in ((0.0, (0.0,)), (math.nan, (1.0,)), (1.0, (INF,))):
        with pytest.raises(ConfigError, match="weights are"):
            LogitArithmetic(*weights)
    with pytest.raises(ConfigError, match="1 entries for 2 partners"):
        LogitArithmetic(1.0, (0.5,))(torch.zeros(1, 4), [torch.zeros(1, 4)] * 2)
    assert hash(LogitArithmetic(1.0, [0.5])) == hash(LogitArithmetic(1.0, (0.5,)))

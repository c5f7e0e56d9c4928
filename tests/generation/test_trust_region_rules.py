import math

import pytest
import torch

from tests import reference_trust_region as reference
from tests.generation.teacher_forced import DETAILS, sample, teacher_forced_logits
from trl_blend.errors import ConfigError
from trl_blend.generation import BlendRule, ChernoffBlend, SpeculativeKD, TrustRegion, blended_generation


INF = math.inf


def draw(*shape, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator), scale * torch.randn(*shape, generator=generator)


def assert_policy(logits, expected, tolerance=2e-6):
    """`softmax(logits)` is the list of probabilities `expected`."""
    torch.testing.assert_close(logits.double().softmax(-1), torch.tensor(expected).double(), rtol=0, atol=tolerance)


def assert_trust_region_step(step, student, teacher, budget):
    """Policy, weight and statistics of a step of shape `(B, V)`, against the reference."""
    torch.testing.assert_close(step.log_normalizer, step.logits.logsumexp(-1), rtol=1e-6, atol=1e-5)
    for row, (s, t) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        values = {name: column[row].item() for name, column in step.statistics.items()}
        weight = reference.largest_weight(s, t, budget)
        assert values["teacher_weight"] == pytest.approx(weight, rel=1e-3)
        assert values["teacher_feasible"] == (weight == 1.0)
        mu = reference.path(s, t, values["teacher_weight"])
        assert_policy(step.logits[row], [math.exp(m) for m in mu])
        assert values["kl_behavior_student"] == pytest.approx(reference.kl(mu, reference.log_softmax(s)), rel=1e-4)
        assert values["kl_behavior_student"] <= budget * (1 + 1e-3)
        expected = reference.kl(mu, reference.log_softmax(t))
        assert values["kl_behavior_teacher"] == pytest.approx(expected, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("budget", [1e-3, 0.05, 0.7, 3.0])
def test_trust_region_against_the_reference(budget):
    student, teacher = draw(6, 40)
    student[5] = teacher[5] + 0.01 * student[5]
    step = TrustRegion(budget)(student, [teacher])
    assert list(step.statistics) == [
        "teacher_weight",
        "teacher_feasible",
        "kl_behavior_student",
        "kl_behavior_teacher",
    ]
    assert_trust_region_step(step, student, teacher, budget)
    assert step.statistics["teacher_feasible"][5] == 1.0


def test_ends_of_the_path_are_the_models_own_logits():
    student, teacher = draw(4, 9)
    student[1, 2], teacher[1, 3] = -INF, -INF
    teacher[2, 4] = -INF
    student[3], teacher[3, 5] = teacher[3], -INF  # feasible for some budgets, with a token less
    step = TrustRegion(0.0)(student, [teacher])
    assert torch.equal(step.logits, student)
    assert (step.statistics["kl_behavior_student"] == 0).all() and (step.statistics["teacher_feasible"] == 0).all()
    expected = [reference.path_teacher_kl(s, t, 0.0) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    torch.testing.assert_close(step.statistics["kl_behavior_teacher"], torch.tensor(expected))
    step = TrustRegion(INF)(student, [teacher])
    assert torch.equal(step.logits, teacher)
    assert (step.statistics["kl_behavior_teacher"] == 0).all() and step.statistics["kl_behavior_student"][1] == INF
    step = TrustRegion(5.0)(student, [teacher])
    assert torch.equal(step.logits[3], teacher[3])
    assert step.logits[1, 2] == step.logits[1, 3] == -INF and step.logits[2, 4] == -INF
    assert not step.logits.isnan().any()


@pytest.mark.parametrize("scale", [1.0, 0.4, 0.0])
def test_chernoff_blend_is_as_far_from_both(scale):
    student, teacher = draw(8, 30)
    teacher[6] = student[6] + 0.01 * teacher[6]
    student[7, 3], teacher[7, [5, 6]] = -INF, -INF
    step = ChernoffBlend(scale)(student, [teacher])
    torch.testing.assert_close(step.log_normalizer, step.logits.logsumexp(-1), rtol=1e-6, atol=1e-5)
    for row, (s, t) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        values = {name: column[row].item() for name, column in step.statistics.items()}
        weight = scale * reference.chernoff_weight(s, t)
        assert values["teacher_weight"] == pytest.approx(weight, abs=2e-4)
        mu = reference.path(s, t, values["teacher_weight"])
        assert_policy(step.logits[row], [math.exp(m) for m in mu])
        assert values["kl_behavior_student"] == pytest.approx(reference.kl(mu, reference.log_softmax(s)), abs=1e-5)
        assert values["kl_behavior_teacher"] == pytest.approx(reference.kl(mu, reference.log_softmax(t)), abs=1e-5)
        if scale == 1.0:
            assert values["kl_behavior_student"] == pytest.approx(values["kl_behavior_teacher"], abs=2e-3)
    assert scale > 0 or torch.equal(step.logits, student)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("budget", [1e-3, 0.1])
def test_trust_region_decoding_has_the_temperature_once(student, teacher, prompts, budget, temperature):
    with blended_generation(student, teacher, TrustRegion(budget), record=True) as session:
        output = sample(student, prompts, temperature=temperature, **DETAILS)
    record = session.records[0]
    models = [
        teacher_forced_logits(model, output.sequences, prompts["attention_mask"]) for model in (student, teacher)
    ]
    z_s, z_t = (logits.double() / temperature for logits in models)
    tokens = output.sequences[:, -z_s.shape[1] :]
    for b, t in ((b, t) for b in range(z_s.shape[0]) for t in range(z_s.shape[1])):
        rows = z_s[b, t].tolist(), z_t[b, t].tolist()
        weight = reference.largest_weight(*rows, budget)
        assert 0 < weight < 1
        mu = reference.path(*rows, weight)
        # What `generate` sampled from, after its own division by the temperature
        assert_policy(output.scores[t][b], [math.exp(m) for m in mu], tolerance=2e-4)
        assert record.behavior_logps[b, t].item() == pytest.approx(mu[tokens[b, t]], abs=5e-3)
        statistics = {name: values[b, t].item() for name, values in record.statistics.items()}
        assert statistics["teacher_weight"] == pytest.approx(weight, rel=2e-3)
        assert statistics["kl_behavior_student"] == pytest.approx(budget, rel=2e-3)
        assert statistics["kl_behavior_teacher"] == pytest.approx(reference.path_teacher_kl(*rows, weight), rel=2e-3)


@pytest.mark.parametrize("top_k, teacher_temperature", [(1, 1.0), (3, 0.2), (7, 2.0), (12, 0.6)])
def test_speculative_kd_is_its_two_stage_procedure(top_k, teacher_temperature):
    student, teacher = draw(5, 12)
    student[1, 0] = -INF
    teacher[2, [1, 4]] = -INF
    teacher[3, :9] = -INF  # fewer tokens than the larger top k
    student[4, teacher[4].topk(3).indices] -= 60.0
    step = SpeculativeKD(top_k, teacher_temperature)(student, [teacher])
    torch.testing.assert_close(step.logits.logsumexp(-1), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(step.log_normalizer, torch.zeros(5), rtol=0, atol=1e-6)
    for row, (s, t) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        expected = reference.speculative_distribution(s, t, top_k, teacher_temperature)
        assert_policy(step.logits[row], expected)
        ranked = sorted((v for v in range(12) if t[v] > -INF), key=lambda v: -t[v])[:top_k]
        share = math.fsum(p for v, p in enumerate(reference.softmax(s)) if v not in ranked)
        assert step.statistics["replaced_share"][row].item() == pytest.approx(share, rel=1e-5)
        kl = reference.kl([math.log(p) if p > 0 else -INF for p in expected], reference.log_softmax(s))
        assert step.statistics["kl_behavior_student"][row].item() == pytest.approx(kl, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_speculative_kd_decoding_has_the_temperature_once(student, teacher, prompts, temperature):
    with blended_generation(student, teacher, SpeculativeKD(4, 0.6), record=True) as session:
        output = sample(student, prompts, temperature=temperature, **DETAILS)
    models = [
        teacher_forced_logits(model, output.sequences, prompts["attention_mask"]) for model in (student, teacher)
    ]
    z_s, z_t = (logits.double() / temperature for logits in models)
    tokens = output.sequences[:, -z_s.shape[1] :]
    for b, t in ((b, t) for b in range(z_s.shape[0]) for t in range(z_s.shape[1])):
        expected = reference.speculative_distribution(z_s[b, t].tolist(), z_t[b, t].tolist(), 4, 0.6)
        assert_policy(output.scores[t][b], expected, tolerance=1e-5)
        logp = session.records[0].behavior_logps[b, t].item()
        assert logp == pytest.approx(math.log(expected[tokens[b, t]]), abs=1e-4)


@pytest.mark.parametrize("rule", [TrustRegion(0.05), SpeculativeKD(3, 0.6), ChernoffBlend(0.8)])
def test_pure_over_leading_dimensions(rule):
    student, teacher = draw(2, 3, 8)
    student.requires_grad_(), teacher.requires_grad_()
    before = student.detach().clone(), teacher.detach().clone()
    whole = rule(student, [teacher])
    for t in range(3):
        step = rule(student[:, t], [teacher[:, t]])
        torch.testing.assert_close(step.logits, whole.logits[:, t], rtol=0, atol=1e-6)
        for name, values in step.statistics.items():
            torch.testing.assert_close(values, whole.statistics[name][:, t], rtol=0, atol=1e-6)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    assert whole.logits.requires_grad and not whole.log_normalizer.requires_grad
    assert not any(values.requires_grad for values in whole.statistics.values())
    whole.logits.square().sum().backward()
    assert student.grad.isfinite().all() and student.grad.any() and teacher.grad is None


@pytest.mark.parametrize("rule", [TrustRegion(0.05), SpeculativeKD(3, 0.6), ChernoffBlend(0.8)])
def test_precision_and_nan(rule):
    student, teacher = draw(3, 20)
    half = rule(student.bfloat16(), [teacher.bfloat16()])
    assert half.logits.dtype == torch.float32
    exact = rule(student.bfloat16().double(), [teacher.bfloat16().double()])
    assert exact.logits.dtype == torch.float64
    torch.testing.assert_close(half.logits.softmax(-1).double(), exact.logits.softmax(-1), rtol=0, atol=1e-4)
    teacher[0, 1] = math.nan
    step = rule(student, [teacher])
    kl = step.statistics["kl_behavior_student"]
    assert step.logits[0].isnan().any() and kl[0].isnan() and kl[1:].isfinite().all()


def test_settings():
    assert TrustRegion(0.1) == TrustRegion(0.1) and hash(TrustRegion(0.1)) == hash(TrustRegion(0.1, 1e-3))
    assert isinstance(TrustRegion(0.1), BlendRule) and isinstance(SpeculativeKD(5, 1.0), BlendRule)
    for budget in (-0.1, math.nan):
        with pytest.raises(ConfigError, match="`kl_budget` is"):
            TrustRegion(budget)
    with pytest.raises(ConfigError, match="`rtol` is 0.5"):
        TrustRegion(0.1, rtol=0.5)
    for top_k in (0, -3):
        with pytest.raises(ConfigError, match="`top_k` is"):
            SpeculativeKD(top_k, 1.0)
    for temperature in (0.0, -1.0, math.nan, INF):
        with pytest.raises(ConfigError, match="`teacher_temperature` is"):
            SpeculativeKD(5, temperature)
    with pytest.raises(ConfigError, match="`top_k` is 5 for a vocabulary of 4 tokens"):
        SpeculativeKD(5, 1.0)(torch.zeros(1, 4), [torch.zeros(1, 4)])
    for scale in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="`scale` is"):
            ChernoffBlend(scale)
    for rule in (TrustRegion(0.1), SpeculativeKD(2, 1.0), ChernoffBlend()):
        for partners in ([], [torch.zeros(1, 4)] * 2):
            with pytest.raises(
                ConfigError, match=f"`{type(rule).__name__}` got the logits of {len(partners)} partners"
            ):
                rule(torch.zeros(1, 4), partners)

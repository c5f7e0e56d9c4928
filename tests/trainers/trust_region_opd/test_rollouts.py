"""What blended rollouts are drawn from, against the policies of `tests.reference_trust_region`, token by token."""

import logging
import math

import pytest
import torch
from peft import LoraConfig

from tests import reference_trust_region
from tests.tiny import VOCAB_SIZE, tiny_model
from tests.trainers import forced, runs
from tests.trainers.trust_region_opd import policies
from tests.trainers.trust_region_opd.policies import mean


OTHER_EOS = [20, 33]
ANNEALED = {"kl_budget": 0.3, "blend_warmup_steps": 3, "max_steps": 2}


def train(trainer):
    """Rollouts of a run, and its record."""
    rollouts = runs.record_opd_rollouts(trainer)
    return rollouts, runs.train(trainer)


def models_of(rollout, student_rows=VOCAB_SIZE, teacher_rows=VOCAB_SIZE):
    student = forced.student_at(rollout.parameters, vocab_size=student_rows)
    return student, forced.frozen(1, vocab_size=teacher_rows)


def check(rollout, policy, *, temperature=1.0, eos=None, sizes=(VOCAB_SIZE, VOCAB_SIZE)):
    """The recorded log-probability of every token is that of `policy`. Rows of student, teacher and policy."""
    (record,) = rollout.records
    student, teacher = (
        policies.logprob_rows(model, rollout.inputs, temperature, eos) for model in models_of(rollout, *sizes)
    )
    behavior = [policy(s, t) for s, t in zip(student, teacher, strict=True)]
    tokens = policies.emitted(rollout.inputs)
    expected = [row[token] for row, token in zip(behavior, tokens, strict=True)]
    recorded = policies.kept(record.behavior_logps, rollout.inputs)
    assert recorded == pytest.approx(expected, abs=2e-3)
    own = [row[token] for row, token in zip(student, tokens, strict=True)]
    assert sum(abs(a - b) for a, b in zip(recorded, own)) > 0.1 * len(own), "this is the student: nothing is tested"
    teacher_logps = [row[token] for row, token in zip(teacher, tokens, strict=True)]
    assert policies.kept(record.teacher_logps[0], rollout.inputs) == pytest.approx(teacher_logps, abs=1e-3)
    return student, teacher, behavior


def pairwise_kl(rows, others):
    return [reference_trust_region.kl(row, other) for row, other in zip(rows, others, strict=True)]


def entropies(rows):
    return [-math.fsum(math.exp(v) * v for v in row if v > -math.inf) for row in rows]


TRUST_REGIONS = {
    "linear": ({}, [0.3, 0.2]),
    "constant": ({"kl_budget_schedule": "constant", "temperature": 0.7}, [0.3, 0.3]),
    "eos": ({"temperature": 1.3, "teacher_eos_token_id": OTHER_EOS}, [0.3, 0.2]),
}


@pytest.mark.parametrize("name", TRUST_REGIONS)
def test_trust_region(build_opd, name):
    settings, budgets = TRUST_REGIONS[name]
    rollouts, record = train(build_opd(**{**ANNEALED, **settings}))
    assert record.logged("blend/kl_budget") == pytest.approx(budgets, rel=1e-6)
    temperature = settings.get("temperature", 1.0)
    eos = policies.eos_pair(OTHER_EOS) if name == "eos" else None
    for step, (rollout, budget) in enumerate(zip(rollouts, budgets, strict=True)):
        rows = check(rollout, policies.trust_region(budget), temperature=temperature, eos=eos)
        student, teacher, behavior = rows
        realised = pairwise_kl(behavior, student)
        statistics = rollout.records[0].statistics
        recorded = policies.kept(statistics["kl_behavior_student"], rollout.inputs)
        assert recorded == pytest.approx(realised, rel=5e-3)
        assert max(recorded) <= budget * (1 + 1e-3) and max(recorded) > 0.9 * budget
        weights = [reference_trust_region.largest_weight(s, t, budget) for s, t in zip(student, teacher)]
        feasible = [float(weight == 1.0) for weight in weights]
        expected = {
            "kl_behavior_student": mean(realised),
            "kl_behavior_teacher": mean(pairwise_kl(behavior, teacher)),
            "teacher_weight/mean": mean(weights),
            "teacher_weight/max": max(weights),
            "teacher_feasible": mean(feasible),
            "teacher_entropy": mean(entropies(teacher)),
            "teacher_logp": mean([row[t] for row, t in zip(teacher, policies.emitted(rollout.inputs))]),
        }
        for key, value in expected.items():
            assert record.logged(f"blend/{key}")[step] == pytest.approx(value, rel=5e-3, abs=1e-4), key


@pytest.mark.parametrize("sizes", [(64, 72), (72, 64)], ids=["padded_teacher", "padded_student"])
@pytest.mark.parametrize("policy", ["trust_region", "speculative_kd"])
def test_padded_vocabularies(build_opd, sizes, policy):
    settings = {"kl_budget": 0.3, "blend_warmup_steps": 3} if policy == "trust_region" else {"skd_top_k": 5}
    trainer = build_opd(rollout_policy=policy, **settings, **policies.padded_models(*sizes))
    assert trainer.missing_token_ids == list(range(sizes[1], sizes[0]))
    rollouts, _ = train(trainer)
    expected = policies.trust_region(0.3) if policy == "trust_region" else policies.speculative(5, 0.2)
    check(rollouts[0], expected, sizes=sizes)


@pytest.mark.parametrize("policy", ["trust_region", "student"])
def test_padding_rows_are_never_emitted(build_opd, policy):
    """Also where the student prefers them, after the warmup and with the user's own suppressed tokens."""
    arguments = policies.padded_models(72, 64)
    head = arguments["student"].get_output_embeddings()
    with torch.no_grad():
        head.weight[60:] *= 6.0
    settings = {"kl_budget": 0.1, "blend_warmup_steps": 1} if policy == "trust_region" else {}
    rollouts, _ = train(
        build_opd(
            rollout_policy=policy, max_steps=2, generation_kwargs={"suppress_tokens": [61]}, **settings, **arguments
        )
    )
    tokens = {token for rollout in rollouts for token in policies.emitted(rollout.inputs)}
    assert max(tokens) == 63 and 61 not in tokens
    assert [bool(rollout.records) for rollout in rollouts] == [policy == "trust_region", False]


def test_fixed_weight(build_opd):
    settings = {"rollout_policy": "fixed_weight", "teacher_weight": 0.4, "temperature": 0.7}
    rollouts, record = train(build_opd(**settings))
    student, teacher, behavior = check(rollouts[0], policies.fixed_weight(0.4), temperature=0.7)
    assert record.logged("blend/kl_behavior_student") == [
        pytest.approx(mean(pairwise_kl(behavior, student)), rel=1e-3)
    ]
    # Estimated from the drawn tokens
    tokens = policies.emitted(rollouts[0].inputs)
    gap = mean([b[token] - t[token] for b, t, token in zip(behavior, teacher, tokens, strict=True)])
    assert record.logged("blend/kl_behavior_teacher") == [pytest.approx(gap, rel=1e-3, abs=1e-4)]
    assert record.logged("blend/kl_budget") == [] and record.logged("blend/replaced_share") == []


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({"rollout_policy": "chernoff"}, policies.chernoff()),
        ({"rollout_policy": "contrastive", "contrastive_alpha": 0.02}, policies.contrastive(0.02, 0.5)),
    ],
    ids=["chernoff", "contrastive"],
)
def test_policies_without_a_budget(build_opd, settings, policy):
    rollouts, record = train(build_opd(temperature=0.7, **settings))
    student, teacher, behavior = check(rollouts[0], policy, temperature=0.7)
    to_student = mean(pairwise_kl(behavior, student))
    assert record.logged("blend/kl_behavior_student") == [pytest.approx(to_student, rel=2e-3)]
    if settings["rollout_policy"] == "chernoff":
        assert to_student == pytest.approx(mean(pairwise_kl(behavior, teacher)), rel=2e-3)
        assert record.logged("blend/kl_behavior_teacher") == [pytest.approx(to_student, rel=2e-3)]


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_speculative_kd(build_opd, temperature):
    settings = {"rollout_policy": "speculative_kd", "skd_top_k": 5, "skd_teacher_temperature": 0.6}
    rollouts, record = train(build_opd(temperature=temperature, **settings))
    student, teacher, behavior = check(rollouts[0], policies.speculative(5, 0.6), temperature=temperature)
    replaced = []
    for s, t in zip(student, teacher, strict=True):
        top = sorted(range(len(t)), key=lambda v: -t[v])[:5]  # noqa: B023
        replaced.append(1.0 - math.fsum(math.exp(s[v]) for v in top))
    assert record.logged("blend/replaced_share") == [pytest.approx(mean(replaced), rel=1e-3)]
    divergence = mean(pairwise_kl(behavior, student))
    assert record.logged("blend/kl_behavior_student") == [pytest.approx(divergence, rel=1e-3)]


def test_the_students_eos_is_what_is_emitted(build_opd):
    """A teacher that always stops with its own token, and whose budget is generous: rows end with the student's."""
    teacher = tiny_model("llama", seed=1)
    teacher.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB_SIZE))
    with torch.no_grad():
        teacher.lm_head.bias[33] = 30.0
    settings = {"rollout_policy": "fixed_weight", "teacher_weight": 0.9}

    def student():
        model = tiny_model(seed=0)
        model.generation_config.eos_token_id = 1
        return model

    arguments = policies.padded_models(64, 64) | {"teacher": teacher}
    arguments["student"] = student()
    rollouts, _ = train(build_opd(teacher_eos_token_id=[33], **settings, **arguments))
    rows = forced.tokens(rollouts[0].inputs)
    assert all(row == [1] for row in rows)
    # Without the map the student decodes on past the teacher's token
    arguments["student"] = student()
    rollouts, _ = train(build_opd(canonicalize_eos=False, **settings, **arguments))
    assert all(row == [33] * runs.MAX_LENGTH for row in forced.tokens(rollouts[0].inputs))


def test_the_students_own_rollouts_stop_with_any_of_the_merged_tokens(build_opd):
    """The loss does not tell the merged tokens apart: a rollout that went on after one would be another policy's."""
    student, teacher_eos = tiny_model(seed=0), [3, 7, 11, 20, 33]
    student.generation_config.eos_token_id = 1
    arguments = policies.padded_models(64, 64) | {"student": student, "teacher": tiny_model(seed=1)}
    trainer = build_opd(rollout_policy="student", teacher_eos_token_id=teacher_eos, max_steps=4, **arguments)
    rollouts, _ = train(trainer)
    rows = [row for rollout in rollouts for row in forced.tokens(rollout.inputs)]
    stops = {1, *teacher_eos}
    assert not any(token in stops for row in rows for token in row[:-1])
    assert any(row[-1] in teacher_eos for row in rows)
    assert set(trainer.model.generation_config.eos_token_id) == stops  # so that the saved model stops there, too


def test_rollouts_are_drawn_without_dropout(build_opd):
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5
    )
    trainer = build_opd(learning_rate=0.0, **{**ANNEALED, "max_steps": 1}, trainer_kwargs={"peft_config": config})
    rollouts, _ = train(trainer)
    assert trainer.model.training  # for the loss
    student = trainer.accelerator.unwrap_model(trainer.model).eval().double()
    inputs = rollouts[0].inputs
    rows = [policies.logprob_rows(model, inputs, 1.0) for model in (student, forced.frozen(1))]
    behavior = [policies.trust_region(0.3)(s, t) for s, t in zip(*rows, strict=True)]
    expected = [row[token] for row, token in zip(behavior, policies.emitted(inputs), strict=True)]
    assert policies.kept(rollouts[0].records[0].behavior_logps, inputs) == pytest.approx(expected, abs=2e-3)


WARMUPS = {
    "linear": {"kl_budget": 0.05},
    "constant": {"kl_budget": 0.05, "kl_budget_schedule": "constant"},
    "fixed_weight": {"rollout_policy": "fixed_weight"},
    "speculative_kd": {"rollout_policy": "speculative_kd"},
}


@pytest.mark.parametrize("name", WARMUPS)
def test_the_switch_to_the_student_is_made_and_said_once(build_opd, caplog, name):
    trainer = build_opd(blend_warmup_steps=2, max_steps=4, **WARMUPS[name])
    with caplog.at_level(logging.WARNING):
        rollouts, record = train(trainer)
    assert [bool(rollout.records) for rollout in rollouts] == [True, True, False, False]
    (message,) = [text for text in caplog.messages if "warmup of" in text]
    assert "Step 2:" in message and "transformers" in message
    assert f"`rollout_policy='{trainer.args.rollout_policy}'`" in message
    assert len(record.logged("blend/kl_behavior_student")) == 2


@pytest.mark.parametrize("settings", [{"rollout_policy": "student"}, {"kl_budget": 0.0}], ids=str)
def test_a_run_that_never_blends_says_nothing(build_opd, caplog, settings):
    with caplog.at_level(logging.WARNING):
        build_opd(max_steps=2, **settings).train()
    assert "warmup of" not in caplog.text


# Temperature warmup


def test_a_temperature_warmup_is_of_the_sampling_only(build_opd, monkeypatch):
    settings = {"temperature_warmup_start": 0.4, "temperature_warmup_steps": 2, "temperature": 0.8, "max_steps": 3}
    trainer = build_opd(rollout_policy="student", **settings)
    used, generate = [], trainer.model.generate

    def recording(*args, generation_config=None, **kwargs):
        taken, _ = trainer.model._prepare_generation_config(generation_config)
        used.append((taken.temperature, trainer.generation_kwargs["temperature"]))
        return generate(*args, generation_config=generation_config, **kwargs)

    monkeypatch.setattr(trainer.model, "generate", recording)
    record = runs.train(trainer)
    assert used == [(pytest.approx(t), pytest.approx(t)) for t in (0.4, 0.6, 0.8)]
    assert record.logged("blend/temperature") == pytest.approx([0.4, 0.6, 0.8])
    assert trainer.generation_config.temperature == trainer.generation_kwargs["temperature"] == 0.8
    # The loss keeps the temperature
    call = record.calls[0]
    student, teacher = forced.student_at(call.parameters), forced.frozen(1)
    rows = [policies.logprob_rows(model, call.inputs, 0.8) for model in (student, teacher)]
    assert call.loss == pytest.approx(mean(pairwise_kl(*rows)), rel=1e-4)


def test_a_temperature_warmup_changes_what_is_drawn(build_opd):
    """Nearly greedy at a tiny start, as the reference's greedy completions say."""
    settings = {"temperature_warmup_start": 1e-3, "temperature_warmup_steps": 5, "max_steps": 1}
    (call,) = runs.train(build_opd(rollout_policy="student", **settings)).calls
    student = forced.student_at(call.parameters)
    prompts = zip(call.inputs["prompt_ids"], call.inputs["prompt_mask"].bool(), strict=True)
    expected = [
        forced.greedy(student, [], [], prompt[mask].tolist(), runs.EOS_IDS, runs.MAX_LENGTH)
        for prompt, mask in prompts
    ]
    assert forced.tokens(call.inputs) == expected


def test_rows_that_neither_model_has_tokens_for_are_not_drawn(build_opd):
    """Both are padded alike, and prefer the padding."""
    arguments = policies.padded_models(72, 72)
    with torch.no_grad():
        for role in ("student", "teacher"):
            arguments[role].get_output_embeddings().weight[64:] *= 6.0
    trainer = build_opd(kl_budget=0.3, blend_warmup_steps=3, **arguments)
    assert trainer.missing_token_ids == [] and not trainer.uses_own_divergence
    rollouts, _ = train(trainer)
    assert max(policies.emitted(rollouts[0].inputs)) < 64

"""Rollouts with `use_vllm=True`, of an engine that is not vLLM: it is told what to draw from, at every step."""

import logging

import pytest
import transformers
import trl.trainer.distillation_trainer as trl_distillation

from tests.trainers import forced, runs
from tests.trainers.engines import COMPLETION, Engine, PlainEngine
from tests.trainers.trust_region_opd import policies
from trl_blend import LogitMixing
from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.generation import settings
from trl_blend.serving.statistics import OF_DRAFTS
from trl_blend.trainers import _engine


AFTER_THE_BLEND = {
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {5: 1.0},
    "bad_words": ["a"],
    "allowed_token_ids": [5, 6],
    "min_tokens": 3,
    "structured_outputs": {"regex": "[0-9]+"},
}


@pytest.fixture
def build_vllm(build_opd, monkeypatch):
    monkeypatch.setattr(trl_distillation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(trl_distillation, "VLLMGeneration", PlainEngine)  # what a run without a blend takes
    monkeypatch.setattr(_engine, "BlendedVLLMGeneration", Engine)
    monkeypatch.setattr(_engine, "partners_of", lambda teachers, args: list(teachers))
    return lambda **settings: build_opd(use_vllm=True, **settings)


def drawn_by_engine(call):
    return all(row == COMPLETION for row in forced.tokens(call.inputs))


@pytest.mark.parametrize("policy", ["trust_region", "fixed_weight", "speculative_kd"])
def test_the_engine_draws_the_warmup_too(build_vllm, caplog, policy):
    trainer = build_vllm(rollout_policy=policy, blend_warmup_steps=2, max_steps=4)
    engine, rules = trainer.vllm_generation, [trainer.args.rule_at(step) for step in range(4)]
    with caplog.at_level(logging.WARNING):
        record = runs.train(trainer)
    assert all(drawn_by_engine(call) for call in record.calls)
    assert engine.rules == rules and None not in rules[:2] and rules[2:] == [None, None]
    assert engine.calls == [(8, 1, 1.0)] * 4 and engine.syncs == 4
    assert [given["records"] for given in engine.settings] == [True, True, False, False]
    assert engine.blend.rule == rules[0] and engine.partners_stop
    assert engine.sent == {}  # it was given by name
    assert len([text for text in caplog.messages if "From here on rollouts are drawn from the student" in text]) == 1


def test_the_statistics_are_the_engines(build_vllm):
    trainer = build_vllm(kl_budget=0.3, blend_warmup_steps=2, max_steps=1)
    runs.train(trainer)
    (entry,) = [entry for entry in trainer.state.log_history if "blend/teacher_weight/mean" in entry]
    expected = {"teacher_weight/mean": 0.25, "teacher_weight/max": 0.75, "kl_behavior_student": 0.5}
    expected |= {"kl_behavior_teacher": 2.0, "teacher_logp": 0.75, "teacher_entropy": 0.875}
    assert {name: entry[f"blend/{name}"] for name in expected} == expected


def test_a_rule_without_a_divergence_from_the_teacher_has_the_engines(build_vllm):
    trainer = build_vllm(rollout_policy="fixed_weight", max_steps=1)
    runs.train(trainer)
    (value,) = [e["blend/kl_behavior_teacher"] for e in trainer.state.log_history if "blend/kl_behavior_teacher" in e]
    assert value == 0.625
    assert not trainer.vllm_generation.partners_stop  # it blends to the end


def test_the_table_has_no_columns_that_only_transformers_knows(build_vllm):
    trainer = build_vllm(kl_budget=0.3, blend_warmup_steps=2, max_steps=1, log_completions=True)
    runs.train(trainer)
    assert list(trainer._table._extra) == ["kl_budget"]


@pytest.mark.parametrize("failing", [False, True])
def test_a_temperature_warmup_is_the_engines_too(build_vllm, monkeypatch, failing):
    settings = {"temperature_warmup_start": 0.5, "temperature_warmup_steps": 2, "max_steps": 3}
    trainer = build_vllm(rollout_policy="student", **settings)
    engine = trainer.vllm_generation
    if failing:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "sync_weights", lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                trainer.train()
    else:
        runs.train(trainer)
        assert [temperature for _, _, temperature in engine.calls] == [0.5, 0.75, 1.0]
    assert engine.temperature == 1.0 and trainer.generation_kwargs["temperature"] == 1.0


def test_evaluation_is_the_students(build_vllm):
    trainer = build_vllm(blend_warmup_steps=5, trainer_kwargs={"eval_dataset": runs.dataset()})
    trainer.evaluate()
    assert trainer.vllm_generation.calls == [(8, 1, 1.0)] and trainer.vllm_generation.rules == [None]


def test_the_engine_stops_at_merged_tokens(build_vllm):
    trainer = build_vllm(teacher_eos_token_id=[33], max_steps=1)
    engine = trainer.vllm_generation
    assert set(engine.generation_kwargs["stop_token_ids"]) == {*runs.EOS_IDS, 33}
    runs.train(trainer)
    assert engine.settings[0]["eos"] == trainer.eos and set(engine.settings[0]["stop_token_ids"]) == {
        *runs.EOS_IDS,
        33,
    }
    assert "stop_token_ids" not in build_vllm().vllm_generation.generation_kwargs
    given = build_vllm(teacher_eos_token_id=[33], generation_kwargs={"stop_token_ids": [45]})
    assert {33, 45} < set(given.vllm_generation.generation_kwargs["stop_token_ids"])


@pytest.mark.parametrize(
    "given",
    [
        *({"generation_kwargs": {name: value}} for name, value in AFTER_THE_BLEND.items()),
        {"vllm_structured_outputs_regex": "[0-9]+"},
    ],
)
def test_what_vllm_applies_after_the_blend_is_refused(build_vllm, given):
    (name,) = given.get("generation_kwargs", given)
    with pytest.raises(ConfigError, match=f"`{name}=.*after the blend.*`rollout_policy='student'`"):
        build_vllm(**given)
    build_vllm(rollout_policy="student", **given)
    assert set(AFTER_THE_BLEND) == set(settings.AFTER_THE_BLEND)


def test_greedy_decodes_are_the_engines(build_vllm, build_opd):
    trainer = build_vllm(teacher_eos_token_id=[33])
    engine = trainer.vllm_generation
    assert trainer.decode_greedily([[5, 6]]) == [COMPLETION] == trainer.decode_greedily([[5, 6]], teacher=True)
    assert (
        engine.rules == [None, LogitMixing(1.0)] and [temperature for _, _, temperature in engine.calls] == [0.0] * 2
    )
    assert engine.settings[1]["eos"] == trainer.eos and engine.temperature == 1.0
    assert [given["vocab_size"] for given in engine.settings] == [trainer._num_tokens] * 2
    with pytest.raises(ConfigError, match="No engine draws blended rollouts here"):
        build_opd().decode_greedily([[5, 6]])


def test_the_best_weights_reach_the_engine(build_vllm, monkeypatch):
    monkeypatch.setattr(transformers.Trainer, "_load_best_model", lambda self: None)
    trainer = build_vllm(max_steps=1)
    runs.train(trainer)
    assert trainer._last_loaded_step == 0
    trainer._load_best_model()
    assert trainer._last_loaded_step == -1


def test_without_a_blend_the_engine_is_the_parents(build_vllm):
    trainer = build_vllm(rollout_policy="student")
    assert type(trainer.vllm_generation) is PlainEngine and trainer.engine is None


def test_an_engine_that_could_emit_padding_rows_is_refused(build_vllm):
    models = policies.padded_models(72, 64)
    with pytest.raises(UnsupportedError, match="8 vocabulary rows that the teacher lacks, and an engine that holds"):
        build_vllm(rollout_policy="student", **models)
    assert len(build_vllm(**policies.padded_models(72, 64)).missing_token_ids) == 8  # a blend never draws them
    assert build_vllm(**policies.padded_models(64, 72)).missing_token_ids == []


def test_what_becomes_of_the_drafts_is_logged(build_vllm):
    drafts = {"vllm_mode": "colocate", "vllm_draft_tokens": 4, "max_steps": 1}
    trainer = build_vllm(kl_budget=0.02, blend_warmup_steps=2, **drafts)
    runs.train(trainer)
    assert trainer.engine.draft_tokens == 4
    (entry,) = [entry for entry in trainer.state.log_history if "blend/draft_acceptance" in entry]
    names = (*OF_DRAFTS, "draft_acceptance_bound")
    assert [entry[f"blend/{name}"] for name in names] == [0.25, 0.5, 0.75, 1.0, 0.9]
    trainer = build_vllm(rollout_policy="fixed_weight", **drafts)
    runs.train(trainer)
    assert not any("blend/draft_acceptance_bound" in entry for entry in trainer.state.log_history)

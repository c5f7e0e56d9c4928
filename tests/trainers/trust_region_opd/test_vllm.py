"""Rollouts with `use_vllm=True`, of an engine that is not vLLM: blended ones are transformers', later ones its own."""

import logging

import pytest
import trl.trainer.distillation_trainer as trl_distillation

from tests.trainers import forced, runs
from tests.trainers.trust_region_opd import policies
from trl_blend.errors import UnsupportedError
from trl_blend.trainers.trust_region_opd import trainer as module


COMPLETION = [7, 8, 9]


class Engine:
    """In the shape of `VLLMGeneration`: remembers its calls and completes every prompt with the same tokens."""

    def __init__(self, **kwargs):
        self.temperature, self.generation_kwargs = kwargs["temperature"], dict(kwargs["generation_kwargs"] or {})
        self.calls, self.syncs = [], 0

    def sync_weights(self):
        self.syncs += 1

    def generate(self, prompts, images, num_generations, profiler):
        self.calls.append((len(prompts), num_generations, self.temperature))
        return None, [list(COMPLETION) for _ in prompts], None, None


@pytest.fixture
def build_vllm(build_opd, monkeypatch):
    monkeypatch.setattr(trl_distillation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(trl_distillation, "VLLMGeneration", Engine)
    return lambda **settings: build_opd(use_vllm=True, **settings)


def drawn_by_engine(call):
    return all(row == COMPLETION for row in forced.tokens(call.inputs))


@pytest.mark.parametrize("policy", ["trust_region", "fixed_weight", "speculative_kd"])
def test_the_engine_takes_over_after_the_warmup(build_vllm, caplog, policy):
    trainer = build_vllm(rollout_policy=policy, blend_warmup_steps=2, max_steps=4)
    rollouts = runs.record_opd_rollouts(trainer)
    with caplog.at_level(logging.WARNING):
        record = runs.train(trainer)
    assert [drawn_by_engine(call) for call in record.calls] == [False, False, True, True]
    assert [bool(rollout.records) for rollout in rollouts] == [True, True, False, False]
    assert trainer.vllm_generation.calls == [(8, 1, 1.0)] * 2
    assert trainer.vllm_generation.syncs == 2  # never while it is not used
    (message,) = [text for text in caplog.messages if "warmup of" in text]
    assert "with vLLM" in message
    assert trainer.use_vllm is True


def test_blended_rollouts_are_those_without_the_engine(build_vllm, build_opd):
    settings = {"kl_budget": 0.3, "blend_warmup_steps": 3, "max_steps": 2}
    ours, plain = runs.train(build_vllm(**settings)), runs.train(build_opd(**settings))
    runs.assert_same_run(ours, plain)
    assert ours.trainer.vllm_generation.calls == []


@pytest.mark.parametrize("where", ["generate", "enter"])
def test_the_flag_is_put_back_after_a_failure(build_vllm, monkeypatch, where):
    class Failure(Exception):
        pass

    seen = []

    def fail(*args, **kwargs):
        seen.append(trainer.use_vllm)
        raise Failure

    trainer = build_vllm(blend_warmup_steps=2, max_steps=1)
    with monkeypatch.context() as patch:
        if where == "generate":
            patch.setattr(trainer.teacher_model.model, "forward", fail)
        else:
            patch.setattr(module, "blended_generation", fail)
        with pytest.raises(Failure):
            trainer.train()
    assert seen == [False] and trainer.use_vllm is True
    assert "generate" not in vars(trainer.model) and trainer.model.training
    assert len(runs.train(trainer).calls) == 1


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


def test_evaluation_is_the_engines(build_vllm):
    trainer = build_vllm(blend_warmup_steps=5, trainer_kwargs={"eval_dataset": runs.dataset()})
    trainer.evaluate()
    assert trainer.vllm_generation.calls == [(8, 1, 1.0)]


def test_the_engine_stops_at_merged_tokens(build_vllm):
    trainer = build_vllm(teacher_eos_token_id=[33])
    assert set(trainer.vllm_generation.generation_kwargs["stop_token_ids"]) == {*runs.EOS_IDS, 33}
    assert "stop_token_ids" not in build_vllm().vllm_generation.generation_kwargs


def test_an_engine_that_could_emit_padding_rows_is_refused(build_vllm):
    with pytest.raises(UnsupportedError, match="8 vocabulary rows that the teacher lacks, and vLLM"):
        build_vllm(**policies.padded_models(72, 64))
    assert build_vllm(**policies.padded_models(64, 72)).missing_token_ids == []

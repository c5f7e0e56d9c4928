"""Mixed rollouts of an engine that is not vLLM: what it is told, and what its log-probabilities are taken for."""

from functools import partial

import pytest
import torch
import trl.trainer.grpo_trainer as trl_grpo

from tests.trainers import runs
from tests.trainers.engines import COMPLETION, Engine, PlainEngine
from trl_blend import LogitMixing, ProbabilityMixing
from trl_blend.errors import TokenizerMismatchError
from trl_blend.generation import LogitArithmetic
from trl_blend.serving.statistics import OF_DRAFTS
from trl_blend.trainers import _engine


LOGPS = [-0.5 - token / 100 for token in COMPLETION]


@pytest.fixture
def build_vllm(build, monkeypatch):
    monkeypatch.setattr(trl_grpo, "VLLMGeneration", PlainEngine)  # what a run without teachers takes
    monkeypatch.setattr(_engine, "BlendedVLLMGeneration", Engine)
    monkeypatch.setattr(_engine, "partners_of", lambda teachers, args: list(teachers))
    return lambda **settings: build(use_vllm=True, **settings)


def outputs(trainer, steps=1):
    """What `_generate_and_score_completions` returned in a run."""
    found, score = [], trainer._generate_and_score_completions

    def keep(inputs):
        found.append(score(inputs))
        return found[-1]

    trainer._generate_and_score_completions = keep
    runs.train(trainer)
    return found


@pytest.mark.parametrize(
    ("space", "weight", "rule"),
    [
        ("logits", 0.4, LogitMixing),
        ("probs", 0.4, ProbabilityMixing),
        ("arithmetic", -0.4, partial(LogitArithmetic, 1.0)),
    ],
)
def test_the_engine_is_told_the_weight_of_each_step(build_vllm, space, weight, rule):
    decay = {"teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 2, "mixing_space": space}
    trainer = build_vllm(teacher_weight=weight, max_steps=3, **decay)
    runs.train(trainer)
    assert trainer.engine.rules == [rule((weight,)), rule((weight / 2,)), None]
    assert trainer.engine.partners_stop and trainer.engine.syncs == 3
    settings = {"stop_token_ids": trainer.eos_token_ids, "vocab_size": trainer._num_tokens, "records": True}
    assert trainer.engine.settings[0] == settings
    (first, *_) = [entry for entry in trainer.state.log_history if "mixing/kl_behavior_student" in entry]
    assert first["mixing/kl_behavior_student"] == 0.5 and first["mixing/teacher_logp"] == 0.75


def test_the_students_objective_divides_by_the_engines_probabilities(build_vllm):
    trainer = build_vllm(objective="student", teacher_weight=0.4, max_steps=1)
    (output,) = outputs(trainer)
    assert torch.allclose(output["old_per_token_logps"], torch.tensor(LOGPS))
    assert "importance_sampling_ratio" not in output  # it is in that ratio already
    assert trainer.vllm_importance_sampling_correction  # put back


def test_a_token_whose_probability_is_unknown_leaves_the_loss(build_vllm, monkeypatch):
    generate = PlainEngine.generate

    def generate_without_one(self, **given):
        ids, completions, logps, extra = generate(self, **given)
        logps[0][1] = [None]  # where vLLM computes no number
        return ids, completions, logps, extra

    trainer = build_vllm(objective="student", teacher_weight=0.4, max_steps=1)
    monkeypatch.setattr(PlainEngine, "generate", generate_without_one)
    (output,) = outputs(trainer)
    known = output["tool_mask"].bool()
    assert known.sum() == known.numel() - 1
    assert torch.allclose(output["old_per_token_logps"][known], torch.tensor(LOGPS).expand(len(known), -1)[known])
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_the_mixed_objective_is_corrected(build_vllm):
    (output,) = outputs(build_vllm(teacher_weight=0.4, max_steps=1))
    expected = (output["old_per_token_logps"] - torch.tensor(LOGPS)).exp().prod(dim=1, keepdim=True)
    ratio = output["importance_sampling_ratio"]
    assert torch.allclose(ratio[ratio > 0], expected[ratio > 0]) and ratio.shape == expected.shape


def test_the_correction_comes_back_with_the_students_own_rollouts(build_vllm):
    decay = {"teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 1}
    first, second = outputs(build_vllm(objective="student", teacher_weight=0.4, max_steps=2, **decay))
    assert "importance_sampling_ratio" not in first and "importance_sampling_ratio" in second


def test_greedy_decodes_are_the_engines(build_vllm):
    trainer = build_vllm(teacher_weight=0.4)
    rewards = trainer.greedy_rewards(list(runs.dataset())[:4], (0.3,))
    assert len(rewards.rewards) == 4 and trainer.engine.rules == [LogitMixing((0.3,))]
    assert trainer.engine.calls == [(4, 1, 0.0)]  # the prompts are all different
    assert trainer.engine.settings[0]["records"] is False and trainer.engine.temperature == 1.0
    assert trainer.num_generations_eval == trainer.num_generations == 4


@pytest.mark.parametrize("weights", [(0.0,), (0.3,)])
def test_greedy_decodes_draw_no_row_that_is_no_token(build_vllm, weights):
    trainer = build_vllm(teacher_weight=0.4, max_steps=1)
    trainer._num_tokens = 60
    trainer.greedy_rewards(list(runs.dataset())[:4], weights)
    assert trainer.engine.settings[0]["vocab_size"] == 60


def test_a_prompt_without_a_row_is_refused(build_vllm):
    trainer = build_vllm(teacher_weight=0.4)
    with pytest.raises(TokenizerMismatchError, match="holds token id 1000 "):
        trainer._generate_single_turn([[5, 1000]], None, {}, 1)


def test_without_teachers_the_engine_is_the_parents(build_vllm):
    trainer = build_vllm(teacher_weight=0.0)
    assert type(trainer.vllm_generation) is PlainEngine and trainer.engine is None
    trainer.greedy_rewards(list(runs.dataset())[:4], (0.0,))
    assert trainer.vllm_generation.calls == [(4, 1, 0.0)] and trainer.vllm_generation.temperature == 1.0


def test_what_becomes_of_the_drafts_is_logged(build_vllm):
    trainer = build_vllm(teacher_weight=0.4, max_steps=1, vllm_mode="colocate", vllm_draft_tokens=4)
    runs.train(trainer)
    assert trainer.engine.draft_tokens == 4
    (entry,) = [entry for entry in trainer.state.log_history if "mixing/draft_acceptance" in entry]
    assert [entry[f"mixing/{name}"] for name in OF_DRAFTS] == [0.25, 0.5, 0.75, 1.0]

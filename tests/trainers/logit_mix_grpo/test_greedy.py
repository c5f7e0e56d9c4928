"""Greedy decoding of held-out prompts: what it returns, and what it leaves alone."""

import copy
import random

import numpy as np
import pytest
import torch

from tests.tiny import tiny_tokenizer
from tests.trainers import forced, runs


def parity(completion_ids, **kwargs):
    return [float(sum(ids) % 2) for ids in completion_ids]


def length_or_none(completion_ids, **kwargs):
    return [len(ids) if len(ids) % 2 else None for ids in completion_ids]


ROWS = [{"prompt": prompt} for prompt in (*runs.PROMPTS, "x", "0 = 0", "{a: 1}")]


def expected_completions(weights, space="logits"):
    student, partners = forced.frozen(0), [forced.frozen(seed + 1) for seed in range(len(weights))]
    tokenizer = tiny_tokenizer()
    return [
        forced.greedy(
            student, partners, weights, tokenizer(row["prompt"])["input_ids"], runs.EOS_IDS, runs.MAX_LENGTH, space
        )
        for row in ROWS
    ]


@pytest.mark.parametrize(
    ("weights", "space"),
    [
        ((0.0,), "logits"),
        ((0.5,), "logits"),
        ((0.5,), "probs"),
        ((1.0,), "logits"),
        ((0.3, 0.4), "logits"),
        ((1.0, -0.5), "arithmetic"),
    ],
)
def test_rewards_are_those_of_an_independent_decode(build, weights, space):
    names = ["teacher", "second"][: len(weights)]
    funcs = [parity, length_or_none]
    trainer = build(
        teacher=names, teacher_weight=[0.1] * len(names), mixing_space=space, reward_funcs=funcs, temperature=0.3
    )
    # 11 rows in chunks of 8: the last chunk is short
    assert len(ROWS) == 11 and trainer.args.generation_batch_size == 8
    result = trainer.greedy_rewards(ROWS, weights)
    completions = expected_completions(weights, space)
    expected = torch.tensor(
        [[*parity([ids]), *(float("nan") if n is None else n for n in length_or_none([ids]))] for ids in completions]
    )
    assert torch.equal(result.rewards.nan_to_num(-1), expected.nan_to_num(-1))
    assert result.num_tokens == sum(map(len, completions))
    assert result.seconds > 0


def test_the_policies_decode_differently():
    """The comparison above can fail."""
    assert expected_completions((0.0,)) != expected_completions((0.5,)) != expected_completions((0.5,), "probs")


def state_of(trainer):
    return copy.deepcopy(
        {
            "metrics": trainer._metrics,
            "logs": trainer._logs,
            "tokens": trainer.state.num_input_tokens_seen,
            "generation_kwargs": trainer.generation_kwargs,
            "generation_config": trainer.generation_config.to_dict(),
            "model_generation_config": trainer.model.generation_config.to_dict(),
            "weights": (trainer._rule, trainer._recording, trainer._generating),
            "pending": (dict(trainer._pending_extra_logs), dict(trainer._pending_metrics)),
            "training": trainer.model.training,
        }
    )


def logs_only(completion_ids, log_extra, log_metric, **kwargs):
    log_extra("column", [0] * len(completion_ids))
    log_metric("metric", 1.0)
    return [0.0] * len(completion_ids)


@pytest.mark.parametrize("weights", [(0.5,), (0.0,)])
def test_nothing_is_drawn_logged_or_counted(build, weights):
    trainer = build(reward_funcs=logs_only)
    trainer.train()
    trainer._metrics["train"]["reward"].append(0.25)
    before = state_of(trainer)
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()
    trainer.greedy_rewards(ROWS, weights)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), generators[2]))
    assert state_of(trainer) == before
    assert "generate" not in vars(trainer.model)


def test_everything_is_put_back_when_a_reward_fails(build):
    def failing(completion_ids, **kwargs):
        raise RuntimeError("reward")

    trainer = build(reward_funcs=failing)
    before = state_of(trainer)
    with pytest.raises(RuntimeError, match="reward"):
        trainer.greedy_rewards(ROWS, (0.5,))
    assert state_of(trainer) == before


def test_generation_settings_that_are_not_sampling_are_kept(build):
    trainer = build(generation_kwargs={"max_new_tokens": 3})
    assert trainer.greedy_rewards(ROWS[:2], (0.5,)).num_tokens <= 6

"""What checkpoints of the test-bed score, by its own evaluation, which shares no code with the scripts."""

import math

import pytest

from testbed.evaluate import evaluate, load_checkpoint
from testbed.task import MAX_NEW_TOKENS, build_prompt_dataset


REWARDS = ["format_and_answer_reward", "answer_reward", "format_reward"]


def assert_rates(found, checkpoint, num_prompts):
    """A row of a table is the mean and standard error of each reward on the first test prompts."""
    model, tokenizer = load_checkpoint(checkpoint)
    result = evaluate(model, tokenizer, build_prompt_dataset("test", num_prompts), max_new_tokens=MAX_NEW_TOKENS)
    rates = (result.reward_rate, result.answer_rate, result.format_rate)
    expected = [(rate, math.sqrt(rate * (1 - rate) / (num_prompts - 1))) for rate in rates]
    assert [tuple(cell) for cell in found] == [pytest.approx(cell, abs=1e-6) for cell in expected]

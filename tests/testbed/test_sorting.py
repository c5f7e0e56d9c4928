"""The second task of the test-bed: what it asks, and what its checkpoints can do."""

import re

import pytest

from testbed import sorting
from testbed.evaluate import evaluate, load_checkpoint
from testbed.task import format_and_answer_reward, format_reward
from testbed.tasks import TASKS
from testbed.tokenizer import build_tokenizer
from trl_blend.consistency.provenance import read_provenance
from trl_blend.models.fingerprint import identify_model


TASK = TASKS["sorting"]


def take_out_smallest(completion: str) -> str:
    """The number that a chain of thought starts with, after checking every step; no code of the task."""
    chain, answer = re.fullmatch(r"<think>(.*)</think>\\boxed\{(\d+)\}", completion).groups()
    steps = [step.split(">") for step in chain.split(",")]
    for (left, smallest), (after, _) in zip(steps, [*steps[1:], ("", "")], strict=True):
        place = left.index(min(left))
        assert smallest == left[place] and after == left[:place] + left[place + 1 :]
    assert answer == "".join(smallest for _, smallest in steps)
    return steps[0][0]


def test_the_reference_completion_of_the_documentation():
    assert sorting.completion_text("312") == r"<think>312>1,32>2,3>3</think>\boxed{123}"
    text = r"<think>73295>2,7395>3,795>5,79>7,9>9</think>\boxed{23579}"
    assert sorting.completion_text("73295") == text and take_out_smallest(text) == "73295"


def test_reference_completions_sort_and_fit():
    data = sorting.build_sft_dataset("train", 500, seed=1)
    tokenizer = build_tokenizer()
    texts = [completion[0]["content"] for completion in data["completion"]]
    for (prompt,), text in zip(data["prompt"], texts, strict=True):
        assert prompt["content"] == f"sort {take_out_smallest(text)}"
        assert len(tokenizer(text)["input_ids"]) + 1 <= 55 < TASK.max_new_tokens
    assert format_reward(texts) == [1.0] * 500
    lengths = {len(prompt["content"]) for (prompt,) in sorting.build_sft_dataset("train", 90, 0, (2, 3))["prompt"]}
    assert lengths == {len("sort 12"), len("sort 123")}


def test_prompts_are_distinct_and_their_orders_share_a_split():
    seen = {}
    for split in ("train", "validation", "test"):
        data = TASK.prompts(split, 1000)
        numbers = [prompt["content"].removeprefix("sort ") for (prompt,) in data["prompt"]]
        assert len(set(numbers)) == 1000
        assert [int("".join(sorted(number))) for number in numbers] == list(map(int, data["answer"]))
        for answer in data["answer"]:
            assert seen.setdefault(answer, split) == split
        right = [sorting.completion_text(number) for number in numbers]
        assert format_and_answer_reward(right, list(data["answer"])) == [1.0] * 1000
    assert TASK.prompts("test", 50).to_list() == TASK.prompts("test", 100).select(range(50)).to_list()
    assert TASK.prompts("test", 50).to_list() != TASK.prompts("test", 50, 1).to_list()


@pytest.mark.parametrize(
    ("name", "low", "high"), [("base", 0.0, 0.05), ("sft_student", 0.2, 0.7), ("teacher", 0.9, 1.0)]
)
def test_checkpoints(name, low, high):
    model, tokenizer = load_checkpoint(TASK.model(name))
    result = evaluate(model, tokenizer, TASK.prompts("test", 64), 64, TASK.max_new_tokens)
    assert low <= result.reward_rate <= high, result
    assert result.format_rate > 0.6, result


def test_base_sorts_what_it_has_seen():
    model, tokenizer = load_checkpoint(TASK.model("base"))
    shorter = sorting.build_prompt_dataset("test", 32, digits=(2, 3, 4))
    assert evaluate(model, tokenizer, shorter, 64, TASK.max_new_tokens).reward_rate > 0.8


def test_the_sft_student_names_its_teacher():
    provenance = read_provenance(str(TASK.model("sft_student")))
    assert provenance.how == "recorded"
    assert provenance.teacher.weights.sha256 == identify_model(str(TASK.model("teacher"))).weights.sha256

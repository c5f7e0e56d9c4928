r"""The second task: sort the digits of a number, with a chain of thought that takes out the smallest one each time.

The user asks `sort 73295` and the assistant answers

    <think>73295>2,7395>3,795>5,79>7,9>9</think>\boxed{23579}

Digits are 1 to 9 and may come more than once. The task proper has [`DIGITS`] of them; a model that has only seen
shorter numbers keeps the format and gets nothing right. The split follows a CRC-32 of the sorted digits, so that all
orders of them share one.

Answers are integers in the format of [`~testbed.task`], so that its reward functions and the evaluation serve as they
are.
"""

import random
import zlib
from collections.abc import Iterator
from itertools import islice

from datasets import Dataset

from testbed.task import Split


DIGITS = (5, 6)
MAX_NEW_TOKENS = 60  # the longest reference completion has 55 tokens, EOS included


def split_of(number: str) -> Split:
    """Return the split of a number: 10% test, 10% validation, 80% train of the multisets of digits."""
    bucket = zlib.crc32("".join(sorted(number)).encode()) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def completion_text(number: str) -> str:
    r"""Return the reference completion, for example `<think>312>1,32>2,3>3</think>\boxed{123}`."""
    steps, left = [], number
    for smallest in sorted(number):
        steps.append(f"{left}>{smallest}")
        left = left.replace(smallest, "", 1)
    return f"<think>{','.join(steps)}</think>\\boxed{{{''.join(sorted(number))}}}"


def _numbers(split: Split, seed: int, digits: tuple[int, ...]) -> Iterator[str]:
    rng = random.Random(f"sort-{split}-{seed}")
    while True:
        number = "".join(rng.choices("123456789", k=rng.choice(digits)))
        if split_of(number) == split:
            yield number


def _messages(number: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"sort {number}"}]


def build_prompt_dataset(split: Split, n: int, seed: int = 0, digits: tuple[int, ...] = DIGITS) -> Dataset:
    r"""
    Build a prompt dataset for RL, distillation or evaluation, with the columns of
    [`~testbed.task.build_prompt_dataset`].

    Args:
        split (`"train"`, `"validation"` or `"test"`):
            Split to draw from.
        n (`int`):
            Number of distinct prompts. A longer draw with the same seed starts with the shorter one.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        digits (`tuple[int, ...]`, *optional*, defaults to `(5, 6)`):
            Numbers of digits, all as likely.
    """
    numbers: dict[str, None] = {}
    drawn = _numbers(split, seed, digits)
    while len(numbers) < n:
        numbers[next(drawn)] = None
    answers = ["".join(sorted(number)) for number in numbers]
    return Dataset.from_dict(
        {
            "prompt": [_messages(number) for number in numbers],
            "answer": answers,
            "solution": [f"\\boxed{{{answer}}}" for answer in answers],
        }
    )


def build_sft_dataset(split: Split, n: int, seed: int = 0, digits: tuple[int, ...] = DIGITS) -> Dataset:
    """
    Build a prompt-completion dataset (conversational) for [`~trl.SFTTrainer`]. Short numbers come more than once.

    Args:
        split (`"train"`, `"validation"` or `"test"`):
            Split to draw from.
        n (`int`):
            Number of rows.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        digits (`tuple[int, ...]`, *optional*, defaults to `(5, 6)`):
            Numbers of digits, all as likely.
    """
    numbers = list(islice(_numbers(split, seed, digits), n))
    return Dataset.from_dict(
        {
            "prompt": [_messages(number) for number in numbers],
            "completion": [[{"role": "assistant", "content": completion_text(number)}] for number in numbers],
        }
    )

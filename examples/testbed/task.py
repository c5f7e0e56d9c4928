r"""The "add3cot" task: add two numbers of up to three digits, with a chain of thought.

The user asks `123+456=?` and the assistant answers

    <think>3+6+0=09,2+5+0=07,1+4+0=05</think>\boxed{579}

The chain goes through the digits from the right; each column reads `digit+digit+carry_in=two_digit_sum`, and the
shorter operand is padded with zeros in the chain (never in the prompt). The last carry is the leading digit of a
longer answer.

The 1,000,000 ordered pairs of operands are split by a CRC-32 of the *unordered* pair, so that `a+b` and `b+a` always
share a split and no split is a linear function of the sum (`7919a + 104729b mod 10`, say, puts every sum that ends in
0 into one split, where a model then scores 0 at zero training loss).

Reward functions have TRL's signature `(completions, answer, **kwargs) -> list[float | None]` and take conversational
completions (`[{"role": "assistant", "content": ...}]`) or plain strings. They read decoded text without special
tokens, which is what TRL hands over: `<think>` and `</think>` survive because [`~testbed.tokenizer.build_tokenizer`]
adds them as non-special tokens.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

from datasets import Dataset


Split = Literal["train", "validation", "test"]
AnswerStyle = Literal["boxed", "bare"]
Completion = str | list[dict[str, str]]

OPERAND_LIMIT = 1000
MAX_NEW_TOKENS = 48  # the longest reference completion has 41 tokens, EOS included

_FORMAT = re.compile(r"<think>(?:(?!</?think>).)*</think>\\boxed\{[0-9]+\}", flags=re.DOTALL)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_INTEGER = re.compile(r"[0-9]+")
_LAST_INTEGER = re.compile(r"(?<![-\d.,])(\d{1,3}(?:,\d{3})+|\d+)\Z")


def split_of(a: int, b: int) -> Split:
    """Return the split of `a+b`: 10% test, 10% validation, 80% train, the same for both orders of the operands."""
    bucket = zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def prompt_text(a: int, b: int) -> str:
    """Return the user message, for example `"123+456=?"`."""
    return f"{a}+{b}=?"


def chain_of_thought(a: int, b: int) -> str:
    """Return the columns of the long addition from the right, for example `"3+6+0=09,2+5+0=07,1+4+0=05"`."""
    width = max(len(str(a)), len(str(b)))
    columns, carry = [], 0
    for digit_a, digit_b in zip(reversed(str(a).zfill(width)), reversed(str(b).zfill(width)), strict=True):
        total = int(digit_a) + int(digit_b) + carry
        columns.append(f"{digit_a}+{digit_b}+{carry}={total:02d}")
        carry = total // 10
    return ",".join(columns)


def completion_text(a: int, b: int, style: AnswerStyle = "boxed") -> str:
    r"""Return the reference completion, ending in `\boxed{a+b}` (`style="boxed"`) or in the bare number (`"bare"`)."""
    answer = f"\\boxed{{{a + b}}}" if style == "boxed" else str(a + b)
    return f"<think>{chain_of_thought(a, b)}</think>{answer}"


def sample_operands(split: Split, n: int, seed: int = 0) -> list[tuple[int, int]]:
    """
    Draw `n` distinct ordered pairs of operands of one split, uniformly.

    Args:
        split (`"train"`, `"validation"` or `"test"`):
            Split to draw from.
        n (`int`):
            Number of pairs. A longer draw with the same seed starts with the shorter one.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.

    Raises:
        `ValueError`: if `split` is unknown, or `n` is more than the split could hold.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"`split` must be 'train', 'validation' or 'test', got {split!r}.")
    limit = 700_000 if split == "train" else 90_000
    if not 0 <= n <= limit:
        raise ValueError(f"`n` must lie in [0, {limit}] for the {split} split, got {n}.")
    rng = random.Random(f"{split}-{seed}")
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < n:
        pair = (rng.randrange(OPERAND_LIMIT), rng.randrange(OPERAND_LIMIT))
        if split_of(*pair) == split:
            pairs[pair] = None
    return list(pairs)


def build_prompt_dataset(split: Split, n: int, seed: int = 0) -> Dataset:
    r"""
    Build a prompt dataset for RL, distillation or evaluation.

    Columns: `prompt` (one user message), `answer` (the sum in decimal digits), `solution` (the same as `\boxed{...}`).

    Args:
        split (`"train"`, `"validation"` or `"test"`):
            Split to draw from.
        n (`int`):
            Number of distinct prompts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
    """
    pairs = sample_operands(split, n, seed)
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": prompt_text(a, b)}] for a, b in pairs],
            "answer": [str(a + b) for a, b in pairs],
            "solution": [f"\\boxed{{{a + b}}}" for a, b in pairs],
        }
    )


def build_sft_dataset(split: Split, n: int, seed: int = 0, boxed_fraction: float = 1.0) -> Dataset:
    r"""
    Build a prompt-completion dataset (conversational) for [`~trl.SFTTrainer`].

    Args:
        split (`"train"`, `"validation"` or `"test"`):
            Split to draw from.
        n (`int`):
            Number of distinct prompts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw and of the choice of format.
        boxed_fraction (`float`, *optional*, defaults to `1.0`):
            Share of completions, drawn at random, that end in `\boxed{N}`; the others end in the bare number.
    """
    rng = random.Random(f"style-{seed}")
    prompts, completions = [], []
    for a, b in sample_operands(split, n, seed):
        style: AnswerStyle = "boxed" if rng.random() < boxed_fraction else "bare"
        prompts.append([{"role": "user", "content": prompt_text(a, b)}])
        completions.append([{"role": "assistant", "content": completion_text(a, b, style)}])
    return Dataset.from_dict({"prompt": prompts, "completion": completions})


def _texts(completions: list[Completion]) -> Iterator[str]:
    for completion in completions:
        yield completion if isinstance(completion, str) else completion[-1]["content"]


def _digits(number: str) -> str | None:
    """An integer without leading zeros. It stays a text: `int` refuses thousands of digits."""
    return (number.lstrip("0") or "0") if _INTEGER.fullmatch(number) else None


def _reference(answer: Any) -> str | None:
    """The digits of a reference answer: a number, or a text that ends in one, such as GSM8K's `"... #### 1,234"`."""
    whole = isinstance(answer, float) and answer.is_integer()
    found = _LAST_INTEGER.search(str(int(answer) if whole else answer).strip())
    return _digits(found[1].replace(",", "")) if found else None


def _is_accurate(text: str, reference: str) -> bool:
    boxes = _BOXED.findall(text)
    return bool(boxes) and _digits(boxes[-1]) == reference


def _rewards(
    completions: list[Completion], answer: list[Any], is_right: Callable[[str, str], bool]
) -> list[float | None]:
    """`None`, which TRL leaves out, where the reference answer is no number."""
    references = map(_reference, answer)
    return [
        None if reference is None else float(is_right(text, reference))
        for text, reference in zip(_texts(completions), references, strict=True)
    ]


def _is_formatted(text: str) -> bool:
    return _FORMAT.fullmatch(text) is not None


def accuracy_reward(completions: list[Completion], answer: list[Any], **kwargs: Any) -> list[float | None]:
    r"""1 if the last `\boxed{N}` holds the right number, whatever stands around it, else 0."""
    return _rewards(completions, answer, _is_accurate)


def format_reward(completions: list[Completion], **kwargs: Any) -> list[float]:
    r"""1 if the whole completion is `<think>...</think>\boxed{N}` with nothing before, between or after, else 0."""
    return [float(_is_formatted(text)) for text in _texts(completions)]


def format_and_answer_reward(completions: list[Completion], answer: list[Any], **kwargs: Any) -> list[float | None]:
    """1 only if the answer is right **and** in the required format, else 0: the logit-averaging paper's reward."""
    return _rewards(completions, answer, lambda text, right: _is_formatted(text) and _is_accurate(text, right))


def answer_reward(completions: list[Completion], answer: list[Any], **kwargs: Any) -> list[float | None]:
    """
    1 if the final number is right, boxed or not, else 0.

    The final number is the last integer after the last `</think>`, or the last integer of the whole text if there is
    no `</think>`. It measures the ability to add apart from the ability to follow the format.
    """

    def is_right(text: str, right: str) -> bool:
        integers = _INTEGER.findall(text.rpartition("</think>")[2])
        return bool(integers) and _digits(integers[-1]) == right

    return _rewards(completions, answer, is_right)

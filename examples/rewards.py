"""Rewards for mathematics with boxed answers, beside those that ship with TRL (`trl.rewards`)."""

import re
from typing import Any

from trl.rewards import accuracy_reward


Completion = str | list[dict[str, str]]

# At least one box, and nothing after the sentence that holds the last one
_ENDS_IN_BOX = re.compile(r"\\boxed\{.+\}[^\n]{0,40}\Z", re.DOTALL)


def _text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def boxed_format_reward(completions: list[Completion], **kwargs: Any) -> list[float]:
    r"""1 if the completion ends in `\boxed{...}`, else 0."""
    return [float(_ENDS_IN_BOX.search(_text(completion).strip()) is not None) for completion in completions]


def boxed_accuracy_reward(completions: list[Completion], solution: list[str], **kwargs: Any) -> list[float | None]:
    r"""
    1 only if the completion ends in `\boxed{...}` **and** the answer is right, else 0; `None` if the solution cannot
    be parsed. This is the logit-averaging paper's reward; `math-verify` decides whether the answer is right, through
    [`trl.rewards.accuracy_reward`].
    """
    chats = [[{"role": "assistant", "content": _text(completion)}] for completion in completions]
    right = accuracy_reward(completions=chats, solution=solution, **kwargs)
    formatted = boxed_format_reward(completions)
    return [None if r is None else r * f for r, f in zip(right, formatted, strict=True)]

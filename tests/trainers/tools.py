"""A conversation with a tool: a tokenizer and tiny models for it, and the calls that random models do not write."""

import itertools
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from testbed.tokenizer import build_tokenizer
from tests.tiny import tiny_model


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
EOS_IDS = list(range(100, 130))  # most rows end early


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: First number.
        b: Second number.
    """
    return a + b


def tokenizer() -> Any:
    """That of the test-bed, with a chat template that knows tools."""
    made = build_tokenizer()
    made.chat_template = (files("trl") / "chat_templates" / "qwen3.jinja").read_text()
    return made


def models() -> list[Any]:
    """Student and teacher, with room for a long conversation."""
    pair = [tiny_model(seed=seed, vocab_size=264, max_position_embeddings=1024) for seed in range(2)]
    for model in pair:
        model.generation_config.eos_token_id = EOS_IDS
    return pair


def every_other_call() -> Callable[..., dict[str, Any]]:
    """In the place of TRL's `parse_response`: every other completion of the first turn calls the tool."""
    counter = itertools.count()

    def parse(tokenizer: Any, ids: list[int], **kwargs: Any) -> dict[str, Any]:
        turn = next(counter)
        return {"role": "assistant", "content": "x"} | ({"tool_calls": [CALL]} if turn < 8 and turn % 2 else {})

    return parse

"""
Teacher-forced logits of a recorded loss call, for `tests.reference`: float64, each row alone and without padding.

Imports nothing of `trl_blend`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests import reference
from tests.tiny import tiny_model


def with_parameters(model: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """`model` in float64 with the given weights, ready for a gradient."""
    model = model.double().eval().requires_grad_(True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])
    return model


def student_at(parameters: dict[str, Tensor], **overrides: Any) -> nn.Module:
    """The tiny student with the weights of a recorded call; `overrides` are those of [`tiny_model`]."""
    return with_parameters(tiny_model(seed=0, **overrides), parameters)


def frozen(seed: int, **overrides: Any) -> nn.Module:
    """The tiny model of a seed: 0 is the initial student, 1 the teacher, 2 the second teacher."""
    return tiny_model(seed=seed, **overrides).double().requires_grad_(False)


def tokens(inputs: dict[str, Any]) -> list[list[int]]:
    """Completion of each row, without padding."""
    rows = zip(inputs["completion_ids"], inputs["completion_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def ones(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[1] * len(row) for row in rows]


def completion_logits(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """`(T_b, V)` logits of each row, at the positions that predict its completion."""
    logits = []
    prompts = zip(inputs["prompt_ids"], inputs["prompt_mask"].bool(), strict=True)
    for (prompt, mask), completion in zip(prompts, tokens(inputs), strict=True):
        prompt = prompt[mask]
        row = torch.cat([prompt, torch.tensor(completion)])
        logits.append(model(input_ids=row[None], use_cache=False).logits[0, len(prompt) - 1 : -1])
    return logits


def logps(
    student: nn.Module,
    partners: Sequence[nn.Module],
    weights: Sequence[float],
    inputs: dict[str, Any],
    temperature: float = 1.0,
    space: str = "logits",
) -> list[list[float]]:
    """`log p_mix(y_t)`; no partners: `log p_S(y_t)`. Without gradient."""
    with torch.no_grad():
        logits = [completion_logits(model, inputs) for model in (student, *partners)]
        rows = reference.token_logps(logits[0], logits[1:], weights, tokens(inputs), temperature, space)
    return [[logp.item() for logp in row] for row in rows]


def kept(values: Tensor, inputs: dict[str, Any]) -> list[list[float]]:
    """Per-token values of a batch as nested lists, without padding."""
    masks = inputs["completion_mask"].bool()
    return [row[mask].tolist() for row, mask in zip(values, masks, strict=True)]


def assert_close_rows(actual: list[list[float]], expected: list[list[float]], tolerance: float) -> None:
    assert [len(row) for row in actual] == [len(row) for row in expected] and actual
    for row, expected_row in zip(actual, expected, strict=True):
        for value, expected_value in zip(row, expected_row, strict=True):
            assert abs(value - expected_value) <= tolerance, (value, expected_value)


@torch.no_grad()
def greedy(
    student: nn.Module,
    partners: Sequence[nn.Module],
    weights: Sequence[float],
    prompt: Sequence[int],
    eos_ids: Sequence[int],
    max_length: int,
    space: str = "logits",
) -> list[int]:
    """Greedy completion of one prompt by the mixture, with a full forward pass of every model at every token."""
    completion: list[int] = []
    while len(completion) < max_length and not (completion and completion[-1] in eos_ids):
        ids = torch.tensor([[*prompt, *completion]])
        logits = [model(input_ids=ids, use_cache=False).logits[0, -1] for model in (student, *partners)]
        mixed = reference.mixed_logprobs(logits[0], logits[1:], weights, 1.0, space)
        completion.append(int(mixed.argmax()))
    return completion

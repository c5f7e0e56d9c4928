"""Greedy decoding of held-out prompts, on every process together, and what reward functions say of the completions."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.models import unwrap_model_for_generation

from trl_blend.generation.settings import without_sampling
from trl_blend.models.limits import eos_token_ids, num_token_ids, vocabulary_rows
from trl_blend.models.wrappers import evaluation_mode


Decoder = Callable[[list[list[int]]], list[list[int]]]
"""Token ids of prompts -> token ids of their completions."""


def greedy_rewards(
    model: AbstractContextManager[PreTrainedModel] | Decoder,
    rows: Sequence[dict[str, Any]],
    prompt_ids: Sequence[list[int]],
    reward: Callable[[list[dict[str, Any]], list[list[int]]], Tensor],
    *,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    generation_kwargs: Mapping[str, Any],
    batch_size: int,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Tensor:
    """
    Decode the prompts of `rows` and reward the completions. Use it for a table of accuracy before and after a run.

    The rows are the same on every process, and split over them. Nothing is drawn from the random generators, nothing
    is logged. A completion also ends with the end-of-sequence tokens of the tokenizer and of the model; settings of
    sampling among `generation_kwargs` are left out.

    Args:
        model (context manager of a [`~transformers.PreTrainedModel`], or [`Decoder`]):
            What to decode with, see [`generating_model`]; `contextlib.nullcontext(teacher)` for one that is whole. A
            function that decodes greedily by itself, such as that of an engine, reads none of the settings below.
        prompt_ids (`list[list[int]]`):
            Token ids of the prompt of each row, as the rollouts are drawn from.
        reward (`Callable`):
            Takes the rows of this process and the token ids of their completions, and returns their rewards, of shape
            `(n, F)`.
        batch_size (`int`):
            Prompts that a process decodes at once.
        progress (`Callable`, *optional*):
            Wraps the batches as `tqdm` does.

    Returns:
        `torch.Tensor` of shape `(N, F)`: Reward of each row by each function, on the CPU, equal on every process.
    """
    mine, prompt_ids = own_share(rows, accelerator), own_share(prompt_ids, accelerator)
    if isinstance(model, AbstractContextManager):
        with model as decoding:
            settings = greedy_settings(generation_kwargs, tokenizer, decoding)
            completion_ids = decode(decoding, prompt_ids, settings, batch_size, progress)
    else:
        completion_ids = model(prompt_ids)
    rewards = reward(mine, completion_ids)
    return accelerator.gather(rewards.to(accelerator.device))[: len(rows)].cpu()


@contextmanager
def generating_model(model: Any, accelerator: Accelerator, **unwrapping: Any) -> Iterator[PreTrainedModel]:
    """
    The model inside a prepared one, whole and in evaluation mode; `unwrapping` goes to
    [`~trl.models.unwrap_model_for_generation`]. To be called from `on_train_begin` on: before, FSDP and ZeRO have not
    put its weights in place.
    """
    with unwrap_model_for_generation(model, accelerator, **unwrapping) as unwrapped, evaluation_mode(unwrapped):
        yield unwrapped


def greedy_settings(
    generation_kwargs: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> GenerationConfig:
    """
    Settings of `generate` without those of sampling, that stop at every end-of-sequence token there is, and choose no
    row of the model that is not a token.
    """
    settings = without_sampling(generation_kwargs)
    given = settings.pop("eos_token_id", ())
    ends = settings["eos_token_id"] = sorted({*given, *eos_token_ids(model.generation_config), tokenizer.eos_token_id})
    if padding := range(num_token_ids(tokenizer, ends), vocabulary_rows(model)):
        settings["suppress_tokens"] = [*(settings.get("suppress_tokens") or ()), *padding]
    settings.setdefault("pad_token_id", pad_token_id(tokenizer))
    return GenerationConfig(**settings, do_sample=False, disable_compile=True)


def own_share(rows: Sequence[Any], state: Accelerator | PartialState) -> list[Any]:
    """
    The rows of this process: contiguous and as many on every process, so that sharded models stay in step.

    The last row fills the shares up: concatenated in the order of the processes and cut to `len(rows)`, the shares are
    the rows.
    """
    share = math.ceil(len(rows) / state.num_processes)
    first = state.process_index * share
    return [rows[min(first + offset, len(rows) - 1)] for offset in range(share)]


def decode(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    settings: GenerationConfig,
    batch_size: int,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[list[int]]:
    """Token ids of one completion per prompt, from left-padded batches, up to and with the first EOS of `settings`."""
    eos, completions = set(settings.eos_token_id), []
    for start in progress(range(0, len(prompt_ids), batch_size)):
        batch = prompt_ids[start : start + batch_size]
        width = max(map(len, batch))
        input_ids = torch.tensor([[settings.pad_token_id] * (width - len(ids)) + ids for ids in batch])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch])
        output = model.generate(
            input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
        )
        for ids in output[:, width:].tolist():
            end = next((index for index, token in enumerate(ids) if token in eos), len(ids))
            completions.append(ids[: end + 1])
    return completions


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or else the end-of-sequence token."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

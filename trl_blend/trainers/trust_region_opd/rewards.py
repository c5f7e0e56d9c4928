"""Rewards as diagnostics: what a verifier says about the rollouts, without any effect on the loss."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from trl_blend import _compat
from trl_blend.errors import ConfigError


RewardFunction = Callable[..., list[float | None]]


def as_reward_functions(reward_funcs: RewardFunction | Sequence[RewardFunction] | None) -> list[RewardFunction]:
    """
    Reward functions as a list.

    Raises:
        [`~trl_blend.errors.ConfigError`]:
            If one is not a function; reward models are left out on purpose.
    """
    if reward_funcs is None:
        return []
    functions = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    for function in functions:
        is_model = isinstance(function, (str, torch.nn.Module))
        if is_model or not callable(function) or inspect.iscoroutinefunction(function):
            raise ConfigError(
                f"`reward_funcs` has {function!r:.80}. Here rewards are diagnostics and must be plain functions "
                "`(prompts, completions, completion_ids, **columns) -> list[float]`; call a reward model from one."
            )
    return functions


def rollout_rewards(
    functions: Sequence[RewardFunction],
    rows: list[dict[str, Any]],
    completion_ids: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    trainer_state: Any,
) -> Tensor:
    """
    Rewards of a batch of rollouts, in the calling convention of [`~trl.GRPOTrainer`]: `(B, len(functions))`, NaN where
    a function returned `None`. A rollout with tool calls is given as one assistant message.

    `completion_ids` are without padding; the other columns of `rows`, the rollouts' dataset rows, are passed on.

    Raises:
        [`~trl_blend.errors.ConfigError`]:
            If a function returns another number of rewards than there are rollouts.
    """
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    conversational = is_conversational(rows[0])
    completions = [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts
    given = {
        "prompts": [row["prompt"] for row in rows],
        "completions": completions,
        "completion_ids": completion_ids,
        "trainer_state": trainer_state,
        # GRPO's hooks for extra columns and metrics, which have no place here
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }
    reserved = {"prompt", "completion", *given}
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in reserved}
    rewards = []
    for function in functions:
        values = function(**given, **columns)
        if len(values) != len(rows):
            raise ConfigError(
                f"`reward_funcs`: {_compat.get_callable_name(function)} returned {len(values)} rewards for "
                f"{len(rows)} rollouts. Return one per rollout, `None` where there is none."
            )
        rewards.append([float("nan") if value is None else float(value) for value in values])
    return torch.tensor(rewards).T

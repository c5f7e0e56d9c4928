"""Rewards as diagnostics: what a verifier says about the rollouts, without any effect on the loss."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from ...errors import ConfigError


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
        if isinstance(function, (str, torch.nn.Module)) or not callable(function):
            raise ConfigError(
                f"`reward_funcs` has {function!r:.80}. Here rewards are diagnostics and must be functions "
                "`(prompts, completions, completion_ids, **columns) -> list[float]`; call a reward model from one."
            )
    return functions


def score_rollouts(
    functions: Sequence[RewardFunction],
    rows: list[dict[str, Any]],
    completion_ids: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    trainer_state: Any,
) -> Tensor:
    """
    Rewards of a batch of rollouts, in the calling convention of [`~trl.GRPOTrainer`].

    A rollout with tool calls is given as one assistant message.

    Args:
        functions (`Sequence[Callable]`):
            Reward functions.
        rows (`list[dict[str, Any]]`):
            Dataset row of each rollout; its columns are passed on as lists.
        completion_ids (`list[list[int]]`):
            Tokens of each rollout, without padding.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the student.
        trainer_state ([`~transformers.TrainerState`]):
            State of the trainer, passed on.

    Returns:
        `torch.Tensor` of shape `(B, len(functions))`: Rewards, NaN where a function returned `None`.
    """
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    conversational = is_conversational(rows[0])
    completions = [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
    rewards = [
        function(
            prompts=[row["prompt"] for row in rows],
            completions=completions,
            completion_ids=completion_ids,
            trainer_state=trainer_state,
            **columns,
        )
        for function in functions
    ]
    values = [[float("nan") if value is None else float(value) for value in column] for column in rewards]
    return torch.tensor(values).T

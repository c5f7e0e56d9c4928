"""The before/after table of the scripts, and the greedy scores in it."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import is_conversational

from trl_blend.errors import ConfigError
from trl_blend.reports.cards import Score, shown_score
from trl_blend.trainers._greedy import Decoder, generating_model, greedy_rewards
from trl_blend.trainers.trust_region_opd.rewards import rollout_rewards


__all__ = ["generating_model", "greedy_scores", "means_and_errors", "print_table", "scoring_bar", "tokenize_prompts"]


def greedy_scores(
    model: AbstractContextManager[PreTrainedModel] | Decoder,
    rows: Sequence[dict[str, Any]],
    prompt_ids: Sequence[list[int]],
    reward_funcs: Sequence[Callable[..., Any]],
    tokenizer: PreTrainedTokenizerBase,
    trainer_state: Any,
    **decoding: Any,
) -> list[Score]:
    """
    Mean and standard error of each reward function over greedy completions of the prompts of `rows`, equal on every
    process; `None` where there are too few numbers for one.

    Arguments are those of [`~trl_blend.trainers._greedy.greedy_rewards`]: `model` is `generating_model(...)`, or
    `contextlib.nullcontext(teacher)`; with an engine, `trainer.decode_greedily`. The functions are called as in
    [`~trl.GRPOTrainer`]; the tokenizer may be that of a processor.
    """

    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor

    def reward(mine: list[dict[str, Any]], completion_ids: list[list[int]]) -> torch.Tensor:
        return rollout_rewards(reward_funcs, mine, completion_ids, tokenizer, trainer_state)

    return means_and_errors(greedy_rewards(model, rows, prompt_ids, reward, tokenizer=tokenizer, **decoding))


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Any], chat_template_kwargs: dict[str, Any] | None = None
) -> list[list[int]]:
    """Token ids of each prompt, a conversation or a text, without padding, as TRL's trainers tokenise them."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if not is_conversational({"prompt": prompts[0]}):
        return tokenizer(text=prompts)["input_ids"]
    tokenized = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
    )
    return tokenized["input_ids"]


def scoring_bar(trainer: Any, policy: str) -> Callable[..., Any]:
    """`tqdm` over the batches that a policy decodes for the table, on the main process and unless it is turned off."""
    disable = trainer.args.disable_tqdm or not trainer.accelerator.is_main_process
    return partial(tqdm, desc=f"scoring: {policy}", unit="batch", disable=disable, leave=False)


def means_and_errors(rewards: torch.Tensor) -> list[Score]:
    """
    Mean and standard error of each column, over the rows that are not NaN; no error of a single row.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a column has no number at all.
    """
    found: list[Score] = []
    for index, column in enumerate(rewards.double().T):
        column = column[~column.isnan()]
        if not len(column):
            raise ConfigError(
                f"Reward {index} of `reward_funcs` gave no number for any of the {len(rewards)} held-out prompts: it "
                "cannot read their reference answers. Name their column with `answer_column`, or take another reward."
            )
        error = column.std(correction=1).item() / len(column) ** 0.5 if len(column) > 1 else None
        found.append((column.mean().item(), error))
    return found


def print_table(results: Mapping[str, Any]) -> None:
    """Before and after, side by side, one row per policy and one column per reward, see `RunMixin.card_results`."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Greedy decoding of {results['prompts']} held-out prompts: mean ± standard error")
    table.add_column("policy")
    step = results.get("before_step")
    for when in (f"at step {step}" if step else "before", "after"):
        for name in results["rewards"]:
            table.add_column(f"{name.removesuffix('_reward').replace('_', ' ')}\n{when}", justify="right")
    # The adaptive weight moves, so rows are matched by position
    for (policy, old), (policy_after, new) in zip(results["before"].items(), results["after"].items(), strict=True):
        cells = [shown_score(*score) for score in [*old, *new]]
        table.add_row(policy if policy == policy_after else f"{policy} → {policy_after.rsplit(' ', 1)[1]}", *cells)
    Console(width=None if sys.stdout.isatty() else 130).print(table)

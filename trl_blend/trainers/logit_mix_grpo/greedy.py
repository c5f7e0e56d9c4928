"""Greedy decoding of held-out prompts with a trainer's own model, prompts and rewards, on every rank together."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from trl_blend.models.wrappers import evaluation_mode


_SAMPLING_KEYS = frozenset({"do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p"})


class GreedyRewards(NamedTuple):
    """
    Rewards of one greedy decode.

    Args:
        rewards (`torch.Tensor` of shape `(N, F)`):
            Reward of each row by each reward function, NaN where a function returned `None`. Equal on every rank.
        num_tokens (`int`):
            Tokens decoded by all ranks together.
        seconds (`float`):
            Wall time on this rank.
    """

    rewards: Tensor
    num_tokens: int
    seconds: float


def greedy_rewards(trainer: Any, rows: list[dict[str, Any]], weights: tuple[float, ...]) -> GreedyRewards:
    """
    Decode `rows` greedily at the given teacher weights and reward the completions.

    The rows are split over the ranks. The student is in evaluation mode, nothing is drawn from the random generators,
    no metric or completion is logged, and no token is counted as trained on. As always with greedy decoding, models
    are mixed at temperature 1; for `mixing_space="probs"` the most likely token depends on that.

    Args:
        trainer ([`LogitMixGRPOTrainer`]):
            Trainer whose student, partners, chat template and reward functions are used.
        rows (`list[dict]`):
            Rows of a dataset, as for training. Every rank passes the same ones.
        weights (`tuple[float, ...]`):
            Weight of each teacher: all 0 is the student alone, 1 the teacher alone.
    """
    started, accelerator = time.perf_counter(), trainer.accelerator
    per_device = max(trainer.args.generation_batch_size // accelerator.num_processes, 1)
    chunk = per_device * accelerator.num_processes
    rewards, tokens = [], torch.zeros((), dtype=torch.long, device=accelerator.device)
    student = accelerator.unwrap_model(trainer.model_wrapped)
    with _greedy(trainer), trainer.policy(weights, recording=False), evaluation_mode(student):
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            # Each rank takes a slice of equal length; the last row is repeated to fill it, and dropped again
            share = math.ceil(len(part) / accelerator.num_processes)
            first = accelerator.process_index * share
            mine = [part[min(first + offset, len(part) - 1)] for offset in range(share)]
            prompts = [row["prompt"] for row in mine]
            _, completion_ids, _, completions, *_ = trainer._generate(prompts)
            gathered = trainer._calculate_rewards(mine, prompts, completions, completion_ids)
            rewards.append(gathered[: len(part)])
            tokens += sum(map(len, completion_ids))
    return GreedyRewards(
        torch.cat(rewards), int(accelerator.reduce(tokens, reduction="sum")), time.perf_counter() - started
    )


@contextmanager
def _greedy(trainer: Any) -> Iterator[None]:
    """Greedy generation settings, with the trainer's logs and counters put back on exit."""
    saved_settings = trainer.generation_kwargs, trainer.generation_config
    saved_logs = trainer._metrics, trainer.state.num_input_tokens_seen
    settings = {key: value for key, value in trainer.generation_kwargs.items() if key not in _SAMPLING_KEYS}
    trainer.generation_kwargs = {**settings, "do_sample": False}
    trainer.generation_config = GenerationConfig(**trainer.generation_kwargs, disable_compile=True)
    trainer._metrics = {mode: defaultdict(list) for mode in saved_logs[0]}
    try:
        yield
    finally:
        trainer.generation_kwargs, trainer.generation_config = saved_settings
        trainer._metrics, trainer.state.num_input_tokens_seen = saved_logs
        # Reward functions may have logged extra columns and metrics for rows that are not part of the run
        trainer._pending_extra_logs.clear()
        trainer._pending_metrics.clear()

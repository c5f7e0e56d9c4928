"""The importance ratio of `objective="student"`: how it is clipped, and what is logged of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trl_blend.ops.importance import ImportanceSums, importance_statistics, summarize_importance


@contextmanager
def importance_clip(trainer: Any) -> Iterator[None]:
    r"""
    Turn TRL's clipped surrogate into \\( -rA \\) (`"none"`) or \\( -\min(r, c)A \\) (`"max"`), by its own bounds:
    without a lower bound, and with the upper bound and `delta` at \\( c \\), both arms of its minimum are equal.

    Source: logit fusion, reference code. `"ppo"` leaves TRL's clipping as it is.
    """
    args = trainer.args
    if args.is_clip_mode == "ppo":
        yield
        return
    saved = trainer.epsilon_low, trainer.epsilon_high, args.delta
    cap = args.is_clip_max if args.is_clip_mode == "max" else None
    trainer.epsilon_low = float("inf")
    trainer.epsilon_high = float("inf") if cap is None else cap - 1
    args.delta = cap
    try:
        yield
    finally:
        trainer.epsilon_low, trainer.epsilon_high, args.delta = saved


def log_importance(trainer: Any, inputs: dict[str, Any], logps: Tensor) -> None:
    """
    Log mean, maximum, effective sample size and clipped share of the ratio, over the tokens (sequences) of all ranks.

    Args:
        trainer ([`LogitMixGRPOTrainer`]):
            Trainer whose metrics receive the values, under `importance/`.
        inputs (`dict[str, Any]`):
            Batch with the recorded log-probabilities of the sampling policy as `old_per_token_logps`.
        logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities under the student, in nats.
    """
    sums = importance_statistics(
        logps - inputs["old_per_token_logps"],
        inputs["completion_mask"] * inputs.get("tool_mask", 1),
        level=trainer.importance_sampling_level,
        clip_max=_ratio_cap(trainer),
    )
    total = _combine(trainer.accelerator.gather(torch.stack(sums).float()[None]))
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    if "importance/ratio_mean" in metrics:
        total = _combine(torch.stack([torch.stack(trainer.importance_sums), torch.stack(total)]))
    trainer.importance_sums = total
    # One value for everything since the last log: TRL would otherwise average maxima and shares of micro-batches
    for name, value in summarize_importance(total).items():
        metrics[f"importance/{name}"] = [value]


def _combine(sums: Tensor) -> ImportanceSums:
    """Sums of several batches, `(n, 5)`, as those of one."""
    return ImportanceSums(*sums.sum(dim=0))._replace(ratio_max=sums[:, 3].max())


def _ratio_cap(trainer: Any) -> float | None:
    """Ratio above which the loss no longer grows with it; `None` where the loss has no such bound."""
    args = trainer.args
    if args.loss_type == "cispo":
        return trainer.epsilon_high
    if args.loss_type in ("sapo", "vespo") or args.is_clip_mode == "none":
        return None
    return args.is_clip_max if args.is_clip_mode == "max" else 1 + trainer.epsilon_high

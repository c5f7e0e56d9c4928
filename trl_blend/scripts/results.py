"""The before/after table of the scripts, and the numbers in it."""

import sys
from collections.abc import Mapping
from typing import Any

import torch


def means_and_errors(rewards: torch.Tensor) -> list[tuple[float, float]]:
    """Mean and standard error of each column, over the rows that are not NaN."""
    columns = [column[~column.isnan()] for column in rewards.double().T]
    return [(column.mean().item(), column.std(correction=1).item() / len(column) ** 0.5) for column in columns]


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
        cells = [f"{mean:.3f} ± {error:.3f}" for mean, error in [*old, *new]]
        table.add_row(policy if policy == policy_after else f"{policy} → {policy_after.rsplit(' ', 1)[1]}", *cells)
    Console(width=None if sys.stdout.isatty() else 130).print(table)

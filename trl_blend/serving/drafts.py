"""How many tokens the student drafts, decided between two generations."""

import math
from collections.abc import Sequence
from typing import Any

from trl_blend.generation.rules import BlendRule, TrustRegion
from trl_blend.serving.statistics import Statistic


NUMBERS = (0, 1, 2, 3, 4, 6, 8)
"""Those that are chosen from. vLLM captures CUDA graphs for each."""


class DraftChoice:
    """
    The number of drafts of each generation: none for the student alone, else the given one, or with `"auto"` the one
    with the fewest weights read per token: those of all models in a pass, and those of the student for each draft.
    That is the cost of few sequences; with many, a pass takes longer the more drafts it looks at, and fewer would be
    better.

    Drafts are refused as often as [`most_refused`] says, until some were counted. Then what it says is multiplied by
    how much of it was found, so that the number follows a budget or a weight that moves.

    Args:
        given (`int` or `str`):
            A number, or `"auto"`.

    Attributes:
        numbers (`tuple[int, ...]`): Those that it may be, ascending.
        student_share (`float`): How many of the weights of all models are the student's.
    """

    def __init__(self, given: int | str) -> None:
        self.numbers = NUMBERS if isinstance(given, str) else (0, given)
        self.student_share = 0.5
        self._found: float | None = None

    def __call__(self, rule: BlendRule | None) -> int:
        """Number of drafts of the next generation, with a teacher at least one before any is counted."""
        if rule is None:
            return 0
        if self.numbers != NUMBERS:
            return self.numbers[-1]
        refused = min(most_refused(rule) * (1.0 if self._found is None else self._found), 1.0)
        return max(cheapest_number(1.0 - refused, self.student_share), int(self._found is None))

    def observe(self, rule: BlendRule | None, accepted: Statistic | None) -> None:
        """Count the drafts of a generation: `draft_acceptance` of its statistics."""
        if rule is not None and accepted is not None and accepted.count:
            self._found = (1.0 - accepted.total / accepted.count) / max(most_refused(rule), 1e-6)


def most_refused(rule: BlendRule) -> float:
    r"""
    Largest probability that a draft is refused, TV(\\( \mu \\), student) at any prefix: \\( \sqrt{\epsilon / 2} \\) in
    a trust region, the weight of the teachers where probabilities are mixed. No rule but these has a bound; for other
    rules with weights their sum is taken, which moves the same way, else 1.
    """
    if isinstance(rule, TrustRegion):
        return min(math.sqrt(rule.kl_budget / 2.0), 1.0)
    return min(sum(map(abs, getattr(rule, "weights", (1.0,)))), 1.0)


def cheapest_number(acceptance: float, student_share: float, numbers: Sequence[int] = NUMBERS) -> int:
    r"""
    The \\( k \\) with the smallest \\( (1 + c k) / (1 + a + \dots + a^k) \\): passes over the tokens that they give,
    for drafts that are accepted with probability \\( a \\), whatever was before, and cost \\( c \\) of a pass each.
    """

    def cost(drafts: int) -> float:
        return (1.0 + student_share * drafts) / sum(acceptance**place for place in range(drafts + 1))

    return min(numbers, key=cost)


def schedule_drafts(llm: Any, number: int) -> None:
    """
    Let a colocated engine draft `number` tokens from here on, one of those that it was started with.

    vLLM's scheduler reads them from a table, by the number of requests, in every step
    (`num_speculative_tokens_per_batch_size`). It is in this process: TRL starts its engines so.
    """
    table = llm.llm_engine.engine_core.engine_core.scheduler.dynamic_sd_lookup
    table[:] = [number] * len(table)

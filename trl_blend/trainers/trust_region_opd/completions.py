"""The completions table of [`TrustRegionOPDTrainer`]: TRL's, with the blend and the rewards of each completion."""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow
from accelerate.utils import gather_object
from pyarrow import parquet
from torch import Tensor
from transformers.utils import is_rich_available

from trl_blend import _compat
from trl_blend.generation.recording import RolloutRecord
from trl_blend.generation.rules import BlendRule
from trl_blend.trainers.trust_region_opd.config import TrustRegionOPDConfig


# Column of what the rule of a policy was set to, and the rule's field
_LEVEL = {
    "trust_region": ("kl_budget", "kl_budget"),
    "fixed_weight": ("teacher_weight", "weight"),
    "chernoff": ("scale", "scale"),
}
# What a rule reports beside `kl_behavior_student`, which every rule does
_STATISTICS = {
    "trust_region": ("teacher_weight",),
    "chernoff": ("teacher_weight",),
    "speculative_kd": ("replaced_share",),
}


@dataclass
class _Completion:
    """Sums over the tokens of one completion that the model has drawn so far, which may take several turns."""

    prompt_length: int
    ids: list[int]
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, name: str, values: Tensor) -> None:
        values = values[values.isfinite()]
        self.sums[name] += values.double().sum().item()
        self.counts[name] += values.numel()

    def mean(self, name: str) -> float:
        return self.sums[name] / max(self.counts[name], 1)


class CompletionsTable:
    """
    Columns beside `step`, `prompt` and `completion`, with `log_completions=True`:

    - `kl_budget` or the fixed `teacher_weight` that the completion was decoded with; `teacher_weight` (β*),
      `kl_behavior_student` and `replaced_share`, means over the tokens that were drawn, by `rollout_policy` (not with
      vLLM, which sums them over all completions). All of them are 0 for the student's own rollouts, after the warmup
      and in evaluation. Without blending there are none;
    - the reward of each of `reward_funcs`, under its name.

    TRL's table has no place for further columns, so this one is written in its stead, in the same places. Without any
    column to add TRL writes its own.

    Args:
        args ([`TrustRegionOPDConfig`]):
            Configuration of the trainer.
        reward_names (`list[str]`):
            Names of its reward functions.
        num_rows (`int`, *optional*):
            Length of the table: that of the columns which TRL keeps.
    """

    def __init__(self, args: TrustRegionOPDConfig, reward_names: list[str], num_rows: int | None):
        self.args = args
        self.reward_names = reward_names
        self.num_rows = num_rows
        self._statistics = (*_STATISTICS.get(args.rollout_policy, ()), "kl_behavior_student")
        if args.use_vllm:
            self._statistics = ()
        self._turns: list[_Completion] = []
        self._rewards: dict[str, deque[float]] = {}
        self._extra: dict[str, deque[float]] = {}

    @property
    def is_own(self) -> bool:
        """Whether there are columns that TRL's table has no place for."""
        return self.args.log_completions and bool(self._extra or self._rewards)

    def start(self) -> None:
        """Begin a generation batch."""
        self._turns = []

    def add_turn(self, record: RolloutRecord, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> None:
        """Add what one blended `generate` call recorded: of all completions at first, then of those that go on."""
        if not self.args.log_completions:
            return
        if not self._turns:
            self._turns = [_Completion(len(ids), list(ids)) for ids in prompt_ids]
        # After a tool call the prompt is all that the completion has so far, and rows keep their order
        remaining = iter(self._turns)
        for row, (prompt, drawn) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            one = next((one for one in remaining if prompt[: len(one.ids)] == one.ids), None)
            if one is None:
                break
            one.ids = [*prompt, *drawn]
            # TRL cuts the last turn at the length limit
            kept = min(len(drawn), self.args.max_completion_length - (len(prompt) - one.prompt_length))
            for name in self._statistics:
                one.add(name, record.statistics[name][row, :kept])

    def finish(self, num_rows: int, rule: BlendRule | None, rewards: Tensor | None) -> None:
        """
        End a generation batch of `num_rows` completions of this rank, drawn from `rule`, or from the student, with
        rewards of shape `(num_rows, len(reward_funcs))`. Every rank must call it.
        """
        args, turns = self.args, self._turns
        if not args.log_completions:
            return
        if args.blends:
            if args.rollout_policy in _LEVEL:
                column, field_name = _LEVEL[args.rollout_policy]
                self._keep(self._extra, column, [getattr(rule, field_name, 0.0)] * num_rows)
            for name in self._statistics:
                self._keep(self._extra, name, [one.mean(name) for one in turns] if turns else [0.0] * num_rows)
        if rewards is not None:
            for name, values in dict(zip(self.reward_names, rewards.T.tolist(), strict=True)).items():
                self._keep(self._rewards, name, values)
        self._turns = []

    def _keep(self, columns: dict[str, deque[float]], name: str, values: list[float]) -> None:
        columns.setdefault(name, deque(maxlen=self.num_rows)).extend(gather_object(values))

    def write(self, step: int, prompts: list[str], completions: list[str]) -> None:
        """Print the table and write it where TRL writes its own. The main process calls it."""
        args = self.args
        rewards, extra = (
            {name: list(values) for name, values in found.items()} for found in (self._rewards, self._extra)
        )
        if is_rich_available():
            shown = {name: [f"{value:.3g}" for value in values] for name, values in extra.items()}
            _compat.print_prompt_completions_sample(
                prompts, completions, rewards, None, step, args.num_completions_to_print, extra=shown
            )
        texts: dict[str, Any] = {"step": [step] * len(prompts), "prompt": prompts, "completion": completions}
        table = {**texts, **rewards, **extra}
        file = Path(args.output_dir) / "completions" / f"completions_{step:05d}.parquet"
        parquet.write_table(pyarrow.table(table), file)
        rows = list(zip(*table.values(), strict=True))
        if args.log_unique_prompts:
            firsts = {prompt: index for index, prompt in reversed(list(enumerate(prompts)))}
            rows = [rows[index] for index in sorted(firsts.values())]
        for backend in _table_backends(args.report_to or []):
            backend.log({"completions": backend.Table(columns=list(table), data=[list(row) for row in rows])})


def _table_backends(report_to: list[str]) -> list[Any]:
    """Modules with `log` and `Table` that are asked for and have a run."""
    # transformers has loaded what `report_to` names: none of them is a dependency of this package
    modules = [import_module(name) for name in ("wandb", "trackio") if name in report_to]
    return [module for module in modules if module.__name__ != "wandb" or module.run is not None]

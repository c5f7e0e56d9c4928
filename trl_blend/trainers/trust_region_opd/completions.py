"""The completions table of [`TrustRegionOPDTrainer`]: TRL's, with the blend and the rewards of each completion."""

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
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


_LEVEL = {"trust_region": "kl_budget", "fixed_weight": "teacher_weight"}
_STATISTICS = {
    "trust_region": ("teacher_weight", "kl_behavior_student"),
    "fixed_weight": ("kl_behavior_student",),
    "speculative_kd": ("replaced_share", "kl_behavior_student"),
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
      `kl_behavior_student` and `replaced_share`, means over the tokens that were drawn, by `rollout_policy`. All of
      them are 0 for the student's own rollouts, after the warmup and in evaluation. Without blending there are none;
    - the reward of each of `reward_funcs`, under its name.

    TRL's table has no place for further columns, so this one is written in its stead, in the same places. Without any
    column to add TRL writes its own.

    Args:
        trainer ([`TrustRegionOPDTrainer`]):
            Whose rollouts to show.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._turns: list[_Completion] = []
        self._rewards: dict[str, deque[float]] = {}
        self._extra: dict[str, deque[float]] = {}

    def start(self) -> None:
        """Begin a generation batch."""
        self._turns = []

    def add_turn(self, record: RolloutRecord, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> None:
        """Add what one blended `generate` call recorded: of all completions at first, then of those that go on."""
        if not self.trainer.log_completions:
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
            kept = min(len(drawn), self.trainer.max_completion_length - (len(prompt) - one.prompt_length))
            for name in _STATISTICS[self.trainer.args.rollout_policy]:
                one.add(name, record.statistics[name][row, :kept])

    def finish(self, num_rows: int, level: float, rewards: Tensor | None) -> None:
        """
        End a generation batch. Every rank must call it.

        Args:
            num_rows (`int`):
                Completions of this rank.
            level (`float`):
                What the blend was decoded with; 0 for the student's own rollouts.
            rewards (`torch.Tensor` of shape `(num_rows, len(reward_funcs))`, *optional*):
                Rewards of the completions.
        """
        trainer = self.trainer
        if not trainer.log_completions:
            return
        args, turns = trainer.args, self._turns
        if args.blends:
            if args.rollout_policy in _LEVEL:
                self._keep(self._extra, _LEVEL[args.rollout_policy], [level] * num_rows)
            for name in _STATISTICS[args.rollout_policy]:
                self._keep(self._extra, name, [one.mean(name) for one in turns] if turns else [0.0] * num_rows)
        if rewards is not None:
            names = [_compat.get_callable_name(function) for function in trainer.reward_funcs]
            for name, values in dict(zip(names, rewards.T.tolist(), strict=True)).items():
                self._keep(self._rewards, name, values)
        self._turns = []

    def _keep(self, columns: dict[str, deque[float]], name: str, values: list[float]) -> None:
        # As long as TRL's columns of texts, beside which it stands
        texts = self.trainer._logs["prompt"]
        columns.setdefault(name, deque(maxlen=texts.maxlen)).extend(gather_object(values))

    @contextmanager
    def written(self) -> Iterator[None]:
        """Around TRL's `log`: write the table at the end of it, instead of TRL's own."""
        trainer = self.trainer
        shown = trainer.log_completions and bool(self._extra or self._rewards)
        if not shown:
            yield
            return
        trainer.log_completions = False
        try:
            yield
        finally:
            trainer.log_completions = True
        if trainer.accelerator.is_main_process:
            self._write()

    def _write(self) -> None:
        trainer, args, step = self.trainer, self.trainer.args, self.trainer.state.global_step
        prompts, completions = (list(trainer._logs[name]) for name in ("prompt", "completion"))
        rewards, extra = (
            {name: list(values) for name, values in found.items()} for found in (self._rewards, self._extra)
        )
        if is_rich_available():
            shown = {name: [f"{value:.3g}" for value in values] for name, values in extra.items()}
            _compat.print_prompt_completions_sample(
                prompts, completions, rewards, None, step, trainer.num_completions_to_print, extra=shown
            )
        texts: dict[str, Any] = {"step": [step] * len(prompts), "prompt": prompts, "completion": completions}
        table = {**texts, **rewards, **extra}
        file = Path(args.output_dir) / "completions" / f"completions_{step:05d}.parquet"
        parquet.write_table(pyarrow.table(table), file)
        rows = list(zip(*table.values(), strict=True))
        if trainer.log_unique_prompts:
            firsts = {prompt: index for index, prompt in reversed(list(enumerate(prompts)))}
            rows = [rows[index] for index in sorted(firsts.values())]
        for backend in _table_backends(args.report_to or []):
            backend.log({"completions": backend.Table(columns=list(table), data=[list(row) for row in rows])})


def _table_backends(report_to: list[str]) -> list[Any]:
    """Modules with `log` and `Table` that are asked for and have a run."""
    # transformers has loaded what `report_to` names: none of them is a dependency of this package
    modules = [import_module(name) for name in ("wandb", "trackio") if name in report_to]
    return [module for module in modules if module.__name__ != "wandb" or module.run is not None]

"""What [`TrustRegionOPDTrainer`] measures of its rollouts and their teacher, none of which changes the training."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trl_blend import _compat
from trl_blend.generation.recording import RolloutRecord
from trl_blend.ops.head.layer import LMHead
from trl_blend.ops.head.reverse_kl import support_statistics
from trl_blend.ops.reduction import masked_mean
from trl_blend.ops.vocab import EosMap
from trl_blend.trainers._statistics import TokenMeans
from trl_blend.trainers.trust_region_opd.completions import CompletionsTable
from trl_blend.trainers.trust_region_opd.rewards import score_rollouts
from trl_blend.trainers.trust_region_opd.support import SupportScores


class Diagnostics:
    """
    Metrics under `blend/…` and `rewards/…`.

    Means are over tokens of all ranks: those of rollouts per generation batch, those of the loss since the last log.
    Seconds and tokens per second are those of this process.

    Args:
        trainer ([`TrustRegionOPDTrainer`]):
            Whose metrics to fill.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._rollout_means = TokenMeans()
        self._loss_means = {"train": TokenMeans(), "eval": TokenMeans()}
        self._mode = "train"
        self._support = {"train": SupportScores(), "eval": SupportScores()}
        self._latest_scores: Tensor | None = None
        self.completions = CompletionsTable(trainer)

    def measures_support(self, mode: str) -> bool:
        """Whether the loss measures the teacher's support of the rollouts, with one more pass over the vocabulary."""
        return mode == "eval" or bool(self.trainer.reward_funcs) or self.trainer.args.log_teacher_statistics

    def _log(self, mode: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.trainer._metrics[mode][name].append(value)

    # Rollouts

    @contextmanager
    def of_rollouts(self, mode: str, rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """Time the rollouts made inside the context, then reward them and log. The batch is appended to the list."""
        self._rollout_means = TokenMeans()  # an earlier call that raised may have left some
        self.completions.start()
        batches: list[dict[str, Any]] = []
        start = time.perf_counter()
        yield batches
        seconds, output = time.perf_counter() - start, batches[0]
        means = self._rollout_means.reduce(self.trainer.accelerator)
        self._log(mode, {f"blend/{name}": value for name, value in means.items()})
        tokens = output["completion_mask"].sum().item()
        self._log(mode, {"blend/rollout_seconds": seconds, "blend/rollout_tokens_per_second": tokens / seconds})
        rewards = self._reward(mode, rows, output) if self.trainer.reward_funcs else None
        self.completions.finish(len(rows), self.trainer._rollout_level if mode == "train" else 0.0, rewards)

    def collect(self, record: RolloutRecord, lengths: list[int]) -> None:
        """Add what one blended `generate` call recorded, up to the length of each row."""
        logps, means = record.behavior_logps, self._rollout_means
        mask = torch.arange(logps.size(1), device=logps.device) < torch.tensor(lengths, device=logps.device)[:, None]
        for name, values in record.statistics.items():
            if name == "teacher_weight":
                means.add("teacher_weight/mean", values, mask)
                means.add_max("teacher_weight/max", values, mask)
            else:
                means.add(name, values, mask & values.isfinite())
        teacher_logps = record.teacher_logps[0]
        if "kl_behavior_teacher" not in record.statistics:
            # Unbiased: the tokens are drawn from the behaviour policy
            gap = logps - teacher_logps
            means.add("kl_behavior_teacher", gap, mask & gap.isfinite())
        if not self.measures_support("train"):
            means.add("teacher_logp", teacher_logps, mask & teacher_logps.isfinite())
            means.add("teacher_entropy", record.teacher_entropies[0], mask)

    def _reward(self, mode: str, rows: list[dict[str, Any]], output: dict[str, Any]) -> Tensor:
        trainer = self.trainer
        masks = output["completion_mask"].bool()
        completion_ids = [ids[mask].tolist() for ids, mask in zip(output["completion_ids"], masks, strict=True)]
        rewards = score_rollouts(trainer.reward_funcs, rows, completion_ids, trainer._tokenizer, trainer.state)
        rewards = rewards.to(trainer.accelerator.device)
        gather = trainer.accelerator.gather if mode == "train" else trainer.accelerator.gather_for_metrics
        means = gather(rewards).nanmean(dim=0).tolist()
        names = [_compat.get_callable_name(function) for function in trainer.reward_funcs]
        self._log(mode, {f"rewards/{name}/mean": mean for name, mean in zip(names, means, strict=True)})
        output["verifier_reward"] = rewards[:, 0]
        return rewards

    # Loss

    @contextmanager
    def of_loss(self, mode: str, inputs: dict[str, Any]) -> Iterator[None]:
        """Time the loss computed inside the context and log what was measured in it, once the forward is over."""
        self._latest_scores, self._mode = None, mode
        start = time.perf_counter()
        yield
        seconds, tokens = time.perf_counter() - start, inputs["completion_mask"].sum().item()
        self._log(mode, {"blend/loss_seconds": seconds, "blend/loss_tokens_per_second": tokens / seconds})
        self._loss_means[mode].sync(self.trainer.accelerator)
        if self._latest_scores is not None and "verifier_reward" in inputs:
            reward = inputs["verifier_reward"]
            right = (reward >= self.trainer.args.success_threshold).float().masked_fill(reward.isnan(), math.nan)
            # The last batch of an epoch is whole in training: only evaluation repeats rows to fill it
            accelerator = self.trainer.accelerator
            gather = accelerator.gather if mode == "train" else accelerator.gather_for_metrics
            self._support[mode].add(self._latest_scores.to(right.device), right, gather)

    def add_reverse_kl(self, values: Tensor) -> None:
        """Add the reverse KL `(N,)` of the tokens of a micro-batch."""
        self._loss_means[self._mode].add("reverse_kl", values, values.isfinite())

    @torch.no_grad()
    def measure_support(self, heads: _compat.DivergenceInputs, completion_ids: Tensor, eos: EosMap | None) -> None:
        """Log-probabilities of the rollouts' tokens under both models, and the teacher's entropy at their prefixes."""
        valid, student, teacher = valid_positions(heads)
        result = support_statistics(
            student,
            teacher,
            completion_ids.to(valid.device).reshape(-1)[valid],
            temperature=heads.temperature,
            eos=eos,
            gather_parameters=_compat.gather_lm_head,
        )
        for name in ("student_logps", "teacher_logps", "teacher_entropy"):
            values = getattr(result, name)
            self._loss_means[self._mode].add(name.removesuffix("s"), values, values.isfinite())
        gap = result.teacher_logps - result.student_logps
        gaps = gap.new_zeros(valid.shape).masked_scatter(valid, gap).view_as(completion_ids)
        self._latest_scores = masked_mean(gaps, heads.mask, dim=1)

    def log_losses(self, mode: str) -> None:
        """Log what was measured in the losses since the last call."""
        # Here and not after each loss: TRL would average the means of micro-batches, whatever their lengths
        self._log(mode, {f"blend/{name}": value for name, value in self._loss_means[mode].pop().items()})
        value = self._support[mode].pop_auroc()  # undefined where all rollouts are right or all are wrong
        if not math.isnan(value):
            self._log(mode, {"blend/auroc": value})


def valid_positions(heads: _compat.DivergenceInputs) -> tuple[Tensor, LMHead, LMHead]:
    """Mask of the tokens that count, `(B * T,)`, and both output layers at these tokens only."""
    valid = heads.mask.reshape(-1) != 0
    student, teacher = (head._replace(hidden=head.hidden[valid]) for head in (heads.student, heads.teacher))
    return valid, student, teacher

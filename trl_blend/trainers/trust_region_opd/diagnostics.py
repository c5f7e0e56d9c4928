"""What [`TrustRegionOPDTrainer`] measures of its rollouts and their teacher, none of which changes the training."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trl_blend import _compat
from trl_blend.generation.recording import RolloutRecord
from trl_blend.ops.head.layer import LMHead
from trl_blend.ops.head.reverse_kl import ReverseKL, support_statistics
from trl_blend.ops.losses import SampledTokenLoss
from trl_blend.ops.reduction import masked_mean
from trl_blend.ops.vocab import EosMap
from trl_blend.serving.statistics import Statistic
from trl_blend.trainers._statistics import TokenMeans
from trl_blend.trainers.trust_region_opd.config import TrustRegionOPDConfig


class Diagnostics:
    """
    Metrics under `blend/…` and `rewards/…`.

    Means are over tokens of all ranks: those of rollouts per generation batch, those of the loss since the last log.
    Seconds and tokens per second are those of this process.

    Args:
        args ([`TrustRegionOPDConfig`]):
            Configuration of the trainer.
        reward_names (`list[str]`):
            Names of its reward functions.
        accelerator ([`~accelerate.Accelerator`]):
            To add over ranks with.
        log (`Callable[[str, dict[str, float]], None]`):
            Takes a mode (`"train"` or `"eval"`) and metrics by name.
    """

    def __init__(
        self,
        args: TrustRegionOPDConfig,
        reward_names: list[str],
        accelerator: Accelerator,
        log: Callable[[str, dict[str, float]], None],
    ):
        self.args = args
        self.reward_names = reward_names
        self.accelerator = accelerator
        self._log = log
        self._rollout_means = TokenMeans()
        self._loss_means = {"train": TokenMeans(), "eval": TokenMeans()}
        self._mode = "train"
        self._support: dict[str, list[Tensor]] = {"train": [], "eval": []}
        self._latest_scores: Tensor | None = None

    def measures_support(self, mode: str) -> bool:
        """Whether the loss measures the teacher's support of the rollouts, with one more pass over the vocabulary."""
        return mode == "eval" or bool(self.reward_names) or self.args.log_teacher_statistics

    def _gather(self, mode: str) -> Callable[[Tensor], Tensor]:
        # The last batch of an epoch is whole in training: only evaluation repeats rows to fill it
        return self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics

    # Rollouts

    def start_rollouts(self) -> None:
        """Begin a generation batch."""
        self._rollout_means = TokenMeans()  # an earlier call that raised may have left some

    def collect(self, record: RolloutRecord, lengths: list[int]) -> None:
        """Add what one blended `generate` call recorded, up to the length of each row."""
        logps, means, mask = record.behavior_logps, self._rollout_means, record.mask_of(lengths)
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

    def collect_sums(self, sums: Mapping[str, Statistic]) -> None:
        """Add what an engine has summed up of its draws, see [`~trl_blend.serving.statistics.row_statistics`]."""
        means, own = self._rollout_means, {name: value for name, value in sums.items() if not name.endswith("_0")}
        for name, (total, count, largest) in own.items():
            if name == "teacher_weight":
                means.add_sum("teacher_weight/mean", total, count)
                means.add_largest("teacher_weight/max", largest)
            else:
                means.add_sum(name, total, count)
        of_teacher = [] if "kl_behavior_teacher" in own else ["kl_behavior_teacher"]
        of_teacher += [] if self.measures_support("train") else ["teacher_logp", "teacher_entropy"]
        for name in of_teacher:
            means.add_sum(name, sums[f"{name}_0"].total, sums[f"{name}_0"].count)

    def log_rollouts(self, mode: str, num_tokens: int, seconds: float) -> None:
        """End a generation batch: log its means, and what it took. Every rank must call it."""
        means = self._rollout_means.reduce(self.accelerator)
        self._log(mode, {f"blend/{name}": value for name, value in means.items()})
        self._log(mode, {"blend/rollout_seconds": seconds, "blend/rollout_tokens_per_second": num_tokens / seconds})

    def log_rewards(self, mode: str, rewards: Tensor) -> None:
        """Log the mean of each reward function, of `(B, F)` on each rank."""
        means = self._gather(mode)(rewards).nanmean(dim=0).tolist()
        named = zip(self.reward_names, means, strict=True)
        self._log(mode, {f"rewards/{name}/mean": mean for name, mean in named})

    # Loss

    @contextmanager
    def of_loss(self, mode: str, inputs: dict[str, Any]) -> Iterator[None]:
        """Time the loss computed inside the context and log what was measured in it, once the forward is over."""
        self._latest_scores, self._mode = None, mode
        start = time.perf_counter()
        yield
        seconds, tokens = time.perf_counter() - start, inputs["completion_mask"].sum().item()
        self._log(mode, {"blend/loss_seconds": seconds, "blend/loss_tokens_per_second": tokens / seconds})
        self._loss_means[mode].sync(self.accelerator)
        if self._latest_scores is not None and "verifier_reward" in inputs:
            reward = inputs["verifier_reward"]
            right = (reward >= self.args.success_threshold).float().masked_fill(reward.isnan(), math.nan)
            pairs = torch.stack([self._latest_scores.to(right.device).float(), right], dim=1)
            self._support[mode].append(self._gather(mode)(pairs).cpu())

    def add_loss(self, result: ReverseKL, kept: Tensor | None) -> None:
        """Add what the loss has found of the `N` tokens of a micro-batch, and which of them it is taken over."""
        means = self._loss_means[self._mode]
        means.add("reverse_kl", result.reverse_kl, result.reverse_kl.isfinite())
        for name, chosen in (("forward_kl_share", result.has_forward_kl), ("kept_share", kept)):
            if chosen is not None:
                means.add(name, chosen.float(), torch.ones_like(chosen))

    def add_sampled_loss(self, result: SampledTokenLoss, weights: Tensor) -> None:
        """Add what a loss of sampled tokens has found of `N` of them: the reverse KL, estimated, and their weights."""
        gap = -result.advantage if result.ratio is None else -result.ratio * result.advantage
        for name, values in (("reverse_kl", gap), ("iw_opd_weight", weights)):
            self._loss_means[self._mode].add(name, values, values.isfinite())

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
        pairs, self._support[mode] = self._support[mode], []
        value = auroc(*torch.cat(pairs).unbind(dim=1)) if pairs else math.nan
        if not math.isnan(value):
            self._log(mode, {"blend/auroc": value})


def valid_positions(heads: _compat.DivergenceInputs) -> tuple[Tensor, LMHead, LMHead]:
    """Mask of the tokens that count, `(B * T,)`, and both output layers at these tokens only."""
    valid = heads.mask.reshape(-1) != 0
    student, teacher = (head._replace(hidden=head.hidden[valid]) for head in (heads.student, heads.teacher))
    return valid, student, teacher


def auroc(scores: Tensor, right: Tensor) -> float:
    r"""
    Probability that a right rollout has a higher score than a wrong one, ties counting half: the area under the ROC
    curve (Fig. 7 of [Trust-region behaviour blending](https://huggingface.co/papers/2605.31159)).

    Args:
        scores (`torch.Tensor` of shape `(N,)`):
            Scores, such as the mean over tokens of \\( \log p_T - \log p_S \\).
        right (`torch.Tensor` of shape `(N,)`):
            1 for a right rollout, 0 for a wrong one. Rollouts where it or the score is NaN are left out.

    Returns:
        `float`: AUROC, NaN where all rollouts are right or all are wrong.
    """
    known = ~(scores.isnan() | right.isnan())
    positive, negative = scores[known & (right > 0.5)], scores[known & (right <= 0.5)]
    if not len(positive) or not len(negative):
        return math.nan
    negative = negative.sort().values
    below = torch.searchsorted(negative, positive.contiguous(), side="left")
    not_above = torch.searchsorted(negative, positive.contiguous(), side="right")
    return ((below + not_above).double().mean() / (2 * len(negative))).item()

"""The model that TRL's loss sees: the student, with the offline objective in the place of its log-probabilities."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trl_blend import _compat
from trl_blend.ops.head.layer import LMHead
from trl_blend.ops.head.top_k import TopKDivergence, top_k_divergence
from trl_blend.ops.losses import extrapolated_logps, sampled_token_loss
from trl_blend.trainers.offline_opd.config import OfflineOPDConfig
from trl_blend.trainers.offline_opd.data import WEIGHTS


class OfflineForward:
    r"""
    Stands in for the student in `SFTTrainer.compute_loss`, which minimises `-Σ_t outputs.log_probs / num_items`.

    The forward goes through the wrapped student (DDP, FSDP2, DeepSpeed) and TRL's fused head. Its `log_probs` are then
    replaced by \\( -w_t \ell_t \\), with \\( \ell_t \\) the offline loss of a token and \\( w_t \\) its weight: TRL's
    reduction over gradient accumulation and processes then gives \\( \sum_t w_t \ell_t / \sum_t w_t \\). Without
    `fused_lm_head=True` the call is the student's own.

    Args:
        student (`nn.Module`):
            The (wrapped) student.
        columns (`Mapping[str, torch.Tensor]`):
            Per-token columns of the batch and their weights, each of shape `(B, T)` or `(B, T, K)`.
        args ([`OfflineOPDConfig`]):
            Which loss it is.
        scale (`float` or `torch.Tensor`, *optional*, defaults to `1.0`):
            Factor of all weights.
        num_tokens (`int`, *optional*):
            Ids below it were tokens when the teacher was scored: a top-k loss compares the student over the same
            ones. The sampled token's log-probability is that of TRL's fused head, over all rows.
    """

    def __init__(
        self,
        student: nn.Module,
        columns: Mapping[str, Tensor],
        args: OfflineOPDConfig,
        scale: float | Tensor = 1.0,
        num_tokens: int | None = None,
    ):
        self.student = student
        # The fused head predicts token t from position t - 1
        self.columns = {name: column[:, 1:] for name, column in columns.items()}
        self.args = args
        self.scale = scale
        self.num_tokens = num_tokens
        self.student_logps: Tensor | None = None
        self.divergence: Tensor | None = None
        self.ratio: Tensor | None = None

    def __call__(self, **inputs: Any) -> Any:
        if not inputs.get("fused_lm_head"):
            return self.student(**inputs)
        mask = inputs["labels"][:, 1:] != -100
        if not self.args.uses_top_k:
            has_baseline = self.args.advantage_baseline == "kl"
            with _compat.fused_log_prob_function(partial(self._baseline, mask)) if has_baseline else nullcontext():
                outputs = self.student(**inputs)
            self.student_logps = outputs.log_probs.detach()
            rollout = self.columns["rollout_logps"] if self.args.importance_correction == "token" else None
            result = sampled_token_loss(
                outputs.log_probs, self._target_logps(), rollout, self.args.importance_cap, self.divergence
            )
            loss, self.ratio = result.loss, result.ratio
        else:
            with _compat.fused_log_prob_function(partial(self._top_k, mask)):
                outputs = self.student(**inputs)
            loss = outputs.log_probs
            self.divergence = loss.detach()
        outputs.log_probs = -loss * (self.columns[WEIGHTS] * self.scale)
        return outputs

    def _target_logps(self) -> Tensor:
        teacher = self.columns["teacher_logps"]
        if self.args.reward_extrapolation == 1.0:
            return teacher
        return extrapolated_logps(teacher, self.columns["student_logps"], self.args.reward_extrapolation)

    @torch.no_grad()
    def _baseline(self, mask: Tensor, head: LMHead, targets: Tensor, *_: Any) -> None:
        """Keep the divergence, and leave the log-probabilities to TRL's own function."""
        result, _ = self._divergence(mask, head, targets, "reverse")
        self.divergence = result.loss.new_zeros(mask.shape).masked_scatter(mask, result.loss)

    def _divergence(
        self, mask: Tensor, head: LMHead, targets: Tensor, direction: str
    ) -> tuple[TopKDivergence, slice | Tensor]:
        """Divergence at the labelled positions, and which of those that TRL hands over these are."""
        # It hands over the labelled positions alone on some devices, and all of them on others
        rows = slice(None) if len(targets) == mask.sum() else mask.reshape(-1)
        columns = {name: column[mask] for name, column in self.columns.items()}
        result = top_k_divergence(
            head._replace(hidden=head.hidden[rows]),
            targets[rows],
            columns["teacher_topk_ids"],
            columns["teacher_topk_logps"],
            columns["teacher_tail_logmass"],
            direction=direction,
            vocab_size=self.num_tokens,
            gather_parameters=_compat.gather_lm_head,
        )
        return result, rows

    def _top_k(
        self, mask: Tensor, head: LMHead, targets: Tensor, temperature: float, outputs: tuple[str, ...]
    ) -> tuple[Tensor | None, ...]:
        direction = "reverse" if self.args.offline_loss == "top_k_reverse_kl" else "forward"
        result, rows = self._divergence(mask, head, targets, direction)
        self.student_logps = result.student_logps.new_zeros(mask.shape).masked_scatter(mask, result.student_logps)

        def spread(values: Tensor) -> Tensor:
            if isinstance(rows, slice):
                return values
            return values.new_zeros(targets.shape).masked_scatter(rows, values)

        return spread(result.loss), spread(result.student_entropy), None, None, spread(result.is_top1)

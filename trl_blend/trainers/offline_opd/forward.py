"""The model that TRL's loss sees: the student, with the offline objective in the place of its log-probabilities."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trl_blend import _compat
from trl_blend.ops.head.layer import LMHead
from trl_blend.ops.head.top_k import top_k_divergence
from trl_blend.ops.losses import sampled_token_loss
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
        self.loss: Tensor | None = None
        self.ratio: Tensor | None = None

    def __call__(self, **inputs: Any) -> Any:
        if not inputs.get("fused_lm_head"):
            return self.student(**inputs)
        if not self.args.uses_top_k:
            outputs = self.student(**inputs)
            self.student_logps = outputs.log_probs.detach()
            rollout = self.columns["rollout_logps"] if self.args.importance_correction == "token" else None
            result = sampled_token_loss(
                outputs.log_probs, self.columns["teacher_logps"], rollout, self.args.importance_cap
            )
            loss, self.ratio = result.loss, result.ratio
        else:
            mask = inputs["labels"][:, 1:] != -100
            with _compat.fused_log_prob_function(lambda *call: self._top_k(mask, *call)):
                outputs = self.student(**inputs)
            loss = outputs.log_probs
        self.loss = loss.detach()
        outputs.log_probs = -loss * (self.columns[WEIGHTS] * self.scale)
        return outputs

    def _top_k(
        self, mask: Tensor, head: LMHead, targets: Tensor, temperature: float, outputs: tuple[str, ...]
    ) -> tuple[Tensor | None, ...]:
        # TRL hands over the labelled positions alone on some devices, and all of them on others
        rows = slice(None) if len(targets) == mask.sum() else mask.reshape(-1)
        columns = {name: column[mask] for name, column in self.columns.items()}
        result = top_k_divergence(
            head._replace(hidden=head.hidden[rows]),
            targets[rows],
            columns["teacher_topk_ids"],
            columns["teacher_topk_logps"],
            columns["teacher_tail_logmass"],
            direction="reverse" if self.args.offline_loss == "top_k_reverse_kl" else "forward",
            vocab_size=self.num_tokens,
            gather_parameters=_compat.gather_lm_head,
        )
        self.student_logps = result.student_logps.new_zeros(mask.shape).masked_scatter(mask, result.student_logps)

        def spread(values: Tensor) -> Tensor:
            if isinstance(rows, slice):
                return values
            return values.new_zeros(targets.shape).masked_scatter(rows, values)

        return spread(result.loss), spread(result.student_entropy), None, None, spread(result.is_top1)

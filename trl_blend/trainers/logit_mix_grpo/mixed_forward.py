"""The model that TRL's log-prob code sees when the objective is written on the mixed policy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trl_blend import _compat
from trl_blend.models.wrappers import evaluation_mode
from trl_blend.ops.head.layer import LMHead
from trl_blend.ops.head.mixed import mixed_log_probs


@dataclass(eq=False)
class MixedForward:
    r"""
    Stands in for the student in `GRPOTrainer._get_per_token_logps_and_entropies`: same inputs, same outputs, but the
    log-probabilities and entropies are those of the mixed policy.

    Each teacher's forward comes first, without gradient, and leaves its hidden states and LM head; the student's
    forward then goes through the wrapped module (DDP, FSDP2, DeepSpeed), and where TRL's fused head would compute
    \\( \log p_S(y_t) \\) it computes \\( \log p_{mix}(y_t) \\) from both. The gradient reaches the student only.

    Left out on purpose: the teachers' router losses, and image features (the trainer refuses vision-language models).

    Args:
        student (`nn.Module`):
            The (wrapped) student.
        teachers (`Sequence[nn.Module]`):
            The frozen teachers; empty when the base of a PEFT student is the only one.
        weights (`Sequence[float]`):
            Weight of each teacher.
        space (`str`):
            `"logits"`, `"probs"` or `"arithmetic"`.
        unwrapped_student (`nn.Module`):
            The PEFT model inside `student`, whose adapters are disabled when there are no teachers.
        num_tokens (`int`, *optional*):
            Ids below it are tokens; the other rows have no part in the policy. All rows by default.
    """

    student: nn.Module
    teachers: Sequence[nn.Module]
    weights: Sequence[float]
    space: str
    unwrapped_student: nn.Module
    num_tokens: int | None = None

    def __call__(self, **inputs: Any) -> Any:
        frozen = {key: value for key, value in inputs.items() if key != "output_router_logits"}
        if self.teachers:
            heads = [self._capture_head(teacher, frozen) for teacher in self.teachers]
        else:
            with evaluation_mode(self.unwrapped_student, disable_adapters=True):
                heads = [self._capture_head(self.student, frozen)]

        def mix(head: LMHead, targets: Tensor, temperature: float, outputs: tuple[str, ...]) -> tuple:
            mixed = mixed_log_probs(
                head,
                heads,
                self.weights,
                targets,
                temperature=temperature,
                space=self.space,
                compute_entropy="entropy" in outputs,
                vocab_size=self.num_tokens,
                gather_parameters=_compat.gather_lm_head,
            )
            return mixed.logps, mixed.entropy, None, None, None

        with _compat.fused_log_prob_function(mix):
            return self.student(**inputs)

    @staticmethod
    @torch.no_grad()
    def _capture_head(model: nn.Module, inputs: dict[str, Any]) -> LMHead:
        captured: list[LMHead] = []

        def keep(head: LMHead, targets: Tensor, temperature: float, outputs: tuple[str, ...]) -> tuple:
            captured.append(head)
            placeholder = head.hidden.new_zeros(targets.shape, dtype=torch.float32)
            return placeholder, placeholder if "entropy" in outputs else None, None, None, None

        with _compat.fused_log_prob_function(keep):
            model(**inputs)
        return captured[0]

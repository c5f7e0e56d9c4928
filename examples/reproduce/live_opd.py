"""Distillation with a live teacher, to compare offline distillation with: TRL's loss, and that on sampled tokens."""

import time
from typing import Any

import torch
from trl import DistillationTrainer

from trl_blend._compat import DivergenceInputs, DivergenceResult, divergence_function
from trl_blend.ops import LMHead, mixed_log_probs
from trl_blend.ops.head.scores import score_tokens
from trl_blend.ops.losses import sampled_token_loss, sequence_weights


class LiveOPDTrainer(DistillationTrainer):
    """
    [`~trl.DistillationTrainer`] that also counts what a step spends its time on.

    Attributes:
        rollout_seconds (`float`): Time in decoding, all steps.
        teacher_seconds (`float`): Time in the teacher's forward passes, all steps.
        tokens (`list[int]`): Completion tokens of each step.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rollout_seconds = self.teacher_seconds = 0.0
        self.tokens: list[int] = []

    def _generate_single_turn(self, *args, **kwargs):
        started = time.perf_counter()
        completion_ids = super()._generate_single_turn(*args, **kwargs)
        self.rollout_seconds += time.perf_counter() - started
        self.tokens.append(sum(map(len, completion_ids)))
        return completion_ids

    def _get_last_hidden_state(self, unwrapped_model, *args, **kwargs):
        started = time.perf_counter()
        hidden = super()._get_last_hidden_state(unwrapped_model, *args, **kwargs)
        if unwrapped_model is self.accelerator.unwrap_model(self.teacher_model):
            self.teacher_seconds += time.perf_counter() - started
        return hidden


class SampledTokenOPDTrainer(LiveOPDTrainer):
    r"""
    Live distillation with the loss of [`~trl_blend.OfflineOPDTrainer`], for one process and one micro-batch per step:

    $$
    \ell_t = -\mathrm{sg}\left[\log p_T(y_t) - \log p_\theta(y_t)\right] \log p_\theta(y_t), \qquad y_t \sim p_\theta
    $$

    averaged over the tokens of each sequence, then over sequences. Rollouts, batches and everything else are TRL's.
    """

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        tokens = inputs["completion_ids"]

        def divergence(heads: DivergenceInputs) -> DivergenceResult:
            return self._sampled_token_divergence(heads, tokens, num_items_in_batch)

        with divergence_function(divergence):
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)

    def _sampled_token_divergence(
        self, heads: DivergenceInputs, tokens: torch.Tensor, num_items: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        valid, targets = heads.mask.reshape(-1) != 0, tokens.reshape(-1)

        def kept(head: LMHead) -> LMHead:
            return head._replace(hidden=head.hidden[valid])

        student = mixed_log_probs(kept(heads.student), [], [], targets[valid])
        started = time.perf_counter()
        teacher_logps = score_tokens(kept(heads.teacher), targets[valid]).logps
        self.teacher_seconds += time.perf_counter() - started
        result = sampled_token_loss(student.logps, teacher_logps)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["live/reverse_kl"].append(-result.advantage.mean().item())
        # TRL divides the sum by `num_items`: the weights make that the mean over sequences of their token means
        weights = sequence_weights(heads.mask.sum(dim=1).tolist(), "sequence").to(result.loss)
        items = valid.sum() if num_items is None else num_items
        zeros = result.loss.new_zeros(valid.shape)
        per_token = zeros.masked_scatter(valid, result.loss * weights * (items / weights.sum()))
        return per_token, zeros.masked_scatter(valid, student.entropy.detach())

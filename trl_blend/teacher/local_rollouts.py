"""Rollouts with the `generate` of transformers, with the log-probabilities of what was sampled from."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trl_blend.generation.partner import evaluation_mode, innermost_model
from trl_blend.generation.rules import log_normalizer
from trl_blend.teacher.sampling import OnRows, Rollout, SamplingSettings, cut_at_eos


logger = logging.getLogger(__name__)

# What a checkpoint's generation_config.json may hold that changes the distribution of a token, or where a text ends
_LEFT_OUT = {
    "bad_words_ids",
    "begin_suppress_tokens",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "force_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "num_beams",
    "penalty_alpha",
    "repetition_penalty",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
    "top_h",
    "typical_p",
    "watermarking_config",
}


class LocalRolloutEngine:
    """
    Samples completions in batches of left-padded prompts.

    The distribution is the model's own after temperature, top-k, top-p and min-p, in transformers' order, and nothing
    else: what the checkpoint's `generation_config.json` would add (a repetition penalty, suppressed tokens, ...) is
    left out, with a warning that names it. The global random state is left as it was.

    Args:
        model ([`~transformers.PreTrainedModel`] or `peft.PeftModel`):
            Causal language model. It runs in evaluation mode and is left as it was.
        sampling ([`SamplingSettings`]):
            What is sampled.
        eos_token_ids (`Sequence[int]`):
            Tokens that end a completion.
        pad_token_id (`int`):
            Token to pad with; may be one of `eos_token_ids`.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of completions drawn at once.

    Raises:
        [`~trl_blend.errors.UnsupportedError`]: If `model` is not a decoder-only model with `generate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sampling: SamplingSettings,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        batch_size: int = 32,
    ) -> None:
        self.model: Any = innermost_model(model, "model")
        self.sampling = sampling
        self.eos_token_ids = list(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.max_batch: int | None = batch_size
        left_out = sorted(name for name in self.model.generation_config.to_diff_dict() if name in _LEFT_OUT)
        if left_out:
            logger.warning(
                f"The checkpoint's generation_config.json sets {left_out}, which rollouts leave out: they are drawn "
                "from the model's own distribution after temperature, top-k, top-p and min-p only."
            )

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int], on_rows: OnRows | None = None
    ) -> list[Rollout]:
        """One rollout per prompt, in order. All of `prompt_ids` is one batch, seeded with the first of `seeds`."""
        width = max(len(prompt) for prompt in prompt_ids)
        ids = torch.full((len(prompt_ids), width), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompt_ids):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self.model.get_input_embeddings().weight.device
        recorder = _SampledLogProbs(_warpers(self.sampling))
        devices = [device] if device.type not in ("cpu", "mps") else []
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"), torch.no_grad():
            torch.manual_seed(seeds[0])
            with evaluation_mode(self.model), self._neutral_generation_config() as config:
                sequences = self.model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=config,
                    logits_processor=[recorder],
                )
        tokens = sequences[:, width:].tolist()
        rollout_logps, student_logps = recorder.finish(sequences, width)
        rollouts = []
        for row, completion in enumerate(tokens):
            end, ended = cut_at_eos(completion, self.eos_token_ids)
            rollouts.append(
                Rollout(completion[:end], rollout_logps[row][:end], student_logps[row][:end], truncated=not ended)
            )
        if on_rows is not None:
            on_rows(len(rollouts), sum(len(rollout.completion_ids) for rollout in rollouts))
        return rollouts

    @contextmanager
    def _neutral_generation_config(self) -> Iterator[GenerationConfig]:
        # `generate` fills what its argument leaves open from the model's own configuration
        own = self.model.generation_config
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_id=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
        )
        self.model.generation_config = GenerationConfig()
        try:
            yield config
        finally:
            self.model.generation_config = own


def _warpers(sampling: SamplingSettings) -> list[LogitsProcessor]:
    """transformers' own, in its own order."""
    warpers: list[Any] = []
    if sampling.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers


class _SampledLogProbs(LogitsProcessor):
    """
    Applies the warpers, as the last processor of `generate`, and records log-probabilities before and after them.

    The token drawn from a step is only known at the next one, so one step's two `(B, V)` tensors are kept until then.
    """

    def __init__(self, warpers: Sequence[LogitsProcessor]) -> None:
        self._warpers = warpers
        self._pending: list[Tensor] = []
        self._logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._pending:
            self._gather(input_ids[:, -1])
        warped = scores
        for warper in self._warpers:
            warped = warper(input_ids, warped)
        self._pending = [warped, scores]
        return warped

    def finish(self, sequences: Tensor, prompt_length: int) -> tuple[list[list[float]], list[list[float]]]:
        """Log-probabilities of the sampled-from distribution and of the model, one list per row each."""
        length = sequences.shape[1] - prompt_length
        # `generate` may have undone its last step (deferred stop check): then no token belongs to it
        if len(self._logps) < length:
            self._gather(sequences[:, -1])
        self._pending = []
        sampled, own = torch.stack(self._logps[:length], dim=-1).clamp_(max=0.0).tolist()
        return sampled, own

    def _gather(self, tokens: Tensor) -> None:
        index = tokens[:, None]
        logps = [logits.gather(1, index).squeeze(1) - log_normalizer(logits) for logits in self._pending]
        self._logps.append(torch.stack(logps))  # (2, B)

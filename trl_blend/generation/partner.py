"""A frozen partner model that follows the student's rollout with a key-value cache of its own."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from trl_blend.errors import UnsupportedError
from trl_blend.models.wrappers import attributes_set, evaluation_overrides


class PartnerDecoder:
    """
    Drives one partner through one `generate` call of the student.

    The partner goes through its own generation methods (cache preparation, `prepare_inputs_for_generation`,
    `_update_model_kwargs_for_generation`), so that sliding-window, hybrid and grouped-query models work. Its mask is
    the prompt's, extended by ones; its position ids follow from that mask. The forward pass runs without gradient and
    in evaluation mode, whatever mode the model is in; the mode is restored after each pass.

    Args:
        model ([`~transformers.GenerationMixin`]):
            The partner, see [`innermost_model`].
        attention_mask (`torch.Tensor` of shape `(B, S)`):
            Mask of the left-padded prompts, one row per returned sequence.
        disable_adapters (`bool`, *optional*, defaults to `False`):
            Whether to disable the model's adapters during its forward passes, and only then.

    Attributes:
        num_forward_steps (`int`): Forward passes so far.
    """

    def __init__(self, model: GenerationMixin, attention_mask: Tensor, *, disable_adapters: bool = False) -> None:
        self.model: Any = model
        self.num_forward_steps = 0
        self._attention_mask = attention_mask
        self._model_kwargs: dict[str, Any] = {}
        self._overrides = evaluation_overrides(self.model, disable_adapters)

    @torch.no_grad()
    def step(self, input_ids: Tensor) -> Tensor:
        """
        Logits of the partner after `input_ids`: the prompt at the first call, then one token more at every call.

        Args:
            input_ids (`torch.Tensor` of shape `(B, S)`):
                Prompt and the tokens emitted so far.

        Returns:
            `torch.Tensor` of shape `(B, V)`: Raw logits of the next token, on the partner's device and in its dtype.

        Raises:
            [`~trl_blend.errors.UnsupportedError`]: If the prompt does not have the mask's shape, a later call does not
                add exactly one token (a decoding loop other than sampling or greedy search), or a token is beyond the
                partner's embedding.
        """
        expected = (self._attention_mask.shape[0], self._attention_mask.shape[1] + self.num_forward_steps)
        if tuple(input_ids.shape) != expected:
            raise UnsupportedError(
                f"`input_ids` has shape {tuple(input_ids.shape)} at decoding step {self.num_forward_steps}, expected "
                f"{expected} from the prompt's `attention_mask`. Blending follows plain sampling and greedy search of "
                "whole prompts, one token per step."
            )
        input_ids = input_ids.to(self.model.device)
        prefill = self.num_forward_steps == 0
        self._check_ids(input_ids if prefill else input_ids[:, -1])
        if prefill:
            self._prepare_model_kwargs(input_ids)
        inputs = self.model.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=None if prefill else 1,
            is_first_iteration=prefill,
            **self._model_kwargs,
        )
        with attributes_set(self._overrides):
            outputs = self.model(**inputs, return_dict=True)
        self._model_kwargs = self.model._update_model_kwargs_for_generation(outputs, self._model_kwargs)
        logits = outputs.logits[:, -1]
        if outputs.logits.shape[1] > 1:
            logits = logits.clone()  # let go of the logits of the whole prompt
        self.num_forward_steps += 1
        return logits

    def _check_ids(self, ids: Tensor) -> None:
        # A family pads its embeddings to different sizes. On CUDA the lookup itself would take the whole process down.
        rows = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        if rows is not None and int(ids.max()) >= rows:
            raise UnsupportedError(
                f"Token id {int(ids.max())} is beyond the {rows} embedding rows of `teacher` "
                f"({type(self.model).__name__}). Suppress the ids that are no tokens (`suppress_tokens`), or use a "
                "teacher with the student's tokenizer."
            )

    def _prepare_model_kwargs(self, input_ids: Tensor) -> None:
        """What `generate` prepares before its prefill, with a dynamic cache."""
        mask = self._attention_mask.to(input_ids.device)
        kwargs: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
        kwargs["position_ids"] = self.model._prepare_position_ids_for_generation(input_ids, kwargs)
        if bool(mask.all()):
            kwargs["attention_mask"] = None  # no padding: the causal mask is enough, and faster
        if self.model._supports_logits_to_keep():
            kwargs["logits_to_keep"] = 1
        self.model._prepare_cache_for_generation(
            GenerationConfig(use_cache=True), kwargs, GenerationMode.SAMPLE, input_ids.shape[0], input_ids.shape[1]
        )
        self._model_kwargs = kwargs

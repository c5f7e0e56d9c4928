"""A frozen partner model that follows the student's rollout with a key-value cache of its own."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from trl_blend.errors import UnsupportedError


# Named initialisations of LoRA that leave the base's weights as they are. All others may change them (PiSSA does), so
# that without its adapter the model is not the one it started from.
_INITS_THAT_KEEP_THE_BASE = {"eva", "gaussian", "orthogonal"}


def innermost_model(model: nn.Module, argument: str) -> GenerationMixin:
    """
    The Hugging Face causal language model inside `model`: PEFT and `torch.compile` wrappers are taken off.

    Adapters stay active: PEFT injects them into the model's own layers.

    Args:
        model (`torch.nn.Module`):
            A causal language model, or a PEFT model of one.
        argument (`str`):
            Name of the argument that holds it, for the error messages.

    Returns:
        [`~transformers.GenerationMixin`]: The model whose `generate` and `forward` do the work.

    Raises:
        [`~trl_blend.errors.UnsupportedError`]: For prompt-learning adapters, encoder-decoder models, and anything that
            is not a Hugging Face model with `generate` (such as a DDP or DeepSpeed wrapper).
    """
    inner: Any = getattr(model, "_orig_mod", model)
    for name, config in _peft_configs(inner).items():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedError(
                f"`{argument}` has the prompt-learning adapter {name!r} ({type(config).__name__}), whose virtual "
                "tokens the other model cannot see. Use an adapter that lives in the layers, such as LoRA."
            )
    if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, GenerationMixin):
        raise UnsupportedError(
            f"`{argument}` is a {type(model).__name__}, which is not a Hugging Face model with `generate`. Pass the "
            "unwrapped causal language model (`accelerator.unwrap_model(model)`)."
        )
    if inner.config.is_encoder_decoder:
        raise UnsupportedError(
            f"`{argument}` is a {type(inner).__name__}, an encoder-decoder model. Blending needs decoder-only models."
        )
    return inner


def check_adapters_can_be_disabled(model: nn.Module) -> None:
    """
    Check that `model` with its adapters disabled is the model the adapters were put on.

    Args:
        model (`torch.nn.Module`):
            PEFT model, or Hugging Face model with adapters.

    Raises:
        [`~trl_blend.errors.UnsupportedError`]: If there are no adapters, or an adapter changed the base's own weights
            (trained biases, or an initialisation such as PiSSA).
    """
    if not adapter_layers(model):
        raise UnsupportedError(
            f"`teacher` is None and `model` ({type(model).__name__}) has no adapters to disable. Pass a `teacher`, or "
            "a model with LoRA adapters."
        )
    for name, config in _peft_configs(getattr(model, "_orig_mod", model)).items():
        changed_by = what_changes_the_base(config.to_dict())
        if changed_by is not None:
            raise UnsupportedError(
                f"`teacher` is None, but adapter {name!r} has `{changed_by}`, which changes the base's weights: "
                "disabling it does not give the base back. Pass a separate `teacher`."
            )


def what_changes_the_base(settings: Mapping[str, Any]) -> str | None:
    """
    The setting with which an adapter changes its base's own weights; `None` if disabling it gives the base back.

    Args:
        settings (`Mapping[str, Any]`):
            Fields of its PEFT configuration.
    """
    bias, init = settings.get("bias", "none"), settings.get("init_lora_weights", True)
    if bias not in (None, "none"):
        return f"bias={bias!r}"
    if isinstance(init, str) and init.lower() not in _INITS_THAT_KEEP_THE_BASE:
        return f"init_lora_weights={init!r}"
    return None


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
        seconds (`float`): Wall time spent in them.
    """

    def __init__(self, model: GenerationMixin, attention_mask: Tensor, *, disable_adapters: bool = False) -> None:
        self.model: Any = model
        self.num_forward_steps = 0
        self.seconds = 0.0
        self._attention_mask = attention_mask
        self._model_kwargs: dict[str, Any] = {}
        self._overrides = _evaluation_overrides(self.model, disable_adapters)

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
        start = time.perf_counter()
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
        with _attributes_set(self._overrides):
            outputs = self.model(**inputs, return_dict=True)
        self._model_kwargs = self.model._update_model_kwargs_for_generation(outputs, self._model_kwargs)
        logits = outputs.logits[:, -1]
        if outputs.logits.shape[1] > 1:
            logits = logits.clone()  # let go of the logits of the whole prompt
        self.num_forward_steps += 1
        self.seconds += time.perf_counter() - start
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


def _peft_configs(model: Any) -> dict[str, Any]:
    return dict(getattr(model, "peft_config", None) or {})


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """The PEFT modules in `model` that can run with their adapters disabled; empty without adapters."""
    # PEFT's layers read this flag in their forward. Its public switch, `enable_adapters`, also sets `requires_grad` of
    # every adapter weight, and walking all modules at every decoding step would cost more than a small forward pass.
    return [module for module in model.modules() if hasattr(module, "_disable_adapters")]


@contextmanager
def evaluation_mode(model: nn.Module, *, disable_adapters: bool = False) -> Iterator[None]:
    """
    Every module of `model` in evaluation mode and, on request, every adapter disabled; each put back on exit.

    Unlike `model.eval()` followed by `model.train()`, modules that were in evaluation mode stay in it. Unlike PEFT's
    `disable_adapter()`, no `requires_grad` changes.
    """
    with _attributes_set(_evaluation_overrides(model, disable_adapters)):
        yield


def _evaluation_overrides(model: nn.Module, disable_adapters: bool) -> list[tuple[nn.Module, str, bool]]:
    overrides = [(module, "training", False) for module in model.modules() if module.training]
    if disable_adapters:
        overrides += [(layer, "_disable_adapters", True) for layer in adapter_layers(model)]
    return overrides


@contextmanager
def _attributes_set(overrides: Sequence[tuple[nn.Module, str, bool]]) -> Iterator[None]:
    saved = [(module, name, getattr(module, name)) for module, name, _ in overrides]
    try:
        for module, name, value in overrides:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)

"""What wraps a model: PEFT adapters and `torch.compile`; adapters on and off, evaluation mode."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationMixin

from trl_blend.errors import UnsupportedError


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


def _peft_configs(model: Any) -> dict[str, Any]:
    return dict(getattr(model, "peft_config", None) or {})


# Named initialisations of LoRA that leave the base's weights as they are. All others may change them (PiSSA does), so
# that without its adapter the model is not the one it started from.
_INITS_THAT_KEEP_THE_BASE = {"eva", "gaussian", "orthogonal"}

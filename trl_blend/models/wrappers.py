"""What wraps a model: PEFT adapters and `torch.compile`; adapters on and off, evaluation mode."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin

from trl_blend.errors import UnsupportedError
from trl_blend.models.checkpoints import read_json
from trl_blend.models.compatibility import check_decoder_only
from trl_blend.models.identity import digest


# Named initialisations of LoRA that leave the base's weights as they are. All others may change them (PiSSA does), so
# that without its adapter the model is not the one it started from.
_INITS_THAT_KEEP_THE_BASE = {"eva", "gaussian", "orthogonal"}


def innermost_model(model: nn.Module, argument: str) -> GenerationMixin:
    """
    The Hugging Face causal language model inside `model`: PEFT and `torch.compile` wrappers are taken off.

    Adapters stay active: PEFT injects them into the model's own layers. `argument` is the name of the one that holds
    the model, for the error messages.

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
    check_decoder_only(inner.config, argument)
    return inner


def check_adapters_can_be_disabled(model: nn.Module) -> None:
    """
    Check that `model`, a PEFT model, is with its adapters disabled the model the adapters were put on.

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
    The setting, among the fields of a PEFT configuration, with which an adapter changes its base's own weights; `None`
    if disabling it gives the base back.
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
    with attributes_set(evaluation_overrides(model, disable_adapters)):
        yield


def evaluation_overrides(model: nn.Module, disable_adapters: bool) -> list[tuple[nn.Module, str, bool]]:
    """What [`evaluation_mode`] sets, found once for [`attributes_set`] at every decoding step."""
    # bitsandbytes packs a 4-bit weight for inference at its first forward in evaluation mode on a CPU, and after that
    # no gradient passes it. The layer computes the same in both modes.
    overrides = [
        (module, "training", False)
        for module in model.modules()
        if module.training and not type(module).__module__.startswith("bitsandbytes.")
    ]
    if disable_adapters:
        overrides += [(layer, "_disable_adapters", True) for layer in adapter_layers(model)]
    return overrides


@contextmanager
def attributes_set(overrides: Sequence[tuple[nn.Module, str, bool]]) -> Iterator[None]:
    """Modules with other values of the named attributes; each put back on exit."""
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


# Settings of an adapter that say where it comes from or how it is trained, not what it computes
_TRAINING_FIELDS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "lora_dropout",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}


@dataclass(frozen=True)
class AdapterConfig:
    """
    Settings of one PEFT adapter.

    Args:
        fields (`Mapping[str, Any]`):
            Fields of its PEFT configuration.
        adapter_name (`str`, *optional*):
            Name in memory.
    """

    fields: Mapping[str, Any]
    adapter_name: str | None = None

    @classmethod
    def of_folder(cls, folder: Path) -> "AdapterConfig":
        """Settings in the folder's `adapter_config.json`."""
        return cls(read_json(folder / "adapter_config.json"))

    @classmethod
    def of_model(cls, model: Any) -> "AdapterConfig | None":
        """
        Settings of the active adapter of a [`~peft.PeftModel`]; `None` for a plain model.

        Raises:
            [`~trl_blend.errors.UnsupportedError`]: If several adapters are active.
        """
        if not hasattr(model, "peft_config"):
            return None
        # Asked of the layers: the method of a model that transformers put an adapter on wants a certain PEFT
        layers = (layer.active_adapters for layer in model.modules() if hasattr(layer, "_disable_adapters"))
        active = sorted(set(chain.from_iterable(layers))) or list(model.peft_config)
        if len(active) != 1:
            raise UnsupportedError(f"the identity of a model with {len(active)} active adapters: {active}")
        return cls(model.peft_config[active[0]].to_dict(), active[0])

    @property
    def peft_config(self) -> Any:
        """The same settings as a [`~peft.PeftConfig`]."""
        from peft import PeftConfig

        return PeftConfig.from_peft_type(**self.fields)

    @property
    def base_name(self) -> str | None:
        """Folder or Hub id of the base model."""
        return self.fields.get("base_model_name_or_path")

    @property
    def base_revision(self) -> str | None:
        """Branch, tag or commit of the base model. The adapter's own is known to whoever loads it."""
        return self.fields.get("revision")

    @property
    def computing_fields(self) -> dict[str, Any]:
        """The settings that change what the adapter computes."""
        # One that is unset is dropped, so that a release of PEFT which adds one changes no fingerprint
        return {
            key: _plain(value)
            for key, value in self.fields.items()
            if key not in _TRAINING_FIELDS and value not in _UNSET
        }

    @property
    def sha256(self) -> str:
        """SHA-256 of `computing_fields`."""
        return digest(self.computing_fields)

    def is_neutral(self, tensors: Mapping[str, Callable[[], Tensor]]) -> bool:
        """Whether the adapter changes nothing: a LoRA whose `B` matrices are all zero."""
        fields = self.computing_fields
        if fields.get("peft_type") != "LORA" or fields.keys() & {"use_dora", "modules_to_save", "layer_replication"}:
            return False
        factors = [read for name, read in tensors.items() if "lora_B" in name or "lora_embedding_B" in name]
        others = [name for name in tensors if "lora_" not in name]
        return bool(factors) and not others and not any(bool(read().any()) for read in factors)


_UNSET: tuple[Any, ...] = (None, False, {}, [], "none", set())


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)) or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value.value if hasattr(value, "value") else value

"""What of a model in memory can be hashed, and under which names; the settings of its adapter."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trl_blend.errors import UnsupportedError
from trl_blend.models.tokenizer_identity import digest
from trl_blend.models.weights import Layout, LazyTensor


# PEFT puts the base model under this name; adapters that transformers loaded have their names without it
ADAPTER_LAYOUT = Layout("base_model.model.")

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


class AdapterConfig(NamedTuple):
    """
    Args:
        sha256 (`str`):
            SHA-256 of the settings that change what the adapter computes.
        base_name, base_revision (`str`, *optional*):
            The base model.
        adapter_name (`str`, *optional*):
            Name in memory.
        may_be_neutral (`bool`):
            Whether zero `B` matrices are enough for the adapter to change nothing.
    """

    sha256: str
    base_name: str | None
    base_revision: str | None
    adapter_name: str | None
    may_be_neutral: bool

    @classmethod
    def of_folder(cls, folder: Path) -> "AdapterConfig":
        fields = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return cls._of_fields(fields, None)

    @classmethod
    def of_model(cls, model: Any) -> "AdapterConfig | None":
        """
        Settings of the active adapter of a [`~peft.PeftModel`]; `None` for a plain model.

        Raises:
            [`~trl_blend.errors.UnsupportedError`]: If several adapters are active.
        """
        if not hasattr(model, "peft_config"):
            return None
        active = getattr(model, "active_adapters", list(model.peft_config))
        active = active() if callable(active) else active
        if len(active) != 1:
            raise UnsupportedError(f"the identity of a model with {len(active)} active adapters: {list(active)}")
        fields = model.peft_config[active[0]].to_dict()
        return cls._of_fields(fields, active[0])

    @classmethod
    def _of_fields(cls, fields: Mapping[str, Any], name: str | None) -> "AdapterConfig":
        # A field that is unset is dropped, so that a release which adds one changes no fingerprint
        kept = {
            key: _plain(value) for key, value in fields.items() if key not in _TRAINING_FIELDS and value not in _UNSET
        }
        neutral = kept.get("peft_type") == "LORA" and not {"use_dora", "modules_to_save", "layer_replication"} & set(
            kept
        )
        return cls(digest(kept), fields.get("base_model_name_or_path"), fields.get("revision"), name, neutral)

    def is_neutral(self, tensors: Mapping[str, LazyTensor]) -> bool:
        """Whether the adapter changes nothing: a LoRA whose `B` matrices are all zero."""
        if not self.may_be_neutral:
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


def unhashable_reason(model: Any) -> str | None:
    """Why the weights of a model in memory cannot be hashed; `None` where they can."""
    quantized = getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantized or any(hasattr(p, "quant_state") for p in model.parameters()):
        method = getattr(config, "quant_method", None) or "unknown method"
        return f"the weights are quantised in memory ({getattr(method, 'value', method)})"
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_status") or hasattr(parameter, "ds_id"):
            return "the weights are partitioned by DeepSpeed ZeRO-3"
        if hasattr(parameter, "placements") or "_flat_param" in name:
            return "the weights are sharded by FSDP or tensor parallelism"
        if parameter.device.type == "meta":
            return f"`{name}` is offloaded or was never loaded (meta device)"
    if any(getattr(module, "merged", False) for module in model.modules()):
        return "an adapter is merged into the weights in place: call `unmerge_adapter()` first"
    return None


def hashable_state(
    model: Any, adapter: AdapterConfig | None, with_base: bool = True
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """
    Tensors of the base and of its adapter under the names that `save_pretrained` gives them.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            In memory.
        adapter ([`AdapterConfig`], *optional*):
            The active adapter.
        with_base (`bool`, *optional*, defaults to `True`):
            Whether the base is wanted.
    """
    from transformers.core_model_loading import revert_weight_conversion

    own: dict[str, torch.Tensor] = {}
    base = model
    if adapter is not None:
        from peft import get_peft_model_state_dict

        own = get_peft_model_state_dict(model, adapter_name=adapter.adapter_name)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
    state: dict[str, torch.Tensor] = {}
    if with_base:
        state = base.state_dict()
        if adapter is not None:
            state = _without_adapters(base, state)
        state = revert_weight_conversion(base, state)
        # What transformers would undo for an adapter that it loaded itself
        state = {name.removeprefix(ADAPTER_LAYOUT.prefix): tensor for name, tensor in state.items()}
    return _lazy(state), _lazy(own)


def _without_adapters(base: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of the model under its adapters: tensors that PEFT added are left out, wrapped ones renamed back."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    inner: dict[str, str] = {}  # name of a wrapper module -> name of the original inside it
    for name, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            inner[name] = f"{name}.original_module"
        elif isinstance(module, BaseTunerLayer):
            inner[name] = f"{name}.base_layer"
    kept = {}
    for name, tensor in state.items():
        for wrapper, original in inner.items():
            if name.startswith(f"{wrapper}."):
                if name.startswith(f"{original}."):
                    kept[wrapper + name.removeprefix(original)] = tensor
                break
        else:
            kept[name] = tensor
    return kept


def _lazy(state: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {name: functools.partial(_identity, tensor) for name, tensor in state.items()}


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor

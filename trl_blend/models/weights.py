"""
The tensors of a model, in memory or in files: their names, and SHA-256 over names, shapes and values, whatever the
files are called, however they are sharded and in whichever dtype the same values are stored.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from trl_blend.errors import UnsupportedError
from trl_blend.models.checkpoints import LazyTensor
from trl_blend.models.identity import WeightsFingerprint
from trl_blend.models.wrappers import AdapterConfig


CHUNK_ELEMENTS = 1 << 20  # part of the definition: changing it changes every fingerprint

_PROBE = 1024  # float32 weights show in the first few values that they are no bfloat16 numbers

# Buffers that older releases of transformers saved with the weights and today's models compute
_LEGACY_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias|position_ids)$")


class Layout(NamedTuple):
    """
    What an architecture says about the names of its weights.

    Args:
        prefix (`str`):
            Name of the backbone inside the causal language model, left out of the fingerprint: some checkpoints have
            it and some do not.
        tied (`dict[str, str]`):
            Tensors that may be a second name of another one. Compared by their last two parts: where a language model
            is inside another one, its checkpoints and its class have different names in front of these.
    """

    prefix: str = "model."
    tied: Mapping[str, str] = {"lm_head.weight": "embed_tokens.weight"}


def layout_of(config: Any) -> Layout:
    """The layout of a configuration's causal language model; the default one for an unknown architecture."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    model_class = None
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        model_class = model_class or mapping.get(type(config), None)
    if isinstance(model_class, (tuple, list)):
        model_class = model_class[0]
    if model_class is None:
        return Layout()
    prefix = f"{model_class.base_model_prefix}." if model_class.base_model_prefix else ""
    tied = model_class._tied_weights_keys
    tied = tied if isinstance(tied, Mapping) else {}
    tied = {name.removeprefix(prefix): source.removeprefix(prefix) for name, source in tied.items()}
    return Layout(prefix, {**Layout().tied, **tied})


# PEFT puts the base model under this name; adapters that transformers loaded have their names without it
ADAPTER_LAYOUT = Layout("base_model.model.")


class _TensorDigest(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    digest: bytes
    digest_bfloat16: bytes


def _chunk_digests(chunk: torch.Tensor) -> tuple[bytes, bytes]:
    """Digests of a flat piece of a tensor: of its values, and of its values rounded to bfloat16."""
    if not chunk.is_floating_point():
        digest = hashlib.sha256(f"{chunk.dtype}".encode() + chunk.contiguous().numpy().tobytes()).digest()
        return digest, digest
    if chunk.dtype == torch.bfloat16:
        bits = chunk.view(torch.int16)
    else:
        values = chunk.float().contiguous()
        lower_halves = values.view(torch.int16)[::2]  # of a little-endian float32, zero in a bfloat16 number
        if lower_halves[:_PROBE].any() or lower_halves.any():
            digest_bfloat16 = _digest(b"bfloat16", values.bfloat16().view(torch.int16))
            return _digest(b"float32", values.view(torch.int32)), digest_bfloat16
        bits = (values.view(torch.int32) >> 16).to(torch.int16)
    # bfloat16 numbers, in whatever dtype: hashed once, two bytes each
    digest = _digest(b"bfloat16", bits)
    return digest, digest


def _digest(tag: bytes, bits: torch.Tensor) -> bytes:
    hashed = hashlib.sha256(tag)
    hashed.update(bits.contiguous().numpy().data.cast("B"))
    return hashed.digest()


@torch.no_grad()
def _tensor_digest(read: LazyTensor) -> _TensorDigest:
    tensor = read().detach()
    flat = tensor.reshape(-1)
    exact, rounded = hashlib.sha256(), hashlib.sha256()
    for start in range(0, flat.numel(), CHUNK_ELEMENTS):
        digests = _chunk_digests(flat[start : start + CHUNK_ELEMENTS].cpu())
        exact.update(digests[0])
        rounded.update(digests[1])
    dtype = str(tensor.dtype).removeprefix("torch.")
    return _TensorDigest(tuple(tensor.shape), dtype, exact.digest(), rounded.digest())


def fingerprint_tensors(tensors: Mapping[str, LazyTensor], layout: Layout | None = None) -> WeightsFingerprint:
    """
    Fingerprint of tensors, given by name and how to get each, of an architecture with these names. Reads one tensor
    per thread at a time, one piece of it at a time: memory does not grow with the model.
    """
    layout = layout or Layout()
    names = sorted(name for name in tensors if not _is_legacy_buffer(name, tensors))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_tensor_digest, [tensors[name] for name in names]))
    found = {name.removeprefix(layout.prefix): digest for name, digest in zip(names, digests, strict=True)}
    if len(found) != len(names):
        raise UnsupportedError(
            f"weights hold both `{layout.prefix}x` and `x` for {len(names) - len(found)} tensors: not one causal LM"
        )
    for second, first in layout.tied.items():
        # One tensor under two names; which of the two a file keeps is the writer's choice.
        sources = [name for name in found if _ending(name) == _ending(first)]
        for name in [name for name in found if _ending(name) == _ending(second)]:
            one = found[name]
            if not sources and first not in found:
                found[first] = found.pop(name)
            elif any((one.shape, one.digest) == (found[source].shape, found[source].digest) for source in sources):
                del found[name]
    return _combine(found)


def _ending(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _is_legacy_buffer(name: str, names: Iterable[str]) -> bool:
    match = _LEGACY_BUFFERS.search(name)
    return match is not None and f"{name.rsplit('.', 1)[0]}.weight" not in names


def _combine(found: Mapping[str, _TensorDigest]) -> WeightsFingerprint:
    exact, rounded = hashlib.sha256(), hashlib.sha256()
    dtypes: dict[str, int] = {}
    for name, tensor in sorted(found.items()):
        header = f"{name}\0{list(tensor.shape)}\0".encode()
        exact.update(header + tensor.digest)
        rounded.update(header + tensor.digest_bfloat16)
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return WeightsFingerprint(exact.hexdigest(), rounded.hexdigest(), dtypes, sum(dtypes.values()))


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
    """Tensors of the base, where it is wanted, and of its adapter, under the names that `save_pretrained` gives."""
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
    return {name: lambda tensor=tensor: tensor for name, tensor in state.items()}  # type: ignore[misc]

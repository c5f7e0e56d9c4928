"""The files of the models in an exported directory: copied from a checkpoint, or saved from memory."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.generation.partner import adapter_layers, check_adapters_can_be_disabled
from trl_blend.hub.mixing_spec import ModelSource, file_hashes
from trl_blend.teacher.checkpoints import Checkpoint, find_checkpoint, weight_files
from trl_blend.teacher.model_state import AdapterConfig, hashable_state, unhashable_reason


GENERATE_FILE = "custom_generate/generate.py"
ADAPTER_FOLDER = "adapter"
# What `AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)` is to load the model with
_AUTO_MAP = {"AutoModelForCausalLM": "custom_generate/generate.MixedPolicy"}
_SMALL_SUFFIXES = {".json", ".jinja", ".model", ".tiktoken", ".txt"}
# Of a training run, of an adapter, or of another export
_NOT_COPIED = {"adapter_config.json", "logit_mix_state.json", "mixing.json", "trainer_state.json"}
_HARMLESS_INITS = {"default", "eva", "gaussian", "orthogonal"}


def add_code(folder: Path) -> None:
    """Put `custom_generate/generate.py` into `folder`."""
    target = folder / GENERATE_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).parent / GENERATE_FILE, target)


def point_config_at_code(folder: Path) -> None:
    """Let `config.json` name the class in `custom_generate/generate.py` that loads the policy."""
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["auto_map"] = content.get("auto_map", {}) | _AUTO_MAP
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy a model's weights, configuration and tokenizer; nothing of the training run that wrote them."""
    folder.mkdir(parents=True, exist_ok=True)
    small = [path for path in sorted(checkpoint.folder.iterdir()) if path.suffix in _SMALL_SUFFIXES]
    for path in [*weight_files(checkpoint), *small]:
        if path.is_file() and path.name not in _NOT_COPIED:
            shutil.copyfile(path, folder / path.name)


def copy_adapter(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy an adapter's weights and configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*weight_files(checkpoint, "adapter_model"), checkpoint.folder / "adapter_config.json"]:
        shutil.copyfile(path, folder / path.name)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a model in memory, and its tokenizer."""
    reason = unhashable_reason(model)
    if reason is not None and not reason.startswith("the weights are quantised"):
        raise UnsupportedError(f"A {type(model).__name__} cannot be saved here: {reason}. Pass its name or folder.")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_base(model: Any, tokenizer: Any, folder: Path) -> None:
    """
    Save the base of a PEFT model in memory, without its adapters.

    Raises:
        [`~trl_blend.errors.UnsupportedError`]: If the weights are not all here.
    """
    from huggingface_hub import save_torch_state_dict

    reason = unhashable_reason(model)
    if reason is not None:
        raise UnsupportedError(f"The base of the adapter cannot be saved: {reason}. Pass its name as `reference`.")
    state, _ = hashable_state(model, AdapterConfig.of_model(model))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: read().detach().cpu().contiguous() for name, read in state.items()}
    save_torch_state_dict(tensors, folder)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.config.save_pretrained(folder)
    base.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def base_source(model: Any) -> Checkpoint | None:
    """
    Checkpoint that the adapters of a model in memory were put on: a folder, or a Hub id whose commit is in the cache.
    `None` if its configuration does not say, or it is not there any more.
    """
    settings = AdapterConfig.of_model(model)
    name = (settings and settings.base_name) or ""
    try:
        checkpoint = find_checkpoint(name, settings and settings.base_revision, local_files_only=True)
    except ConfigError:
        return None
    return checkpoint if (checkpoint.folder / "config.json").is_file() else None


def check_base_is_reference(adapter: Any, argument: str = "student") -> None:
    """
    Check that an adapter left its base as it was, so that the base is what the student started from.

    Args:
        adapter ([`~teacher.checkpoints.Checkpoint`] or [`~peft.PeftModel`]):
            The adapter.
        argument (`str`, *optional*, defaults to `"student"`):
            Name of the argument that holds it, for the error message.

    Raises:
        [`~trl_blend.errors.UnsupportedError`]: If it did not, or there is no adapter.
    """
    is_checkpoint = isinstance(adapter, Checkpoint)
    if not (adapter.is_adapter if is_checkpoint else adapter_layers(adapter)):
        raise UnsupportedError(
            f"`reference=None` means the base of an adapter, and `{argument}` has none. Pass the reference: a name, a "
            "folder or a model."
        )
    if not is_checkpoint:
        check_adapters_can_be_disabled(adapter)
        return
    fields = json.loads((adapter.folder / "adapter_config.json").read_text(encoding="utf-8"))
    init, bias = fields.get("init_lora_weights", True), fields.get("bias", "none")
    if bias not in (None, "none") or (isinstance(init, str) and init.lower() not in _HARMLESS_INITS):
        raise UnsupportedError(
            f"The adapter {adapter.name!r} has `bias={bias!r}` and `init_lora_weights={init!r}`, which changed the "
            "base's own weights. Pass the reference as a model of its own."
        )


def folder_source(folder: Path, dtype: str | None) -> ModelSource:
    """A folder beside `mixing.json`, with the hashes of its files."""
    return ModelSource(path=folder.name, files=file_hashes(folder), dtype=dtype)


def write_adapter_root(folder: Path, config: Any, generation_config: GenerationConfig, dtype: torch.dtype) -> None:
    """Configuration of an adapter's base beside `mixing.json`, so that transformers knows what the directory holds."""
    config.save_pretrained(folder)
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | {"dtype": dtype_name(dtype)}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    generation_config.save_pretrained(folder)


def dtype_name(dtype: Any) -> str:
    """`"float32"` of `torch.float32`; of `None` too, which is how transformers stores it."""
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")

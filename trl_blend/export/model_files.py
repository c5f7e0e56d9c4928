"""The files of the models in an exported directory: copied from a checkpoint, or saved from memory."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.export.spec import ModelSource, file_hashes
from trl_blend.models.checkpoints import Checkpoint, find_checkpoint, weight_files, weight_tensors
from trl_blend.models.weights import fingerprint_tensors, hashable_state, layout_of, unhashable_reason
from trl_blend.models.wrappers import (
    AdapterConfig,
    adapter_layers,
    check_adapters_can_be_disabled,
    what_changes_the_base,
)


logger = logging.getLogger(__name__)

GENERATE_FILE = "custom_generate/generate.py"
ADAPTER_FOLDER = "adapter"
# What is written beside `mixing.json` for an adapter; beside a full model they are its own
BASE_CONFIGS = ("config.json", "generation_config.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What `AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)` is to load the model with
AUTO_MAP = {"AutoModelForCausalLM": "custom_generate/generate.MixedPolicy"}
_SMALL_SUFFIXES = {".json", ".jinja", ".model", ".tiktoken", ".txt"}
# Of a training run, of an adapter, or of another export
_NOT_COPIED = {"adapter_config.json", "logit_mix_state.json", "mixing.json", "trainer_state.json"}


def add_code(folder: Path) -> None:
    """Put `custom_generate/generate.py` into `folder`."""
    target = folder / GENERATE_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).parent / GENERATE_FILE, target)


def point_config_at_code(folder: Path) -> None:
    """Let `config.json` name the class in `custom_generate/generate.py` that loads the policy."""
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["auto_map"] = content.get("auto_map", {}) | AUTO_MAP
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


def save_adapter(model: Any, folder: Path) -> None:
    """Save the active adapter of a model in memory."""
    settings = AdapterConfig.of_model(model)
    name = (settings and settings.adapter_name) or "default"
    model.save_pretrained(folder, selected_adapters=[name])
    if (folder / name).is_dir():  # where PEFT puts an adapter of any name but "default"
        for path in list((folder / name).iterdir()):
            path.replace(folder / path.name)
        (folder / name).rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card


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


def base_source(model: Any, revision: str | None = None, *, is_known: bool = False) -> Checkpoint | None:
    """
    Checkpoint that the adapters of a model in memory were put on: a folder, or a Hub id whose commit is in the cache.
    `None` if there is none with these weights: neither PEFT nor the model says which revision it was loaded from.

    Args:
        model ([`~peft.PeftModel`]):
            The model.
        revision (`str`, *optional*):
            Branch, tag or commit that its base was loaded from.
        is_known (`bool`, *optional*, defaults to `False`):
            Whether it certainly was loaded from there, so that no weights have to be compared.
    """
    settings = AdapterConfig.of_model(model)
    if settings is None or not settings.base_name:
        return None
    try:
        checkpoint = find_checkpoint(settings.base_name, revision or settings.base_revision, local_files_only=True)
        if not (checkpoint.folder / "config.json").is_file():
            return None
        return checkpoint if is_known or _is_loaded_from(model, settings, checkpoint) else None
    except ConfigError:
        return None


def _is_loaded_from(model: Any, settings: AdapterConfig, checkpoint: Checkpoint) -> bool:
    """Whether the base under the adapters has the weights of a checkpoint, or those in bfloat16."""
    reason = unhashable_reason(model)
    if reason is not None:
        logger.warning(
            f"The base of the adapter cannot be compared with {checkpoint.name!r} ({reason}), so mixing.json names "
            f"what is there now, {checkpoint.commit or checkpoint.folder}. If it was loaded from another revision, "
            "pass the student by its name."
        )
        return True
    layout = layout_of(model.config)
    found = fingerprint_tensors(hashable_state(model, settings)[0], layout)
    stored = fingerprint_tensors(weight_tensors(checkpoint), layout)
    return found.sha256 in (stored.sha256, stored.sha256_bfloat16)


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
    changed_by = what_changes_the_base(fields)
    if changed_by is not None:
        raise UnsupportedError(
            f"The adapter {adapter.name!r} has `{changed_by}`, which changes the base's own weights. Pass the "
            "reference as a model of its own."
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

"""The files of one model in an exported folder: copied from a checkpoint, or saved from memory."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.models.checkpoints import Checkpoint, find_checkpoint, read_json, weight_files, weight_tensors
from trl_blend.models.limits import vocabulary_rows
from trl_blend.models.loading import MIXED_POLICY, leads_to_policy
from trl_blend.models.weights import fingerprint_tensors, hashable_state, layout_of, unhashable_reason
from trl_blend.models.wrappers import AdapterConfig


logger = logging.getLogger(__name__)

GENERATE_FILE = "custom_generate/generate.py"
# What `from_pretrained(…, trust_remote_code=True)` is to load configuration and model with
AUTO_MAP = {"AutoConfig": f"{MIXED_POLICY}Config", "AutoModelForCausalLM": MIXED_POLICY}
_NOT_ALONE = "none: a mixed policy is loaded with AutoModelForCausalLM and trust_remote_code=True"
ADAPTER_FOLDER = "adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_SMALL_SUFFIXES = {".json", ".jinja", ".model", ".tiktoken", ".txt"}
# Of a training run, of an adapter, or of another export
_NOT_COPIED = {"adapter_config.json", "mixing.json", "trainer_state.json", "trl_blend_run.json"}


def update_config(folder: Path, fields: Mapping[str, Any]) -> None:
    """Set fields of `config.json`; those without a value are removed."""
    content = read_json(folder / "config.json") | dict(fields)
    _write_config(folder, {name: value for name, value in content.items() if value or name not in fields})


def _write_config(folder: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def holds_policy(folder: Path) -> bool:
    """Whether `config.json` of a folder leads to the code of a mixed policy."""
    path = folder / "config.json"
    return path.is_file() and leads_to_policy(read_json(path))


def wrap_config(folder: Path) -> None:
    """
    Put the student's configuration inside one of a model type that transformers does not know: without
    `trust_remote_code=True` nothing loads, where the student alone would have been.
    """
    if holds_policy(folder):
        return
    student = read_json(folder / "config.json")
    outer = {
        "architectures": [MIXED_POLICY.split(".")[-1]],
        "auto_map": AUTO_MAP,
        "model_type": "mixed_policy",
        "student_type": student["model_type"],  # inside, the class of that type would find its configuration
        "student": {name: value for name, value in student.items() if name != "model_type"},
        "vocab_size": _NOT_ALONE,  # where that class is used by name, it says what is wrong with this number
    }
    _write_config(folder, outer)


def unwrap_config(folder: Path) -> None:
    """Undo [`wrap_config`]."""
    if holds_policy(folder):
        _write_config(folder, _student(folder))


def student_config(folder: Path) -> Any:
    """Configuration of the student in a folder that [`holds_policy`]."""
    from transformers import CONFIG_MAPPING

    student = _student(folder)
    return CONFIG_MAPPING[student["model_type"]].from_dict(student)


def _student(folder: Path) -> dict[str, Any]:
    content = read_json(folder / "config.json")
    return content["student"] | {"model_type": content["student_type"]}


def copy_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy a model's weights, configuration and tokenizer; nothing of the training run that wrote them."""
    small = [path for path in checkpoint.folder.iterdir() if path.suffix in _SMALL_SUFFIXES and path.is_file()]
    _copy([*weight_files(checkpoint), *(path for path in small if path.name not in _NOT_COPIED)], folder)


def copy_adapter(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy an adapter's weights and configuration."""
    _copy([*weight_files(checkpoint, "adapter_model"), checkpoint.folder / "adapter_config.json"], folder)


def _copy(paths: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
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


def move_adapter(folder: Path) -> None:
    """
    Move an adapter from the top of a folder into `adapter/`: with `adapter_config.json` at the top of a repository,
    `AutoModelForCausalLM.from_pretrained` would go to that of the base model, past the code of this one.
    """
    (folder / ADAPTER_FOLDER).mkdir(exist_ok=True)
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            (folder / name).replace(folder / ADAPTER_FOLDER / name)


def save_model(model: Any, folder: Path) -> None:
    """
    Save a model in memory; of one with adapters its base, without them.

    Raises:
        [`~trl_blend.errors.UnsupportedError`]: If the weights are not all here.
    """
    is_adapter = bool(getattr(model, "peft_config", None))
    reason = unhashable_reason(model)
    if reason is not None and (is_adapter or not reason.startswith("the weights are quantised")):
        what = "The base of the adapter" if is_adapter else f"A {type(model).__name__}"
        raise UnsupportedError(f"{what} cannot be saved: {reason}. Pass its name or folder.")
    if not is_adapter:
        model.save_pretrained(folder)
        return
    from huggingface_hub import save_torch_state_dict

    state, _ = hashable_state(model, AdapterConfig.of_model(model))
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict({name: read().detach().cpu().contiguous() for name, read in state.items()}, folder)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.config.save_pretrained(folder)
    base.generation_config.save_pretrained(folder)


def base_checkpoint(model: Any, revision: str | None = None, *, is_known: bool = False) -> Checkpoint | None:
    """
    Checkpoint that the adapter of a model in memory was put on: a folder, or a Hub id whose commit is in the cache.
    `None` if there is none with these weights, which are compared unless it `is_known` to be loaded from there:
    neither PEFT nor the model says which revision it was.
    """
    settings = AdapterConfig.of_model(model)
    if settings is None or not settings.base_name:
        return None
    try:
        checkpoint = find_checkpoint(settings.base_name, revision or settings.base_revision, local_files_only=True)
        if not (checkpoint.folder / "config.json").is_file():
            return None
        is_known = is_known and _rows(checkpoint) in (None, vocabulary_rows(model))  # not resized for the adapter
        return checkpoint if is_known or _is_loaded_from(model, settings, checkpoint) else None
    except ConfigError:
        return None


def _rows(checkpoint: Checkpoint) -> int | None:
    config = read_json(checkpoint.folder / "config.json")
    return config.get("text_config", config).get("vocab_size")


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
    found = fingerprint_tensors(hashable_state(model, settings)[0], layout_of(model.config))
    stored = fingerprint_tensors(weight_tensors(checkpoint), layout_of(model.config))
    return found.sha256 in (stored.sha256, stored.sha256_bfloat16)


def dtype_name(dtype: Any) -> str:
    """`"float32"` of `torch.float32`; of `None` too, which is how transformers stores it."""
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")

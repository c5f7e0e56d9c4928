"""Where a checkpoint lies, and how its weights are read without building the model."""

import functools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trl_blend.errors import ConfigError


LazyTensor = Callable[[], torch.Tensor]

_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
_SETTINGS = {"adapter_config.json", "config.json", "generation_config.json", "tokenizer_config.json"}
_PICKLED = ("adapter_model", "pytorch_model")
_LFS = b"version https://git-lfs"
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Checkpoint(NamedTuple):
    """
    Args:
        name (`str`):
            As it was given.
        folder (`Path`):
            Where its files are.
        commit (`str`, *optional*):
            Commit of a Hub repository, also for a folder inside the Hub's cache.
        in_hub (`bool`):
            Whether the name is a Hub id, so that its weights may still have to be fetched.
        local_files_only (`bool`):
            Whether nothing is to be fetched.
    """

    name: str
    folder: Path
    commit: str | None
    in_hub: bool
    local_files_only: bool

    @property
    def is_adapter(self) -> bool:
        return (self.folder / "adapter_config.json").is_file()


def find_checkpoint(name: str, revision: str | None = None, local_files_only: bool = False) -> Checkpoint:
    """
    The folder of a checkpoint: itself, or the snapshot of a Hub repository at `revision` (its small files are fetched;
    offline or with `local_files_only`, the cache is used).

    Raises:
        [`~trl_blend.errors.ConfigError`]: If it is neither a folder nor a repository that can be had.
    """
    if not name:
        raise ConfigError("a model without a name: give a folder or a Hub id.")
    folder = Path(name)
    in_hub = not folder.is_dir()
    if in_hub:
        folder = Path(_snapshot(name, revision, _SMALL_FILES, local_files_only))
    has_commit = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return Checkpoint(name, folder, folder.name if has_commit else None, in_hub, local_files_only)


def inner_folder(checkpoint: Checkpoint, path: str) -> Path:
    """A folder with a model of its own inside of a checkpoint; of a Hub repository it is fetched, with its weights."""
    if checkpoint.in_hub:
        _snapshot(checkpoint.name, checkpoint.commit, [f"{path}/*"], checkpoint.local_files_only)
    return (checkpoint.folder / path).resolve()


def _snapshot(name: str, revision: str | None, patterns: list[str], local_files_only: bool) -> str:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    # Said, too: some releases ask for the tree of a commit that is in the cache, and fail
    local_files_only = local_files_only or constants.HF_HUB_OFFLINE
    try:
        return snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=local_files_only)
    except (HTTPError, HFValidationError, OSError) as error:
        raise missing_model(name, error, revision=revision) from error


def missing_model(
    name: str, error: Exception, argument: str | None = None, revision: str | None = None
) -> ConfigError:
    """The error of a name that leads nowhere, to be raised from `error`, which says why."""
    given = f"`{argument}={name!r}`" if argument else repr(name)
    where = f" at revision {revision!r}" if revision else ""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ConfigError(
        f"{given}{where} is neither a folder with a model nor one that can be had from the Hub or its cache. Correct "
        f"the path or the id. ({reason})"
    )


def weight_tensors(checkpoint: Checkpoint, stem: str = "model") -> dict[str, LazyTensor]:
    """
    How to read each tensor of a checkpoint (`stem="adapter_model"`: of an adapter): safetensors, else PyTorch files,
    one file or shards with an index. Only the files of the index are read, so shards left over from another save do
    not count.
    """
    tensors: dict[str, LazyTensor] = {}
    for file in weight_files(checkpoint, stem):
        opened = _opened(file)
        read = opened.get_tensor if file.suffix == ".safetensors" else opened.__getitem__
        tensors |= {name: functools.partial(read, name) for name in opened.keys()}
    return tensors


def _opened(file: Path) -> Any:
    """An open safetensors file, or the tensors of a PyTorch file by name."""
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            return safe_open(file, framework="pt")
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(loaded, dict):
            raise ValueError(f"a {type(loaded).__name__} instead of tensors by name")
        return loaded
    except Exception as error:  # of a damaged file, each library raises its own
        raise _broken(file, str(error)) from error


def read_json(file: Path) -> dict[str, Any]:
    """
    What a JSON file of a checkpoint says.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If it is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken(file, str(error)) from error
    if not isinstance(content, dict):
        raise _broken(file, f"a {type(content).__name__} instead of an object")
    return content


def check_files(folder: Path, thoroughly: bool = False) -> None:
    """
    Check that the settings in the folder of a model can be read; `thoroughly`, its tokenizer and weights too. Files
    that are not there are not missed.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If one cannot. The message names it.
    """
    for file in sorted(folder.glob("*.json")):
        if file.name.endswith(".index.json"):
            _shards(file)
        elif thoroughly or file.name in _SETTINGS:
            read_json(file)
    for file in sorted(folder.iterdir()) if thoroughly else ():
        if file.suffix == ".safetensors" or (file.suffix == ".bin" and file.name.startswith(_PICKLED)):
            _opened(file)


def _shards(index: Path) -> list[str]:
    """Files that an index of weights names."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise _broken(index, "it has no `weight_map`")
    return sorted(set(shards.values()))


def _broken(file: Path, reason: str) -> ConfigError:
    with file.open("rb") as opened:
        start = opened.read(len(_LFS))
    if start == _LFS:
        return ConfigError(f"{str(file)!r} is a Git LFS pointer, not the file itself. Run `git lfs pull` there.")
    if not start:
        reason = "it is empty"
    return ConfigError(f"{str(file)!r} is damaged: {reason.splitlines()[0]}. Save or fetch it again.")


def weight_files(checkpoint: Checkpoint, stem: str = "model") -> list[Path]:
    """
    The files that hold a checkpoint's weights, see [`weight_tensors`], fetched if they have to be; without the index.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there are none, some are missing, or the index is damaged.
    """
    legacy = {"model": "pytorch_model"}.get(stem, stem)
    for single in (f"{stem}.safetensors", f"{legacy}.bin"):
        if found := _fetched(checkpoint, [single], missing_ok=True):
            return found  # before an index, as transformers does
        index = checkpoint.folder / f"{single}.index.json"
        if index.is_file():
            return _fetched(checkpoint, _shards(index))
    raise ConfigError(
        f"{checkpoint.name!r} has no weights: neither {stem}.safetensors nor {legacy}.bin, nor an index of shards, in "
        f"{checkpoint.folder}."
    )


def _fetched(checkpoint: Checkpoint, files: Iterable[str], missing_ok: bool = False) -> list[Path]:
    paths = [checkpoint.folder / file for file in files]
    if checkpoint.in_hub and not all(path.is_file() for path in paths):
        _snapshot(checkpoint.name, checkpoint.commit, [path.name for path in paths], checkpoint.local_files_only)
    missing = [path.name for path in paths if not path.is_file()]
    if missing and not missing_ok:
        raise ConfigError(
            f"{checkpoint.name!r} lacks {missing} of its weights in {checkpoint.folder}. Save or fetch it again."
        )
    return [] if missing else paths

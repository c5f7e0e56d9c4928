"""
Several processes that write the shards of one store: who does which shard, and how the end is found.

Shard `i` belongs to process `i % world_size`. Processes meet once, before the first shard. After that they only look
at the files: one that waited in a collective for hours would run into its timeout.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from trl_blend.errors import ConfigError, StoreError
from trl_blend.rollouts.format import LOGPS_DTYPES, MANIFEST_NAME, Manifest
from trl_blend.rollouts.shard import DATA_FOLDER, shard_index, shards_on_disk
from trl_blend.rollouts.writer import LOCK_NAME, ShardWriter


POLL_SECONDS = 0.5

Value = TypeVar("Value")


def processes() -> PartialState:
    """The processes of this launch, also where there is no accelerator."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # Without being told, accelerate takes each of several processes on the CPU (or on MPS) for the only one
    on_cpu = kind is None or (launched and kind.type == "mps")
    on_cpu = on_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return PartialState(cpu=on_cpu)


def on_main_process(state: PartialState, compute: Callable[[], Value]) -> Value:
    """
    Value of `compute()` on the main process, for all of them; it has to be picklable. What it raises, all raise: the
    others wait for the outcome, whatever it is.
    """
    answer: list[Any] = [None, None]
    if state.is_main_process:
        try:
            answer[0] = compute()
        except Exception as error:
            answer[1] = error
    if state.num_processes > 1:
        broadcast_object_list(answer, from_process=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def open_writer(state: PartialState, folder: str | os.PathLike[str], manifest: Manifest, repair: bool) -> ShardWriter:
    """A writer per process, the main one's first: it removes leftovers and finds what is broken."""
    made: list[ShardWriter] = []

    def make() -> None:
        made.append(ShardWriter(folder, manifest, is_main_process=state.is_main_process, repair=repair))

    on_main_process(state, make)
    if not state.is_main_process:
        make()
    return made[0]


def own_shards(state: PartialState, count: int) -> range:
    """Shards of this process."""
    return range(state.process_index, count, state.num_processes)


def finish(writer: ShardWriter, count: int) -> None:
    """Wait until the shards of all processes are on disk and the manifest says so."""
    if writer.is_main_process:
        _wait(lambda: set(range(count)) <= shards_on_disk(writer.folder).keys())
        writer.update_manifest(complete=True)
    else:
        _wait(lambda: Manifest.load(writer.folder).complete)


def _wait(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(POLL_SECONDS)


def check_output_dir(folder: str | os.PathLike[str], others: Sequence[Path] = ()) -> None:
    """
    Refuse to write into a folder that holds something else than a store.

    Args:
        folder (`str` or `os.PathLike`):
            The folder; it need not exist.
        others (`Sequence[pathlib.Path]`, *optional*):
            Folders of stores that are read, which it may not be or lie in.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there are other files in it, or it is one of `others`.
    """
    path = Path(folder)
    for other in others:
        if path.resolve() == other.resolve() or other.resolve() in path.resolve().parents:
            raise ConfigError(f"`output_dir={str(folder)!r}` is the store that is read, or in it. Choose another one.")
    if path.is_file():
        raise ConfigError(f"`output_dir={str(folder)!r}` is a file. Choose a folder.")
    if not path.is_dir() or (path / MANIFEST_NAME).exists():
        return
    # What a process killed before its first manifest leaves behind
    foreign = sorted({entry.name for entry in path.iterdir()} - {DATA_FOLDER, LOCK_NAME})
    foreign = [name for name in foreign if not (name.startswith((".", "_")) and name.endswith(".tmp"))]
    if not foreign and (path / DATA_FOLDER).is_dir():
        foreign = [f"{DATA_FOLDER}/{name}" for name in _foreign_data(os.listdir(path / DATA_FOLDER))]
    if foreign:
        raise ConfigError(
            f"`output_dir={str(folder)!r}` is not empty and no store of rollouts: it holds {foreign[:3]}. Choose a "
            "new or empty folder, or one that the same command has begun."
        )


def _foreign_data(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if shard_index(name) is None and not name.endswith(".tmp"))


def engine_versions(name: str) -> dict[str, Any]:
    """What the manifest says about an engine in this process; nothing is imported."""
    packages = ["vllm"] if name == "vllm" else ["transformers", "torch"]
    return {"name": name, **{package: version(package) for package in packages}}


def identity_settings(role: str, identity: dict[str, Any] | None, model: Any) -> dict[str, Any]:
    """What of a model's identity has to be the same at a second start, as flat settings."""
    name = {f"{role}_name": model if isinstance(model, str) else type(model).__name__}
    if identity is None:
        return name
    weights, adapter, tokenizer = (identity.get(part) or {} for part in ("weights", "adapter", "tokenizer"))
    settings = {
        f"{role}_weights": weights.get("sha256"),
        f"{role}_adapter": (adapter.get("weights") or {}).get("sha256"),
        f"{role}_tokenizer": tokenizer.get("sha256"),
    }
    return settings if weights else settings | name


def identify(model: Any, argument: str, *, tokenizer: Any = None, revision: str | None = None) -> dict[str, Any]:
    """
    Identity of a model as a dictionary.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If it cannot be had; the message says how to go on without.
    """
    from trl_blend.models.fingerprint import identify_model

    try:
        return identify_model(model, tokenizer=tokenizer, revision=revision).to_dict()
    except (ConfigError, StoreError, OSError) as error:
        raise ConfigError(
            f"The identity of `{argument}={model if isinstance(model, str) else type(model).__name__!r}` cannot be "
            f"recorded: {error} To go on without, set `identify=False` (`--no_identify`); the consistency of the "
            "teacher can then not be verified."
        ) from error


def check_numbers(logps_dtype: str, **numbers: int) -> None:
    """
    Refuse numbers below 1 and unknown dtypes of stored log-probs.

    Raises:
        [`~trl_blend.errors.ConfigError`]: At the first one.
    """
    if logps_dtype not in LOGPS_DTYPES:
        raise ConfigError(f"`logps_dtype={logps_dtype!r}` is unknown. Choose one of {', '.join(LOGPS_DTYPES)}.")
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"`{name}={value}` must be at least 1.")

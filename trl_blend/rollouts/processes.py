"""
Several processes that write the shards of one store: who does which shard, and how the end is found.

Shard `i` belongs to process `i % world_size`. Processes meet once, before the first shard. After that they only look
at the files: one that waited in a collective for hours would run into its timeout.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from trl_blend.errors import ConfigError
from trl_blend.rollouts.card import CARD_NAME
from trl_blend.rollouts.config import StoreConfig
from trl_blend.rollouts.folders import describe
from trl_blend.rollouts.format import MANIFEST_NAME, Manifest
from trl_blend.rollouts.shard import DATA_FOLDER, shard_index, shards_on_disk
from trl_blend.rollouts.store import RolloutStore
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


def write_store(
    state: PartialState,
    args: StoreConfig,
    manifest: Manifest,
    digests: Sequence[str],
    rows: Sequence[int],
    load: Callable[[], object],
    make: Callable[[int, Callable[[int], object]], Mapping[str, Sequence[Any]]],
) -> RolloutStore:
    """
    Write the shards of a store that are not there yet, and wait until those of all processes are.

    Args:
        digests, rows (`Sequence`):
            Digest of what each shard is made from, and its number of rows.
        load (`Callable`):
            Called before the first shard, if there is any left to make.
        make (`Callable`):
            Takes the index of a shard and a function to call with numbers of rows that are done; returns its columns.
    """
    writer = _open_writer(state, args, manifest)
    own = range(state.process_index, len(digests), state.num_processes)
    todo = [index for index in own if not writer.done(index, digests[index])]
    if todo:
        load()
        total, left = (sum(rows[index] for index in indices) for indices in (own, todo))
        silent = args.disable_tqdm or not state.is_main_process
        with tqdm(total=total, initial=total - left, desc=manifest.kind, unit=" rows", disable=silent) as bar:
            for index in todo:
                writer.write(index, make(index, bar.update), digests[index])
                writer.update_manifest()
    if state.is_main_process:
        _wait(lambda: set(range(len(digests))) <= shards_on_disk(writer.folder).keys())
        writer.update_manifest(complete=True)
    else:
        _wait(lambda: Manifest.load(writer.folder).complete)
    return RolloutStore.open(args.output_dir)


def _open_writer(state: PartialState, args: StoreConfig, manifest: Manifest) -> ShardWriter:
    """A writer per process, the main one's first: it removes leftovers and finds what is broken."""
    made: list[ShardWriter] = []

    def make() -> None:
        writer = ShardWriter(args.output_dir, manifest, is_main_process=state.is_main_process, repair=args.repair)
        made.append(writer)

    on_main_process(state, make)
    if not state.is_main_process:
        make()
    return made[0]


def _wait(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(POLL_SECONDS)


def check_output_dir(folder: str | os.PathLike[str], others: Sequence[Path] = ()) -> None:
    """
    Refuse to write into a folder that holds something else than a store, or that is one of `others` or lies in it.

    Raises:
        [`~trl_blend.errors.ConfigError`]: With what is there.
    """
    path = Path(folder)
    for other in others:
        if path.resolve() == other.resolve() or other.resolve() in path.resolve().parents:
            raise ConfigError(f"`output_dir={str(folder)!r}` is the store that is read, or in it. Choose another one.")
    if path.is_file():
        raise ConfigError(f"`output_dir={str(folder)!r}` is a file. Choose a folder.")
    if not path.is_dir() or (path / MANIFEST_NAME).exists():
        return
    # What a process killed before its first manifest leaves behind, and what a manifest that was removed does
    names = {entry.name for entry in path.iterdir()} - {LOCK_NAME}
    if (path / DATA_FOLDER).is_dir():
        names -= {DATA_FOLDER, CARD_NAME}
        names |= {f"{DATA_FOLDER}/{name}" for name in os.listdir(path / DATA_FOLDER) if shard_index(name) is None}
    foreign = sorted(name for name in names if not name.endswith(".tmp"))
    if foreign:
        raise ConfigError(
            f"`output_dir={str(folder)!r}` is not empty and no store of rollouts, but {describe(path)} (with "
            f"{foreign[0]}). Choose a new or empty folder, or one that the same command has begun."
        )

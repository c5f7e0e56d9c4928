"""
Writing a store of rollouts so that it can be killed at any point and started again.

The shard is the unit of work: which rows it holds follows from its index and the settings alone. It is written whole
or not at all, so what a killed process leaves behind is a set of finished shards, and the same command started again
writes the others. The manifest follows the shards; one that it does not know yet is recognised by its footer.
"""

import errno
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trl_blend._files import sha256_of, write_atomically
from trl_blend.errors import ConfigError, StoreError
from trl_blend.rollouts.card import CARD_NAME, write_card
from trl_blend.rollouts.checks import check_rows
from trl_blend.rollouts.format import MANIFEST_NAME, REQUIRED, BrokenManifestError, Manifest, build_table
from trl_blend.rollouts.shard import (
    DATA_FOLDER,
    Footer,
    check_record,
    encode,
    read_footer,
    record_of,
    shard_file,
    shard_index,
    shards_on_disk,
)


LOCK_NAME = ".lock"
MANIFEST_INTERVAL = 10.0
"""Seconds between two manifests while shards are being written."""

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class ShardWriter:
    """
    Writes the shards of one store, alone or together with other processes.

    With several processes, create it on the main process first (`with state.main_process_first(): ...`): that is where
    leftovers are removed and broken shards are found. Shards may be written in any order, each by one process.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of the store, created if it does not exist. If it holds a store with the same settings, that one is
            continued: its creation time, identities and versions are kept, also if the ones given now differ.
        manifest ([`~trl_blend.rollouts.format.Manifest`]):
            What is going to be written.
        is_main_process (`bool`, *optional*, defaults to `True`):
            Whether this process writes the manifest.
        repair (`bool`, *optional*, defaults to `False`):
            Verify every checksum and delete the shards that are bad, so that they are written again. Nothing else is
            touched.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the folder holds a store with other settings. The message names each one.
        [`~trl_blend.errors.StoreError`]: If a shard is broken or missing and `repair` is off, if another process is
            writing the folder, or if the disk is full.
    """

    def __init__(
        self, folder: str | os.PathLike[str], manifest: Manifest, *, is_main_process: bool = True, repair: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.is_main_process = is_main_process
        (self.folder / DATA_FOLDER).mkdir(parents=True, exist_ok=True)
        if is_main_process:
            self._lock = _locked(self.folder)
        self.manifest = self._continued(manifest, repair=repair)
        self._records = {_index(record): record for record in self.manifest.shards}
        self._saved_at = float("-inf")
        if is_main_process:
            self._remove_leftovers()
            self._check_known(repair)
            self._take_up_unknown(repair)
            self.update_manifest(complete=self.manifest.complete and not any(self._gaps()))

    def done(self, index: int, input_digest: str) -> bool:
        """
        Whether the shard at a place is on disk, made from the input with this digest.

        Raises:
            [`~trl_blend.errors.ConfigError`]: If it was made from another input or with other settings.
            [`~trl_blend.errors.StoreError`]: If the file is broken.
        """
        file = shard_file(index)
        if not (self.folder / file).exists():
            return False
        record = self._records.get(index)
        found = record["input_digest"] if record else self._own_footer(file).input_digest
        if found != input_digest:
            raise ConfigError(
                f"Shard {self.folder / file} was made from another input (digest {found[:16]}…, now "
                f"{input_digest[:16]}…): the prompts or rollouts have changed since the store was started. Restore "
                "them, or choose another output_dir."
            )
        return True

    def write(self, index: int, columns: Mapping[str, Sequence[Any]], input_digest: str) -> None:
        """
        Check the rows of a shard and write them, whole or not at all. Log-probs are stored as the manifest's
        `logps_dtype`, and `input_digest` is that of what the rows are made from, by which [`ShardWriter.done`] knows
        them again.

        Raises:
            [`~trl_blend.errors.StoreError`]: If a row is wrong, or the disk is full; what was written before is kept.
        """
        file, manifest = shard_file(index), self.manifest
        try:
            table = build_table(columns, manifest.logps_dtype)
        except StoreError as error:
            raise StoreError(f"shard {file}: {error}") from None
        if not table.num_rows:
            raise StoreError(f"shard {file} has no rows. Plan the shards so that each has at least one.")
        check_rows(table, required=REQUIRED[manifest.kind], where=f"shard {file}")
        content, footer = encode(
            table, settings_digest=manifest.settings_digest, index=index, input_digest=input_digest
        )
        with _full_disk_explained(self.folder / file):
            write_atomically(self.folder / file, content)
        if self.is_main_process:
            sha256 = hashlib.sha256(content).hexdigest()
            self._records[index] = record_of(file, footer, size=content.size, sha256=sha256)

    def update_manifest(self, complete: bool = False) -> None:
        """
        Bring the manifest up to date with the shards of all processes. Does nothing on any but the main process.

        Cheap to call after every shard: each file is hashed once, and a manifest is written every 10 seconds at most,
        unless it is `complete`, with the shards of all processes. Wait for these before.

        Raises:
            [`~trl_blend.errors.StoreError`]: If `complete` and a shard is missing; if a shard is broken.
        """
        if not self.is_main_process:
            return
        if not complete and time.monotonic() - self._saved_at < MANIFEST_INTERVAL:
            return
        self._take_up_unknown(repair=False)
        missing, extra = self._gaps()
        if complete and (missing or extra):
            raise StoreError(
                f"{self.folder} is not complete: {len(missing)} shards are missing (the first: {missing[:3]}) and "
                f"{len(extra)} are too many (the first: {extra[:3]}). Run the same command again."
            )
        self.manifest.shards = [record for _, record in sorted(self._records.items())]
        self.manifest.complete = complete
        with _full_disk_explained(self.folder):
            self.manifest.save(self.folder)
            self._saved_at = time.monotonic()
            if complete or not (self.folder / CARD_NAME).exists():
                write_card(self.folder, self.manifest)
        if complete:
            self._lock.release(force=True)

    def _continued(self, manifest: Manifest, *, repair: bool) -> Manifest:
        """The manifest of the folder if there is one with the same settings, else the one given."""
        if not (self.folder / MANIFEST_NAME).exists():
            return manifest
        try:
            found = Manifest.load(self.folder)
        except BrokenManifestError:
            if not repair:
                raise
            return manifest  # the shards say what is in them
        differences = found.differences(manifest)
        if differences:
            listed = "; ".join(differences)
            raise ConfigError(
                f"{self.folder} holds a store that was started with other settings (there -> now): {listed}. "
                "Pass the same settings to continue it, or choose another output_dir."
            )
        return found

    def _remove_leftovers(self) -> None:
        for pattern in (f"{DATA_FOLDER}/?part-*.tmp", f"?{MANIFEST_NAME}.*.tmp", f"?{CARD_NAME}.*.tmp"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def _check_known(self, repair: bool) -> None:
        for index, record in list(self._records.items()):
            with self._dropping_broken(index, record["file"], repair):
                check_record(self.folder, record, checksum=repair)
                self._own_footer(record["file"])

    def _take_up_unknown(self, repair: bool) -> None:
        """Take up the shards that the manifest does not know: of a killed process, or of the other processes."""
        for index, file in shards_on_disk(self.folder).items():
            if index not in self._records:
                with self._dropping_broken(index, file, repair):
                    footer, path = self._own_footer(file), self.folder / file
                    size, sha256 = path.stat().st_size, sha256_of(path)
                    self._records[index] = record_of(file, footer, size=size, sha256=sha256)

    @contextmanager
    def _dropping_broken(self, index: int, file: str, repair: bool) -> Iterator[None]:
        try:
            yield
        except StoreError:
            if not repair:
                raise
            self._records.pop(index, None)
            (self.folder / file).unlink(missing_ok=True)

    def _own_footer(self, file: str) -> Footer:
        footer = read_footer(self.folder, file)
        if footer.settings_digest != self.manifest.settings_digest:
            raise ConfigError(
                f"Shard {self.folder / file} belongs to a store with other settings, and no manifest says which. "
                "Choose another output_dir."
            )
        return footer

    def _gaps(self) -> tuple[list[int], list[int]]:
        """Indices that are missing from the planned ones, and those beyond. Without a plan, up to the last one."""
        planned = self.manifest.planned_shards
        expected = set(range(max(self._records, default=-1) + 1 if planned is None else planned))
        return sorted(expected - self._records.keys()), sorted(self._records.keys() - expected)


def _locked(folder: Path) -> FileLock:
    """
    Lock a folder for this process, until it ends or the last writer of it is gone: two commands on one folder would
    remove each other's work. A second writer of the same process takes the lock over.
    """
    lock = FileLock(folder.resolve() / LOCK_NAME, timeout=0, thread_local=False, is_singleton=True)
    lock.release(force=True)  # of a writer before this one, and perhaps of a folder that was deleted meanwhile
    try:
        lock.acquire()
    except Timeout:
        raise StoreError(
            f"Another process is writing {folder}. Wait for it, or stop it and run the command again; with several "
            "processes, only the main one may be `is_main_process`."
        ) from None
    except (OSError, NotImplementedError):  # a network file system without locks
        pass
    return lock


@contextmanager
def _full_disk_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise StoreError(
            f"No space left for {path} ({os.strerror(error.errno)}). What was written before is kept: free some space "
            "and run the same command again, it continues there."
        ) from error


def _index(record: Mapping[str, Any]) -> int:
    index = shard_index(record["file"])
    if index is None:
        raise StoreError(f"{MANIFEST_NAME} names {record['file']!r}, which is no shard. Run again with `--repair`.")
    return index

"""Files that are there whole or not at all, and their checksums."""

import errno
import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from trl_blend.errors import StoreError


def write_atomically(path: Path, data: Any) -> None:
    """
    Write a file so that it is there whole or not at all, also after a power failure.

    Args:
        path (`pathlib.Path`):
            The file. An existing one is replaced.
        data (`bytes`, or anything with the buffer protocol):
            Its content.

    Raises:
        [`~trl_blend.errors.StoreError`]: If the disk or the quota is full. Nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        if error.errno not in _DISK_FULL:
            raise
        raise StoreError(
            f"No space left for {path} ({os.strerror(error.errno)}). What was written before is kept: free some space "
            "and run the same command again, it continues there."
        ) from error


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

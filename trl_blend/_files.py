"""Files that are there whole or not at all, and their checksums."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: Any) -> None:
    """
    Write a file so that it is there whole or not at all, also after a power failure. An existing one is replaced.

    What is not finished has a name with a leading underscore, which a [`~transformers.Trainer`] does not push.

    Args:
        path (`pathlib.Path`):
            The file, in a folder that exists.
        data (`bytes`, or anything with the buffer protocol):
            Its content.

    Raises:
        `OSError`: If it cannot be written. Nothing is left behind.
    """
    unfinished = path.with_name(f"_{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()
        raise


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

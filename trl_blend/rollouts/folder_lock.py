"""A lock on a folder that is being written: two commands on one folder would remove each other's work."""

import os
from itertools import count
from pathlib import Path
from typing import IO

from trl_blend.errors import StoreError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"

# A record lock belongs to the process, is gone when it dies, and is lost when any descriptor of the file is closed:
# hence one descriptor per folder for all writers of this process, kept for the last one that took it.
_held: dict[Path, tuple[IO[str], int]] = {}
_tickets = count()


def hold_lock(folder: Path) -> int:
    """
    Lock a folder for this process. It may be called again by the same one, which takes the lock over.

    Does nothing where the file system has no locks.

    Returns:
        `int`: Ticket to give the lock back with. It is also given back when the process ends, however it ends.

    Raises:
        [`~trl_blend.errors.StoreError`]: If another process holds it.
    """
    path, ticket = (folder / LOCK_NAME).resolve(), next(_tickets)
    if path in _held and _same_file(_held[path][0], path):
        _held[path] = (_held[path][0], ticket)
        return ticket
    if path in _held:
        _held.pop(path)[0].close()
    file = None if fcntl is None else _locked(path, folder)
    if file is not None:
        _held[path] = (file, ticket)
    return ticket


def release_lock(folder: Path, ticket: int) -> None:
    """Give the lock back, unless another writer of this process has taken it over."""
    path = (folder / LOCK_NAME).resolve()
    if path in _held and _held[path][1] == ticket:
        _held.pop(path)[0].close()


def _locked(path: Path, folder: Path) -> IO[str] | None:
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise StoreError(
            f"Another process ({owner}) is writing {folder}. Wait for it, or stop it and run the command again; with "
            "several processes, only the main one may be `is_main_process`."
        ) from None
    except OSError:  # a network file system without locks
        file.close()
        return None
    file.truncate(0)
    file.write(f"pid {os.getpid()}\n")
    file.flush()
    return file


def _same_file(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:  # the folder was deleted and made again
        return False

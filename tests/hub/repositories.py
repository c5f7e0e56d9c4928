"""What the stand-in for the Hub of `server.py` keeps: accounts, repositories, files."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import NamedTuple


class Refused(Exception):
    """An answer with an error; without a status the connection is dropped."""

    def __init__(self, status: int | None, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in (headers or {}).items()}


def not_found(what: str, name: str) -> Refused:
    return Refused(404, f"{what} {name} not found", {"X-Error-Code": f"{what}NotFound"})


class Account(NamedTuple):
    name: str
    can_write: bool


class File(NamedTuple):
    data: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """What the client compares with the file it has: the git hash, or the SHA-256 of an LFS file."""
        if self.is_lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repository:
    """Files of each branch as a commit left them, and the content of every LFS file that has arrived."""

    kind: str
    name: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    snapshots: dict[str, dict[str, File]] = field(default_factory=dict)
    commits: list[tuple[str, str]] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.put("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    def put(self, branch: str, files: dict[str, File], message: str) -> str:
        """Make `files` the content of a branch; the commit's id."""
        parent = self.branches.get(branch)
        content = sorted((path, file.oid) for path, file in files.items())
        sha = hashlib.sha1(json.dumps([parent, message, content]).encode()).hexdigest()
        self.snapshots[sha], self.branches[branch] = files, sha
        return sha

    def sha(self, revision: str = "main") -> str | None:
        return self.branches.get(revision, revision if revision in self.snapshots else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Content by path."""
        return {path: file.data for path, file in self.snapshots[self.branches.get(revision, revision)].items()}

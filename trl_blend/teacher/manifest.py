"""
The manifest of a store of rollouts: `manifest.json`, what the shards hold and where they came from.

It is written by one process, atomically, and is always behind the shards rather than ahead of them: a shard that it
names is complete on disk. A manifest with `complete = false` belongs to a store that is still being written.
"""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trl_blend import __version__
from trl_blend.errors import ConfigError, StoreError


SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
KINDS = ("rollouts", "scored_rollouts")
LOGPS_DTYPES = ("float16", "float32")

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class BrokenManifestError(StoreError):
    """A `manifest.json` that cannot be made sense of. The shards beside it may well be whole."""


@dataclass
class Manifest:
    """
    What a store holds.

    Args:
        kind (`str`):
            `"rollouts"` (student samples) or `"scored_rollouts"` (with the teacher's log-probs).
        settings (`dict[str, Any]`):
            Flat dictionary of JSON values: everything that has to be equal for a second start to continue the first.
        schema_version (`int`, *optional*, defaults to `1`):
            Version of the layout on disk.
        complete (`bool`, *optional*, defaults to `False`):
            Whether every shard is written.
        created_at (`str`, *optional*):
            Time of the first start, ISO 8601 in UTC.
        package_version (`str`, *optional*):
            Version of `trl_blend` at the first start.
        planned_shards (`int`, *optional*):
            Number of shards of the finished store, where it is known beforehand.
        num_rows, num_prompt_tokens, num_completion_tokens, num_truncated (`int`, *optional*, defaults to `0`):
            Sums over the shards named here.
        logps_dtype (`str`, *optional*, defaults to `"float16"`):
            `"float16"` or `"float32"`, for every column of log-probs.
        sampling (`dict[str, Any]`, *optional*):
            Temperature, top-p, top-k, min-p, `max_new_tokens`, `num_rollouts_per_prompt`, seed, `eos_token_ids`.
        scoring (`dict[str, Any]`, *optional*):
            Temperature (1.0), top-k and dtype of the teacher's forward pass.
        engine (`dict[str, Any]`, *optional*):
            `name` (`"transformers"`, `"vllm"`, `"vllm-server"`) and versions.
        student, teacher (`dict[str, Any]`, *optional*):
            Identity of the model ([`~trl_blend.teacher.fingerprint.ModelIdentity`] as a dictionary). `None` means that
            nothing is known about it.
        source (`dict[str, Any]`, *optional*):
            Where the rows came from.
        shards (`list[dict[str, Any]]`, *optional*):
            In the order of their index: `file`, `rows`, `bytes`, `sha256`, `input_digest`, `num_prompt_tokens`,
            `num_completion_tokens`, `num_truncated`.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If `kind` or `logps_dtype` is none of the above, or `settings` is not JSON.
    """

    kind: str
    settings: dict[str, Any]
    schema_version: int = SCHEMA_VERSION
    complete: bool = False
    created_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    package_version: str = __version__
    planned_shards: int | None = None
    num_rows: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_truncated: int = 0
    logps_dtype: str = "float16"
    sampling: dict[str, Any] | None = None
    scoring: dict[str, Any] | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] | None = None
    teacher: dict[str, Any] | None = None
    source: dict[str, Any] = field(default_factory=dict)
    shards: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"Unknown kind={self.kind!r} of a store. Choose one of {KINDS}.")
        if self.logps_dtype not in LOGPS_DTYPES:
            raise ConfigError(f"Unknown logps_dtype={self.logps_dtype!r}. Choose one of {LOGPS_DTYPES}.")
        try:
            self.settings = _plain(self.settings)
        except TypeError as error:
            raise ConfigError(f"`settings` of a manifest has to be JSON: {error}.") from None

    @property
    def settings_digest(self) -> str:
        """SHA-256 of what [`Manifest.differences`] compares; every shard carries it."""
        return hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()

    def differences(self, now: "Manifest") -> list[str]:
        """Every setting that `now` has otherwise than this manifest, as a line `name: old -> new`."""
        old, new = self._identity(), now._identity()
        return [
            f"{name}: {_short(old, name)} -> {_short(new, name)}"
            for name in sorted(old | new)
            if (name in old, old.get(name)) != (name in new, new.get(name))
        ]

    def to_dict(self) -> dict[str, Any]:
        """Dictionary of JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = MANIFEST_NAME) -> "Manifest":
        """
        Inverse of [`Manifest.to_dict`]. Keys that this version does not know are left out.

        Raises:
            [`~trl_blend.errors.StoreError`]: If the schema is newer than this version's, or a value is missing or of
                the wrong kind.
        """
        version = values.get("schema_version")
        if not isinstance(version, int) or version < 1:
            raise BrokenManifestError(
                f"{where} has schema_version={version!r}, so it is no manifest of a store of rollouts."
            )
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{where} has schema_version={version}, written by trl_blend {values.get('package_version')}; this is "
                f"trl_blend {__version__}, which reads up to {SCHEMA_VERSION}. Upgrade trl_blend to read it."
            )
        known = {entry.name for entry in fields(cls)}
        missing = sorted(known - {"planned_shards"} - values.keys())
        if missing:
            raise BrokenManifestError(
                f"{where} lacks {missing}. Restore the file, or run the command again with `--repair`."
            )
        try:
            return cls(**{name: value for name, value in values.items() if name in known})
        except ConfigError as error:
            raise BrokenManifestError(f"{where}: {error}") from None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `folder/manifest.json` atomically."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        write_atomically(Path(folder) / MANIFEST_NAME, text.encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Manifest":
        """
        Read `folder/manifest.json`.

        Raises:
            [`~trl_blend.errors.StoreError`]: If there is none, it is not JSON, or [`Manifest.from_dict`] refuses it.
        """
        path = Path(folder) / MANIFEST_NAME
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise StoreError(
                f"{folder} has no {MANIFEST_NAME}, so it is no store of rollouts. Pass the output_dir of "
                "`trl-blend rollouts` or `trl-blend score`."
            ) from None
        except ValueError as error:
            raise BrokenManifestError(
                f"{path} is broken ({error}). Run the command that wrote it again with `--repair`; the shards stay."
            ) from None
        return cls.from_dict(values if isinstance(values, dict) else {}, where=str(path))

    def _identity(self) -> dict[str, Any]:
        return {**self.settings, "kind": self.kind, "logps_dtype": self.logps_dtype}


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


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    """`value` as JSON would give it back, with one spelling per number: 1.0 from a command line is 1."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def _short(settings: Mapping[str, Any], name: str) -> str:
    text = repr(settings[name]) if name in settings else "not set"
    return text if len(text) <= 80 else f"{text[:77]}..."

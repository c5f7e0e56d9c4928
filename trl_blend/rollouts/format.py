"""
Columns and manifest: read this to know what a store is.

| column | type | content |
|---|---|---|
| `key` | string | [`row_key`] of the prompt and the sample index |
| `prompt_ids` | list of int32 | token ids of the prompt, chat template applied |
| `completion_ids` | list of int32, `(T,)` | sampled token ids, the end-of-sequence token included |
| `rollout_logps` | list of float, `(T,)` | log-prob of each token under the distribution it was sampled from |
| `student_logps` | list of float, `(T,)` | the same at temperature 1 over all tokens, what drift is measured against |
| `truncated` | bool | the length limit was hit: no end-of-sequence token at the end |
| `row_weight` | float | where the prompts have it: how much the row counts in training, at least 0 |
| `route` | string | where the prompts have it: which teacher scores the row |
| `teacher_logps` | list of float, `(T,)` | log-prob of each token under the teacher, temperature 1 |
| `teacher_topk_ids` | list of list of int32, `(T, K)` | the teacher's K most probable ids, the sampled one included |
| `teacher_topk_logps` | list of list of float, `(T, K)` | their log-probs |
| `teacher_tail_logmass` | list of float, `(T,)` | log of the teacher's probability outside the K ids |

Log-probs are float16 or float32, the same for all columns of a store, and in nats; weights are float32.

The manifest says who sampled and who scored, with which settings, and names every shard with its checksum.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trl_blend._files import write_atomically
from trl_blend._version import __version__
from trl_blend.errors import ConfigError, StoreError
from trl_blend.rollouts.folders import describe
from trl_blend.rollouts.ragged import from_rows


SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
KINDS = ("rollouts", "scored_rollouts")
LOGPS_DTYPES = ("float16", "float32")
UNLIKELY_LOGP = -10.0
"""Below this a token is one that the teacher would hardly ever write: e^-10 is 5 in 100,000."""

POSITIVE_TOLERANCE = 1e-4
"""Largest log-prob that still counts as rounding: a probability cannot be above 1."""

LOWEST_LOGP = -1000.0
"""
Smallest number that counts as a log-prob. No sane model comes near; engines write -9999 (vLLM), -1e4 or the smallest
number of their dtype where they have none.
"""

ID_COLUMNS = ("prompt_ids", "completion_ids")
TOKEN_COLUMNS = ("rollout_logps", "student_logps", "teacher_logps", "teacher_tail_logmass")
TOP_K_COLUMNS = ("teacher_topk_ids", "teacher_topk_logps", "teacher_tail_logmass")
ROW_COLUMNS = ("row_weight", "route")
# In the order of the table above, which is their order on disk
COLUMNS = ("key", *ID_COLUMNS, *TOKEN_COLUMNS[:2], "truncated", *ROW_COLUMNS, "teacher_logps", *TOP_K_COLUMNS)
# What a row of each kind of store needs at least
REQUIRED = {
    "rollouts": ("key", "prompt_ids", "completion_ids", "rollout_logps", "truncated"),
    "scored_rollouts": ("key", "prompt_ids", "completion_ids", "teacher_logps", "truncated"),
}


def row_key(prompt_ids: Iterable[int], sample_index: int) -> str:
    """
    Key of a row: 32 hexadecimal characters of the SHA-256 of the prompt's token ids and of the sample's index among
    those of the same prompt.
    """
    content = np.asarray([*prompt_ids, sample_index], dtype="<i8").tobytes()
    return hashlib.sha256(content).hexdigest()[:32]


def build_table(columns: Mapping[str, Sequence[Any]], logps_dtype: str = "float32") -> pa.Table:
    """
    Arrow table of columns of Python lists or arrays, with the types and in the order of the table above. Each has one
    entry per row: a list or one-dimensional array for the list columns, `(T, K)` for the top-k ones.

    Raises:
        [`~trl_blend.errors.StoreError`]: If a column is none of the above, has another number of rows than the first,
            or holds something that its type cannot.
    """
    unknown = sorted(set(columns) - set(COLUMNS))
    if unknown:
        raise StoreError(f"Unknown columns {unknown}. A store of rollouts has {COLUMNS}; leave the others out.")
    counts = {name: len(values) for name, values in columns.items()}
    if len(set(counts.values())) > 1:
        raise StoreError(f"The columns differ in their number of rows: {counts}. Pass one entry per row in each.")
    arrays = {}
    for name in COLUMNS:
        if name in columns:
            try:
                arrays[name] = _to_arrow(name, columns[name], logps_dtype)
            except (TypeError, ValueError, OverflowError) as error:
                where = _first_wrong(name, columns[name], logps_dtype)
                raise StoreError(f"Column {name!r} does not hold what it has to{where}: {error}.") from error
    return pa.table(arrays)


def _first_wrong(name: str, rows: Sequence[Any], logps_dtype: str) -> str:
    """Which row cannot be converted, where it is one alone."""
    for index, row in enumerate(rows):
        try:
            _to_arrow(name, [row], logps_dtype)
        except (TypeError, ValueError, OverflowError):
            return f" in row {index}"
    return ""


def _to_arrow(name: str, rows: Sequence[Any], logps_dtype: str) -> pa.Array:
    if name in ("key", "route"):
        return pa.array(rows, pa.string())
    if name == "row_weight":
        return pa.array([float(row) for row in rows], pa.float32())
    if name == "truncated":
        return pa.array([bool(row) for row in rows], pa.bool_())
    return from_rows(rows, np.int32 if name.endswith("_ids") else logps_dtype, nested=name.startswith("teacher_topk"))


class BrokenManifestError(StoreError):
    """A `manifest.json` that cannot be made sense of. The shards beside it may well be whole."""


def _sum_of(name: str) -> Any:
    return property(lambda manifest: sum(record[name] for record in manifest.shards))


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
        created_at, package_version (`str`, *optional*):
            Time of the first start, ISO 8601 in UTC, and the version of `trl_blend` then.
        planned_shards (`int`, *optional*):
            Number of shards of the finished store, where it is known beforehand.
        logps_dtype (`str`, *optional*, defaults to `"float16"`):
            `"float16"` or `"float32"`, for every column of log-probs.
        sampling (`dict[str, Any]`, *optional*):
            Temperature, top-p, top-k, min-p, `max_new_tokens`, `num_rollouts_per_prompt`, seed, `eos_token_ids`.
        scoring (`dict[str, Any]`, *optional*):
            Temperature (1.0), top-k and dtype of the teacher's forward pass.
        engine (`dict[str, Any]`, *optional*):
            `name` (`"transformers"`, `"vllm"`, `"vllm-server"`) and versions.
        student, teacher (`dict[str, Any]`, *optional*):
            Identity of the model ([`~trl_blend.models.identity.ModelIdentity`] as a dictionary). `None` means that
            nothing is known about it.
        source (`dict[str, Any]`, *optional*):
            Where the rows came from.
        shards (`list[dict[str, Any]]`, *optional*):
            In the order of their index: `file`, `rows`, `bytes`, `sha256`, `input_digest`, `num_prompt_tokens`,
            `num_completion_tokens`, `num_truncated`.

    The sums over the shards are attributes, and in the file for those who read it: `num_rows`, `num_prompt_tokens`,
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
    logps_dtype: str = "float16"
    sampling: dict[str, Any] | None = None
    scoring: dict[str, Any] | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] | None = None
    teacher: dict[str, Any] | None = None
    source: dict[str, Any] = field(default_factory=dict)
    shards: list[dict[str, Any]] = field(default_factory=list)

    num_rows = _sum_of("rows")
    num_prompt_tokens = _sum_of("num_prompt_tokens")
    num_completion_tokens = _sum_of("num_completion_tokens")
    num_truncated = _sum_of("num_truncated")

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
        """Dictionary of JSON values, the sums among them."""
        sums = ("num_rows", "num_prompt_tokens", "num_completion_tokens", "num_truncated")
        values = asdict(self)
        shards = values.pop("shards")
        return {**values, **{name: getattr(self, name) for name in sums}, "shards": shards}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `folder/manifest.json` atomically."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        write_atomically(Path(folder) / MANIFEST_NAME, text.encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Manifest":
        """
        Read `folder/manifest.json`. What this version does not know of it is left out.

        Raises:
            [`~trl_blend.errors.StoreError`]: If there is none, it is not JSON, its schema is newer than this
                version's, or a value is missing or of the wrong kind.
        """
        path = Path(folder) / MANIFEST_NAME
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise StoreError(
                f"{folder} is {describe(folder)} and has no {MANIFEST_NAME}, so it is no store of rollouts. Pass the "
                "output_dir of `trl-blend rollouts` or `trl-blend score`."
            ) from None
        except ValueError as error:
            raise BrokenManifestError(
                f"{path} is broken ({error}). Run the command that wrote it again with `--repair`; the shards stay."
            ) from None
        version = values.get("schema_version") if isinstance(values, dict) else None
        if not isinstance(version, int) or version < 1:
            raise BrokenManifestError(
                f"{path} has schema_version={version!r}, so it is no manifest of a store of rollouts."
            )
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{path} has schema_version={version}, written by trl_blend {values.get('package_version')}; this is "
                f"trl_blend {__version__}, which reads up to {SCHEMA_VERSION}. Upgrade trl_blend to read it."
            )
        known = {entry.name for entry in fields(cls)}
        missing = sorted(known - {"planned_shards"} - values.keys())
        if missing:
            raise BrokenManifestError(
                f"{path} lacks {missing}. Restore the file, or run the command again with `--repair`."
            )
        try:
            return cls(**{name: value for name, value in values.items() if name in known})
        except ConfigError as error:
            raise BrokenManifestError(f"{path}: {error}") from None

    def _identity(self) -> dict[str, Any]:
        return {**self.settings, "kind": self.kind, "logps_dtype": self.logps_dtype}


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

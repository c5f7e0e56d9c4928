"""
Columns of a store of rollouts: their names, their Arrow types, and the row's key.

| column | type | content |
|---|---|---|
| `key` | string | [`row_key`] of the prompt and the sample index |
| `prompt_ids` | list of int32 | token ids of the prompt, chat template applied |
| `completion_ids` | list of int32, `(T,)` | sampled token ids, the end-of-sequence token included |
| `rollout_logps` | list of float, `(T,)` | log-prob of each token under the distribution it was sampled from |
| `student_logps` | list of float, `(T,)` | the same at temperature 1 over all tokens, what drift is measured against |
| `truncated` | bool | the length limit was hit: no end-of-sequence token at the end |
| `teacher_logps` | list of float, `(T,)` | log-prob of each token under the teacher, temperature 1 |
| `teacher_topk_ids` | list of list of int32, `(T, K)` | the teacher's K most probable ids, the sampled one included |
| `teacher_topk_logps` | list of list of float, `(T, K)` | their log-probs |
| `teacher_tail_logmass` | list of float, `(T,)` | log of the teacher's probability outside the K ids |

Floats are float16 or float32, the same for all columns of a store. All log-probs are in nats.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from trl_blend.errors import StoreError


UNLIKELY_LOGP = -10.0
"""Below this a token is one that the teacher would hardly ever write: e^-10 is 5 in 100,000."""

ID_COLUMNS = ("prompt_ids", "completion_ids")
TOKEN_COLUMNS = ("rollout_logps", "student_logps", "teacher_logps", "teacher_tail_logmass")
TOP_K_COLUMNS = ("teacher_topk_ids", "teacher_topk_logps", "teacher_tail_logmass")
# In the order of the table above, which is their order on disk.
COLUMNS = (
    "key",
    "prompt_ids",
    "completion_ids",
    "rollout_logps",
    "student_logps",
    "truncated",
    "teacher_logps",
    "teacher_topk_ids",
    "teacher_topk_logps",
    "teacher_tail_logmass",
)
# What a row of each kind of store needs at least.
REQUIRED = {
    "rollouts": ("key", "prompt_ids", "completion_ids", "rollout_logps", "truncated"),
    "scored_rollouts": ("key", "prompt_ids", "completion_ids", "teacher_logps", "truncated"),
}

_NESTED = ("teacher_topk_ids", "teacher_topk_logps")


def row_key(prompt_ids: Iterable[int], sample_index: int) -> str:
    """
    Key of a row: 32 hexadecimal characters of the SHA-256 of the prompt's token ids and the sample's index.

    Args:
        prompt_ids (`Iterable[int]`):
            Token ids of the prompt.
        sample_index (`int`):
            Index of the sample among those of the same prompt.
    """
    content = np.asarray([*prompt_ids, sample_index], dtype="<i8").tobytes()
    return hashlib.sha256(content).hexdigest()[:32]


def build_table(columns: Mapping[str, Sequence[Any]], logps_dtype: str = "float32") -> pa.Table:
    """
    Arrow table of columns of Python lists or arrays, with the types and in the order of the table above.

    Args:
        columns (`Mapping[str, Sequence[Any]]`):
            One entry per row each: a list or one-dimensional array for the list columns; `(T, K)` for the top-k ones.
        logps_dtype (`str`, *optional*, defaults to `"float32"`):
            `"float16"` or `"float32"`.

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
                raise StoreError(f"Column {name!r} does not hold what it has to: {error}.") from error
    return pa.table(arrays)


def _to_arrow(name: str, rows: Sequence[Any], logps_dtype: str) -> pa.Array:
    if name == "key":
        return pa.array(rows, pa.string())
    if name == "truncated":
        return pa.array([bool(row) for row in rows], pa.bool_())
    dtype = np.dtype(np.int32 if name.endswith("_ids") else logps_dtype)
    if name not in _NESTED:
        return _list_array(rows, _flat(rows, dtype))
    positions = [position for row in rows for position in row]
    return _list_array(rows, _list_array(positions, _flat(positions, dtype)))


def _flat(rows: Sequence[Any], dtype: np.dtype[Any]) -> pa.Array:
    parts = [part for part in map(np.asarray, rows) if part.size]
    wrong = next((part.ndim for part in parts if part.ndim != 1), None)
    if wrong is not None:
        raise ValueError(f"every entry has to be one-dimensional, got one of {wrong} dimensions")
    flat = np.concatenate(parts) if parts else np.empty(0, dtype)
    if dtype.kind == "i" and flat.size:
        if flat.dtype.kind not in "iu":
            raise TypeError(f"token ids have to be integers, got {flat.dtype}")
        if flat.max() > np.iinfo(dtype).max or flat.min() < np.iinfo(dtype).min:
            raise OverflowError(f"a token id is beyond int32: {flat.min()} to {flat.max()}")
    with np.errstate(over="ignore"):  # an infinity is found and reported by the checks of the rows
        return pa.array(flat.astype(dtype))


def _list_array(rows: Sequence[Any], values: pa.Array) -> pa.Array:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise OverflowError(f"{offsets[-1]} values in one shard; write fewer rows per shard")
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)

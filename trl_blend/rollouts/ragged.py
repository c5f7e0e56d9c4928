"""
Rows of different lengths, as Arrow holds them and as NumPy does: the one set of helpers for list columns.

A column of lists is `lengths`, one per row, and `values`, those of all rows behind one another: `(N,)`, or `(N, K)`
for a column of `(T, K)` rows, which in Arrow is a list of lists of K.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, DTypeLike, NDArray


Column = pa.Array | pa.ChunkedArray


def is_list(column: Column) -> bool:
    """Whether every row is a list, of whichever of Arrow's kinds."""
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(column.type) for is_kind in kinds)


def split(column: Column) -> tuple[NDArray[np.int64], pa.Array]:
    """Length of every row, 0 for a missing one, and the values one level of lists down."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64), pc.list_flatten(array)


def flatten(column: Column) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """
    Lengths of the rows, and their values: `(N,)`, or `(N, K)` for rows of `(T, K)`.

    Raises:
        `ValueError`: If K is not the same everywhere.
    """
    lengths, values = split(column)
    if not is_list(values):
        return lengths, values.to_numpy(zero_copy_only=False)
    widths, values = split(values)
    width = int(widths[0]) if len(widths) else 1
    return lengths, values.to_numpy(zero_copy_only=False).reshape(len(widths), width)


def num_values(column: Column) -> int:
    """Number of values, over all levels of lists."""
    while is_list(column):
        column = split(column)[1]
    return len(column)


def to_rows(column: Column) -> list[Any]:
    """An array per row, `(T,)` or `(T, K)`; Python values of a column that has no lists."""
    if not is_list(column):
        return column.to_pylist()
    lengths, values = flatten(column)
    return np.split(values, np.cumsum(lengths))[:-1]


def to_lists(values: NDArray[Any] | pa.Array, lengths: ArrayLike) -> pa.Array:
    """
    Column of lists: the inverse of [`flatten`].

    Raises:
        `OverflowError`: If there are more values than the offsets of a list column can count.
    """
    if isinstance(values, np.ndarray) and values.ndim == 2:
        values = to_lists(values.ravel(), np.full(len(values), values.shape[1]))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise OverflowError(f"{offsets[-1]} values in one column; take fewer rows at a time")
    values = values if isinstance(values, pa.Array) else pa.array(values)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def from_rows(rows: Sequence[Any], dtype: DTypeLike, nested: bool = False) -> pa.Array:
    """
    Column of lists from a list or an array per row, `(T,)`, or `(T, K)` where `nested`.

    Raises:
        `ValueError`, `TypeError`, `OverflowError`: If a row has another number of dimensions, or `dtype` is one of
            integers and a value is none or beyond it.
    """
    values = from_rows([part for row in rows for part in row], dtype) if nested else _joined(rows, np.dtype(dtype))
    return to_lists(values, [len(row) for row in rows])


def _joined(rows: Sequence[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    parts = [part for part in map(np.asarray, rows) if part.size]
    wrong = next((part.ndim for part in parts if part.ndim != 1), None)
    if wrong is not None:
        raise ValueError(f"every entry has to be one-dimensional, got one of {wrong} dimensions")
    joined = np.concatenate(parts) if parts else np.empty(0, dtype)
    if dtype.kind == "i" and joined.size:
        if joined.dtype.kind not in "iu":
            raise TypeError(f"token ids have to be integers, got {joined.dtype}")
        if joined.max() > np.iinfo(dtype).max or joined.min() < np.iinfo(dtype).min:
            raise OverflowError(f"a token id is beyond {dtype}: {joined.min()} to {joined.max()}")
    with np.errstate(over="ignore"):  # an infinity is found and reported by the checks of the rows
        return joined.astype(dtype)

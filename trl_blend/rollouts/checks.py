"""
Checks of the rows of a store, vectorised: every number is looked at once, in Arrow's own buffers.

They hold for what is written, for what is imported and for what a trainer is given.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trl_blend.errors import StoreError
from trl_blend.rollouts.format import ID_COLUMNS, TOKEN_COLUMNS, TOP_K_COLUMNS, build_table


POSITIVE_TOLERANCE = 1e-4
"""Largest log-prob that still counts as rounding: a probability cannot be above 1."""

_REMEDY = {
    "rollout_logps": "Collect the rollouts again.",
    "student_logps": "Collect the rollouts again.",
    "completion_ids": "Collect the rollouts again, or drop the row.",
    "prompt_ids": "Collect the rollouts again, or drop the row.",
}
_SCORE_AGAIN = "Score the rollouts again (`trl-blend score`)."


class _Lists(NamedTuple):
    """A list column: how many values each row has, and all of them in one array (NumPy; Arrow if they are lists)."""

    name: str
    lengths: NDArray[np.int64]
    values: Any

    def row_of(self, position: int) -> int:
        return int(np.searchsorted(np.cumsum(self.lengths), position, side="right"))


def check_rows(
    columns: Mapping[str, Sequence[Any]] | pa.Table,
    *,
    vocab_size: int | None = None,
    top_k_required: bool = False,
    required: Sequence[str] = ("prompt_ids", "completion_ids", "teacher_logps"),
    where: str = "the dataset",
) -> None:
    """
    Check rows of scored or unscored rollouts. Columns of other names are not looked at.

    Args:
        columns (`Mapping[str, Sequence[Any]]` or `pyarrow.Table`):
            The rows. See [`~trl_blend.rollouts.format`] for the columns.
        vocab_size (`int`, *optional*):
            Number of token ids of the student. Without it, only negative ids are refused.
        top_k_required (`bool`, *optional*, defaults to `False`):
            Whether the teacher's top-k columns have to be there.
        required (`Sequence[str]`, *optional*, defaults to `("prompt_ids", "completion_ids", "teacher_logps")`):
            Columns that have to be there.
        where (`str`, *optional*, defaults to `"the dataset"`):
            What the rows belong to, for the error message.

    Raises:
        [`~trl_blend.errors.StoreError`]: If a column is missing or has missing values; a prompt or a completion is
            empty; a column has not one value per completion token; a log-prob is NaN, infinite or above 1e-4 (the tail
            mass may be `-inf`, where the k tokens are all of the vocabulary); an id is negative or not below
            `vocab_size`; a row's top-k is ragged, holds a token twice or lacks the sampled one. The message names the
            column, the row, the value and the remedy.
    """
    if not isinstance(columns, pa.Table):
        try:
            columns = build_table({name: values for name, values in columns.items() if name in _LOOKED_AT})
        except StoreError as error:
            raise StoreError(f"{where}: {error}") from None
    _require(columns, required, top_k_required, where)
    report = _Report(columns, where)
    for name in ("key", "truncated"):
        if name in columns.column_names and columns[name].null_count:
            report.fail(name, 0, "has missing values", "Write the store again.")
    completion = _ids(columns, report, vocab_size)
    for name in TOKEN_COLUMNS:
        if name in columns.column_names:
            lists = _lists(columns, name, report)
            report.same_lengths(lists, completion)
            _check_logps(lists, report, name)
    _check_top_k(columns, report, completion, vocab_size)


_LOOKED_AT = {"key", "truncated", *ID_COLUMNS, *TOKEN_COLUMNS, *TOP_K_COLUMNS}


class _Report:
    """Raises with the row's key, or its index where the table has no keys."""

    def __init__(self, table: pa.Table, where: str) -> None:
        self.keys = table["key"] if "key" in table.column_names else None
        self.where = where

    def fail(self, column: str, row: int, problem: str, remedy: str | None = None) -> None:
        key = "" if self.keys is None else f" (key {self.keys[row].as_py()})"
        remedy = remedy or _REMEDY.get(column, _SCORE_AGAIN)
        raise StoreError(f"{self.where}: column {column!r} {problem} in row {row}{key}. {remedy}")

    def same_lengths(self, lists: _Lists, completion: _Lists) -> None:
        differing = np.flatnonzero(lists.lengths != completion.lengths)
        if differing.size:
            row = int(differing[0])
            self.fail(
                lists.name,
                row,
                f"has {lists.lengths[row]} values for {completion.lengths[row]} tokens of 'completion_ids' "
                f"({differing.size} such rows)",
            )


def _require(table: pa.Table, required: Sequence[str], top_k_required: bool, where: str) -> None:
    names = set(table.column_names)
    missing = [name for name in required if name not in names]
    if missing:
        raise StoreError(
            f"{where} lacks the columns {missing}; it has {table.column_names}. Write it with `trl-blend rollouts` "
            "and `trl-blend score`, or rename your columns."
        )
    missing = [name for name in TOP_K_COLUMNS if name not in names]
    if missing and top_k_required:
        raise StoreError(
            f"{where} lacks {missing}, which a top-k loss needs. Score the rollouts again with `--top_k 16` or so, or "
            'train with `offline_loss="sampled_token"`.'
        )


def _ids(table: pa.Table, report: _Report, vocab_size: int | None) -> _Lists:
    for name in ID_COLUMNS:
        lists = _lists(table, name, report)
        empty = np.flatnonzero(lists.lengths == 0)
        if empty.size:
            report.fail(name, int(empty[0]), f"is empty ({empty.size} such rows)")
        _check_ids(lists, report, vocab_size)
    return lists


def _lists(table: pa.Table, name: str, report: _Report) -> _Lists:
    column = table[name]
    # One array, also of a column in no chunk at all
    column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if not _is_list(column.type):
        report.fail(name, 0, f"is {column.type}, not a list per row,")
    lengths, values = _split(column)
    if column.null_count or values.null_count:
        row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False))) if column.null_count else 0
        report.fail(name, row, "has missing values")
    return _Lists(name, lengths, values if _is_list(values.type) else values.to_numpy(zero_copy_only=False))


def _split(column: pa.Array) -> tuple[NDArray[np.int64], pa.Array]:
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64), pc.list_flatten(column)


def _is_list(arrow_type: pa.DataType) -> bool:
    return hasattr(arrow_type, "value_type")


def _check_ids(lists: _Lists, report: _Report, vocab_size: int | None) -> None:
    values = lists.values
    if values.dtype.kind not in "iu" and values.size:
        report.fail(lists.name, 0, f"is of {values.dtype}, not of integers,")
    bad = values < 0
    if vocab_size is not None:
        bad |= values >= vocab_size
    if bad.any():
        position = int(np.argmax(bad))
        limit = "negative" if values[position] < 0 else f"outside the vocabulary of {vocab_size} tokens"
        report.fail(
            lists.name,
            lists.row_of(position),
            f"has id {values[position]}, {limit},",
            "The data was made with another tokenizer than the student's: use that student, or collect again.",
        )


def _check_logps(lists: _Lists, report: _Report, column: str) -> None:
    values = lists.values
    if values.dtype.kind != "f" and values.size:
        report.fail(column, 0, f"is of {values.dtype}, not of floats,")
    good = values <= POSITIVE_TOLERANCE  # NaN is not
    if column != "teacher_tail_logmass":
        good &= values > -np.inf
    if not good.all():
        position = int(np.argmin(good))
        value = values[position]
        problem = "above 0" if value > 0 else "not a finite number"
        report.fail(
            column,
            lists.row_of(position),
            f"has log-prob {value}, {problem} ({int((~good).sum())} such values),",
        )


def _check_top_k(table: pa.Table, report: _Report, completion: _Lists, vocab_size: int | None) -> None:
    names = [name for name in TOP_K_COLUMNS[:2] if name in table.column_names]
    flat = {name: _top_k_lists(table, name, report, completion) for name in names}
    if "teacher_topk_logps" in flat:
        _check_logps(flat["teacher_topk_logps"], report, "teacher_topk_logps")
    if "teacher_topk_ids" not in flat:
        return
    ids = flat["teacher_topk_ids"]
    _check_ids(ids, report, vocab_size)
    if "teacher_topk_logps" in flat and ids.values.size != flat["teacher_topk_logps"].values.size:
        report.fail("teacher_topk_logps", 0, "has another number of entries per token than 'teacher_topk_ids'")
    top_k = ids.values.size // max(completion.values.size, 1)
    ids_of_token = ids.values.reshape(-1, max(top_k, 1))
    repeated = (np.diff(np.sort(ids_of_token, axis=1), axis=1) == 0).any(1)
    if repeated.any():
        row = completion.row_of(int(np.argmax(repeated)))
        report.fail("teacher_topk_ids", row, f"holds a token twice ({int(repeated.sum())} such tokens)")
    sampled = (ids_of_token == completion.values[:, None]).any(1)
    if not sampled.all():
        position = int(np.argmin(sampled))
        report.fail(
            "teacher_topk_ids",
            completion.row_of(position),
            f"lacks the sampled token {completion.values[position]} ({int((~sampled).sum())} such tokens)",
        )


def _top_k_lists(table: pa.Table, name: str, report: _Report, completion: _Lists) -> _Lists:
    """A `(T, K)` column with all its values in one array, K the same everywhere."""
    outer = _lists(table, name, report)
    report.same_lengths(outer, completion)
    if not isinstance(outer.values, pa.Array):
        report.fail(name, 0, "is a number per token, not a list per token,")
    lengths, values = _split(outer.values)
    wrong = lengths != max(int(lengths[:1].sum()), 1)
    if wrong.any():
        position = int(np.argmax(wrong))
        report.fail(
            name, outer.row_of(position), f"has {lengths[position]} entries at a token, {lengths[0]} elsewhere"
        )
    if values.null_count:
        position = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False))) // int(lengths[0])
        report.fail(name, outer.row_of(position), "has missing values")
    return _Lists(name, outer.lengths * lengths[:1].sum(), values.to_numpy(zero_copy_only=False))

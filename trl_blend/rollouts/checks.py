"""
Checks of the rows of a store, vectorised: every number is looked at once, in Arrow's own buffers.

They hold for what is written, for what is imported and for what a trainer is given.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trl_blend.errors import StoreError
from trl_blend.rollouts import ragged
from trl_blend.rollouts.format import (
    COLUMNS,
    ID_COLUMNS,
    LOWEST_LOGP,
    POSITIVE_TOLERANCE,
    TOKEN_COLUMNS,
    TOP_K_COLUMNS,
    build_table,
)


_COLLECT_AGAIN = "Collect the rollouts again"
_REMEDY = {
    "rollout_logps": f"{_COLLECT_AGAIN}.",
    "student_logps": f"{_COLLECT_AGAIN}.",
    "completion_ids": f"{_COLLECT_AGAIN}, or drop the row.",
    "prompt_ids": f"{_COLLECT_AGAIN}, or drop the row.",
}
_SCORE_AGAIN = "Score the rollouts again (`trl-blend score`)."
_WEIGH = "A weight is finite and at least 0; a row of weight 0 does not count."
_NO_NUMBER = (
    "If it is there again, the model or the engine has no number for the token: check that the checkpoint is whole, "
    "use `dtype='float32'` or `'bfloat16'`, and transformers instead of a vLLM server; else drop the row."
)


def check_rows(
    columns: Mapping[str, Sequence[Any]] | pa.Table,
    *,
    vocab_size: int | None = None,
    required: Sequence[str] = ("prompt_ids", "completion_ids", "teacher_logps"),
    where: str = "the dataset",
    first: int = 0,
) -> None:
    """
    Check rows of scored or unscored rollouts. Columns of other names are not looked at.

    Args:
        columns (`Mapping[str, Sequence[Any]]` or `pyarrow.Table`):
            The rows. See [`~trl_blend.rollouts.format`] for the columns.
        vocab_size (`int`, *optional*):
            Number of token ids of the student. Without it, only negative ids are refused.
        required (`Sequence[str]`, *optional*, defaults to `("prompt_ids", "completion_ids", "teacher_logps")`):
            Columns that have to be there.
        where (`str`, *optional*, defaults to `"the dataset"`):
            What the rows belong to, for the error message.
        first (`int`, *optional*, defaults to `0`):
            Number of the first row there.

    Raises:
        [`~trl_blend.errors.StoreError`]: If a column is missing or has missing values; a prompt or a completion is
            empty; a column has not one value per completion token; a log-prob is NaN, infinite, above 1e-4 or below
            -1000, which is how engines write that they have none (the tail mass may be `-inf`, where the k tokens are
            all of the vocabulary); an id is negative or not below `vocab_size`; a row's top-k is ragged, holds a token
            twice or lacks the sampled one; a row's weight is negative or not finite. The message names the column,
            the row, the token, the value and the remedy.
    """
    if not isinstance(columns, pa.Table):
        try:
            columns = build_table({name: values for name, values in columns.items() if name in COLUMNS})
        except StoreError as error:
            raise StoreError(f"{where}: {error}") from None
    _require(columns, required, where)
    checks = _Checks(columns, vocab_size, where, first)
    for name in ("key", "truncated", "route"):
        if name in columns.column_names and columns[name].null_count:
            checks.fail(name, 0, "has missing values", "Write the store again.")
    if "row_weight" in columns.column_names:
        checks.check_row_weights()
    for name in ID_COLUMNS:
        checks.check_ids(name, *checks.lists(name))
    for name in TOKEN_COLUMNS:
        if name in columns.column_names:
            checks.check_logps(name, *checks.per_token(name))
    checks.check_top_k([name for name in TOP_K_COLUMNS[:2] if name in columns.column_names])


def check_numbers(values: NDArray[Any], rows: NDArray[np.int64], column: str, where: str) -> None:
    """
    Check log-probabilities of tokens, `(N,)` or `(N, K)`, in the rows with the numbers `rows`.

    Raises:
        [`~trl_blend.errors.StoreError`]: At the first that is none; see [`check_rows`].
    """
    good = _are_logps(values, column)
    if not good.all():
        token = int(np.argmin(good)) // max(good.size // len(good), 1)
        problem = f"has log-prob {values.flat[np.argmin(good)]}, which is none, in row {rows[token]}"
        raise StoreError(f"{where}: column {column!r} {problem}. {_REMEDY.get(column, _SCORE_AGAIN)} {_NO_NUMBER}")


def are_row_weights(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of some numbers can be the weight of a row."""
    return np.isfinite(values) & (values >= 0)


def _are_logps(values: NDArray[Any], column: str) -> NDArray[np.bool_]:
    good = (values >= LOWEST_LOGP) & (values <= POSITIVE_TOLERANCE)  # NaN is neither above nor below
    return good | (values == -np.inf) if column == "teacher_tail_logmass" else good


def _require(table: pa.Table, required: Sequence[str], where: str) -> None:
    names = table.column_names
    missing = [name for name in required if name not in names]
    if missing:
        raise StoreError(
            f"{where} lacks the columns {missing}; it has {names}. Write it with `trl-blend rollouts` "
            "and `trl-blend score`, or rename your columns."
        )


class _Checks:
    """Raises at the first thing that is wrong, with the row's key, or its index where the table has no keys."""

    def __init__(self, table: pa.Table, vocab_size: int | None, where: str, first: int) -> None:
        self.table, self.vocab_size, self.where, self.first = table, vocab_size, where, first

    def fail(self, column: str, row: int, problem: str, remedy: str | None = None, where: str = "") -> NoReturn:
        key = f" (key {self.table['key'][row].as_py()})" if "key" in self.table.column_names else ""
        remedy = remedy or _REMEDY.get(column, _SCORE_AGAIN)
        raise StoreError(f"{self.where}: column {column!r} {problem} in row {self.first + row}{key}{where}. {remedy}")

    def place(self, name: str, found: NDArray[np.bool_], lengths: NDArray[np.int64]) -> tuple[int, str]:
        """
        Row of the first token that was found, of those in all rows, and where in the row it is, with the sampled
        token there; `found` is `(N,)`, or `(N, K)` for K at a token.
        """
        token, ends = int(np.argmax(found)) // max(found.size // len(found), 1), np.cumsum(lengths)
        row = int(np.searchsorted(ends, token, side="right"))
        position = token - int(ends[row] - lengths[row])
        sampled = [] if name in ID_COLUMNS else self.table["completion_ids"][row].as_py()
        of_token = f" (token {sampled[position]})" if position < len(sampled) else ""
        return row, f" at position {position}{of_token}"

    def lists(self, name: str) -> tuple[NDArray[np.int64], Any]:
        """Lengths of the rows, none of them missing, and their values: NumPy, or Arrow if these are lists."""
        column = self.table[name]
        if not ragged.is_list(column):
            self.fail(name, 0, f"is {column.type}, not a list per row,")
        lengths, values = ragged.split(column)
        if column.null_count:
            self.fail(name, int(np.argmax(column.is_null().to_numpy())), "has missing values")
        if values.null_count:
            row, where = self.place(name, values.is_null().to_numpy(zero_copy_only=False), lengths)
            self.fail(name, row, "has missing values", where=where)
        return lengths, values if ragged.is_list(values) else values.to_numpy(zero_copy_only=False)

    def per_token(self, name: str) -> tuple[NDArray[np.int64], Any]:
        """The same of a column that has to have one entry per completion token."""
        lengths, values = self.lists(name)
        expected, _ = ragged.split(self.table["completion_ids"])
        differing = np.flatnonzero(lengths != expected)
        if differing.size:
            row = int(differing[0])
            problem = f"has {lengths[row]} values for {expected[row]} tokens of 'completion_ids'"
            self.fail(name, row, f"{problem} ({differing.size} such rows)")
        return lengths, values

    def check_ids(self, name: str, lengths: NDArray[np.int64], values: NDArray[Any]) -> None:
        empty = np.flatnonzero(lengths == 0)
        if empty.size:
            self.fail(name, int(empty[0]), f"is empty ({empty.size} such rows)")
        if values.dtype.kind not in "iu" and values.size:
            self.fail(name, 0, f"is of {values.dtype}, not of integers,")
        bad = values < 0
        if self.vocab_size is not None:
            bad |= values >= self.vocab_size
        if bad.any():
            value = values.flat[np.argmax(bad)]
            limit = "negative" if value < 0 else f"outside the vocabulary of {self.vocab_size} tokens"
            remedy = "The data was made with another tokenizer than the student's: use that student, or collect again."
            if name == "teacher_topk_ids" and value >= 0:
                remedy = f"It is of another tokenizer, or a row that only pads the teacher's embedding. {_SCORE_AGAIN}"
            row, where = self.place(name, bad, lengths)
            self.fail(name, row, f"has id {value}, {limit},", remedy, where)

    def check_logps(self, name: str, lengths: NDArray[np.int64], values: NDArray[Any]) -> None:
        if values.dtype.kind != "f" and values.size:
            self.fail(name, 0, f"is of {values.dtype}, not of floats,")
        good = _are_logps(values, name)
        if not good.all():
            value = values.flat[np.argmin(good)]
            row, where = self.place(name, ~good, lengths)
            kind = "above 0" if value > 0 else "not a finite number" if not np.isfinite(value) else "which is none"
            remedy = f"{_REMEDY.get(name, _SCORE_AGAIN)} {_NO_NUMBER}"
            problem = f"has log-prob {value}, {kind} ({int((~good).sum())} such values),"
            self.fail(name, row, problem, remedy, where)

    def check_row_weights(self) -> None:
        column = self.table["row_weight"]
        if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
            self.fail("row_weight", 0, f"is {column.type}, not a number per row,", _WEIGH)
        values = column.to_numpy().astype(np.float64)  # NaN where one is missing
        good = are_row_weights(values)
        if not good.all():
            row = int(np.argmin(good))
            self.fail("row_weight", row, f"is {values[row]} ({int((~good).sum())} such rows)", _WEIGH)

    def check_top_k(self, names: Sequence[str]) -> None:
        columns = {name: self._top_k(name) for name in names}
        if "teacher_topk_logps" in columns:
            self.check_logps("teacher_topk_logps", *columns["teacher_topk_logps"])
        if "teacher_topk_ids" not in columns:
            return
        lengths, ids = columns["teacher_topk_ids"]
        self.check_ids("teacher_topk_ids", lengths, ids)
        if "teacher_topk_logps" in columns and ids.shape != columns["teacher_topk_logps"][1].shape:
            self.fail("teacher_topk_logps", 0, "has another number of entries per token than 'teacher_topk_ids'")
        repeated = (np.diff(np.sort(ids, axis=1), axis=1) == 0).any(1)
        if repeated.any():
            row, where = self.place("teacher_topk_ids", repeated, lengths)
            problem = f"holds a token twice ({int(repeated.sum())} such tokens)"
            self.fail("teacher_topk_ids", row, problem, where=where)
        _, sampled = ragged.flatten(self.table["completion_ids"])
        lacking = ~(ids == sampled[:, None]).any(1)
        if lacking.any():
            token = sampled[np.argmax(lacking)]
            row, where = self.place("teacher_topk_ids", lacking, lengths)
            problem = f"lacks the sampled token {token} ({int(lacking.sum())} such tokens)"
            self.fail("teacher_topk_ids", row, problem, where=where)

    def _top_k(self, name: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Lengths and values `(N, K)` of a column that has to have K entries per completion token."""
        lengths, tokens = self.per_token(name)
        if not isinstance(tokens, pa.Array):
            self.fail(name, 0, "is a number per token, not a list per token,")
        widths, values = ragged.split(tokens)
        wrong = widths != max(int(widths[:1].sum()), 1)
        if wrong.any():
            problem = f"has {widths[np.argmax(wrong)]} entries at a token, {widths[0]} elsewhere"
            self.fail(name, self.place(name, wrong, lengths)[0], problem)
        shape = (len(widths), int(widths[:1].sum()))
        if values.null_count:
            missing = values.is_null().to_numpy(zero_copy_only=False).reshape(shape)
            row, where = self.place(name, missing, lengths)
            self.fail(name, row, "has missing values", where=where)
        return lengths, values.to_numpy(zero_copy_only=False).reshape(shape)

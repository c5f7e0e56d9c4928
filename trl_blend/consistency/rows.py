"""A few rows of scored rollouts, drawn at random, whatever holds them."""

import itertools
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa

from trl_blend.rollouts.checks import check_rows
from trl_blend.rollouts.ragged import to_rows
from trl_blend.rollouts.shard import read_record
from trl_blend.rollouts.store import RolloutStore


MAX_SHARDS = 8  # read to draw from: the cost of a sample does not grow with the store
_REQUIRED = ("prompt_ids", "completion_ids", "teacher_logps")
_OPTIONAL = ("key", "student_logps", "rollout_logps", "truncated", "route")


@dataclass(frozen=True)
class SampledRows:
    """
    Rows drawn at random.

    Args:
        names (`list[str]`):
            Key of each row, or its index where there is none.
        prompt_ids, completion_ids (`list[list[int]]`):
            Token ids.
        teacher_logps (`list[np.ndarray]`):
            Stored log-probs of the teacher.
        student_logps, rollout_logps (`list[np.ndarray]`, *optional*):
            Stored log-probs of the student, at temperature 1 and as sampled.
        truncated (`list[bool]`, *optional*):
            Whether the length limit was hit.
        route (`list[str]`, *optional*):
            Which teacher each row belongs to.
    """

    names: list[str]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    teacher_logps: list[np.ndarray]
    student_logps: list[np.ndarray] | None = None
    rollout_logps: list[np.ndarray] | None = None
    truncated: list[bool] | None = None
    route: list[str] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def first(self, num_rows: int) -> "SampledRows":
        """The first rows, which are as random as all of them."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return SampledRows(**{name: rows and rows[:num_rows] for name, rows in columns.items()})


def sample_rows(scored: Any, num_rows: int, seed: int = 0) -> SampledRows:
    """
    Draw rows of a store or dataset without replacement, in random order, from at most eight shards of a store; all of
    them where there are fewer than `num_rows`. A streamed dataset gives its first ones.

    Raises:
        [`~trl_blend.errors.StoreError`]: If a column is missing or a drawn row is not valid.
    """
    generator = np.random.default_rng(seed)
    if isinstance(scored, RolloutStore):
        table, where = _from_store(scored, num_rows, generator), scored.name
    else:
        table, where = _from_dataset(scored, num_rows, generator), "the dataset"
    check_rows(table, required=_REQUIRED, where=where)
    table = table.take(generator.permutation(table.num_rows))  # the first rows of the sample are a sample too
    optional = {name: to_rows(table[name]) for name in _OPTIONAL if name in table.column_names}
    names = optional.pop("key", None) or [f"row {index}" for index in table["__index"].to_pylist()]
    ids = {name: [row.tolist() for row in to_rows(table[name])] for name in ("prompt_ids", "completion_ids")}
    return SampledRows(names, **ids, teacher_logps=to_rows(table["teacher_logps"]), **optional)


def _from_store(store: RolloutStore, num_rows: int, generator: np.random.Generator) -> pa.Table:
    shards = store.manifest.shards
    chosen = generator.permutation(len(shards))[:MAX_SHARDS]
    ends = np.cumsum([shards[index]["rows"] for index in chosen])
    drawn = np.sort(generator.permutation(int(ends[-1]))[:num_rows])
    parts = []
    for index, end in zip(chosen, ends, strict=True):
        start = end - shards[index]["rows"]
        rows = drawn[(start <= drawn) & (drawn < end)] - start
        if len(rows):
            table = read_record(store.folder, shards[index])
            wanted = [name for name in (*_REQUIRED, *_OPTIONAL) if name in table.column_names]
            parts.append(table.select(wanted).take(rows))
    return pa.concat_tables(parts)


def _from_dataset(dataset: Any, num_rows: int, generator: np.random.Generator) -> pa.Table:
    if dataset.column_names is not None:  # a stream may not know them
        dataset = dataset.select_columns([name for name in dataset.column_names if name in (*_REQUIRED, *_OPTIONAL)])
    if hasattr(dataset, "__len__"):
        indices = np.sort(generator.permutation(len(dataset))[:num_rows])
        rows = dataset.select(indices).with_format(None).to_list()
    else:
        indices = np.arange(num_rows)
        rows = list(itertools.islice(iter(dataset), num_rows))
    wanted = {*_REQUIRED, *_OPTIONAL}
    table = pa.Table.from_pylist([{name: row[name] for name in row if name in wanted} for row in rows])
    return table.append_column("__index", pa.array(indices[: len(rows)]))

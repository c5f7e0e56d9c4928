"""Scored rollouts as training rows: per-token columns, through truncation, packing and collation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from torch import Tensor
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_blend.errors import ConfigError, StoreError
from trl_blend.ops.losses import sequence_weights
from trl_blend.rollouts.checks import are_row_weights, check_numbers, check_rows
from trl_blend.rollouts.ragged import flatten, to_lists


# Columns with one value per token, under the names they have in a store
LOG_PROBS = ("teacher_logps", "student_logps", "rollout_logps")
TOP_K = ("teacher_topk_ids", "teacher_topk_logps", "teacher_tail_logmass")
REQUIRED = ("prompt_ids", "completion_ids", "teacher_logps")
WEIGHTS = "loss_weights"
ROW_WEIGHT = "row_weight"

_FLOAT32 = str(List(Value("float32")))

AnyDataset = Dataset | IterableDataset


def column_names(dataset: AnyDataset) -> list[str]:
    """Names of the columns; those of the first row where a streaming dataset does not know them."""
    return dataset.column_names or list(next(iter(dataset)))


def concatenate(datasets: Sequence[Dataset]) -> Dataset:
    """Rows of several stores, with the columns that all of them have; in float32 where one of them has it."""
    names = [name for name in datasets[0].column_names if all(name in rows.column_names for rows in datasets)]
    selected = [rows.select_columns(names) for rows in datasets]
    widest = max((rows.features for rows in selected), key=lambda features: str(features["teacher_logps"]) == _FLOAT32)
    return concatenate_datasets([rows if rows.features == widest else rows.cast(widest) for rows in selected])


def is_prepared(dataset: AnyDataset) -> bool:
    """Whether the rows are training rows already."""
    return {"input_ids", "labels", "teacher_logps"} <= set(column_names(dataset))


def token_columns(names: Sequence[str], uses_top_k: bool) -> list[str]:
    """
    Per-token columns that training rows keep, of those that a dataset has.

    Raises:
        [`~trl_blend.errors.StoreError`]:
            If a column is missing that the loss reads.
    """
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise StoreError(
            f"The dataset lacks the column(s) {', '.join(missing)}; it has {', '.join(names)}. Pass the output of "
            "`trl-blend score` (`trl_blend.score_rollouts`)."
        )
    missing = [name for name in TOP_K if name not in names] if uses_top_k else []
    if missing:
        raise StoreError(
            f"The loss reads the teacher's most probable tokens, but the dataset lacks {', '.join(missing)}. Score "
            "the rollouts with `top_k`, or use `offline_loss='sampled_token'` without `advantage_baseline`."
        )
    return [name for name in (*LOG_PROBS, ROW_WEIGHT, *(TOP_K if uses_top_k else ())) if name in names]


def prepare(
    dataset: AnyDataset,
    *,
    uses_top_k: bool,
    vocab_size: int,
    max_length: int | None,
    packing: bool,
    shuffle_seed: int | None,
    num_proc: int | None = None,
    as_one_shard: bool = False,
) -> AnyDataset:
    """
    Turn scored rollouts into training rows, or leave training rows as they are.

    Every row is checked. A training row has `input_ids` (prompt and completion), `labels` (-100 on the prompt) and the
    per-token columns, 0 on the prompt; the weight of a row is one of them, the same at all of its tokens. Rows are cut
    to `max_length` at their end, and left out where nothing of the completion remains.

    With `packing`, whole rows are packed up to `max_length`. A `shuffle_seed` shuffles them. `as_one_shard` lets every
    process read all of a streaming dataset. `vocab_size` is the number of rows of the student's embedding.

    Raises:
        [`~trl_blend.errors.StoreError`]:
            If a column is missing or a row is wrong.
    """
    names = column_names(dataset)
    if is_prepared(dataset):
        _check_prepared(dataset, token_columns([*REQUIRED, *names], uses_top_k))
        return dataset
    columns = token_columns(names, uses_top_k)
    given, shuffles = dataset, shuffle_seed is not None
    if shuffles and not packing:  # before the copy, so that the copy is in order
        dataset = dataset.shuffle(seed=shuffle_seed)
    if isinstance(dataset, IterableDataset) and as_one_shard:
        dataset = _as_one_shard(dataset)
    kwargs: dict[str, Any] = {} if isinstance(dataset, IterableDataset) else {"num_proc": num_proc}
    if kwargs:
        kwargs["desc"] = "Aligning teacher log-probabilities"
    try:
        dataset = dataset.with_format("arrow").map(
            _training_rows,
            batched=True,
            fn_kwargs={"columns": columns, "vocab_size": vocab_size, "max_length": max_length},
            # Not those that the function returns: a streaming dataset would drop them afterwards
            remove_columns=[name for name in names if name not in columns],
            features=_features(columns),
            **kwargs,
        )
    except StoreError:
        _name_the_row(given, vocab_size)
        raise
    dataset = dataset.with_format(None)
    if not isinstance(dataset, IterableDataset) and not len(dataset):
        raise ConfigError(f"`max_length={max_length}` leaves nothing of any completion. Raise it.")
    if packing:
        dataset = dataset.shuffle(seed=shuffle_seed) if shuffles else dataset
        kwargs.pop("desc", None)
        dataset = pack_dataset(dataset, max_length, "bfd", kwargs)
    return dataset


def _name_the_row(dataset: Dataset, vocab_size: int) -> None:
    """Raise for the first wrong row by its place in the data as given: they were shuffled, and in batches."""
    rows = dataset.with_format("arrow")
    for first in range(0, len(dataset), 1000):
        table = rows[first : first + 1000]
        check_rows(table, vocab_size=vocab_size, where="the training data", first=first)


def _check_prepared(dataset: AnyDataset, columns: Sequence[str]) -> None:
    """Training rows that were prepared before: their numbers are looked at once more, where they are not streamed."""
    if not isinstance(dataset, Dataset):
        return
    names = [name for name in columns if not name.endswith("_ids")]
    rows = dataset.select_columns(["labels", *names]).with_format("arrow")
    for first in range(0, len(dataset), 1000):
        table = rows[first : first + 1000]
        lengths, labels = flatten(table["labels"])
        counts, numbers = labels != -100, np.repeat(np.arange(first, first + len(table)), lengths)
        for name in names:
            values = flatten(table[name])[1][counts]
            if name != ROW_WEIGHT:
                check_numbers(values, numbers[counts], name, "the training data")
            elif not (good := are_row_weights(values)).all():
                wrong = int(np.argmin(good))
                raise StoreError(
                    f"the training data: column {name!r} is {values[wrong]} in row {numbers[counts][wrong]}. A weight "
                    "is finite and at least 0."
                )


def _as_one_shard(dataset: IterableDataset) -> IterableDataset:
    # With as many shards as processes or more, accelerate gives each process shards of its own: they would end at
    # different steps and wait for each other. From one shard every process takes its share of each batch.
    if dataset.num_shards == 1:
        return dataset
    return IterableDataset.from_generator(_rows_of, features=dataset.features, gen_kwargs={"dataset": dataset})


def _rows_of(dataset: IterableDataset) -> Iterator[dict[str, Any]]:
    yield from dataset


def _features(columns: Sequence[str]) -> Features:
    ids, values = List(Value("int64")), List(Value("float32"))
    nested = {"teacher_topk_ids": List(ids), "teacher_topk_logps": List(values)}
    return Features({"input_ids": ids, "labels": ids, **{name: nested.get(name, values) for name in columns}})


def _training_rows(table: pa.Table, columns: Sequence[str], vocab_size: int, max_length: int | None) -> pa.Table:
    check_rows(table, vocab_size=vocab_size, where="the training data")
    (prompt_lengths, prompts), (lengths, completions) = flatten(table["prompt_ids"]), flatten(table["completion_ids"])
    lengths = np.stack([prompt_lengths, lengths], axis=1)
    is_completion = np.repeat(np.tile([False, True], len(table)), lengths.ravel())
    ids = np.empty(is_completion.size, dtype=np.int64)
    ids[~is_completion], ids[is_completion] = prompts, completions
    rows = {"input_ids": ids, "labels": np.where(is_completion, ids, -100)}
    for name in columns:
        if name == ROW_WEIGHT:
            values = np.repeat(table[name].to_numpy(), lengths[:, 1])
        else:
            _, values = flatten(table[name])
        dtype = np.int64 if name.endswith("_ids") else np.float32
        aligned = np.zeros((is_completion.size, *values.shape[1:]), dtype)
        aligned[is_completion] = values
        rows[name] = aligned
    totals = lengths.sum(axis=1)
    if max_length is not None:
        whole = np.minimum(totals, max_length) * (lengths[:, 0] < max_length)
        starts = np.repeat(np.cumsum(totals) - totals, totals)
        kept = np.arange(is_completion.size) - starts < np.repeat(whole, totals)
        rows = {name: values[kept] for name, values in rows.items()}
        totals = whole[whole > 0]
    return pa.table({name: to_lists(values, totals) for name, values in rows.items()})


@dataclass
class ScoredRolloutCollator(DataCollatorForLanguageModeling):
    """
    TRL's collator with the per-token columns beside the labels, and the weight of every token.

    Returns, beside TRL's keys, each column of shape `(B, T)` or `(B, T, K)` under its name, and `loss_weights` of
    shape `(B, T)`, the [`~trl_blend.ops.losses.sequence_weights`] of every completion, 0 on prompt and padding. They
    are the same for all rows: `row_weight`, where the data have it, is a column beside them.

    Args:
        loss_aggregation (`str`, *optional*, defaults to `"sequence"`):
            `"sequence"` or `"token"`.
    """

    loss_aggregation: str = "sequence"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        width = batch["input_ids"].shape[1]
        for name in (*LOG_PROBS, *TOP_K, ROW_WEIGHT):
            if name in examples[0]:
                batch[name] = self._stack([torch.tensor(example[name]) for example in examples], width)
        batch[WEIGHTS] = self._stack([self._weights(example) for example in examples], width)
        return batch

    def _weights(self, example: dict[str, Any]) -> Tensor:
        counts = torch.tensor(example["labels"]) != -100
        weights = torch.zeros(len(counts))
        sequences = counts.split(example.get("seq_lengths", [len(counts)]))
        weights[counts] = sequence_weights([int(sequence.sum()) for sequence in sequences], self.loss_aggregation)
        return weights

    def _stack(self, rows: list[Tensor], width: int) -> Tensor:
        rows = [torch.cat(rows)] if self.padding_free else rows
        stacked = rows[0].new_zeros(len(rows), width, *rows[0].shape[1:])
        for target, row in zip(stacked, rows, strict=True):
            target[: len(row)] = row
        return stacked

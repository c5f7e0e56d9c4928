"""The rows that a trainer is given: whether there are enough of them for a step, and whether each has a prompt."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin
from transformers.trainer_utils import has_length

from trl_blend.errors import ConfigError
from trl_blend.rollouts.prompts import check_prompts


class RowsNeeded(NamedTuple):
    """Rows of the dataset without which no step can be made, and the settings that say so."""

    rows: int
    because: str


def check_data(train_dataset: Any, eval_dataset: Any, args: Any, needed: RowsNeeded) -> None:
    """
    Refuse data with which not one step, or no evaluation, could be made. What a stream holds is not known before.

    Raises:
        [`~trl_blend.errors.ConfigError`]: With the number of rows that there are, and that are needed.
    """
    if isinstance(train_dataset, dict):
        raise ConfigError(
            f"`train_dataset` is a dictionary of {', '.join(map(str, train_dataset))}. Pass one of its splits."
        )
    if train_dataset is not None and not has_length(train_dataset) and args.max_steps <= 0:
        raise ConfigError("`train_dataset` is a stream, which does not say how many rows it has. Set `max_steps`.")
    for name, dataset in _named(train_dataset, eval_dataset):
        rows = len(dataset) if has_length(dataset) else None
        if rows == 0:
            raise ConfigError(f"`{name}` has no rows (0). Pass at least one, or leave `{name}` out.")
        if name == "train_dataset" and rows is not None and rows < needed.rows:
            raise ConfigError(
                f"`train_dataset` has {rows} row{'' if rows == 1 else 's'}, but one batch takes {needed.rows} "
                f"({needed.because}): not one step could be made. Pass more rows, or make the batch smaller."
            )


def check_evaluation(eval_dataset: Any, args: Any) -> None:
    """Refuse evaluations of nothing."""
    if args.eval_strategy != "no" and eval_dataset is None:
        raise ConfigError(
            f"`eval_strategy={getattr(args.eval_strategy, 'value', args.eval_strategy)!r}` without `eval_dataset`. "
            "Pass one, or set `eval_strategy='no'`."
        )


def check_prompt_columns(train_dataset: Any, eval_dataset: Any, processing_class: Any) -> None:
    """
    Refuse rows without a prompt, of the training and of every evaluation set.

    Raises:
        [`~trl_blend.errors.ConfigError`]: Names the dataset, its columns or the row, and the remedy.
    """
    for name, dataset in _named(train_dataset, eval_dataset):
        if not isinstance(dataset, Dataset | IterableDataset):
            continue
        columns = dataset.column_names
        if columns is not None and "prompt" not in columns:
            raise ConfigError(
                f"`{name}` has no column `prompt` but {', '.join(columns)}. Rename the column that holds the prompts."
            )
        with_images = isinstance(processing_class, ProcessorMixin) or {"image", "images"} & set(columns or ())
        if not with_images:  # which only runs without a blend take, and TRL checks
            check_prompts(dataset, what=f"`{name}`")


def _named(train_dataset: Any, eval_dataset: Any) -> Iterator[tuple[str, Any]]:
    if train_dataset is not None:
        yield "train_dataset", train_dataset
    if isinstance(eval_dataset, dict):
        yield from ((f"eval_dataset[{key!r}]", dataset) for key, dataset in eval_dataset.items())
    elif eval_dataset is not None and not isinstance(eval_dataset, str):
        yield "eval_dataset", eval_dataset

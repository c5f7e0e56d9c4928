"""Prompts of the training scripts: the test-bed's, or those of a data set whose columns are named."""

import importlib
from pathlib import Path
from typing import Any

from trl_blend import _resources
from trl_blend.errors import ConfigError


TESTBED = _resources.examples_dir() / "testbed" / "checkpoints"


def is_testbed(script_args: Any, dataset_args: Any) -> bool:
    """Whether no dataset is named, so that prompts are the test-bed's."""
    return not script_args.dataset_name and not dataset_args.datasets


def prompts_name(script_args: Any, dataset_args: Any) -> str | None:
    """What the card calls the prompts."""
    return str(TESTBED.parent) if is_testbed(script_args, dataset_args) else script_args.dataset_name


def load_prompts(script_args: Any, dataset_args: Any) -> tuple[Any, Any]:
    """Train and test prompts; the test-bed's when no dataset is named."""
    from datasets import load_dataset
    from trl import get_dataset

    if is_testbed(script_args, dataset_args):
        task = importlib.import_module("testbed.task")  # beside the script that runs
        num_test = max(script_args.num_test_prompts, 1)
        return task.build_prompt_dataset("train", 8192), task.build_prompt_dataset("test", num_test)
    name = script_args.dataset_name or ""
    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
    elif name.endswith((".json", ".jsonl")):
        if not Path(name).is_file():
            raise ConfigError(f"`dataset_name={name}`: there is no such file. Correct the path.")
        dataset = load_dataset("json", data_files={script_args.dataset_train_split: name})
    else:
        dataset = load_dataset(name, name=script_args.dataset_config)
    if script_args.dataset_train_split not in dataset:
        raise ConfigError(
            f"`dataset_train_split={script_args.dataset_train_split}` is no split of the dataset. It has "
            f"{', '.join(dataset)}."
        )
    columns = next(iter(dataset.values())).column_names
    for option in ("prompt_column", "answer_column"):
        column = getattr(script_args, option)
        if column and column not in columns:
            raise ConfigError(f"`{option}={column}` is not a column of the dataset. It has {', '.join(columns)}.")
    if not script_args.prompt_column and "prompt" not in columns:
        raise ConfigError(f"The dataset has no column `prompt` but {', '.join(columns)}. Set `prompt_column`.")
    if script_args.prompt_column:
        system = [{"role": "system", "content": script_args.system_prompt}] if script_args.system_prompt else []
        dataset = dataset.map(
            lambda row: {"prompt": [*system, {"role": "user", "content": row[script_args.prompt_column]}]}
        )
    if script_args.answer_column and script_args.answer_column != "solution":
        if "solution" in columns:
            dataset = dataset.remove_columns("solution")
        dataset = dataset.rename_column(script_args.answer_column, "solution")
    train = dataset[script_args.dataset_train_split]
    if script_args.dataset_test_split in dataset:
        return train, dataset[script_args.dataset_test_split]
    # Without a test split, up to a tenth of the data is held out
    num_test = max(1, min(script_args.num_test_prompts, len(train) // 10))
    held_out = train.train_test_split(test_size=num_test, seed=0)
    return held_out["train"], held_out["test"]

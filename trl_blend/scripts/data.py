"""Prompts of the training scripts: the test-bed's, or those of a data set whose columns are named."""

import importlib
from typing import Any

from datasets import Dataset

from trl_blend import _resources
from trl_blend.errors import ConfigError, nearest
from trl_blend.models.limits import context_length
from trl_blend.models.loading import find_config, find_tokenizer
from trl_blend.rollouts import prompts
from trl_blend.scripts.messages import one_line


TESTBED = "testbed"
"""The `dataset_name` of the prompts of `examples/testbed`."""


def prompts_name(script_args: Any) -> str | None:
    """What the card calls the prompts."""
    name = script_args.dataset_name
    return str(_resources.examples_dir() / TESTBED) if name == TESTBED else name


def load_prompts(
    script_args: Any, training_args: Any, model_args: Any, dataset_args: Any
) -> tuple[Dataset, Dataset | None]:
    """
    Train and test prompts, every row of them checked, by what the parser of a script returns.

    Without a test split, up to a tenth of the data is held out, but for `num_test_prompts=0`, which holds out nothing.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the data cannot be read, lack a column, or have a row that is no prompt
            or leaves no room for a completion.
    """
    wanted = script_args.num_test_prompts
    if dataset_args.datasets:
        splits = _read_mixture(dataset_args)
    else:
        splits = _read_named(script_args.dataset_name, "dataset_name", script_args)
    splits = _prepare(splits, script_args, training_args, model_args)
    train, test = splits["train"], splits.get("test")
    if test is not None or not wanted:
        return train, test if wanted else None
    if len(train) < 2:
        raise ConfigError(
            f"`--num_test_prompts {wanted}` holds rows out for the table, and the dataset has one row. Give more, or "
            "set `--num_test_prompts 0`."
        )
    held_out = train.train_test_split(test_size=max(1, min(wanted, len(train) // 10)), seed=0)
    return held_out["train"], held_out["test"]


def load_test_prompts(script_args: Any, training_args: Any, model_args: Any) -> Dataset:
    """Prompts of `test_dataset_name`: its test split, or else its train split; checked as in [`load_prompts`]."""
    splits = _read_named(script_args.test_dataset_name, "test_dataset_name", script_args)
    name = "test" if "test" in splits else "train"
    return _prepare({name: splits[name]}, script_args, training_args, model_args)[name]


def _read_named(name: str, argument: str, script_args: Any) -> dict[str, Dataset]:
    """The train split, and the test split where there is one."""
    if name == TESTBED:
        for option, own in (
            ("dataset_config", None),
            ("dataset_train_split", "train"),
            ("dataset_test_split", "test"),
        ):
            if getattr(script_args, option) != own:
                raise ConfigError(
                    f"`{option}={getattr(script_args, option)}` is of a dataset, not of `{TESTBED}`. Drop it."
                )
        task = importlib.import_module("testbed.task")  # beside the script that runs
        num_test = max(script_args.num_test_prompts, 1)
        return {
            "train": task.build_prompt_dataset("train", 8192),
            "test": task.build_prompt_dataset("test", num_test),
        }
    found = prompts.read_split(name, argument, script_args.dataset_config, None)
    wanted = {"train": script_args.dataset_train_split, "test": script_args.dataset_test_split}
    for split, own in wanted.items():
        if own not in found and (split, own) != ("test", "test"):
            raise ConfigError(
                f"`dataset_{split}_split={own}` is no split of the dataset. It has {', '.join(map(str, found))}."
            )
    return {split: found[own] for split, own in wanted.items() if own in found}


def _read_mixture(dataset_args: Any) -> dict[str, Dataset]:
    from trl import get_dataset

    try:
        return dict(get_dataset(dataset_args))
    except Exception as error:  # those of `load_dataset` are many, and not of one family
        raise ConfigError(f"`datasets` cannot be read: {one_line(error)}") from error


def _prepare(splits: dict[str, Dataset], script_args: Any, training_args: Any, model_args: Any) -> dict[str, Dataset]:
    """The splits with the columns that the trainers read; refuses rows that are no prompts, or are too long."""
    prepared = {}
    for split, dataset in splits.items():
        if not len(dataset):
            raise ConfigError(f"The {split} split is empty. Give at least one prompt.")
        prepared[split] = _rename(dataset, script_args, _called(split))
    name = model_args.model_name_or_path
    hub = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    config = find_config(name, "model_name_or_path", **hub)
    tokenizer = find_tokenizer(name, "model_name_or_path", required=True, **hub)
    template_kwargs = getattr(training_args, "chat_template_kwargs", None)
    has_limit = training_args if hasattr(training_args, "max_completion_length") else script_args
    completion = has_limit.max_completion_length
    limit = context_length(config, tokenizer)
    for split, dataset in prepared.items():
        tokens = prompts.PromptTokens(dataset, tokenizer, template_kwargs=template_kwargs, what=_called(split))
        scan = tokens.scan(prompts.shard_bounds(len(dataset), 1024))
        prompts.check_prompt_lengths(scan, completion, limit, _called(split))
    return prepared


def _called(split: str) -> str:
    return "the prompts" if split == "train" else f"the {split} prompts"


def _rename(dataset: Dataset, script_args: Any, what: str) -> Dataset:
    columns, column, answer = dataset.column_names, script_args.prompt_column, script_args.answer_column
    for option in ("prompt_column", "answer_column"):
        named = getattr(script_args, option)
        if named and named not in columns:
            raise ConfigError(
                f"`{option}={named}` is not a column of the dataset{nearest(named, columns)} It has "
                f"{', '.join(columns)}."
            )
    if not column and "prompt" not in columns:
        raise ConfigError(f"The dataset has no column `prompt` but {', '.join(columns)}. Set `prompt_column`.")
    if column:
        system = [{"role": "system", "content": script_args.system_prompt}] if script_args.system_prompt else []

        prompts.check_prompts(dataset, column, what)

        def as_messages(value: Any) -> Any:
            return [*system, *([{"role": "user", "content": value}] if isinstance(value, str) else value)]

        dataset = dataset.map(lambda row: {"prompt": as_messages(row[column])})
    if answer and answer != "solution":
        dataset = dataset.remove_columns("solution") if "solution" in columns else dataset
        dataset = dataset.rename_column(answer, "solution")
    return dataset

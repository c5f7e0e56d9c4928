"""What the scripts share about data: their arguments, loading prompts, and loading rewards by name."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ScriptArguments

from trl_blend import _resources
from trl_blend.errors import ConfigError


TESTBED = _resources.examples_dir() / "testbed" / "checkpoints"
TESTBED_REWARDS = [
    "testbed.task.format_and_answer_reward",
    "testbed.task.answer_reward",
    "testbed.task.format_reward",
]
# What a trainer passes to every reward function, beside the columns of the dataset
_PASSED_TO_REWARDS = {
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
}


@dataclass
class PromptScriptArguments(ScriptArguments):
    """
    Arguments of a script that reads prompts.

    Args:
        dataset_name (`str`, *optional*):
            Hub id, local folder or `.json`/`.jsonl` file of prompts. Defaults to the additions of `examples/testbed`.
        prompt_column (`str`, *optional*):
            Column of plain questions, when the dataset has no conversational `prompt` column.
        answer_column (`str`, *optional*):
            Column of reference answers, renamed to the `solution` that TRL's rewards read.
        system_prompt (`str`, *optional*):
            System message put before each question of `prompt_column`.
        num_test_prompts (`int`, *optional*, defaults to `300`):
            Prompts of the test split for the before/after table. 0 skips it. Without a test split, up to a tenth of
            the data is held out.
    """

    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of plain questions, when there is no `prompt` column."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Column of reference answers, renamed to `solution`."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message put before each question of `prompt_column`."}
    )
    num_test_prompts: int = field(
        default=300, metadata={"help": "Prompts of the test split for the before/after table. 0 skips it."}
    )


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
        from testbed.task import build_prompt_dataset

        num_test = max(script_args.num_test_prompts, 1)
        return build_prompt_dataset("train", 8192), build_prompt_dataset("test", num_test)
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


def load_reward(name: str) -> Callable[..., Any]:
    """A reward function by the name of one of TRL's, or by its dotted import path."""
    module_name, _, function = name.rpartition(".")
    if not module_name and name not in ("accuracy_reward", "think_format_reward"):
        raise ConfigError(
            f"`reward_funcs` has {name!r}. Use accuracy_reward, think_format_reward, or a dotted import path such as "
            "rewards.boxed_accuracy_reward."
        )
    module_name = module_name or "trl.rewards"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # something that the module imports
        raise ConfigError(
            f"`reward_funcs` has {name!r}, but there is no module {error.name!r} on the import path. Add its folder "
            "to PYTHONPATH."
        ) from error
    if not hasattr(module, function):
        known = [name for name, value in vars(module).items() if callable(value) and name.endswith("reward")]
        raise ConfigError(f"`reward_funcs` has {name!r}, but {module_name} has no {function!r}: {', '.join(known)}.")
    return getattr(module, function)


def check_reward_columns(reward_funcs: Sequence[Callable[..., Any]], columns: Sequence[str]) -> None:
    """Refuse a reward function that reads a column which the dataset lacks."""
    for function in reward_funcs:
        for name, parameter in inspect.signature(function).parameters.items():
            required = parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            )
            if required and name not in _PASSED_TO_REWARDS and name not in columns:
                remedy = " Name the column of reference answers with `answer_column`." if name == "solution" else ""
                raise ConfigError(
                    f"{getattr(function, '__name__', function)} reads the column `{name}`, which the dataset lacks: "
                    f"it has {', '.join(columns)}.{remedy}"
                )

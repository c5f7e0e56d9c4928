"""Reward functions by name, and whether a data set has the columns that they read."""

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from trl_blend.errors import ConfigError, nearest


_OF_TRL = ("accuracy_reward", "think_format_reward")
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


def load_rewards(names: Sequence[str], columns: Sequence[str]) -> list[Callable[..., Any]]:
    """
    Reward functions by their names, see [`load_reward`], for rows that have these columns.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is no such function, or it reads a column that is not there.
    """
    rewards = [load_reward(name) for name in names]
    check_reward_columns(rewards, columns)
    return rewards


def load_reward(name: str) -> Callable[..., Any]:
    """A reward function by the name of one of TRL's, or by its dotted import path."""
    module_name, _, function = name.rpartition(".")
    if name not in _OF_TRL and not re.fullmatch(r"\w+(\.\w+)+", name):
        raise ConfigError(
            f"`reward_funcs` has {name!r}{nearest(name, _OF_TRL) or '.'} Use {', '.join(_OF_TRL)}, or a dotted import "
            "path such as rewards.boxed_accuracy_reward."
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
    found = getattr(module, function, None)
    if not callable(found):
        known = [name for name, value in vars(module).items() if callable(value) and name.endswith("reward")]
        raise ConfigError(
            f"`reward_funcs` has {name!r}, but {module_name} has no function {function!r}"
            f"{nearest(function, known) or '.'} It has {', '.join(known) or 'none whose name ends in `reward`'}."
        )
    return found


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

"""
What a training script asks of its options, whatever the model: what has to be named, what has no effect as the others
are set, and numbers out of range. It imports nothing, so that the command line can ask before it imports TRL.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_blend.errors import ConfigError


Given = Mapping[str, Any]


class Need(NamedTuple):
    """An option that a run does not start without, what it names, and when it may be left out."""

    option: str
    what: str
    unless: Callable[[Given], bool] = lambda given: False


def _trains_no_blend(given: Given) -> bool:
    """With an adapter the teacher is the student's own base; without a weight there is none."""
    weights = given.get("teacher_weight")
    weights = weights if isinstance(weights, (list, tuple)) else [weights]
    return _is_on(given, "use_peft") or (_is_zero(weights) and given.get("teacher_weight_schedule") != "adaptive")


def _is_on(given: Given, name: str) -> bool:
    # On the command line a switch may stand without a value
    return name in given and str(given[name] if given[name] != [] else True).strip("[']").lower() in ("true", "1")


def _is_zero(values: Sequence[Any]) -> bool:
    try:
        return not any(float(value) for value in values)
    except (TypeError, ValueError):
        return False


_STUDENT = Need("model_name_or_path", "the student")
_TEACHER = Need("teacher_model_name_or_path", "the teacher")
_PROMPTS = Need("dataset_name", "the prompts", lambda given: bool(given.get("datasets")))
GRPO_MIX = (
    _STUDENT,
    _TEACHER._replace(unless=_trains_no_blend),
    _PROMPTS,
    Need("reward_funcs", "what is trained on"),
)
TRUST_REGION_OPD = SFT_WARMUP = (_STUDENT, _TEACHER, _PROMPTS)
OFFLINE_OPD = (
    Need("model_name_or_path", "the student that made the rollouts"),
    Need("dataset_name", "scored rollouts, the output of `trl-blend score`"),
)


def check_required(needs: Iterable[Need], given: Given) -> None:
    """
    Refuse to fill in what a run is about: all that is missing is named at once. A value that is `None` or empty is not
    given.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If something is missing.
    """
    missing = [need for need in needs if given.get(need.option) in (None, [], "") and not need.unless(given)]
    if missing:
        named = ", ".join(f"`--{need.option}` ({need.what})" for need in missing)
        raise ConfigError(f"{named} {'is' if len(missing) == 1 else 'are'} missing. Nothing is filled in: name it.")


class _Rule(NamedTuple):
    """Options that are read only together with others."""

    options: tuple[str, ...]
    needs: str
    holds: Callable[[Given], Any]


_LORA = ("r", "alpha", "dropout", "target_modules", "target_parameters", "modules_to_save", "task_type")
_BITS = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
_NAMED = ("dataset_config", "dataset_train_split", "dataset_test_split")
# Of `offline-opd`, whose `dataset_name` is a store: everything about prompts is about those of the table
_TEST = ("prompt_column", "answer_column", "system_prompt", "reward_funcs", "num_test_prompts", *_NAMED)
_REVISIONS = {
    "model_revision": "model_name_or_path",
    "teacher_model_revision": "teacher_model_name_or_path",
    "dataset_revision": "dataset_name",
    "rollouts_revision": "rollouts",
}
_RULES = (
    _Rule(("system_prompt",), "with `--prompt_column`", lambda given: given.get("prompt_column")),
    _Rule(("test_split_size",), "with `datasets`", lambda given: given.get("datasets")),
    _Rule(
        ("dataset_name", *_NAMED),
        "without `datasets`, which name their own",
        lambda given: not given.get("datasets"),
    ),
    _Rule(("streaming", "dataset_streaming"), "where rows are not read by their number", lambda given: False),
    _Rule(("ignore_bias_buffers",), "in other scripts", lambda given: False),
    _Rule(
        (*(f"lora_{name}" for name in _LORA), "use_rslora", "use_dora"),
        "with `--use_peft`",
        lambda given: given.get("use_peft"),
    ),
    _Rule(_BITS, "with `--load_in_4bit`", lambda given: given.get("load_in_4bit")),
    _Rule(
        (*_TEST, "max_completion_length"),
        "with `--test_dataset_name`",
        lambda given: given.get("test_dataset_name") or "test_dataset_name" not in given,
    ),
)


def check_effects(given: Given, default: Callable[[str], Any]) -> None:
    """
    Refuse an option that is set to something else than its default, and is not read as the others are set.

    Raises:
        [`~trl_blend.errors.ConfigError`]: For the first one.
    """
    for rule in _RULES:
        for name in rule.options:
            if name in given and given[name] not in (default(name), None) and not rule.holds(given):
                raise ConfigError(
                    f"`--{name} {_shown(given[name])}` has no effect here: it is only read {rule.needs}. Drop it."
                )
    for revision, named in _REVISIONS.items():
        name, value = given.get(named), given.get(revision)
        for one in name if isinstance(name, list) else [name]:
            if value not in (None, default(revision)) and one is not None and Path(one).is_dir():
                raise ConfigError(f"`--{revision} {value}` is of the Hub, and {one} is a folder. Drop one of them.")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def check_ranges(given: Given) -> None:
    """
    Refuse numbers outside of their range; those of the configurations are checked by them.

    Raises:
        [`~trl_blend.errors.ConfigError`]: For the first one.
    """
    least = {"num_test_prompts": 0, "lora_r": 1, "lora_alpha": 1}
    for name in (*least, "lora_dropout"):
        if name in given and given[name] is None:  # without a value in a settings file
            raise ConfigError(f"`--{name}` has no value. Give it a number, or leave it out.")
    for name, value in least.items():
        if given.get(name, value) < value:
            raise ConfigError(f"`--{name} {given[name]}` must be at least {value}.")
    for name, value in given.items():
        if name.endswith("_kwargs") and isinstance(value, str):
            raise ConfigError(f"`--{name} {value}` is no JSON object. Write '{{\"name\": value}}'.")
    if not 0.0 <= given.get("lora_dropout", 0.0) < 1.0:
        raise ConfigError(f"`--lora_dropout {given['lora_dropout']}` must be in [0, 1).")

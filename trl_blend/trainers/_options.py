"""What the configs share: an option is described in the docstring alone, and what no run can mean is refused."""

import dataclasses
import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_origin

from trl_blend.errors import ConfigError, nearest


Config = TypeVar("Config", bound=type)

# Smallest value, largest value, and what a setting must be
Range = tuple[float, float, str]

ABOVE_ZERO = math.nextafter(0.0, 1.0)
BELOW_ONE = math.nextafter(1.0, 0.0)
_AT_LEAST_ONE = (1, math.inf, "at least 1")
_NOT_NEGATIVE = (0.0, math.inf, "at least 0")
_POSITIVE = (ABOVE_ZERO, math.inf, "positive")
_DISTANCES = ("/reverse_kl", "/drift_kl", "/divergence", "/unlikely_share")
# Settings of the parents that are refused late, in a traceback, or not at all
_RANGES: dict[str, Range] = {
    "per_device_train_batch_size": _AT_LEAST_ONE,
    "per_device_eval_batch_size": _AT_LEAST_ONE,
    "gradient_accumulation_steps": _AT_LEAST_ONE,
    "num_generations": _AT_LEAST_ONE,
    "num_iterations": _AT_LEAST_ONE,
    "steps_per_generation": _AT_LEAST_ONE,
    "generation_batch_size": _AT_LEAST_ONE,
    "max_completion_length": _AT_LEAST_ONE,
    "max_length": _AT_LEAST_ONE,
    "learning_rate": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "temperature": _POSITIVE,
    "repetition_penalty": _POSITIVE,
    "top_p": (ABOVE_ZERO, 1.0, "above 0 and at most 1"),
    "min_p": (0.0, 1.0, "between 0 and 1"),
    "top_k": _NOT_NEGATIVE,
}
_ENTRY = re.compile(r"^    (\w+) \(.+\):\n((?:        .+\n|\n)+)", flags=re.MULTILINE)


def with_help(config: Config) -> Config:
    """
    Class decorator of a config: what the docstring says of an option is its help on the command line.

    An option of the parent that only has another default keeps the parent's help.
    """
    described = described_options(inspect.getdoc(config))
    inherited = {field.name: field for base in config.__mro__[:0:-1] for field in _fields(base)}
    for field in _fields(config):
        if field.name not in config.__annotations__:
            continue
        if field.name in described:
            field.metadata = MappingProxyType({"help": described[field.name].replace("%", "%%")})
        elif field.name in inherited:
            field.metadata = inherited[field.name].metadata
    return config


def described_options(docstring: str | None) -> dict[str, str]:
    """What the docstring of a config says of each option, in one line without the marks of formulas and links."""
    entries = {name: " ".join(text.split()) for name, text in _ENTRY.findall(f"{docstring}\n\n")}
    without_formulas = {name: re.sub(r"\\\\\( (.+?) \\\\\)", r"\1", text) for name, text in entries.items()}
    return {name: re.sub(r"\[`~?([^`]+)`\]", r"`\1`", text) for name, text in without_formulas.items()}


def check_choices(args: Any, words: Mapping[str, tuple[Any, ...]] | None = None) -> None:
    """
    Refuse a word that an option does not know: `words` of each, by default those of the options that are annotated as
    `Literal`.

    Raises:
        [`~trl_blend.errors.ConfigError`]: With the words it knows.
    """
    for name, choices in (choices_of(type(args)) if words is None else words).items():
        if getattr(args, name) not in choices:
            allowed = ", ".join(repr(choice) for choice in choices if choice is not None)
            raise ConfigError(f"`{name}={getattr(args, name)!r}` is unknown. Choose one of {allowed}.")


def choices_of(config: type) -> dict[str, tuple[Any, ...]]:
    """The words that each option of a config knows, `None` among them where it may be left out."""
    annotations: dict[str, Any] = {}
    for base in reversed(config.__mro__):
        annotations |= vars(base).get("__annotations__", {})
    found = {}
    for name, annotation in annotations.items():
        kinds = [annotation] if get_origin(annotation) is Literal else list(get_args(annotation))
        if kinds and all(kind is type(None) or get_origin(kind) is Literal for kind in kinds):
            found[name] = tuple(word for kind in kinds for word in get_args(kind) or (None,))
    return found


def check_run(args: Any) -> None:
    """
    Refuse what no run can mean: no steps, an empty batch, sampling at temperature 0, a report to nobody.

    Raises:
        [`~trl_blend.errors.ConfigError`]: With the value, and the values that there are.
    """
    check_ranges(args, _RANGES)
    _check_range("max_steps", args.max_steps, -math.inf, math.inf, "a number")
    if args.max_steps == 0:
        raise ConfigError("`max_steps=0` trains nothing. Set it to a number of steps, or leave it out for epochs.")
    if args.max_steps < 0:
        _check_range("num_train_epochs", args.num_train_epochs, *_POSITIVE)
    _check_reports(args.report_to)


def set_direction(args: Any) -> None:
    """Let less be better for a metric of ours that selects the best model and is a distance."""
    if args.greater_is_better is None and (args.metric_for_best_model or "").endswith(_DISTANCES):
        args.greater_is_better = False  # transformers knows that of names that end in "loss" only


def refuse_selecting_by_loss(args: Any, loss: str, metric: str) -> None:
    """
    Refuse to select the best model by the value of a loss that is no divergence, where `metric` is one.

    Raises:
        [`~trl_blend.errors.ConfigError`]: With the metric to take.
    """
    selected = args.metric_for_best_model or ""  # the parent has set it where something selects by a metric
    if selected == "loss" or selected.endswith("_loss"):
        raise ConfigError(
            f"`metric_for_best_model={selected!r}`: the {loss} loss is no divergence by value and can rise while the "
            f"student comes closer to its teacher. Set `metric_for_best_model={metric!r}`."
        )


def check_ranges(args: Any, ranges: Mapping[str, Range]) -> None:
    """
    Refuse a setting that is out of its range, infinite, or no number. `None`, or none of that name, is passed over.

    Raises:
        [`~trl_blend.errors.ConfigError`]: With the value, and what it must be.
    """
    for name, bounds in ranges.items():
        _check_range(name, getattr(args, name, None), *bounds)


def check_generation_kwargs(args: Any) -> None:
    """
    Refuse a setting of `generate` that there is not, which would change nothing, or one out of its range. To be called
    when the dictionary is parsed: the command line has it as text.

    Raises:
        [`~trl_blend.errors.ConfigError`]: With the nearest name, or the value.
    """
    given = args.generation_kwargs or {}
    for name, bounds in _RANGES.items():
        _check_range(name, given.get(name), *bounds)
    if args.use_vllm:
        return  # other names, which vLLM knows
    from transformers import GenerationConfig

    known = set(vars(GenerationConfig()))
    for name in given:
        if name not in known:
            found = nearest(name, known) or "."
            raise ConfigError(
                f"`generation_kwargs` has {name!r}, which is no setting of `generate`{found} Correct it."
            )


def check_drafts(args: Any, blends: bool) -> None:
    """
    Refuse drafts that nothing draws, for want of a step that `blends`. To be called when the dictionaries are parsed.

    Raises:
        [`~trl_blend.errors.ConfigError`]: With the settings that contradict each other.
    """
    drafts = args.vllm_draft_tokens
    if drafts is None:
        return
    if isinstance(drafts, str) and drafts.isdigit():  # as the command line has it
        drafts = args.vllm_draft_tokens = int(drafts)
    given = f"`vllm_draft_tokens={drafts!r}`"
    if drafts != "auto" and (isinstance(drafts, bool) or not isinstance(drafts, int) or drafts < 1):
        raise ConfigError(f"{given} must be a number of tokens, at least 1, or 'auto'. Leave it unset for no drafts.")
    if not args.use_vllm:
        raise ConfigError(f"{given} has no effect with `use_vllm=False`. Set `use_vllm=True`, or leave it unset.")
    if not blends:
        raise ConfigError(
            f"{given}: no step of this run uses a teacher, and the student would draft for itself. Leave it unset."
        )
    if args.vllm_mode == "server":
        raise ConfigError(
            f"{given} has no effect with `vllm_mode='server'`: a server drafts if it was started with "
            "`--speculative-config`. Leave it unset."
        )
    unsupported = {"min_p": getattr(args, "min_p", None), **(args.generation_kwargs or {})}
    for name in ("min_p", "logit_bias"):
        if unsupported.get(name):
            raise ConfigError(
                f"vLLM has no `{name}` with drafts, and `{name}={unsupported[name]!r}`. Leave it at its neutral "
                "value, or leave `vllm_draft_tokens` unset."
            )


def _check_range(name: str, value: Any, low: float, high: float, must_be: str) -> None:
    if value is None or (isinstance(value, Real) and math.isfinite(value) and low <= value <= high):
        return
    must_be = must_be if isinstance(value, Real) else "a number"
    hint = " Greedy rollouts (0) are none to learn from." if name == "temperature" else ""
    raise ConfigError(f"`{name}={value!r}` must be {must_be}.{hint}")


def _check_reports(report_to: Any) -> None:
    # Here, for the help of the commands is read from this module's neighbours in no time
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    names = [] if names in (["all"], ["none"]) else names
    try:
        get_reporting_integration_callbacks(names)
    except ValueError as error:
        raise ConfigError(f"`report_to={report_to!r}`: {error} `'none'` reports to nobody.") from error
    # Those that name themselves: the callbacks of the others say what they lack
    absent = {"comet_ml", "mlflow", "tensorboard", "trackio", "wandb"} & set(names)
    absent -= set(get_available_reporting_integrations() if absent else ())
    if absent:
        missing = ", ".join(sorted(absent))
        raise ConfigError(
            f"`report_to={report_to!r}` needs {missing}, which is not installed. Install it, or drop it."
        )


def refuse_unread(args: Any, names: Iterable[str], switch: str, *needed: Any) -> None:
    """
    Refuse settings that nothing reads because of another one, `switch`: those that are not at their default. They are
    read with its values `needed`; without one, with any other than it has.

    Raises:
        [`~trl_blend.errors.ConfigError`]: Names both settings and their values.
    """
    remedy = "Set " + " or ".join(f"`{switch}={value!r}`" for value in needed) if needed else f"Change `{switch}`"
    for name in names:
        if not is_default(args, name):
            raise ConfigError(
                f"`{name}={getattr(args, name)!r}` has no effect with `{switch}={getattr(args, switch)!r}`. {remedy}, "
                f"or leave `{name}` unset, in a settings file too."
            )


def is_default(args: Any, name: str) -> bool:
    """Whether a setting has the default of its field."""
    field = args.__dataclass_fields__[name]
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return getattr(args, name) == default


def _fields(config: type) -> Iterator[dataclasses.Field]:
    yield from getattr(config, "__dataclass_fields__", {}).values()

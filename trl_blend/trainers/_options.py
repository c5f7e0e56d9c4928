"""What the configs share: an option is described in the docstring alone, and one of a few words is checked as such."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_origin

from trl_blend.errors import ConfigError


Config = TypeVar("Config", bound=type)
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


def check_choices(args: Any) -> None:
    """
    Refuse a word that an option does not know. Options of a few words are annotated as `Literal`.

    Raises:
        [`~trl_blend.errors.ConfigError`]: With the words it knows.
    """
    for name, choices in choices_of(type(args)).items():
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


def _fields(config: type) -> Iterator[dataclasses.Field]:
    yield from getattr(config, "__dataclass_fields__", {}).values()

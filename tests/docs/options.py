"""
The option lists of the trainers' pages, written from the docstrings of the configs:

    python -m tests.docs.options

A docstring is the one place where an option is described; `test_options.py` compares it with the dataclass, and the
pages with it.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any, NamedTuple

from tests.docs.markdown import ROOT, TRAINER_PAGES, read


BEGIN = "<!-- Options: written by `python -m tests.docs.options` from the docstring of the config. Do not edit. -->"
END = "<!-- End of the options -->"
_ITEM = re.compile(r"^    (\w+(?:, \w+)*) \((.+)\):$")


class Option(NamedTuple):
    """One documented option: what its type and default are said to be, and the text."""

    group: str
    name: str
    type: str
    default: str | None
    text: str


def own_fields(config: type) -> dict[str, dataclasses.Field]:
    """Fields that a config adds to, or redefines of, its parent."""
    return {field.name: field for field in dataclasses.fields(config) if field.name in config.__annotations__}


def trl_parent(config: type) -> type:
    """The config of TRL that a config extends."""
    return next(base for base in config.__mro__ if base.__module__.startswith("trl."))


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field, also where it is made by a factory."""
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory()


def documented(config: type) -> list[Option]:
    """The options in the section `Parameters:` of the docstring."""
    options, group = [], ""
    lines = inspect.getdoc(config).partition("Parameters:\n")[2].splitlines()
    for index, line in enumerate(lines):
        if line and not line.startswith("    "):
            break
        if line.startswith("    > "):
            group = line.removeprefix("    > Parameters that control ").strip()
        elif match := _ITEM.match(line):
            text = []
            for follow in lines[index + 1 :]:
                if not follow.startswith("        "):
                    break
                text.append(follow.strip())
            described = match[2].partition(", *optional*")
            default = re.search(r"defaults to `(.+)`", described[2])
            options.append(Option(group, match[1], described[0], default[1] if default else None, " ".join(text)))
    return options


def changed_defaults(config: type) -> dict[str, tuple[str, str, str]]:
    """Options of the parent with another default, from the note of the docstring: `{name: (ours, parent's, text)}`."""
    note = " ".join(line.lstrip("> ") for line in inspect.getdoc(config).partition("> [!NOTE]")[2].splitlines())
    sentences = re.findall(r"- `(\w+)`: (Defaults to .*?)(?= - `|$)", note)
    values = [re.match(r"Defaults to `([^`]+)`(?: instead of `([^`]+)`)?", text) for _, text in sentences]
    return {name: (value[1], value[2], text) for (name, text), value in zip(sentences, values, strict=True)}


def as_value(text: str | None) -> Any:
    """The Python value that a docstring names as a default."""
    return None if text is None else ast.literal_eval(text)


def _markdown(text: str) -> str:
    text = re.sub(r"\\\\\((.+?)\\\\\)", lambda match: f"${match[1].strip()}$", text)
    return re.sub(r"\[`~?([\w.]+)`\]", lambda match: f"`{match[1].removeprefix('trl_blend.')}`", text)


def _entry(text: str) -> str:
    return textwrap.fill(
        f"* {text}", width=119, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def render(config: type) -> str:
    """The Markdown between the two markers."""
    lines, group = [], ""
    for option in documented(config):
        if option.group != group:
            group = option.group
            lines += ["", f"**{group[0].upper()}{group[1:]}**", ""]
        default = f"default `{option.default}`" if option.default else "optional"
        lines.append(_entry(_markdown(f"`{option.name}` ({option.type}, {default}): {option.text}")))
    changed = changed_defaults(config)
    if changed:
        lines += ["", f"**Defaults that differ from those of `{trl_parent(config).__name__}`**", ""]
    lines += [_entry(_markdown(f"`{name}`: {text}")) for name, (_, _, text) in changed.items()]
    return "\n".join([BEGIN, *lines, "", END])


def with_options(page_text: str, config: type) -> str:
    """A page with its list of options made new."""
    before, found, rest = page_text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    assert found and ended, "the page lacks the markers of its options"
    return before + render(config) + after


def main() -> None:
    import trl_blend

    for page, name in TRAINER_PAGES.items():
        (ROOT / page).write_text(with_options(read(page), getattr(trl_blend, name)), encoding="utf-8")


if __name__ == "__main__":
    main()

"""
What a model card says, as text and tables: names, settings beside those of a paper, results; and its rendering with
the templates of `model_cards/`. Nothing here knows a trainer.
"""

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, pass_context

from trl_blend._resources import model_card_template
from trl_blend.reports.names import shown_name, without_paths


Row = tuple[str, ...]
Table = tuple[Row, list[Row]]
"""Header and rows."""


# -------------------- values and names


def shown_value(value: Any) -> str:
    """A value of a setting, for a reader."""
    value = _plain(value)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown_value, value))
    return str(value)


def _plain(value: Any) -> Any:
    value = value.value if isinstance(value, Enum) else value
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def cell(value: Any) -> str:
    """A value in a cell of a Markdown table."""
    text = " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
    return text or "-"


def code(value: Any) -> str:
    """A name as a code span."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39))}`"


def model_link(name: Any, commit: str | None = None, kind: str = "") -> str:
    """
    A model, or with `kind="datasets/"` a data set, as a card names it: `name` is a name, id or path, `commit` a commit
    on the Hub or another revision.
    """
    shown = shown_name(name)
    if not shown.text:
        return "a dataset without a name" if kind else "a model without a name"
    if shown.hub_id is None:
        return f"{code(shown.text)} (a local {'dataset' if kind else 'model'})"
    commit = commit or shown.commit
    text = f"[{shown.hub_id}](https://huggingface.co/{kind}{shown.hub_id})"
    if not commit:
        return text
    return f"{text} at commit `{commit[:12]}`" if is_commit(commit) else f"{text} at revision {code(commit)}"


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit, which cannot move, rather than a branch or a tag."""
    return bool(revision and re.fullmatch(r"[0-9a-f]{7,64}", revision))


class CardTeacher(NamedTuple):
    """A teacher in a card: its identity is `"verified"`, `"stated"` or `"unknown"`, and the reason for that."""

    name: str | None
    commit: str | None
    dtype: str | None
    state: str
    reason: str

    @property
    def shown(self) -> str:
        text = model_link(self.name, self.commit)
        return f"{text}, {self.dtype}" if self.dtype else text


# -------------------- settings beside those of a paper


@dataclass(frozen=True)
class PaperValue:
    """
    What a paper, or its authors' code, does for one setting of the method.

    Args:
        label (`str`):
            Name of the setting in the card.
        values (`tuple`, *optional*, defaults to `()`):
            Values that are used there. A run with one of them does not differ. None of them: the run always does.
        source (`str`, *optional*, defaults to `""`):
            Where that is stated.
        text (`str`, *optional*):
            How the card writes it. Defaults to the values; without values, to `"not given"`.
    """

    label: str
    values: tuple[Any, ...] = ()
    source: str = ""
    text: str = ""

    @property
    def shown(self) -> str:
        *others, last = [shown_value(value) for value in self.values] or ["not given"]
        text = self.text or " or ".join([", ".join(others), last] if others else [last])
        return f"{text} ({self.source})" if self.source else text


class PaperComparison(NamedTuple):
    """Settings that differ (name, value of this run, of the paper), and those that do not (name, value)."""

    differences: list[Row]
    agreements: list[Row]


def compare_with_paper(paper: Mapping[str, PaperValue], run: Mapping[str, Any]) -> PaperComparison:
    """Compare the settings of a run with what the paper does: `run` has a value of each setting in `paper`."""
    differences, agreements = [], []
    for name, value in paper.items():
        own = _plain(run[name])
        if any(_equal(own, _plain(one)) for one in value.values):
            agreements.append((value.label, shown_value(own)))
        else:
            differences.append((value.label, shown_value(own), value.shown))
    return PaperComparison(differences, agreements)


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second  # True is no 1 here
    numbers = all(isinstance(value, (int, float)) for value in (first, second))
    return math.isclose(first, second, rel_tol=1e-9) if numbers else first == second


# -------------------- results


def evaluation_table(log_history: Iterable[Mapping[str, Any]], pattern: str) -> Table | None:
    """
    First and last evaluation of a run by the metrics whose names, without the prefix `eval_`, match the regular
    expression; `None` without one that has any.
    """
    found: dict[str, dict[int, float]] = {}
    for entry in log_history:
        prefix = _dataset_prefix(entry)
        for name, value in entry.items():
            if not name.startswith("eval_") or not isinstance(value, (int, float)):
                continue
            metric = name.removeprefix("eval_")
            metric = metric if metric.startswith(prefix) else prefix + metric
            if re.fullmatch(pattern, metric):
                found.setdefault(metric, {})[entry["step"]] = value
    # A policy's own metrics are also logged without its name
    found = {name: values for name, values in found.items() if not {f"mixed/{name}", f"student/{name}"} & set(found)}
    steps = sorted({step for values in found.values() for step in values})
    if not steps:
        return None
    shown = list(dict.fromkeys([steps[0], steps[-1]]))
    rows = []
    for name, values in found.items():
        rows.append((name, *(f"{values[step]:.4g}" if step in values else "-" for step in shown)))
    return ("metric", *(f"step {step}" for step in shown)), rows


def _dataset_prefix(entry: Mapping[str, Any]) -> str:
    # With several evaluation sets TRL's own metrics lack the name of theirs, which those of transformers have
    match = next(filter(None, (re.fullmatch(r"eval_(.+_)?runtime", name) for name in entry)), None)
    return (match and match[1]) or ""


Score = tuple[float, float | None]
"""Mean and standard error; `None` for the error of a single number."""


def shown_score(mean: float, error: float | None) -> str:
    """A mean and its standard error, if there is one."""
    return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"


def before_after_table(results: Mapping[str, Any]) -> Table:
    """Scores before and after training of every policy that was measured, from a trainer's `card_results`."""
    rows = []
    # An adaptive weight moves, and with it the name of the policy: rows are matched by position
    for (policy, before), (policy_after, after) in zip(
        results["before"].items(), results["after"].items(), strict=True
    ):
        name = policy if policy == policy_after else f"{policy}; after: {policy_after}"
        for reward, old, new in zip(results["rewards"], before, after, strict=True):
            rows.append((name, reward, shown_score(*old), shown_score(*new)))
    step = results.get("before_step")
    return ("policy", "reward", f"at step {step}" if step else "before", "after"), rows


# -------------------- rendering


EXAMPLE = "What is 123 + 456?"


def example_prompt(chat: bool) -> str | list[dict[str, str]]:
    """A prompt for the usage of a model in its card, where none of its user's is known; messages with `chat`."""
    return [{"role": "user", "content": EXAMPLE}] if chat else EXAMPLE


def literal(value: Any) -> str:
    """A value of text, lists and dictionaries as Python writes it, with double quotes."""
    return json.dumps(value, ensure_ascii=False)


_JINJA = re.compile(r"\{\{|\{%|\{#|\}\}|%\}|#\}")


def render(template: str, fields: Mapping[str, Any]) -> str:
    """
    A card template, a file name under `model_cards/`, with the method's fields filled in.

    A template has two kinds of placeholders: `[[ field ]]` (and `[% if … %]`), filled in here, and TRL's own
    `{{ field }}`, which `create_model_card` fills in afterwards. What is filled in is text to TRL, braces included,
    and shows no folders of this machine: [`without_paths`] hides the `local_names` among the fields in all of them. A
    missing field is an error.
    """
    path = Path(model_card_template(template))
    return _environment(path.parent).get_template(path.name).render(**fields)


@functools.lru_cache
def _environment(folder: Path) -> Environment:
    """The templates of a folder, each of them compiled once in a process: a card is written at every checkpoint."""

    @pass_context
    def finalize(context: Any, value: Any) -> Any:
        if isinstance(value, StrictUndefined):
            return value
        shown = without_paths(str(value), context.get("local_names", ()))
        return _JINJA.sub(lambda match: "{{ '" + match[0] + "' }}", shown)

    environment = Environment(
        loader=FileSystemLoader(folder),
        variable_start_string="[[",
        variable_end_string="]]",
        block_start_string="[%",
        block_end_string="%]",
        comment_start_string="[#",
        comment_end_string="#]",
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "cell": cell,
        "code": code,
        "literal": literal,
        "shown": lambda name: shown_name(name).text,
    }
    return environment

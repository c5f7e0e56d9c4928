"""Reading a rendered card with a Markdown parser: its tables, its metadata, and what no card may have."""

import ast
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from markdown_it import MarkdownIt


TRL = "@software{vonwerra2020trl"
# https://huggingface.co/docs/hub/model-cards#model-card-metadata: the fields that a card of ours may have
FIELDS = {
    "base_model": (str,),
    "base_model_relation": (str,),
    "datasets": (str, list),
    "language": (str, list),
    "library_name": (str,),
    "license": (str,),
    "license_link": (str,),
    "license_name": (str,),
    "model-index": (list,),
    "model_name": (str,),
    "pipeline_tag": (str,),
    "tags": (list,),
}
RELATIONS = ("adapter", "finetune", "merge", "quantized")


def write_card(trainer: Any, **kwargs: Any) -> str:
    """The card that `create_model_card` writes, once it is found to be sound."""
    trainer.create_model_card(**{"model_name": "tiny", **kwargs})
    return read_card(trainer)


def read_card(trainer: Any) -> str:
    card = Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8")
    assert_sound(card, trainer.args.output_dir)
    return card


def metadata_of(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def tables_of(card: str) -> dict[str, list[list[str]]]:
    """Rows of text of every table, header first, by the heading above it (a second one below it: with a 2, …)."""
    tables: dict[str, list[list[str]]] = {}
    tokens, heading = MarkdownIt("commonmark").enable("table").parse(_body(card)), ""
    for index, token in enumerate(tokens):
        if token.type == "heading_open":
            heading = tokens[index + 1].content
        elif token.type == "table_open":
            number = sum(name.split(" #")[0] == heading for name in tables)
            rows = tables.setdefault(f"{heading} #{number + 1}" if number else heading, [])
        elif token.type == "tr_open":
            rows.append([])
        elif token.type in ("th_open", "td_open"):
            rows[-1].append(tokens[index + 1].content)
    return tables


def rows_of(card: str, heading: str = "Method") -> dict[str, str]:
    """The table of two columns below a heading, without its header."""
    rows = tables_of(card)[heading][1:]
    found = {name: value for name, value in rows}
    assert len(found) == len(rows)
    return found


def run_of(card: str) -> dict[str, str]:
    return rows_of(card, "Training procedure")


def settings_of(card: str) -> dict[str, tuple[str, str]]:
    """What differs from the paper: per setting, the value of the run and the paper's."""
    tables = [rows for heading, rows in tables_of(card).items() if heading.startswith("Settings beside those of")]
    return {name: (own, paper) for name, own, paper in tables[0][1:]} if tables else {}


def code_of(card: str) -> tuple[ast.Module, str]:
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return ast.parse(code), code


HEADINGS = ("Quick start", "Training procedure", "Method", "Framework versions", "Citations")


def assert_sound(card: str, *secrets: Any, headings: Sequence[str] = HEADINGS) -> None:
    """Complete, well-formed, valid, and silent about this machine."""
    body = _body(card)
    prose = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    # A double brace of BibTeX is followed by text, a placeholder by a space
    assert not re.search(r"\[\[|\[%|\[#|\{\{ |\{%|%\}|\{#", body), body
    assert not re.search(r"\bNone\b|\bnan\b", prose)
    assert "\n\n\n" not in card and card.endswith("\n")
    for secret in (*secrets, os.getcwd(), os.path.expanduser("~"), "/tmp/"):
        assert str(secret) not in card, secret
    for heading in headings:
        assert len(re.findall(rf"^##+ {heading}$", card, flags=re.MULTILINE)) == 1, heading
    assert TRL in body or "Citations" not in headings
    code_of(card)
    _assert_tables(body)
    if headings is HEADINGS:  # of a trainer
        _assert_metadata(metadata_of(card))


def _body(card: str) -> str:
    return card.split("---\n", 2)[2]


def _assert_tables(body: str) -> None:
    lines = [line for line in body.splitlines() if line.startswith("|")]
    parsed = sum(map(len, tables_of(f"---\n---\n{body}").values()))
    separators = sum(set(line) <= set("|-") for line in lines)
    assert parsed == len(lines) - separators  # every line with cells belongs to a table
    for rows in tables_of(f"---\n---\n{body}").values():
        assert len(rows) > 1 and all(cell.strip() for row in rows for cell in row), rows
    width = None
    for line in body.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert width is None or cells is None or cells == width, line  # a parser would fill up or cut
        width = cells


def _assert_metadata(metadata: dict[str, Any]) -> None:
    for name, value in metadata.items():
        assert isinstance(value, FIELDS[name]), (name, value)
    assert all(isinstance(tag, str) for tag in metadata["tags"]) and len(set(metadata["tags"])) == len(
        metadata["tags"]
    )
    assert {"trl", "trl-blend", "generated_from_trainer"} <= set(metadata["tags"])
    assert metadata["pipeline_tag"] == "text-generation" and metadata["library_name"] in ("transformers", "peft")
    for name in ("base_model", "datasets"):
        if name in metadata:
            validate_repo_id(metadata[name])
    assert ("base_model" in metadata) == ("base_model_relation" in metadata)
    assert metadata.get("base_model_relation", "merge") in RELATIONS
    if "model-index" in metadata:
        assert model_index_to_eval_results(metadata["model-index"])[1]
    else:
        assert metadata["model_name"]

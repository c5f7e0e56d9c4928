"""The pages of the trainers have one outline, the README its tree and two commands, and quoted messages are real."""

import ast
import re
from functools import cache

import pytest

from tests.docs.markdown import ROOT, TRAINER_PAGES, code_blocks, read, section, table


OUTLINE = [
    "Overview",
    "Quick start",
    None,  # what this method needs to be explained
    "Dataset format",
    "Choosing",
    "What we measured",
    "Logged metrics",
    "Options",
    "Several processes",
    "Memory and cost",
    "Saving and sharing",
    "What it does not do",
    "Choices of ours",
]
TABLES = ["Before training", "Stored rollouts", "Is it the right teacher", "Command line and Hub"]


@pytest.mark.parametrize("page", TRAINER_PAGES)
def test_outline(page):
    headings = re.findall(r"^## (.+)$", read(page), re.MULTILINE)
    assert len(headings) == len(OUTLINE)
    for heading, expected in zip(headings, OUTLINE, strict=True):
        assert expected is None or heading.startswith(expected)


def test_the_readme_begins_with_the_two_commands():
    """Its first block is what someone who has just cloned the repository runs; a quick start has at most 15 lines."""
    first = code_blocks("README.md")[0]
    assert [line.split("#")[0].strip() for line in first.code.splitlines()] == ["make demo", "make test"]
    starts = [block for block in code_blocks("README.md") if block.language == "python"]
    assert len(starts) == 4
    for block in starts:
        assert len([line for line in block.code.splitlines() if line]) <= 15, block


def test_the_tree_of_the_readme_is_that_of_the_repository():
    tree = next(block.code for block in code_blocks("README.md") if "trl_blend/" in block.code)
    folder, named = ROOT, {}
    for line in tree.splitlines():
        head = re.match(r"( *)((?:[\w.]+/?)+)", line)
        if not head[1]:
            folder = ROOT / head[2]
            assert folder.is_dir(), line
            named[folder] = set()
        for name in re.findall(r"(?:(?<=  )|^)([\w.]+/|\w+\.py)", line.strip() if head[1] else ""):
            assert (folder / name).exists(), f"{folder}: {name}"
            named[folder].add(name.rstrip("/"))


def test_the_rooms_of_the_package_are_those_of_contributing():
    rooms = {path.name for path in (ROOT / "trl_blend").iterdir() if path.is_dir() and path.name != "__pycache__"}
    named = " ".join(row["room"] for row in table(section(read("CONTRIBUTING.md"), "Where things go"), "room"))
    assert rooms == set(re.findall(r"(\w+)/", named))


@cache
def messages() -> list[str]:
    """Texts of the package and of the scripts, with `…` for what is filled in."""
    found = []
    for folder in ("trl_blend", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return [" ".join(message.split()) for message in found]


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    page = read("examples/troubleshooting.md")
    quoted = []
    for heading in TABLES:
        rows = table(section(page, heading), "message")
        assert rows
        for row in rows:
            texts = re.findall(r"\*(.+?)\*", row["message"])
            assert texts and row["cause"] and row["remedy"], row
            quoted += texts
    assert len(quoted) >= 30
    for text in quoted:
        # A quotation may leave out more than one value: each piece then stands in one message, in order
        pieces = [piece.strip() for piece in text.split("…")]
        pattern = ".*".join(re.escape(piece) for piece in pieces)
        assert any(re.search(pattern, message) for message in messages()), text
        assert len(max(pieces, key=len)) >= 8, f"{text}: too little to be found by"

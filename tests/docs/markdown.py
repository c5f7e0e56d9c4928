"""Reading the Markdown files of the repository: which there are, their tables, code blocks, links and anchors."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
# In TRL's style, one per trainer, with the config whose options the page lists
TRAINER_PAGES = {
    "examples/grpo_mix.md": "LogitMixGRPOConfig",
    "examples/trust_region_opd.md": "TrustRegionOPDConfig",
    "examples/offline_opd.md": "OfflineOPDConfig",
}
_FENCE = re.compile(r"^( *)```(\w*)\s*$")
_NOT_RUN = re.compile(r"<!-- parsed, not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """
    A fenced code block.

    Args:
        page (`str`):
            File, relative to the repository.
        line (`int`):
            Line of its first line of code.
        language (`str`):
            What stands behind the opening fence.
        code (`str`):
            Its text.
        not_run (`str`, *optional*):
            Reason given by a comment `<!-- parsed, not run: reason -->` in front of it.
    """

    page: str
    line: int
    language: str
    code: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line} ({self.language})"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def markdown_files() -> list[str]:
    """Markdown files that git knows or would add."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    found = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return sorted(page for page in set(found) if (ROOT / page).is_file())


def code_blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    blocks, opened, reason = [], None, None
    lines = read(page).splitlines()
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        if opened is None:
            marker = _NOT_RUN.fullmatch(line.strip())
            if fence:
                opened, language = number, fence[2]
            elif marker or line.strip():
                reason = marker[1] if marker else None
        elif fence and not fence[2]:
            blocks.append(Block(page, opened + 1, language, "\n".join(lines[opened : number - 1]), reason))
            opened, reason = None, None
    assert opened is None, f"{page}:{opened}: a code block that does not end"
    return blocks


def without_code(text: str) -> str:
    """The text without fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE))


def links(page: str) -> list[str]:
    """Targets of links and images, Markdown or HTML."""
    text = without_code(read(page))
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:href|src)=\"([^\"]+)\"", text)


def anchors(page: str) -> set[str]:
    """Fragments that GitHub gives the headings of a page."""
    text = re.sub(r"^ *```.*?^ *```", "", read(page), flags=re.DOTALL | re.MULTILINE)
    found, seen = set(), Counter()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(slug if not seen[slug] else f"{slug}-{seen[slug]}")
        seen[slug] += 1
    return found


def table(text: str, first_cell: str) -> list[dict[str, str]]:
    """Rows of the Markdown table whose header starts with `first_cell`, as dictionaries."""
    lines = iter(text.splitlines())
    header = next(line for line in lines if line.startswith(f"| {first_cell} |"))
    names = [cell.strip() for cell in header.strip("|").split("|")]
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True)))
    return rows


def section(text: str, heading: str) -> str:
    """The text below a heading of level 2, up to the next one."""
    parts = re.split(r"^## +", text, flags=re.MULTILINE)
    found = [part for part in parts[1:] if part.splitlines()[0].strip() == heading]
    assert len(found) == 1, f"{len(found)} sections {heading!r}"
    return found[0].partition("\n")[2]

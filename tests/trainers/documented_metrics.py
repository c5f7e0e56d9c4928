"""Names of metrics in the tables of the documentation whose first column is headed "metric"."""

import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
_PREFIXES = {
    "logit_mix_grpo": ("mixing/", "importance/", "adaptive/", "eval_mixed/", "eval_student/"),
    "trust_region_opd": ("blend/", "rewards/"),
    "offline_opd": ("offline/",),
}


def documented() -> dict[str, set[str]]:
    """Names per trainer. `…` stands for any text, and so does `<name>`."""
    names = [name for page in pages() for name in table_metrics(page.read_text(encoding="utf-8"))]
    return {
        trainer: {re.sub(r"<\w+>", "…", name) for name in names if name.startswith(prefixes)}
        for trainer, prefixes in _PREFIXES.items()
    }


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "examples").glob("*.md"))]


def table_metrics(text: str) -> list[str]:
    """
    Names in the first column of such tables. `/max` behind `a/b/mean` is `a/b/max`, and `c` behind `a/b` is `a/c`.
    """
    found, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells:
            inside = False
        elif cells[0].lower() == "metric":
            inside = True
        elif inside:
            previous = ""
            for name in re.findall(r"`([^`]+)`", cells[0]):
                if previous and (name.startswith("/") or "/" not in name):
                    name = f"{previous.rpartition('/')[0]}/{name.removeprefix('/')}"
                found.append(name)
                previous = name
    return found


def is_among(name: str, patterns: set[str]) -> bool:
    """Whether a logged name is one of the documented ones."""
    return any(re.fullmatch(re.escape(pattern).replace("…", ".+"), name) for pattern in patterns)

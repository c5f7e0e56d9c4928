"""Shared look of the figures and tables of this folder."""

import csv
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


# Okabe and Ito's colours, which stay apart under the common kinds of colour blindness
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GRAY = "#777777"


def panels(count: int, width: float = 5.2, height: float = 4.2, *, sharey: bool = True) -> tuple[Figure, list[Any]]:
    """A row of `count` panels with a light grid, which share their vertical axis unless told otherwise."""
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), sharey=sharey, squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def save(figure: Figure, path: Path) -> None:
    """Write the figure at 150 dots per inch and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with equal keys; numbers keep four significant decimals."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})


def markdown_table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; cells are written with `str`."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])

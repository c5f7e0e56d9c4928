"""One picture per run: logged metrics against the optimizer step, in small panels, the method's own quantity first."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_blend._files import write_atomically


CURVES_FILE = "training_curves.png"
NATS = "nats per token"

# Okabe and Ito's palette, which colour-blind readers can tell apart
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLE = {
    "font.size": 8.5,
    "axes.titlelocation": "left",
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "lines.linewidth": 1.4,
    "lines.markersize": 4.0,
}
_EVAL = "eval_"


@dataclass(frozen=True)
class Curve:
    """A logged metric, its name in the legend and, where it is shown there, in the progress bar."""

    metric: str
    label: str = ""
    progress: str | None = None
    is_bound: bool = False
    """Whether the other curves of the panel are to be read against it: a dotted line over them."""


@dataclass(frozen=True)
class Panel:
    """Metrics that are drawn over one another. A panel without a point is left out."""

    title: str
    curves: tuple[Curve, ...]
    unit: str = ""
    evaluation: bool = True
    """Whether to draw `eval_<metric>` beside each metric, unless an `eval_…` among `curves` was logged."""


def progress_text(logs: Mapping[str, Any], panels: Sequence[Panel]) -> str:
    """What a progress bar says of one log entry, as `name=value name=value`; `""` if there is nothing to say."""
    curves = [curve for panel in panels for curve in panel.curves if curve.progress]
    return " ".join(f"{curve.progress}={logs[curve.metric]:.3g}" for curve in curves if _has(logs, curve.metric))


def draw_curves(
    log_history: Sequence[Mapping[str, Any]], panels: Sequence[Panel], path: str | os.PathLike[str], title: str = ""
) -> bool:
    """
    Draw the entries of `trainer.state.log_history` into a PNG file, which is there whole or not at all; its folder is
    made if there is none. Values that are missing or not finite are left out.

    Returns:
        `bool`: `False`, and no file, if nothing that the panels ask for was logged at two steps or more: one dot is no
            curve, see [`last_values`].
    """
    if not any(len(set(steps)) > 1 for panel in panels for _, steps, _ in _lines(log_history, panel)):
        return False
    picture = io.BytesIO()
    curves_figure(log_history, panels, title).savefig(picture, format="png", dpi=150)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), picture.getvalue())
    return True


def last_values(
    log_history: Sequence[Mapping[str, Any]], panels: Sequence[Panel]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """The last value of every curve, as a table, header first; `None` where nothing was logged."""
    rows = []
    for panel in panels:
        for curve, steps, values in _lines(log_history, panel):
            unit = f", {panel.unit}" if panel.unit in (NATS,) else ""
            name = f"{panel.title}: {curve.label}" if curve.label else panel.title
            rows.append((f"{name}{unit}", str(steps[-1]), f"{values[-1]:.4g}"))
    return (("last logged", "step", "value"), rows) if rows else None


def curves_figure(log_history: Sequence[Mapping[str, Any]], panels: Sequence[Panel], title: str = "") -> Any:
    """The figure, in which neither pyplot nor the user's style has a part; `None` if there is nothing to draw."""
    from matplotlib import style
    from matplotlib.figure import Figure

    drawn = [(panel, lines) for panel in panels if (lines := _lines(log_history, panel))]
    if not drawn:
        return None
    columns = 2 if len(drawn) in (2, 4) else min(3, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    with style.context(["default", _STYLE]):
        figure, axes = Figure(figsize=(max(3.7 * columns, 5.0), 2.4 * rows + 0.5), layout="constrained"), None
        for index, (panel, lines) in enumerate(drawn):
            axes = figure.add_subplot(rows, columns, index + 1, sharex=axes)
            axes.set_title(panel.title, fontweight="bold")
            axes.set_ylabel(panel.unit)
            _draw(axes, lines)
        figure.supxlabel("optimizer step", fontsize=9)
        figure.suptitle(title, x=0.012, ha="left", fontsize=12)
    return figure


def _lines(log_history: Sequence[Mapping[str, Any]], panel: Panel) -> list[tuple[Curve, list[int], list[float]]]:
    """Curves of a panel with the steps and values at which they were logged, training before evaluation."""
    curves = list(panel.curves)
    named = [curve.metric for curve in curves if curve.metric.startswith(_EVAL)]
    if panel.evaluation and not any(_has(entry, metric) for entry in log_history for metric in named):
        several = len(curves) > 1
        for curve in panel.curves:
            label = f"{curve.label}, evaluation" if several and curve.label else "evaluation"
            curves.append(Curve(_EVAL + curve.metric, label))
    lines = []
    for curve in curves:
        entries = [entry for entry in log_history if _has(entry, curve.metric)]
        if entries:
            lines.append((curve, [entry["step"] for entry in entries], [entry[curve.metric] for entry in entries]))
    return lines


def _draw(axes: Any, lines: Sequence[tuple[Curve, list[int], list[float]]]) -> None:
    from matplotlib.ticker import MaxNLocator

    colors: dict[str, str] = {}
    for curve, steps, values in lines:
        # An evaluation has the colour of its training curve where there are several of them
        color = colors.setdefault(curve.label.removesuffix(", evaluation"), _COLORS[len(colors) % len(_COLORS)])
        style: dict[str, Any] = {"color": color, "marker": "o" if len(steps) <= 25 else ""}
        if curve.metric.startswith(_EVAL):
            # Several evaluation sets share a name: then a line would jump between them
            line = "--" if len(set(steps)) == len(steps) else "none"
            style |= {"linestyle": line, "marker": "s", "markerfacecolor": "white"}
        elif curve.is_bound:
            style = {"color": "black", "linestyle": ":", "linewidth": 1.8, "zorder": 3}
        axes.plot(steps, values, label=curve.label or "training", clip_on=False, **style)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    low, high = (extreme(value for _, _, values in lines for value in values) for extreme in (min, max))
    if 0.0 <= low < 0.75 * high or low == high > 0.0:
        axes.set_ylim(0.0, 1.08 * high)  # a share of nothing is the natural start
    if len(lines) > 1:
        axes.legend()


def _has(entry: Mapping[str, Any], metric: str) -> bool:
    value = entry.get(metric)
    return isinstance(value, (int, float)) and math.isfinite(value)  # TRL logs `None` where nothing was measured

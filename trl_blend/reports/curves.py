"""One picture per run: logged metrics against the optimizer step, in small panels, the method's own quantity first."""

import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trl_blend._files import write_atomically


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES_FILE = "training_curves.png"
NATS = "nats per token"

# Okabe and Ito's palette, which colour-blind readers can tell apart
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_EVAL = "eval_"
_FEW_POINTS, _MANY_POINTS = 25, 150
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.labelcolor": "#444444",
    "axes.edgecolor": "#888888",
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.framealpha": 0.8,
    "legend.edgecolor": "none",
    "legend.borderpad": 0.2,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
}


@dataclass(frozen=True)
class Curve:
    """
    A logged metric.

    Args:
        metric (`str`):
            Its name. One `*` stands for any text: each metric that matches is a curve of its own.
        label (`str`, *optional*, defaults to `""`):
            Name in the legend, where `*` is replaced by the text that it stood for. May be left out in a panel of one
            curve.
        progress (`str`, *optional*):
            Name in the progress bar, likewise. By default it is not shown there.
        is_bound (`bool`, *optional*, defaults to `False`):
            Whether the other curves of the panel are to be read against it: a dotted line over them.
    """

    metric: str
    label: str = ""
    progress: str | None = None
    is_bound: bool = False

    def matches(self, name: str, prefix: str = "") -> str | None:
        """Text that `*` stands for in `name` without `prefix`, `""` if there is no `*`; `None` for another metric."""
        before, star, after = (prefix + self.metric).partition("*")
        if not star:
            return "" if name == before else None
        enough = len(name) > len(before) + len(after)
        if not (enough and name.startswith(before) and name.endswith(after)):
            return None
        return name[len(before) : len(name) - len(after)]


@dataclass(frozen=True)
class Panel:
    """
    Metrics that are drawn over one another.

    Args:
        title (`str`):
            What is shown.
        curves (`tuple[Curve, ...]`):
            The metrics. Where none was logged the panel is left out.
        unit (`str`, *optional*, defaults to `""`):
            Label of the vertical axis.
        evaluation (`bool`, *optional*, defaults to `True`):
            Whether to draw `eval_<metric>` beside each metric, unless a curve of the panel that begins with `eval_`
            was logged.
    """

    title: str
    curves: tuple[Curve, ...]
    unit: str = ""
    evaluation: bool = True


class Series(NamedTuple):
    """Points of one line, in the order in which they were logged."""

    label: str
    steps: list[int]
    values: list[float]
    is_evaluation: bool = False
    is_bound: bool = False


def panel_series(log_history: Sequence[Mapping[str, Any]], panel: Panel) -> list[Series]:
    """
    Lines of a panel, training before evaluation. Values that are missing or not finite are left out.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`):
            Entries as in `trainer.state.log_history`, each with its `step`.
        panel ([`Panel`]):
            What to look for.
    """
    training, evaluation = [], []
    for curve in panel.curves:
        found = list(_curve_series(log_history, curve, "", curve.label))
        (evaluation if curve.metric.startswith(_EVAL) else training).extend(found)
    if panel.evaluation and not evaluation:
        for curve in panel.curves:
            several = len(panel.curves) > 1 or "*" in curve.label
            label = f"{curve.label}, evaluation" if several and curve.label else "evaluation"
            evaluation.extend(_curve_series(log_history, curve, _EVAL, label))
    return training + evaluation


def _curve_series(log_history: Sequence[Mapping[str, Any]], curve: Curve, prefix: str, label: str) -> Iterator[Series]:
    stars: dict[str, str] = {}  # in the order of their first appearance
    for entry in log_history:
        for name in entry:
            if name not in stars and (star := curve.matches(name, prefix)) is not None:
                stars[name] = star
    for name, star in stars.items():
        points = [(int(entry["step"]), entry[name]) for entry in log_history if name in entry and "step" in entry]
        points = [(step, float(value)) for step, value in points if _is_finite(value)]
        if points:
            steps, values = (list(column) for column in zip(*points, strict=True))
            is_evaluation = (prefix + curve.metric).startswith(_EVAL)
            yield Series(label.replace("*", star), steps, values, is_evaluation, curve.is_bound)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:  # TRL logs `None` where nothing was measured
        return False


def progress_text(logs: Mapping[str, Any], panels: Sequence[Panel]) -> str:
    """What a progress bar says of one log entry, as `name=value name=value`; `""` if there is nothing to say."""
    shown = []
    for curve in (curve for panel in panels for curve in panel.curves if curve.progress):
        for name, value in logs.items():
            if (star := curve.matches(name)) is not None and _is_finite(value):
                shown.append(f"{curve.progress.replace('*', star)}={value:.3g}")
    return " ".join(shown)


def curves_figure(
    log_history: Sequence[Mapping[str, Any]], panels: Sequence[Panel], title: str | None = None
) -> "Figure | None":
    """
    The picture as a figure that belongs to nobody: neither pyplot nor the user's style sheet has a part in it.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`):
            Entries as in `trainer.state.log_history`.
        panels (`Sequence[Panel]`):
            What to draw, in this order.
        title (`str`, *optional*):
            Headline.

    Returns:
        [`~matplotlib.figure.Figure`] or `None`: `None` if nothing that the panels ask for was logged.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [(panel, series) for panel in panels if (series := panel_series(log_history, panel))]
    if not drawn:
        return None
    columns = 2 if len(drawn) in (2, 4) else min(3, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    steps = [step for _, series in drawn for one in series for step in one.steps]
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(max(3.7 * columns, 5.0), 2.4 * rows + (0.6 if title else 0.3)), layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.07)
        for index, (panel, series) in enumerate(drawn):
            axes = figure.add_subplot(rows, columns, index + 1)
            _draw_panel(axes, panel, series)
            _set_limits(axes, series, min(steps), max(steps))
        figure.supxlabel("optimizer step", fontsize=9, color="#444444")
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
    return figure


def _draw_panel(axes: "Axes", panel: Panel, series: Sequence[Series]) -> None:
    colors: dict[str, str] = {}
    for one in series:
        color = _COLORS[len(colors) % len(_COLORS)]
        # An evaluation has the colour of its training curve where there are several of them
        color = colors.setdefault(one.label.removesuffix(", evaluation"), color)
        kind: dict[str, Any] = {"marker": "o"} if len(one.steps) <= _FEW_POINTS else {}
        if len(one.steps) > _MANY_POINTS:
            kind = {"linewidth": 0.9}
        if one.is_evaluation:
            # Several evaluation sets share a name: then a line would jump between them
            line = "--" if len(set(one.steps)) == len(one.steps) else "none"
            kind = {"linestyle": line, "marker": "s", "markerfacecolor": "white", "markersize": 4.5}
        elif one.is_bound:
            color, kind = "black", {"linestyle": ":", "linewidth": 1.8}
        label = one.label or "training"  # it is told from its evaluation
        axes.plot(one.steps, one.values, color=color, label=label, clip_on=False, zorder=3 + one.is_bound, **kind)
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
    if len(series) > 1:
        axes.legend(loc="best").set_zorder(5)


def _set_limits(axes: "Axes", series: Sequence[Series], first: int, last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    margin = max((last - first) * 0.03, 0.3)
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    low, high = (extreme(value for one in series for value in one.values) for extreme in (min, max))
    if low == high:
        spread = abs(low) or 1.0
        axes.set_ylim(min(0.0, low - spread / 4), max(0.0, high + spread / 4))
    elif 0.0 <= low < 0.75 * high:
        axes.set_ylim(0.0, high * 1.08)  # a share of nothing is the natural start


def draw_curves(
    log_history: Sequence[Mapping[str, Any]],
    panels: Sequence[Panel],
    path: str | os.PathLike[str],
    title: str | None = None,
) -> bool:
    """
    Draw a run into a PNG file. The file appears at once: a push to the Hub meanwhile finds the old one or the new one.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`):
            Entries as in `trainer.state.log_history`.
        panels (`Sequence[Panel]`):
            What to draw, in this order; `_panels` of each trainer.
        path (`str` or `os.PathLike`):
            File to write. Its folder is made if there is none.
        title (`str`, *optional*):
            Headline.

    Returns:
        `bool`: `False`, and no file, if nothing that the panels ask for was logged.
    """
    figure = curves_figure(log_history, panels, title)
    if figure is None:
        return False
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_atomically(path, picture.getbuffer())
    return True

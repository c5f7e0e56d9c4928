"""The figures of `trust_region.py`."""

from pathlib import Path
from typing import Any

import numpy as np

from reproduce import figures
from reproduce.runs import over_seeds
from reproduce.trust_region_runs import DECODINGS, Runs


# Colour, marker and line of each arm
STYLES = {
    "vanilla": (figures.BLACK, "o", "-"),
    "trust_0.001": (figures.SKY, "s", "-"),
    "trust_0.01": (figures.BLUE, "D", "-"),
    "trust_0.05": (figures.PURPLE, "^", "-"),
    "fixed_0.01": (figures.GREEN, "P", "--"),
    "skd": (figures.RED, "X", "--"),
    "veto": (figures.ORANGE, "<", "-."),
    "temperature": (figures.GRAY, "v", "-."),
    "sft": (figures.YELLOW, "*", "-."),
}
TITLES = {"sampled": "Temperature 1 (the paper's evaluation)", "greedy": "Greedy"}


def _band(axis: Any, steps: Any, values: np.ndarray, name: str, label: str, **style: Any) -> None:
    color, marker, line = STYLES[name]
    mean = values.mean(axis=0)
    axis.plot(steps, mean, color=color, ls=line, label=label, **({"marker": marker, "ms": 5} | style))
    if len(values) > 1:
        error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
        axis.fill_between(steps, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)


def plot_curves(runs: Runs, path: Path) -> None:
    """Accuracy against step, at temperature 1 and greedy."""
    figure, axes = figures.panels(2, width=5.6, height=4.6, sharey=False)
    for axis, decoding in zip(axes, DECODINGS, strict=True):
        for name in runs.by_arm:
            _band(axis, *runs.curve(name, decoding), name, runs.arms[name].label)
        axis.axvspan(0, runs.warmup, color=figures.GRAY, alpha=0.08, linewidth=0)
        axis.set(title=TITLES[decoding], xlabel="optimizer step (shaded: warmup)")
    axes[0].set_ylabel(f"accuracy on {runs.start['n_test']} test prompts (band: ±1 SE over seeds)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, bbox_to_anchor=(0.5, -0.12))
    figures.save(figure, path)


def plot_entropy(runs: Runs, path: Path) -> None:
    """The paper's Figure 3: what the teacher makes of the prefixes that training visits."""
    figure, axes = figures.panels(2, width=5.6, sharey=False)
    titles = {"blend/teacher_entropy": "Teacher's entropy", "blend/teacher_logp": "Teacher's log-probability"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name in (name for name in runs.by_arm if name in ("vanilla", "fixed_0.01", *runs.trust_regions())):
            values = _smoothed(runs.metric(name, key))
            _band(axis, np.arange(1, values.shape[1] + 1), values, name, runs.arms[name].label, marker=None)
        axis.axvspan(0, runs.warmup, color=figures.GRAY, alpha=0.08, linewidth=0)
        axis.set(title=f"{title} on the visited prefixes", xlabel="optimizer step (shaded: warmup)")
    axes[0].set_ylabel("nats per token (mean of 3 steps, band: ±1 SE)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, bbox_to_anchor=(0.5, -0.1))
    figures.save(figure, path)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Centred mean of 3 steps of `(S, steps)` values, of fewer at the ends."""
    padded = np.pad(values, ((0, 0), (1, 1)), constant_values=np.nan)
    return np.nanmean(np.stack([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]]), axis=0)


def plot_support(runs: Runs, path: Path) -> None:
    """The paper's Figure 7."""
    figure, (axis,) = figures.panels(1, width=6.4)
    budgets = [policy for policy in runs.policies if policy != "teacher"]
    x, y, color = ([over_seeds(runs.support(b, key)) for b in budgets] for key in ("teacher_logp", "auroc", "reward"))
    axis.errorbar(
        [e.value for e in x], [e.value for e in y], [e.error for e in y], [e.error for e in x],
        color=figures.GRAY, lw=1, capsize=2, zorder=1,
    )  # fmt: skip
    points = axis.scatter([e.value for e in x], [e.value for e in y], c=[e.value for e in color], s=70, zorder=2)
    for budget, first, second in zip(budgets, x, y, strict=True):
        axis.annotate(f"ε = {float(budget):g}", (first.value, second.value), xytext=(6, 6), textcoords="offset points")
    figure.colorbar(points, label="mean reward")
    axis.margins(0.14)
    axis.locator_params(axis="x", nbins=6)
    axis.set(
        title="Rollouts of the untrained student (bars: ±1 SE over seeds)",
        xlabel="mean log-probability per token under the teacher",
        ylabel="AUROC of the teacher's support",
    )
    figures.save(figure, path)


def plot_prefixes(runs: Runs, path: Path) -> None:
    """The paper's Figure 4, in differences of success."""
    figure, axes = figures.panels(2, width=5.2)
    colors = (figures.BLUE, figures.PURPLE, figures.SKY)
    width = 0.8 / len(runs.prefix_policies)
    for axis, model in zip(axes, ("teacher", "student"), strict=True):
        for index, policy in enumerate(runs.prefix_policies):
            gains = [runs.prefix_gain(policy, model, length) for length in runs.lengths]
            places = np.arange(len(gains)) + (index + 0.5) * width - 0.4
            axis.bar(
                places, [gain.value for gain in gains], width, yerr=[gain.error for gain in gains],
                color=colors[index % len(colors)], capsize=2, label=f"ε = {float(policy):g}",
            )  # fmt: skip
        axis.set_xticks(range(len(runs.lengths)), runs.lengths)
        axis.axhline(0, color=figures.BLACK, linewidth=0.8)
        axis.set(title=f"continued by the {model}", xlabel="length of the prefix in tokens")
    axes[0].set_ylabel("success minus that of vanilla prefixes (bars: ±1 SE)")
    axes[0].legend(frameon=False)
    figures.save(figure, path)

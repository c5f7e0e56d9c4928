"""The figures of `offline_opd.py`."""

from pathlib import Path

import numpy as np

from reproduce import figures
from reproduce.offline_opd_runs import DECODINGS, Runs


# Colour, marker and line of each arm
STYLES = {
    "live_full": (figures.BLACK, "o", "-"),
    "live": (figures.BLUE, "s", "-"),
    "offline": (figures.RED, "D", "-"),
    "offline_4": (figures.ORANGE, "^", "-"),
    "offline_paper": (figures.YELLOW, "v", "-"),
    "offline_ratio": (figures.PURPLE, "X", "-"),
    "offline_topk": (figures.GREEN, "P", "-"),
    "live_second": (figures.BLUE, "s", ":"),
    "offline_second": (figures.RED, "D", ":"),
    "offline_topk_second": (figures.GREEN, "P", ":"),
    "late_live": (figures.BLUE, "s", "--"),
    "late_offline": (figures.RED, "D", "--"),
    "late_offline_topk": (figures.GREEN, "P", "--"),
    "gentle_live": (figures.BLUE, "o", "-."),
    "gentle_offline": (figures.RED, "o", "-."),
}
TITLES = {"sampled": "Temperature 1", "greedy": "Greedy"}


def plot_curves(runs: Runs, path: Path) -> None:
    """Accuracy against step, at temperature 1 and greedy."""
    figure, axes = figures.panels(2, width=5.6, height=4.6, sharey=False)
    steps = [0, *runs.points]
    for axis, decoding in zip(axes, DECODINGS, strict=True):
        for name in runs.by_arm:
            color, marker, line = STYLES[name]
            values = np.stack([runs.scores(name, decoding, step).mean(axis=1) for step in steps], axis=1)
            mean = values.mean(axis=0)
            axis.plot(steps, mean, color=color, marker=marker, ls=line, ms=5, label=runs.arm(name).label)
            if len(values) > 1:
                error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
                axis.fill_between(steps, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
        axis.set(title=TITLES[decoding], xlabel="optimizer step")
    axes[0].set_ylabel(f"accuracy on {runs.start['n_test']} test prompts (band: ±1 SE over seeds)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=3, frameon=False, bbox_to_anchor=(0.5, 0.0))
    figures.save(figure, path)


def plot_costs(runs: Runs, path: Path) -> None:
    """CPU time of each arm: training, and what falls once."""
    figure, (axis,) = figures.panels(1, width=7.0, height=4.4)
    names = list(runs.by_arm)[::-1]
    train = np.array([runs.cost(name, "train_cpu_seconds").value for name in names])
    made = np.array([np.mean([runs.one_time(n, run["seed"]) for run in runs.by_arm[n]], axis=0) for n in names])
    parts = {"training": train, "collecting (once)": made[:, 0], "scoring (once)": made[:, 1]}
    left = np.zeros(len(names))
    for (label, values), color in zip(parts.items(), (figures.BLUE, figures.SKY, figures.ORANGE), strict=True):
        axis.barh([runs.arm(name).label for name in names], values, left=left, color=color, label=label)
        left += values
    axis.set(title=f"{runs.steps} optimizer steps", xlabel="CPU seconds of a run, without evaluation")
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    figures.save(figure, path)


def plot_gradients(runs: Runs, path: Path) -> None:
    """How far the expected offline gradient is from the live one, before and after training."""
    figure, axes = figures.panels(2, width=4.8, sharey=False)
    names = [name for name in runs.by_arm if runs.arm(name).probed]
    steps = (0, runs.points[-1])
    for axis, key in zip(axes, ("relative", "cosine"), strict=True):
        for name in names:
            color, marker, line = STYLES[name]
            values = [runs.probe(name, step, key) for step in steps]
            chance = [runs.probe(name, step, f"chance_{key}").value for step in steps]
            axis.errorbar(
                steps, [v.value for v in values], [v.error for v in values],
                color=color, marker=marker, ls=line, capsize=2, label=runs.arm(name).label,
            )  # fmt: skip
            axis.plot(steps, chance, color=figures.GRAY, marker=marker, ls=line, lw=1, ms=3)
        axis.set_xticks(steps)
        axis.set_xlabel("optimizer step (grey: two live gradients)")
    axes[0].set(title="Norm of the difference / norm of the live gradient", ylim=(0.0, None))
    axes[1].set(title="Cosine of offline and live gradient")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=2, frameon=False, bbox_to_anchor=(0.5, 0.0))
    figures.save(figure, path)

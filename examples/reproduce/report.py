"""Tables and figures of `logit_mixing.py`, rebuilt from the JSON files of the runs."""

from pathlib import Path
from typing import Any

import numpy as np

from reproduce import figures
from reproduce.claims import claims
from reproduce.runs import KINDS, Runs, difference, load_runs, over_seeds


# Colour, marker and line of each arm
STYLES = {
    "grpo": (figures.BLACK, "o", "-"),
    "grpo_kl": (figures.GRAY, "v", "--"),
    "mixed_0.1": (figures.SKY, "s", "-"),
    "mixed_0.3": (figures.BLUE, "D", "-"),
    "mixed_0.5": (figures.PURPLE, "^", "-"),
    "adaptive": (figures.GREEN, "P", "-"),
    "probs_0.3": (figures.RED, "X", "--"),
    "decay_0.5": (figures.ORANGE, "<", "-."),
    "base_grpo": (figures.ORANGE, "<", "-."),
    "base_sft_0.5": (figures.BLUE, "D", "-"),
    "base_base_0.5": (figures.RED, "X", "--"),
}
TEACHER_ARMS = ["grpo", "grpo_kl", "mixed_0.1", "mixed_0.3", "mixed_0.5", "adaptive", "probs_0.3", "decay_0.5"]
ANCHOR_ARMS = ["grpo", "grpo_kl", "base_grpo", "base_sft_0.5", "base_base_0.5"]


def write_report(output_dir: Path) -> str:
    """Write `logit_mixing.csv`, `logit_mixing_runs.csv`, `logit_mixing.md` and two figures; returns the Markdown."""
    runs = load_runs(output_dir / "runs")
    figures.write_csv(output_dir / "logit_mixing.csv", _arm_rows(runs))
    figures.write_csv(output_dir / "logit_mixing_runs.csv", _run_rows(runs))
    _plot(runs, TEACHER_ARMS, output_dir / "logit_mixing_curves.png")
    _plot(runs, ANCHOR_ARMS, output_dir / "logit_mixing_anchor.png")
    text = _markdown(runs)
    (output_dir / "logit_mixing.md").write_text(text, encoding="utf-8")
    return text


def _policies(runs: Runs, name: str) -> list[str]:
    return [policy for policy in ("mixed", "student") if policy in runs.by_arm[name][0]["final"]]


def _arm_rows(runs: Runs) -> list[dict[str, Any]]:
    rows = []
    for name, finished in runs.by_arm.items():
        arm = runs.arms[name]
        for policy in _policies(runs, name):
            row: dict[str, Any] = {
                "arm": name,
                "policy": policy,
                "deployed": policy == arm.deployed,
                "student": arm.student,
                "reference": arm.reference,
                "seeds": len(finished),
                "steps": runs.steps,
            }
            for kind in KINDS:
                estimate = runs.rate(name, policy, kind)
                row |= {f"{kind}_before": float(runs.before(name, policy, kind).mean())}
                row |= {kind: estimate.value, f"{kind}_se": estimate.error}
            for field in ("train_seconds", "cpu_seconds", "rollout_tokens", "validation_tokens", "validation_seconds"):
                row[field] = round(runs.cost(name, field), 1)
            rows.append(row)
    return rows


def _run_rows(runs: Runs) -> list[dict[str, Any]]:
    rows = []
    for name, finished in runs.by_arm.items():
        for run in finished:
            for policy in _policies(runs, name):
                row = {"arm": name, "seed": run["seed"], "policy": policy, "weight": run["final"][policy]["weight"]}
                row |= {kind: run["final"][policy][kind].count("1") / runs.n_test for kind in KINDS}
                for field in ("train_seconds", "cpu_seconds", "rollout_tokens", "validation_tokens"):
                    row[field] = run[field]
                rows.append(row)
    return rows


def _plot(runs: Runs, names: list[str], path: Path) -> None:
    figure, axes = figures.panels(2, width=5.6, height=4.6)
    for axis, policy in zip(axes, ("deployed", "student"), strict=True):
        for name in (name for name in names if name in runs.by_arm):
            color, marker, line = STYLES[name]
            steps, rates = runs.curve(name, runs.arms[name].deployed if policy == "deployed" else policy)
            mean = rates.mean(axis=0)
            axis.plot(steps, mean, color=color, marker=marker, ls=line, ms=5, label=runs.arms[name].label)
            if len(rates) > 1:
                error = rates.std(axis=0, ddof=1) / np.sqrt(len(rates))
                axis.fill_between(steps, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
        axis.set(xlabel="optimizer step", ylim=(-0.03, 1.03))
    axes[0].set_title("Deployed policy (mixed where the objective is)")
    axes[1].set_title("Student alone")
    n_curve = next(iter(runs.by_arm.values()))[0]["n_curve"]
    axes[0].set_ylabel(f"solve rate, greedy, {n_curve} test prompts")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, bbox_to_anchor=(0.5, -0.1))
    figures.save(figure, path)


def _result_table(runs: Runs) -> str:
    costs = ["train s", "CPU s", "rollout tokens", "validation tokens"]
    header = ["arm", "policy", "solve before", "solve", "answer", "format", *costs]
    rows = []
    for name in runs.by_arm:
        arm = runs.arms[name]
        for policy in _policies(runs, name):
            bold = "**" if policy == arm.deployed else ""
            rows.append([
                arm.label,
                f"{bold}{policy if policy == 'mixed' else 'student alone'}{bold}",
                f"{runs.before(name, policy).mean():.3f}",
                *(str(runs.rate(name, policy, kind)) for kind in KINDS),
                f"{runs.cost(name, 'train_seconds'):.0f}",
                f"{runs.cost(name, 'cpu_seconds'):.0f}",
                f"{runs.cost(name, 'rollout_tokens') / 1000:.0f}k",
                f"{runs.cost(name, 'validation_tokens') / 1000:.0f}k",
            ])  # fmt: skip
    return figures.markdown_table(header, rows)


def _complementarity_table(runs: Runs) -> str:
    """The paper's Tables 1 and 3: right means right and in the format, counts are means over seeds."""
    measures = [f"{kind}: {who}" for kind in ("format", "solve", "answer") for who in ("trained", "reference")]
    header = ["arm", "reference", *measures, "both", "only trained", "only reference", "neither", "exactly one"]
    rows = []
    for name in (name for name in runs.by_arm if runs.arms[name].deployed == "mixed" and name != "adaptive"):
        reference = runs.arms[name].reference
        trained, anchor = runs.final(name, "student"), runs.alone(reference)
        cells = [trained * anchor, trained * (1 - anchor), (1 - trained) * anchor, (1 - trained) * (1 - anchor)]
        rates = [
            text
            for kind in ("format", "solve", "answer")
            for text in (str(runs.rate(name, "student", kind)), f"{runs.alone(reference, kind).mean():.3f}")
        ]
        counts = [f"{over_seeds(list(cell.sum(axis=1))).value:.0f}" for cell in cells]
        one = f"{(cells[1] + cells[2]).mean():.3f}"
        rows.append([runs.arms[name].label, f"`{reference}`", *rates, *counts, one])
    return figures.markdown_table(header, rows)


def _student_gains(runs: Runs) -> str:
    if "grpo" not in runs.by_arm:
        return ""
    header = ["arm", "deployed − GRPO", "student alone − GRPO"]
    rows = []
    for name in (name for name in runs.by_arm if name != "grpo"):
        base = runs.final("grpo", "student")
        gaps = [difference(runs.final(name, policy), base) for policy in ("deployed", "student")]
        marks = ["" if abs(gap.value) <= 2 * gap.error else " *" for gap in gaps]
        rows.append([runs.arms[name].label, *(gap.signed() + mark for gap, mark in zip(gaps, marks, strict=True))])
    return figures.markdown_table(header, rows)


def _markdown(runs: Runs) -> str:
    seeds = sorted({len(finished) for finished in runs.by_arm.values()})
    alone = "; ".join(
        f"`{name}` solve {runs.alone(name).mean():.3f}, answer {runs.alone(name, 'answer').mean():.3f}, format "
        f"{runs.alone(name, 'format').mean():.3f}"
        for name in runs.start["alone"]
    )
    return "\n".join([
        "# Logit mixing on the add3cot task",
        "",
        f"{'-'.join(map(str, seeds))} seeds per arm, {runs.steps} optimizer steps of 128 completions (16 prompts x 8),"
        " learning rate 3e-5, temperature 1, the same prompts in every arm of a seed. Greedy on the same "
        f"{runs.n_test} test prompts, mean ± SE over seeds. *solve* = right and in the format (the reward), "
        "*answer* = right in any format. Bold: the policy that the objective is written on. Times are means per run "
        "without the test-set evaluation, on two shared cores: wall seconds depend on the load, CPU seconds less so.",
        "",
        f"Checkpoints before training: {alone}. Arms without \"base:\" train `student` (SFT) with `teacher` (a "
        "stronger model) as the reference; the paper's own setting is \"base: mixing 0.5, SFT anchor\".",
        "",
        _result_table(runs),
        "",
        "![learning curves, stronger reference](logit_mixing_curves.png)",
        "",
        "![learning curves, anchor ablation](logit_mixing_anchor.png)",
        "",
        "## Difference to GRPO (solve rate)",
        "",
        "Standard errors add the variance over seeds and over test prompts; * marks more than 2 of them. A mixed "
        "policy that contains the stronger `teacher` starts with its help; the last column compares students fairly.",
        "",
        _student_gains(runs),
        "",
        "## Complementarity of the trained policy and its reference (the paper's Tables 1-3)",
        "",
        f"Counts of {runs.n_test} problems, mean over seeds; right means right and in the format, as in the paper.",
        "",
        _complementarity_table(runs),
        "",
        "## The papers' claims",
        "",
        "Verdicts are computed; a difference counts above 2 standard errors.",
        "",
        *(f"* {claim} **{verdict[0].upper() + verdict[1:]}.** {numbers}" for claim, verdict, numbers in claims(runs)),
        "",
    ])  # fmt: skip

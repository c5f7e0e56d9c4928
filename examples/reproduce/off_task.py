"""
Distillation of a student whose own rollouts are off the task: does it help to draw the first ones with the teacher?
`base` of the test-bed, for the second task `sort_sft_student`, is distilled from the teacher with equal prompts and
steps, with each rollout policy and with each change of the loss that `TrustRegionOPDTrainer` has. On addition,
rollouts at step 0 are probed too (the paper's Figures 7 and 4):

```sh
python examples/reproduce/off_task.py --seeds 0 1 2 3 4 --workers 2    # all arms, then the report
python examples/reproduce/off_task.py --report                         # only rebuild it from the finished runs
python examples/reproduce/off_task.py --task sorting --seeds 0 1 2 3 4 --arms vanilla trust_0.2 contrastive sft
```

A finished run is in `results/off_task_runs.json` and not repeated: after an interruption, start the command again.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reproduce import study
from reproduce.study import DECODINGS, Claim, Estimate, Runs, difference, over_seeds, verdict


# isort: split
import numpy as np

from reproduce import trust_region
from reproduce import trust_region_probes as probes
from reproduce.trust_region import BATCH, LEARNING_RATE, PROBE, ROLLOUTS_PER_PROMPT, Arm
from testbed.evaluate import load_checkpoint
from testbed.tasks import ADDITION, TASKS


# Shares of the steps: of a warmup, of supervised steps, and of the arm with the compute of the others
WARMUP, SUPERVISED, LONGER = 0.75, 0.25, 1.4
VANILLA, DISTILLED = "vanilla", "distilled"
PROBED, CUT = (0.0, 0.01, 0.05, 0.2), (0.0, 0.05, 0.2)  # budgets of both probes of the rollouts at step 0
LOSSES = (
    "interpolated",
    "extrapolated",
    "tip",
    "forward_kl",
    "iw_opd",
)  # changes of the loss, on the student's own rollouts
MEASURES = {"sampled": "T = 1", "greedy": "greedy"}


def make_arms(steps: int) -> dict[str, Arm]:
    """All arms. Only ordinary distillation, which is cheaper per step, goes on for `LONGER` times the steps."""
    warmup = round(WARMUP * steps)

    def blended(label: str, style: study.Style, policy: str, **settings: Any) -> Arm:
        return Arm(label, style, {"rollout_policy": policy, **settings}, student=DISTILLED)

    def annealed(budget: float, color: str, marker: str) -> Arm:
        label = f"trust region {budget:g}, annealed"
        settings = {"kl_budget": budget, "blend_warmup_steps": warmup}
        return blended(label, (color, marker, "-"), "trust_region", **settings)

    def own(label: str, style: study.Style, **others: Any) -> Arm:
        settings = {"rollout_policy": "student", **others.pop("settings", {})}
        return Arm(label, style, settings, student=DISTILLED, **others)

    between = {"distillation_target": "interpolated", "target_weight": 0.5}
    return {
        VANILLA: own("vanilla OPD", (study.BLACK, "o", "-"), steps=round(LONGER * steps)),
        "trust_0.01": annealed(0.01, study.SKY, "s"),
        "trust_0.05": annealed(0.05, study.BLUE, "D"),
        "trust_0.2": annealed(0.2, study.PURPLE, "^"),
        "fixed_0.05": blended(
            "fixed ε 0.05", (study.GREEN, "P", "--"), "trust_region", kl_budget=0.05, kl_budget_schedule="constant"
        ),
        "skd": blended("SKD (K 15, τ 0.2)", (study.RED, "X", "--"), "speculative_kd"),
        "sft": own("SFT warmup", (study.YELLOW, "*", "-."), sft_steps=round(SUPERVISED * steps)),
        "chernoff": blended("Chernoff, annealed", (study.ORANGE, "<", "-"), "chernoff", blend_warmup_steps=warmup),
        "contrastive": blended(
            "contrastive (0.1, 0.5)", (study.GRAY, "v", "--"), "contrastive", blend_warmup_steps=warmup
        ),
        "interpolated": own("target between (0.5)", (study.SKY, "d", ":"), settings=between),
        "extrapolated": own(
            "target beyond the teacher (1.25)", (study.RED, "h", ":"), settings={**between, "target_weight": 1.25}
        ),
        "tip": own("TIP (0.5, 0.9)", (study.GREEN, ">", ":"), settings={"token_selection": "tip"}),
        "forward_kl": own("forward KL above 0.8 nats", (study.ORANGE, "p", ":"), settings={"forward_kl_entropy": 0.8}),
        "iw_opd": own("IW-OPD (0.5)", (study.PURPLE, "x", ":"), settings={"distillation_objective": "iw_opd"}),
    }


def work(name: str, seed: int, settings: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Train one arm with one seed, probe the rollouts, or measure what there is before training."""
    if name == PROBE:
        return probes.run(seed, settings["n_probe"], "base", PROBED, CUT)
    if name == study.START:
        task = TASKS[settings["task"]]
        test, limit = task.prompts("test", settings["n_test"]), task.max_new_tokens
        scores = {
            model: study.measure_student(*load_checkpoint(task.model(model)), test, 0, limit)
            for model in (DISTILLED, "teacher")
        }
        return {"task": settings["task"], "n_test": settings["n_test"], **scores}
    return trust_region.train(make_arms(settings["steps"])[name], name, seed, settings, scratch)


class Results:
    """The finished runs."""

    def __init__(self, runs: Runs) -> None:
        self.runs, self.names, self.probes = runs, runs.names(make_arms(1)), runs.of(PROBE)
        if VANILLA not in self.names:
            raise SystemExit(f"No finished runs of {VANILLA} in {runs.path}, which every arm is compared with.")
        self.first = runs.of(VANILLA)[0]
        self.steps, interval = self.first["steps"], self.first["eval_interval"]
        self.later = round(LONGER * self.steps)
        self.points = [*range(interval, self.steps, interval), self.steps]
        self.arms = make_arms(self.steps)

    def before(self, model: str, decoding: str) -> float:
        return float(study.as_rates(self.runs.start[model][decoding], decoding).mean())

    def scores(self, name: str, decoding: str, step: int) -> Any:
        """Rates of shape `(S, N)`: seeds, test prompts."""
        runs = self.runs.of(name)
        return np.stack([study.as_rates(run["curve"][str(step)][decoding], decoding) for run in runs])

    def rate(self, name: str, decoding: str, step: int) -> Estimate:
        return over_seeds(self.scores(name, decoding, step).mean(axis=1))

    def gap(self, name: str, decoding: str, step: int, rival_step: int | None = None) -> Estimate:
        """Minus ordinary distillation."""
        rival = self.scores(VANILLA, decoding, rival_step or step)
        return difference(self.scores(name, decoding, step), rival)

    def curve(self, name: str, decoding: str) -> tuple[list[int], Any]:
        rates = [self.scores(name, decoding, step).mean(axis=1) for step in self.points]
        start = np.full(len(rates[0]), self.before(DISTILLED, decoding))
        return [0, *self.points], np.stack([start, *rates], axis=1)

    def seconds(self, name: str, step: int) -> float:
        """CPU seconds of training up to a step, mean over seeds."""
        return float(np.mean([run["curve"][str(step)]["cpu_seconds"] for run in self.runs.of(name)]))


def claims(found: Results) -> Iterator[Claim]:
    """One per arm and time: half of the steps, all of them, and all of them against as much compute."""
    early = found.points[(len(found.points) - 1) // 2]
    for name in found.names:
        if name == VANILLA:
            continue
        label = found.arms[name].label
        times = [(f"after {early} steps", early, early), (f"after {found.steps} steps", found.steps, found.steps)]
        if name not in LOSSES:
            times.append((f"against {found.later} steps of it", found.steps, found.later))
        for when, step, rival in times:
            gaps = {decoding: found.gap(name, decoding, step, rival) for decoding in DECODINGS}
            numbers = "; ".join(
                f"{text} {found.rate(name, decoding, step)} against {found.rate(VANILLA, decoding, rival)} "
                f"({gaps[decoding].signed()})"
                for decoding, text in MEASURES.items()
            )
            cost = f"{found.seconds(name, step):.0f} and {found.seconds(VANILLA, rival):.0f} CPU seconds"
            yield f"{label} is above vanilla OPD, {when}.", verdict(gaps["sampled"]), f"{numbers}; {cost}."
    if found.probes:
        yield from probes.claims(found.probes)


def report(runs: Runs, folder: Path) -> str:
    """Write a CSV file and a figure; returns the Markdown."""
    found = Results(runs)
    rows, cells = [], []
    for name in found.names:
        row: dict[str, Any] = {"arm": name, "seeds": len(runs.of(name)), "steps": found.steps}
        for decoding in DECODINGS:
            for step in found.points:
                estimate = found.rate(name, decoding, step)
                row |= {f"{decoding}_{step}": estimate.value, f"{decoding}_{step}_se": estimate.error}
        row["cpu_seconds"] = round(found.seconds(name, found.steps), 1)
        rows.append(row)
        rates = [found.rate(name, decoding, step) for decoding in DECODINGS for step in found.points]
        cells.append([found.arms[name].label, *rates, f"{row['cpu_seconds']:.0f}"])
    study.write_csv(folder / f"{runs.name}.csv", rows)
    _plot(found, folder / f"{runs.name}.png")
    seeds = sorted({len(runs.of(name)) for name in found.names})
    start = "; ".join(
        f"`{runs.task.model(model).name}` "
        + ", ".join(f"{found.before(model, decoding):.3f} {text}" for decoding, text in MEASURES.items())
        for model in (DISTILLED, "teacher")
    )
    student = runs.task.model(DISTILLED).name
    header = ["arm", *(f"{text}, {step}" for text in MEASURES.values() for step in found.points), "CPU s"]
    return "\n".join([
        "# Distilling a student whose rollouts are off the task",
        "",
        f"Written by `python examples/reproduce/off_task.py{runs.command}`; do not edit. The student is `{student}`, "
        f"which {runs.task.about_distilled}. Right and in the format before training: {start}. "
        f"{study.machine_text(found.first['machine'])}",
        "",
        f"{found.steps} steps of {BATCH} rollouts ({ROLLOUTS_PER_PROMPT} of each prompt, no prompt twice, the same in "
        f"every arm of a seed), learning rate {LEARNING_RATE:g}, "
        f"{' or '.join(map(str, seeds))} seeds, "
        f"{runs.start['n_test']} test prompts, mean ± SE over seeds; T = 1 is the mean of {study.SAMPLES} "
        f"completions. Warmups last {round(WARMUP * found.steps)} steps, SFT {round(SUPERVISED * found.steps)}; fixed "
        "ε and SKD act throughout. Columns are steps; CPU seconds are those of all steps, without evaluation. Vanilla "
        f"OPD went on to {found.later} steps, for comparison at equal cost.",
        "",
        study.markdown_table(header, cells),
        "",
        f"![accuracy against step]({runs.name}.png)",
        "",
        *(probes.report(found.probes, folder, runs.name) if found.probes else []),
        "## What it says",
        "",
        "Judged at T = 1; a difference counts above 2 standard errors, which add the variance over seeds and over "
        "test prompts. The arms of the loss draw the student's own rollouts.",
        "",
        *study.claim_lines(claims(found)),
        "",
    ])  # fmt: skip


def _plot(found: Results, path: Path) -> None:
    figure, axes = study.panels(2, width=5.6, height=4.6, sharey=False)
    for axis, (decoding, text) in zip(axes, MEASURES.items(), strict=True):
        for name in found.names:
            study.band(axis, *found.curve(name, decoding), found.arms[name].style, found.arms[name].label)
        axis.axvspan(0, WARMUP * found.steps, color=study.GRAY, alpha=0.08, linewidth=0)
        axis.set(title=text, xlabel="optimizer step (shaded: warmup)")
    axes[0].set_ylabel(f"right and in the format, of {found.runs.start['n_test']} (band: ±1 SE)")
    study.save(figure, path, legend_of=axes[0], columns=5)


STUDY = study.Study(
    name="off_task",
    options={"steps": 40, "eval_interval": 10, "n_test": 300, "n_probe": 200, "task": ADDITION},
    arms=lambda settings: [*make_arms(settings["steps"]), *([PROBE] if settings["task"] == ADDITION else [])],
    work=work,
    report=report,
)

if __name__ == "__main__":
    STUDY.main(__doc__)

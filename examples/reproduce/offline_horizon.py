"""
For how long, and at which learning rate, does offline distillation keep up with a live teacher? Each loss of
`OfflineOPDTrainer`, up to twice the steps of `offline_opd.py`, from the same student, the paper's at two rates:

```sh
python examples/reproduce/offline_horizon.py --seeds 0 1 2 3 4 --workers 2    # all arms, then the report
python examples/reproduce/offline_horizon.py --report                         # only rebuild it from the finished runs
```

A finished run is in `results/offline_horizon_runs.json` and not repeated: after an interruption, start it again.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reproduce import study
from reproduce.study import Claim, Estimate, Runs, difference, over_seeds, verdict


# isort: split
import numpy as np

from benchmarks._report import machine
from reproduce import offline_opd
from reproduce.offline_opd import Arm
from reproduce.offline_opd_data import BATCH, TOP_K, Data, make_data
from testbed.evaluate import load_checkpoint
from testbed.tasks import ADDITION, TASKS


RATES = ("5e-06", "5e-05")
LIVE, DATA, DRIFT = "live", "data", "offline/drift_kl"
LOSSES = {
    LIVE: Arm("live, sampled token", (study.BLACK, "o", "-"), "sampled"),
    "paper": Arm("sampled token (the paper's)", (study.RED, "D", "-"), "sampled", offline=True),
    "ratio": Arm("sampled token, with the ratio", (study.PURPLE, "X", "-"), "ratio", offline=True),
    "top_k": Arm(f"top-{TOP_K} reverse KL", (study.GREEN, "P", "-"), "top_k", offline=True),
    "baseline": Arm(
        "ratio and KL baseline",
        (study.BLUE, "s", ":"),
        "ratio",
        offline=True,
        settings={"advantage_baseline": "kl"},
    ),
    "extrapolated": Arm(
        "ratio, extrapolated (1.25)",
        (study.ORANGE, "^", ":"),
        "ratio",
        offline=True,
        settings={"reward_extrapolation": 1.25},
    ),
}
AT_BOTH_RATES = (LIVE, "paper")  # the others have no need of the lower one
ARMS = {
    f"{loss}_{rate}": (loss, rate) for rate in RATES for loss in LOSSES if rate == RATES[-1] or loss in AT_BOTH_RATES
}


def work(name: str, seed: int, settings: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Train one arm, make the data of all offline ones, or measure the student before training."""
    steps, folder, task = settings["steps"], Path(settings["work_dir"]), TASKS[settings["task"]]
    test, data = task.prompts("test", settings["n_test"]), Data(task=settings["task"])
    student = data.model(data.student, folder)
    if name == study.START:
        scores = study.measure_student(*load_checkpoint(student), test, 0, task.max_new_tokens)
        return {"task": settings["task"], "n_test": settings["n_test"], **scores}
    if name == DATA:
        return make_data(data, folder, seed, steps, with_top_k=True)
    loss, rate = ARMS[name]
    arm = replace(LOSSES[loss], learning_rate=float(rate), data=data)
    trainer = offline_opd.make_trainer(arm, folder, seed, steps, scratch)
    _, tokenizer = load_checkpoint(student)
    curve = study.Curve(
        lambda model, step: study.measure_student(
            model, tokenizer, test, study.draw_of(seed, step), task.max_new_tokens
        ),
        settings["eval_interval"],
        steps,
    )
    trainer.add_callback(curve)
    trainer.train()
    drift = {str(entry["step"]): study.rounded(entry[DRIFT]) for entry in trainer.state.log_history if DRIFT in entry}
    return {
        "arm": name,
        "seed": seed,
        **{option: settings[option] for option in ("steps", "n_test", "eval_interval")},
        "machine": machine(),
        "curve": curve.points,
        "drift": {step: drift[step] for step in curve.points if step in drift},
    }


class Results:
    """The finished runs; rates at temperature 1."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        if not (names := runs.names(ARMS)):
            raise SystemExit(f"No finished runs of an arm in {runs.path}.")
        self.first = runs.of(names[0])[0]
        self.steps = sorted(map(int, self.first["curve"]))
        self.start = float(study.as_rates(runs.start["sampled"], "sampled").mean())

    def scores(self, loss: str, rate: str, step: int, decoding: str = "sampled") -> np.ndarray:
        """Of shape `(S, N)`: seeds, test prompts."""
        runs = self.runs.of(f"{loss}_{rate}")
        return np.stack([study.as_rates(run["curve"][str(step)][decoding], decoding) for run in runs])

    def rate(self, loss: str, rate: str, step: int, decoding: str = "sampled") -> Estimate:
        return over_seeds(self.scores(loss, rate, step, decoding).mean(axis=1))

    def drift(self, loss: str, rate: str, step: int) -> str:
        values = [run["drift"].get(str(step)) for run in self.runs.of(f"{loss}_{rate}")]
        return f"{np.mean(values):.3f}" if None not in values else "—"


# (claim, loss, compared with)
_COMPARED = (
    ("The paper's loss falls behind live distillation", LIVE, "paper"),
    ("With the ratio it falls behind", LIVE, "ratio"),
    (f"The top-{TOP_K} loss falls behind", LIVE, "top_k"),
    ("The KL baseline improves on the ratio alone", "baseline", "ratio"),
    ("Reward extrapolation improves on the ratio alone", "extrapolated", "ratio"),
)


def claims(found: Results) -> Iterator[Claim]:
    """One per comparison, learning rate, and half or all of the steps."""
    half = found.steps[(len(found.steps) - 1) // 2]
    for claim, first, second in _COMPARED:
        for rate in RATES:
            for step in (half, found.steps[-1]):
                if found.runs.has(f"{first}_{rate}", f"{second}_{rate}"):
                    gap = difference(found.scores(first, rate, step), found.scores(second, rate, step))
                    rates = f"{found.rate(first, rate, step)} against {found.rate(second, rate, step)}"
                    yield f"{claim}: rate {rate}, {step} steps.", verdict(gap), f"{rates} ({gap.signed()})."


def report(runs: Runs, folder: Path) -> str:
    """Write a CSV file and a figure; returns the Markdown."""
    found = Results(runs)
    rows, cells = [], []
    last = found.steps[-1]
    for name in runs.names(ARMS):
        loss, rate = ARMS[name]
        row: dict[str, Any] = {"loss": loss, "learning_rate": rate, "seeds": len(runs.of(name))}
        for step in found.steps:
            estimate = found.rate(loss, rate, step)
            row |= {f"sampled_{step}": estimate.value, f"sampled_{step}_se": estimate.error}
        rows.append(row | {"greedy": found.rate(loss, rate, last, "greedy").value})
        cells.append([
            LOSSES[loss].label,
            rate,
            *(found.rate(loss, rate, step) for step in found.steps),
            found.rate(loss, rate, last, "greedy"),
            found.drift(loss, rate, last),
        ])  # fmt: skip
    study.write_csv(folder / f"{runs.name}.csv", rows)
    _plot(found, folder / f"{runs.name}.png")
    seeds = " or ".join(map(str, sorted({len(runs.of(name)) for name in runs.names(ARMS)})))
    student, teacher = (runs.task.model(name).name for name in ("sft_student", "teacher"))
    header = ["loss", "learning rate", *(f"T = 1, {step}" for step in found.steps), f"greedy, {last}", "drift"]
    return "\n".join([
        "# How long offline distillation keeps up",
        "",
        f"Written by `python examples/reproduce/offline_horizon.py{runs.command}`; do not edit. Student and teacher "
        f"are `{student}` and `{teacher}` of the test-bed; before training {found.start:.3f} at T = 1. "
        f"{study.machine_text(found.first['machine'])}",
        "",
        f"{seeds} seeds; {BATCH} rollouts per step, one of each prompt, none used twice; constant learning rate, "
        f"Adam; right and in the format on {runs.start['n_test']} test prompts, mean ± SE over seeds. Offline rows "
        "are rollouts of the student before training. Columns are steps; *drift* is the KL divergence between the "
        "trained policy and the one that drew them, on their tokens, at the end.",
        "",
        study.markdown_table(header, cells),
        "",
        f"![accuracy against step]({runs.name}.png)",
        "",
        "## What it says",
        "",
        "Judged at T = 1; a difference counts above 2 standard errors, which add the variance over seeds and over "
        "test prompts.",
        "",
        *study.claim_lines(claims(found)),
        "",
    ])  # fmt: skip


def _plot(found: Results, path: Path) -> None:
    rates = [rate for rate in RATES if any(found.runs.has(f"{loss}_{rate}") for loss in LOSSES)]
    figure, axes = study.panels(len(rates), width=4.4)
    for axis, rate in zip(axes, rates, strict=True):
        for loss, arm in LOSSES.items():
            if found.runs.has(f"{loss}_{rate}"):
                solved = [found.scores(loss, rate, step).mean(axis=1) for step in found.steps]
                values = np.stack([np.full(len(solved[0]), found.start), *solved], axis=1)
                study.band(axis, [0, *found.steps], values, arm.style, arm.label)
        axis.set(title=f"learning rate {rate}", xlabel="optimizer step")
    axes[0].set_ylabel(f"right at T = 1, of {found.runs.start['n_test']} (band: ±1 SE)")
    study.save(figure, path, legend_of=axes[-1], columns=3)


STUDY = study.Study(
    name="offline_horizon",
    options={"steps": 80, "n_test": 300, "eval_interval": 20, "work_dir": "outputs/offline_horizon", "task": ADDITION},
    arms=lambda settings: ARMS,
    work=work,
    report=report,
    stages=lambda names, settings: [[DATA], names],
)

if __name__ == "__main__":
    STUDY.main(__doc__)

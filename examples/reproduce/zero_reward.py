"""
A student that gets no reward at the start: what helps? `base` of the test-bed adds but never writes the required box,
so that plain GRPO has nothing to learn from. All arms have equal steps, prompts and rollouts; mixing costs more time.

```sh
python examples/reproduce/zero_reward.py --workers 2    # all arms, 5 seeds, then the report
python examples/reproduce/zero_reward.py --report       # only rebuild the report from the finished runs
```

A finished run is in `results/zero_reward_runs.json` and not repeated: after an interruption, start the command again.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reproduce import study
from reproduce.study import Claim, Estimate, Runs, difference, over_seeds, verdict


# isort: split
import numpy as np

from benchmarks._report import machine
from reproduce import logit_mixing
from reproduce.logit_mixing import KINDS
from reproduce.trust_region import BATCH, ROLLOUTS_PER_PROMPT, supervise, training_prompts
from testbed.task import build_prompt_dataset


DECAY, SFT = 0.7, 1 / 3  # shares of the steps
METRICS = (
    "reward",
    "mixing/teacher_weight",
    "mixing/rewarded_prompts",
    "importance/ratio_mean",
    "importance/effective_sample_size",
    "importance/suppressed_share",
)


@dataclass(frozen=True)
class Arm(logit_mixing.Arm):
    """An arm of `logit_mixing`, from `base`; `sft_steps` are supervised steps on the teacher's rollouts before it."""

    student: str = "base"
    sft_steps: int = 0


def make_arms(steps: int) -> dict[str, Arm]:
    """All arms. `teacher` solves the task; `student` is an SFT version of `base` that knows the format."""
    decay = {"teacher_weight_schedule": "linear", "teacher_weight_decay_steps": max(1, round(DECAY * steps))}

    def annealed(label: str, style: study.Style, reference: str = "teacher", **settings: Any) -> Arm:
        return Arm(label, style, {"teacher_weight": 0.5, **decay, **settings}, reference=reference)

    def fusion(label: str, style: study.Style, mode: str, reference: str = "teacher", **settings: Any) -> Arm:
        return annealed(label, style, reference, objective="student", is_clip_mode=mode, **settings)

    sequence = {"importance_sampling_level": "sequence"}
    return {
        "grpo": Arm("GRPO", (study.BLACK, "o", "-"), {"teacher_weight": 0.0}),
        "grpo_kl": Arm("GRPO + KL (0.04)", (study.GRAY, "v", "--"), {"teacher_weight": 0.0, "beta": 0.04}),
        "fusion_token": fusion("logit fusion, token ratios (cap 3)", (study.RED, "X", "--"), "max"),
        "fusion_sequence": fusion("logit fusion, sequence ratios", (study.ORANGE, "<", "--"), "none", **sequence),
        "floor": fusion("floor", (study.BLUE, "D", "-"), "floor"),
        "floor_sft": fusion("floor, SFT reference", (study.SKY, "s", "-"), "floor", "student"),
        "mixed": annealed("mixed objective, 0.5 to 0", (study.GREEN, "P", "-")),
        "mixed_sft": annealed("mixed objective, 0.5 to 0, SFT reference", (study.YELLOW, "^", "-"), "student"),
        "adaptive": Arm(
            "mixed objective, adaptive weight",
            (study.GRAY, "*", "-."),
            {"teacher_weight": 0.5, "teacher_weight_schedule": "adaptive", "adaptive_num_prompts": 32},
        ),
        "sft_grpo": Arm(
            "SFT on the teacher's rollouts, then GRPO",
            (study.PURPLE, "h", "-."),
            {"teacher_weight": 0.0},
            sft_steps=round(SFT * steps),
        ),
    }


def work(name: str, seed: int, settings: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Train one arm with one seed, or measure what there is before training."""
    steps, rows = settings["steps"], list(build_prompt_dataset("test", settings["n_test"]))
    if name == study.START:
        return run_start(rows, scratch)
    arm = make_arms(steps)[name]

    def measure(trainer: Any) -> dict[str, Any]:
        return logit_mixing.measure(trainer, arm, rows)

    sft_seconds = 0.0
    if arm.sft_steps:
        folder, nothing = f"{scratch}/sft", study.Curve(lambda model, step: None, steps + 1, steps + 1)
        # Prompts and rollouts per step as in GRPO, which takes 128 where the distillation study takes BATCH
        prompts = training_prompts(seed, 2 * arm.sft_steps)
        supervise(prompts, seed, 2 * arm.sft_steps, nothing, folder, model=arm.student)
        arm, sft_seconds = replace(arm, student=folder), nothing.cpu
    trainer = logit_mixing.make_trainer(arm, seed, steps - arm.sft_steps, scratch)
    curve = study.Curve(lambda model, step: measure(trainer), settings["eval_interval"], steps)
    curve.first = arm.sft_steps
    trainer.add_callback(curve)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "arm": name,
        "seed": seed,
        **{option: settings[option] for option in ("steps", "n_test", "eval_interval")},
        "train_seconds": round(curve.wall, 1),
        "cpu_seconds": round(curve.cpu + sft_seconds, 1),
        "rollout_tokens": round(sum(entry["completions/mean_length"] for entry in history) * 2 * BATCH),
        "machine": machine(),
        "metrics": {key: [study.rounded(entry.get(key)) for entry in history] for key in METRICS},
        "curve": curve.points,
    }


def run_start(rows: list[dict[str, Any]], scratch: str) -> dict[str, Any]:
    """Greedy scores of each checkpoint before training, and of the mixtures that the arms start from."""
    arms, found = make_arms(1), {}
    for reference, name in (("teacher", "mixed"), ("student", "mixed_sft")):
        trainer = logit_mixing.make_trainer(arms[name], 0, 1, f"{scratch}/{name}")
        for policy, weight in (("base", 0.0), (reference, 1.0), (name, 0.5)):
            found[policy] = logit_mixing.greedy_bits(trainer, rows, (weight,))
    return {"n_test": len(rows), **found}


class Results:
    """The finished runs, as greedy scores of shape `(S, N)`: seeds, test prompts."""

    def __init__(self, runs: Runs) -> None:
        self.runs, self.names = runs, runs.names(make_arms(1))
        if not self.names:
            raise SystemExit(f"No finished runs of an arm in {runs.path}.")
        self.first = runs.of(self.names[0])[0]
        self.steps = self.first["steps"]
        self.arms = make_arms(self.steps)

    def scores(self, name: str, policy: str = "student", kind: str = "solve", step: int | None = None) -> np.ndarray:
        at = str(self.steps if step is None else step)
        return np.stack([study.as_rates(run["curve"][at][policy][kind]) for run in self.runs.of(name)])

    def rate(self, name: str, policy: str = "student", kind: str = "solve") -> Estimate:
        return over_seeds(self.scores(name, policy, kind).mean(axis=1))

    def curve(self, name: str) -> tuple[list[int], np.ndarray]:
        """Steps, and the solve rates of the student alone, of shape `(S, points)`."""
        runs, start = self.runs.of(name), self.start("base")
        steps = sorted(map(int, runs[0]["curve"]))
        rates = [[start, *(self.scores(name, step=step)[i].mean() for step in steps)] for i in range(len(runs))]
        return [0, *steps], np.array(rates)

    def start(self, policy: str, kind: str = "solve") -> float:
        return float(study.as_rates(self.runs.start[policy][kind]).mean())

    def metric(self, name: str, key: str) -> float:
        """Mean over seeds and the first half of the decay, while the teacher is there."""
        part = slice(0, round(DECAY * self.steps / 2))
        return float(np.nanmean(np.array([run["metrics"][key][part] for run in self.runs.of(name)], dtype=float)))


# (claim, arm, rival): the student alone after the last step
_ABOVE = (
    ("Logit fusion as published (token ratios, capped) learns what GRPO cannot.", "fusion_token", "grpo"),
    ("Sequence-level ratios do.", "fusion_sequence", "grpo"),
    ("The floor does.", "floor", "grpo"),
    ("The floor is above logit fusion as published.", "floor", "fusion_token"),
    ("The floor is above sequence-level ratios.", "floor", "fusion_sequence"),
    ("The mixed objective with a weight that ends at 0 learns what GRPO cannot.", "mixed", "grpo"),
    ("The floor is above the mixed objective.", "floor", "mixed"),
    ("The floor is above SFT on the teacher's rollouts, then GRPO.", "floor", "sft_grpo"),
    ("The mixed objective is above SFT on the teacher's rollouts, then GRPO.", "mixed", "sft_grpo"),
    ("The adaptive weight teaches the student.", "adaptive", "grpo"),
)


def claims(found: Results) -> Iterator[Claim]:
    """Claims whose arms have no finished run are left out."""
    for claim, name, rival in _ABOVE:
        if found.runs.has(name, rival):
            gap = difference(found.scores(name), found.scores(rival))
            yield claim, verdict(gap), f"{found.rate(name)} against {found.rate(rival)} ({gap.signed()})."


def report(runs: Runs, folder: Path) -> str:
    """Write a CSV file and a figure; returns the Markdown."""
    found = Results(runs)
    rows, cells = [], []
    for name in found.names:
        mixes = "mixed" in runs.of(name)[0]["curve"][str(found.steps)]
        row: dict[str, Any] = {"arm": name, "seeds": len(runs.of(name)), "steps": found.steps}
        for kind in KINDS:
            estimate = found.rate(name, kind=kind)
            row |= {kind: estimate.value, f"{kind}_se": estimate.error}
        row |= {key: round(runs.cost(name, key), 1) for key in ("rollout_tokens", "cpu_seconds")}
        rows.append(row)
        mixture = found.rate(name, "mixed") if mixes else "—"
        suppressed = f"{found.metric(name, METRICS[-1]):.3f}" if _has(found, name, METRICS[-1]) else "—"
        rewarded = f"{found.metric(name, METRICS[2]):.2f}" if _has(found, name, METRICS[2]) else "—"
        scores = [found.rate(name, kind=kind) for kind in KINDS]
        cells.append([found.arms[name].label, *scores, mixture, rewarded, suppressed, f"{row['cpu_seconds']:.0f}"])
    study.write_csv(folder / "zero_reward.csv", rows)
    _plot(found, folder / "zero_reward.png")
    seeds = sorted({len(runs.of(name)) for name in found.names})
    header = [
        "arm",
        "student alone: solved",
        "answer",
        "format",
        "mixture",
        "prompts with reward",
        "suppressed",
        "CPU s",
    ]
    start = ", ".join(f"`{policy}` {found.start(policy):.3f}" for policy in ("base", "student", "teacher"))
    return "\n".join([
        "# A student that gets no reward at the start",
        "",
        "Written by `python examples/reproduce/zero_reward.py`; do not edit. The student is `base`, which adds but "
        f"never writes the box. Solved before training, greedy: {start}; mixture of `base` and `teacher` at 0.5 "
        f"{found.start('mixed'):.3f}. {study.machine_text(found.first['machine'])}",
        "",
        f"{found.steps} steps of 128 rollouts (16 prompts), learning rate 3e-5, {' or '.join(map(str, seeds))} seeds, "
        f"{runs.start['n_test']} test prompts, greedy, mean ± SE over seeds. The weight falls from 0.5 to 0 over "
        f"{round(DECAY * found.steps)} steps; *SFT* takes the place of the first {round(SFT * found.steps)} steps, "
        f"with as many rollouts ({ROLLOUTS_PER_PROMPT} per prompt). *rewarded* and *suppressed* are means over the "
        "first half of the decay: `mixing/rewarded_prompts` and `importance/suppressed_share`. CPU seconds are "
        "without evaluation.",
        "",
        study.markdown_table(header, cells),
        "",
        "![student alone against step](zero_reward.png)",
        "",
        "## What it says",
        "",
        "A difference counts above 2 standard errors, which add the variance over seeds and over test prompts.",
        "",
        *study.claim_lines(claims(found)),
        "",
    ])  # fmt: skip


def _has(found: Results, name: str, key: str) -> bool:
    return any(value is not None for run in found.runs.of(name) for value in run["metrics"][key])


def _plot(found: Results, path: Path) -> None:
    figure, (axis,) = study.panels(1, width=8.0, height=4.6)
    for name in found.names:
        study.band(axis, *found.curve(name), found.arms[name].style, found.arms[name].label)
    axis.axvspan(0, DECAY * found.steps, color=study.GRAY, alpha=0.08, linewidth=0)
    axis.set(
        title="A student without reward at the start, decoded alone",
        xlabel="optimizer step (shaded: the teacher's weight is above 0)",
        ylabel=f"solved, of {found.runs.start['n_test']} test prompts (band: ±1 SE)",
    )
    study.save(figure, path, legend_of=axis, columns=2)


STUDY = study.Study(
    name="zero_reward",
    options={"steps": 60, "eval_interval": 10, "n_test": 300},
    arms=lambda settings: make_arms(settings["steps"]),
    work=work,
    report=report,
)

if __name__ == "__main__":
    STUDY.main(__doc__)

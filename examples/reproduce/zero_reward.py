"""
A student that gets no reward at the start: what helps? `base` of the test-bed adds but hardly ever writes the required
box, so that plain GRPO has next to nothing to learn from; that of sorting cannot do the task at all. All arms have
equal steps, prompts and rollouts. Some go on: GRPO, since mixing costs more time, and one or two that mix, after
their teacher has gone. On addition, three start from `student`, which gets some reward.

```sh
python examples/reproduce/zero_reward.py --seeds 0 1 2 3 4 --workers 2    # all arms, then the report
python examples/reproduce/zero_reward.py --task sorting --steps 100 --seeds 0 1 2 3 4 --workers 2
python examples/reproduce/zero_reward.py --report                         # only rebuild it from the finished runs
```

A finished run is in `results/zero_reward_runs.json` and not repeated: after an interruption, start the command again.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reproduce import study
from reproduce.study import HELD, Claim, Estimate, Runs, difference, over_seeds, verdict, word


# isort: split
import numpy as np
import torch
from torch import Tensor

from benchmarks._report import machine
from reproduce import logit_mixing, trust_region
from reproduce.logit_mixing import KINDS
from reproduce.trust_region import BATCH, ROLLOUTS_PER_PROMPT, supervise, teacher_rollouts, training_prompts
from testbed.tasks import ADDITION, TASKS, Task
from trl_blend.trainers.logit_mix_grpo import trainer as logit_mix


# Shares of the steps: until the teacher's weight is 0, until that is so at the earliest where it waits for the reward,
# until it would be 0 where it falls as slowly as those that waited, of a first stage, and of arms that mix and go on
DECAY, FASTEST, SLOW, FIRST_STAGE, LONGER = 0.7, 0.4, 1.4, 1 / 3, 1.6
SHAPE = 0.1
ROLLOUTS = 128  # of a step
SORTING = "sorting"
BOTH = (ADDITION, SORTING)
WEIGHTS = {ADDITION: 0.5, SORTING: 0.8}  # at which the mixture gets reward from the start
# GRPO goes on for about the compute of the arms that mix; on sorting, where it never sees a reward, of the floor
GO_ON = {ADDITION: {"grpo": 2.5, "floor": LONGER, "mixed": LONGER}, SORTING: {"grpo": 1.6, "mixed_slow": LONGER}}
# Of the first figure
MAIN = (
    "grpo",
    "fusion_token",
    "fusion_slow",
    "floor",
    "floor_reward",
    "floor_slow",
    "mixed",
    "mixed_slow",
    "sft_grpo",
)
LENGTH = "completions/mean_length"
WEIGHT, REWARDED, SUPPRESSED = "mixing/teacher_weight", "mixing/rewarded_prompts", "importance/suppressed_share"
# Part of the decay in which a metric tells the arms apart: at its start all are alike
QUARTERS = {REWARDED: (0.75, 1.0), SUPPRESSED: (0.25, 0.5)}
METRICS = (
    "reward",
    WEIGHT,
    REWARDED,
    "importance/ratio_mean",
    "importance/effective_sample_size",
    SUPPRESSED,
)


@dataclass(frozen=True)
class Arm(logit_mixing.Arm):
    """
    An arm of `logit_mixing`, from `base`.

    Args:
        first_stage (`str`, *optional*):
            What takes the place of the first steps: `"sft"` on the teacher's rollouts, or distillation from a
            `"trust_region"`.
        shaped (`bool`, *optional*, defaults to `False`):
            Whether ratios are those of [`shaped_log_ratio`].
        tasks (`tuple[str, ...]`, *optional*, defaults to addition):
            On which it is compared.
    """

    student: str = "base"
    first_stage: str | None = None
    shaped: bool = False
    tasks: tuple[str, ...] = (ADDITION,)


def make_arms(steps: int, task: str) -> dict[str, Arm]:
    """The arms of a task. `teacher` solves it; `student` is an SFT version of `base` that gets some reward."""
    weight = WEIGHTS[task]
    waiting = {"teacher_weight_schedule": "reward", "teacher_weight_decay_steps": max(1, round(FASTEST * steps))}
    decay = {"teacher_weight_schedule": "linear", "teacher_weight_decay_steps": max(1, round(DECAY * steps))}
    slow = {"teacher_weight_schedule": "linear", "teacher_weight_decay_steps": max(1, round(SLOW * steps))}

    annealed = {"teacher_weight": weight, **decay}

    def fusion(
        label: str,
        style: study.Style,
        mode: str,
        level: str = "token",
        schedule: dict[str, Any] = decay,
        **others: Any,
    ) -> Arm:
        settings = {"objective": "student", "is_clip_mode": mode, "importance_sampling_level": level}
        settings |= {"teacher_weight": weight, **schedule}
        if others.get("first_stage"):
            settings["teacher_weight_decay_steps"] = max(1, round(DECAY * (steps - round(FIRST_STAGE * steps))))
        return Arm(label, style, settings, **others)

    mixed = f"mixed objective, {weight:g} to 0"
    arms = {
        "grpo": Arm("GRPO", (study.BLACK, "o", "-"), {"teacher_weight": 0.0}, tasks=BOTH),
        "grpo_kl": Arm("GRPO + KL (0.04)", (study.GRAY, "v", "--"), {"teacher_weight": 0.0, "beta": 0.04}, tasks=BOTH),
        "fusion_token": fusion("logit fusion, token ratios (cap 3)", (study.RED, "X", "--"), "max"),
        "fusion_slow": fusion(
            "logit fusion, token ratios (cap 3), slower decay",
            (study.RED, "X", ":"),
            "max",
            schedule=slow,
            tasks=(SORTING,),
        ),
        "fusion_sequence": fusion("logit fusion, sequence ratios", (study.ORANGE, "<", "--"), "none", "sequence"),
        "floor": fusion("floor", (study.BLUE, "D", "-"), "floor", tasks=BOTH),
        "floor_reward": fusion(
            "floor, waits for the reward", (study.SKY, "D", "--"), "floor", schedule=waiting, tasks=BOTH
        ),
        "floor_slow": fusion("floor, slower decay", (study.ORANGE, "D", ":"), "floor", schedule=slow, tasks=BOTH),
        "shaped": fusion("LUFFY's shaped ratios", (study.YELLOW, "v", "--"), "floor", shaped=True),
        "shaped_slow": fusion(
            "LUFFY's shaped ratios, slower decay",
            (study.YELLOW, "v", ":"),
            "floor",
            schedule=slow,
            shaped=True,
            tasks=(SORTING,),
        ),
        "floor_sft": fusion("floor, SFT reference", (study.SKY, "s", "-"), "floor", reference="student"),
        "mixed": Arm(mixed, (study.GREEN, "P", "-"), annealed),
        "mixed_reward": Arm(
            "mixed objective, waits for the reward",
            (study.GREEN, "P", "-."),
            annealed | waiting,
            tasks=(SORTING,),
        ),
        "mixed_slow": Arm("mixed objective, slower decay", (study.GREEN, "P", ":"), annealed | slow, tasks=(SORTING,)),
        "mixed_sft": Arm(f"{mixed}, SFT reference", (study.YELLOW, "^", "-"), annealed, reference="student"),
        "mixed_arithmetic": Arm(
            f"mixed objective, logits added, {weight:g} to 0",
            (study.SKY, "H", ":"),
            annealed | {"mixing_space": "arithmetic"},
        ),
        "mixed_kept": Arm(
            f"mixed objective, {weight:g} throughout", (study.GREEN, "p", ":"), {"teacher_weight": weight}, tasks=BOTH
        ),
        "sft_grpo": Arm(
            "SFT on the teacher's rollouts, then GRPO",
            (study.PURPLE, "h", "-."),
            {"teacher_weight": 0.0},
            first_stage="sft",
            tasks=BOTH,
        ),
        "sft_floor": fusion(
            "SFT on the teacher's rollouts, then floor",
            (study.PURPLE, "*", "-"),
            "floor",
            first_stage="sft",
        ),
        "some_grpo": Arm("some reward: GRPO", (study.BLACK, "o", ":"), {"teacher_weight": 0.0}, student="student"),
        "some_fusion": fusion(
            "some reward: logit fusion, token ratios (cap 3)", (study.RED, "X", ":"), "max", student="student"
        ),
        "some_floor": fusion("some reward: floor", (study.BLUE, "D", ":"), "floor", student="student"),
        "trb_grpo": Arm(
            "trust-region distillation (0.05), then GRPO",
            (study.PURPLE, "d", ":"),
            {"teacher_weight": 0.0},
            first_stage="trust_region",
            tasks=BOTH,
        ),
    }
    return {name: arm for name, arm in arms.items() if task in arm.tasks}


def last_step(name: str, steps: int, task: str) -> int:
    """Up to which an arm is trained."""
    return round(steps * GO_ON[task].get(name, 1))


def first_stage(arm: Arm, seed: int, steps: int, folder: str, task: Task) -> tuple[float, float]:
    """Train `base` into a folder with the rollouts of `steps` steps of GRPO; CPU seconds and tokens decoded."""
    steps *= ROLLOUTS // BATCH
    prompts = training_prompts(seed, steps, task)
    clock = study.Curve(lambda model, step: None, steps + 1, steps + 1)
    clock.start()
    if arm.first_stage == "sft":
        rollouts = teacher_rollouts(prompts, seed, task)
        supervise(rollouts, seed, steps, clock, folder, task.model(arm.student), task)
        return clock.cpu, float(sum(map(sum, rollouts["completion_mask"])))
    settings = {"rollout_policy": "trust_region", "kl_budget": 0.05, "blend_warmup_steps": steps // 2}
    distilled = trust_region.Arm(arm.label, arm.style, settings)
    trainer = trust_region.make_trainer(distilled, task.model(arm.student), prompts, seed, steps, folder, task)
    trainer.add_callback(clock)
    trainer.train()
    trainer.save_model(folder)
    return clock.cpu, _tokens(trainer, BATCH)


def _tokens(trainer: Any, rollouts: int, steps: int | None = None) -> float:
    """Tokens decoded in the first `steps` steps, of so many rollouts each."""
    lengths = [entry[LENGTH] for entry in trainer.state.log_history if LENGTH in entry]
    return sum(lengths[:steps]) * rollouts


def work(name: str, seed: int, settings: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Train one arm with one seed, or measure what there is before training."""
    task = TASKS[settings["task"]]
    steps, rows = settings["steps"], list(task.prompts("test", settings["n_test"]))
    if name == study.START:
        return {"task": settings["task"], **run_start(rows, scratch, task, WEIGHTS[settings["task"]])}
    arm = make_arms(steps, settings["task"])[name]
    last = last_step(name, steps, settings["task"])
    done, earlier_seconds, earlier_tokens = 0, 0.0, 0.0
    if arm.first_stage:
        folder, done = f"{scratch}/first", round(FIRST_STAGE * steps)
        earlier_seconds, earlier_tokens = first_stage(arm, seed, done, folder, task)
        arm = replace(arm, student=folder)
    trainer = logit_mixing.make_trainer(arm, seed, last - done, scratch, task)

    def measure(model: Any, step: int) -> dict[str, Any]:
        seconds = round(curve.cpu + earlier_seconds, 1)
        return logit_mixing.measure(trainer, arm, rows) | {"cpu_seconds": seconds}

    curve = study.Curve(measure, settings["eval_interval"], last)
    curve.first = done
    trainer.add_callback(curve)
    with mock.patch.object(logit_mix, "floored_log_ratio", shaped_log_ratio) if arm.shaped else nullcontext():
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "arm": name,
        "seed": seed,
        **{option: settings[option] for option in ("steps", "n_test", "eval_interval")},
        "rollout_tokens": round(earlier_tokens + _tokens(trainer, ROLLOUTS, steps - done)),
        "machine": machine(),
        "metrics": {key: [study.rounded(entry.get(key)) for entry in history] for key in METRICS},
        "curve": curve.points,
    }


def shaped_log_ratio(log_ratio: Tensor, advantages: Tensor, clip_max: float) -> Tensor:
    r"""
    What takes the place of the floor in the arm `"shaped"`: \\( r (1 + γ)^2 / (r + γ)^2 \\) with γ = 0.1, the
    coefficient of the gradient of \\( r / (r + γ) \\), 1 at r = 1, for either sign of the advantage.

    Source: LUFFY, arXiv 2504.14945.
    """
    log_ratio = log_ratio.detach()
    return log_ratio + 2 * (math.log1p(SHAPE) - torch.log(log_ratio.exp() + SHAPE))


def run_start(rows: list[dict[str, Any]], scratch: str, task: Task, start_weight: float) -> dict[str, Any]:
    """Greedy scores of each checkpoint before training, and of the mixtures that the arms start from."""
    arms, found = make_arms(1, ADDITION), {}
    for reference, name in (("teacher", "mixed"), ("student", "mixed_sft")):
        trainer = logit_mixing.make_trainer(arms[name], 0, 1, f"{scratch}/{name}", task)
        for policy, weight in (("base", 0.0), (reference, 1.0), (name, start_weight)):
            found[policy] = logit_mixing.greedy_bits(trainer, rows, (weight,))
    return {"n_test": len(rows), **found}


class Results:
    """The finished runs, as greedy scores of shape `(S, N)`: seeds, test prompts."""

    def __init__(self, runs: Runs) -> None:
        self.task = runs.start.get("task", ADDITION)
        self.runs, self.names = runs, runs.names(make_arms(1, self.task))
        if not self.names:
            raise SystemExit(f"No finished runs of an arm in {runs.path}.")
        self.first = runs.of(self.names[0])[0]
        self.steps = self.first["steps"]
        self.arms = make_arms(self.steps, self.task)

    def scores(self, name: str, policy: str = "student", kind: str = "solve", step: int | None = None) -> np.ndarray:
        at = str(self.steps if step is None else step)
        return np.stack([study.as_rates(run["curve"][at][policy][kind]) for run in self.runs.of(name)])

    def rate(self, name: str, policy: str = "student", kind: str = "solve", step: int | None = None) -> Estimate:
        return over_seeds(self.scores(name, policy, kind, step).mean(axis=1))

    def curve(self, name: str) -> tuple[list[int], np.ndarray]:
        """Steps, and the solve rates of the student alone, of shape `(S, points)`."""
        runs, start = self.runs.of(name), self.start(self.arms[name].student)
        steps = sorted(map(int, runs[0]["curve"]))
        rates = [[start, *(self.scores(name, step=step)[i].mean() for step in steps)] for i in range(len(runs))]
        return [0, *steps], np.array(rates)

    def start(self, policy: str, kind: str = "solve") -> float:
        return float(study.as_rates(self.runs.start[policy][kind]).mean())

    def later(self, name: str) -> int:
        """The last step of an arm that goes on."""
        return max(map(int, self.runs.of(name)[0]["curve"]))

    def metric(self, name: str, key: str) -> float | None:
        """Mean over seeds and one quarter of the decay; `None` if no decay ends in the run, or it is not logged."""
        settings = self.arms[name].settings
        decay = settings.get("teacher_weight_decay_steps", 0)
        if settings.get("teacher_weight_schedule") != "linear" or decay > self.steps:
            return None
        first, last = (round(decay * share) for share in QUARTERS[key])
        values = np.array([run["metrics"][key][first:last] for run in self.runs.of(name)], dtype=float)
        return None if np.isnan(values).all() else float(np.nanmean(values))

    def first_reward(self, name: str) -> float:
        """Of GRPO's first step, mean over seeds."""
        return float(np.mean([run["metrics"]["reward"][0] for run in self.runs.of(name)]))

    def weights(self, name: str) -> tuple[float, float]:
        """The teacher's, over all steps and in the last: means over seeds. It is logged while it is not 0."""
        runs, steps = self.runs.of(name), self.steps
        values = np.array([[weight or 0.0 for weight in run["metrics"][WEIGHT][:steps]] for run in runs])
        return float(values.mean()), float(values[:, -1].mean())

    def seconds(self, name: str, step: int) -> float:
        """CPU seconds of training up to a step, mean over seeds."""
        return float(np.mean([run["curve"][str(step)]["cpu_seconds"] for run in self.runs.of(name)]))


# (claim, arm, rival): the student alone after the steps of all
_ABOVE = (
    ("Logit fusion as published (token ratios, capped) is above GRPO.", "fusion_token", "grpo"),
    ("Sequence-level ratios are above GRPO.", "fusion_sequence", "grpo"),
    ("The floor is above GRPO.", "floor", "grpo"),
    ("The floor is above logit fusion as published.", "floor", "fusion_token"),
    ("The floor is above sequence-level ratios.", "floor", "fusion_sequence"),
    ("The floor learns more with a weight that waits for the reward.", "floor_reward", "floor"),
    ("More than with a linear decay of the same mean weight.", "floor_reward", "floor_slow"),
    ("With a slower decay the floor is above logit fusion as published.", "floor_slow", "fusion_slow"),
    ("With a slower decay the floor is above LUFFY's shaped ratios.", "floor_slow", "shaped_slow"),
    ("With a slower decay LUFFY's shaped ratios are above GRPO.", "shaped_slow", "grpo"),
    ("The floor is above LUFFY's shaped ratios.", "floor", "shaped"),
    ("LUFFY's shaped ratios are above GRPO.", "shaped", "grpo"),
    ("The floor with the SFT reference is above GRPO.", "floor_sft", "grpo"),
    ("The mixed objective with a weight that ends at 0 is above GRPO.", "mixed", "grpo"),
    ("The mixed objective with a weight that waits for the reward is above GRPO.", "mixed_reward", "grpo"),
    ("With a slower decay it is above GRPO.", "mixed_slow", "grpo"),
    ("With the SFT reference it is above GRPO.", "mixed_sft", "grpo"),
    ("With the teacher's logits added to the student's whole ones it is above GRPO.", "mixed_arithmetic", "grpo"),
    ("The floor is above the mixed objective.", "floor", "mixed"),
    ("The mixed objective at a fixed weight teaches the student alone.", "mixed_kept", "grpo"),
    ("With a slower decay the floor is above the mixed objective.", "floor_slow", "mixed_slow"),
    ("The floor is above SFT on the teacher's rollouts, then GRPO.", "floor", "sft_grpo"),
    ("With a weight that waits for the reward it is.", "floor_reward", "sft_grpo"),
    ("The mixed objective is above SFT on the teacher's rollouts, then GRPO.", "mixed", "sft_grpo"),
    ("The floor is above trust-region distillation, then GRPO.", "floor", "trb_grpo"),
    ("After SFT the floor is above plain GRPO.", "sft_floor", "sft_grpo"),
    ("From a student that gets some reward, logit fusion as published is above GRPO.", "some_fusion", "some_grpo"),
    ("From there, the floor is above GRPO.", "some_floor", "some_grpo"),
    ("From there, the floor is above logit fusion as published.", "some_floor", "some_fusion"),
    ("The mixed objective is above trust-region distillation, then GRPO.", "mixed", "trb_grpo"),
)


def claims(found: Results) -> Iterator[Claim]:
    """Claims whose arms have no finished run are left out, and those that would rest on a single seed."""
    steps = found.steps
    compared = [(*row, steps, steps) for row in _ABOVE]
    for arm, label in (
        ("floor", "The floor"),
        ("floor_slow", "The floor with a slower decay"),
        ("floor_reward", "The floor that waits"),
        ("mixed", "The mixed objective"),
        ("mixed_slow", "The mixed objective with a slower decay"),
    ):
        if found.runs.has(arm, "grpo"):
            longer, later = found.later("grpo"), found.later(arm)
            compared.append((f"{label} is above GRPO with {longer} steps.", arm, "grpo", steps, longer))
            if later > steps:
                compared.append((f"{label} goes on rising, to step {later}.", arm, arm, later, steps))
    for claim, arm, rival, at, rival_at in compared:
        if found.runs.has(arm, rival) and len(found.runs.of(arm)) > 1:
            gap = difference(found.scores(arm, step=at), found.scores(rival, step=rival_at))
            rates = f"{found.rate(arm, step=at)} against {found.rate(rival, step=rival_at)}"
            cost = f"{found.seconds(arm, at):.0f} and {found.seconds(rival, rival_at):.0f} CPU seconds"
            yield claim, verdict(gap), f"{rates} ({gap.signed()}); {cost}."
    yield from _price(found)


def _price(found: Results) -> Iterator[Claim]:
    """What learning the format costs, where answers in whatever form were right before."""
    start = study.as_rates(found.runs.start["base"]["answer"])[None]
    learned = [name for name in found.names if found.arms[name].student == "base" and found.rate(name).value > 0.1]
    gaps = {found.arms[name].label: difference(found.scores(name, kind="answer"), start) for name in learned}
    kept = [f"{label} ({gap.signed()})" for label, gap in gaps.items() if verdict(gap, -1) != HELD]
    if start.any() and gaps:
        claim = "An arm from `base` that solves a tenth of the problems, alone, has fewer right answers than before."
        numbers = f"{len(gaps) - len(kept)} of {len(gaps)} arms{'; not: ' if kept else ''}{', '.join(kept)}."
        yield claim, word(not kept), numbers


def report(runs: Runs, folder: Path) -> str:
    """Write a CSV file and a figure; returns the Markdown."""
    found = Results(runs)
    rows, cells = [], []
    for name in found.names:
        mixes_at_all = bool(found.arms[name].settings["teacher_weight"])
        mixes = "mixed" in runs.of(name)[0]["curve"][str(found.steps)]
        goes_on = found.later(name) > found.steps
        rewarded, suppressed = (found.metric(name, key) for key in (REWARDED, SUPPRESSED))
        row: dict[str, Any] = {"arm": name, "seeds": len(runs.of(name)), "steps": found.steps}
        for kind in KINDS:
            estimate = found.rate(name, kind=kind)
            row |= {kind: estimate.value, f"{kind}_se": estimate.error}
        row |= {
            "rollout_tokens": runs.cost(name, "rollout_tokens"),
            "cpu_seconds": round(found.seconds(name, found.steps), 1),
        }
        rows.append(row)
        cells.append([
            found.arms[name].label,
            *(found.rate(name, kind=kind) for kind in KINDS),
            found.rate(name, "mixed") if mixes else "—",
            f"{found.rate(name, step=found.later(name))} ({found.later(name)})" if goes_on else "—",
            f"{found.first_reward(name):.2f}",
            *(f"{weight:.2f}" if mixes_at_all else "—" for weight in found.weights(name)),
            "—" if rewarded is None else f"{rewarded:.2f}",
            "—" if suppressed is None else f"{suppressed:.3f}",
            f"{row['rollout_tokens'] / 1000:.0f}k",
            f"{found.seconds(name, found.steps):.0f}",
        ])  # fmt: skip
    study.write_csv(folder / f"{runs.name}.csv", rows)
    figures = [f"![student alone against step]({runs.name}.png)", ""]
    _plot(found, MAIN, folder / f"{runs.name}.png")
    if not set(found.names) <= set(MAIN):
        figures += [f"![the same for all arms]({runs.name}_all.png)", ""]
        _plot(found, found.names, folder / f"{runs.name}_all.png")
    seeds = sorted({len(runs.of(name)) for name in found.names})
    weight = WEIGHTS[found.task]
    stage = round(FIRST_STAGE * found.steps)
    header = [
        "arm",
        "student alone: solved",
        "answer",
        "format",
        "mixture",
        "student alone, later (steps)",
        "first reward",
        "mean weight",
        "last weight",
        "prompts with reward",
        "suppressed",
        "tokens",
        "CPU s",
    ]
    start = ", ".join(f"`{policy}` {found.start(policy):.3f}" for policy in ("base", "student", "teacher"))
    return "\n".join([
        "# A student that gets no reward at the start",
        "",
        f"Written by `python examples/reproduce/zero_reward.py{runs.command}`; do not edit. The student is `base`, "
        f"which {runs.task.about_base}. Solved before training, greedy: {start}; mixture of `base` and `teacher` at "
        f"{weight:g} {found.start('mixed'):.3f}. The answer of `base`, in any form: "
        f"{found.start('base', 'answer'):.3f}. {study.machine_text(found.first['machine'])}",
        "",
        f"{found.steps} steps of {ROLLOUTS} rollouts (16 prompts), learning rate {runs.task.grpo_learning_rate:g}, "
        f"{' or '.join(map(str, seeds))} seeds, "
        f"{runs.start['n_test']} test prompts, greedy, mean ± SE over seeds. The weight falls from {weight:g}, unless "
        f"said, to 0 over {round(DECAY * found.steps)} steps, with a *slower decay* over {round(SLOW * found.steps)}, "
        f"where it waits for the reward in {round(FASTEST * found.steps)} at the earliest; a first stage takes the "
        f"place of the first {stage} steps, with as many rollouts ({ROLLOUTS_PER_PROMPT} per prompt). *first reward* "
        "is the mean reward in the first step of GRPO, *mean weight* the teacher's over all steps, *last weight* that "
        f"of the last, *prompts with reward* the mean of `{REWARDED}` over the last quarter of a decay that ends in "
        f"the run, *suppressed* that of `{SUPPRESSED}` over the second. Tokens and CPU seconds "
        f"are those of {found.steps} steps, without evaluation; between arms that were run at other times they "
        "compare only roughly, since other work on the cores slows all of them.",
        "",
        study.markdown_table(header, cells),
        "",
        *figures,
        "## What it says",
        "",
        "The student alone, after equal steps unless said. A difference counts above 2 standard errors, which add the "
        "variance over seeds and over test prompts.",
        "",
        *study.claim_lines(claims(found)),
        "",
    ])  # fmt: skip


def _plot(found: Results, names: Iterable[str], path: Path) -> None:
    figure, (axis,) = study.panels(1, width=8.0, height=4.2)
    for name in (name for name in found.names if name in names):
        study.band(axis, *found.curve(name), found.arms[name].style, found.arms[name].label)
    axis.axvspan(0, DECAY * found.steps, color=study.GRAY, alpha=0.08, linewidth=0)
    axis.set(
        title="A student without reward at the start, decoded alone",
        xlabel="optimizer step (shaded: the faster linear decay of the weight)",
        ylabel=f"solved, of {found.runs.start['n_test']} test prompts (band: ±1 SE)",
    )
    study.save(figure, path, legend_of=axis, columns=2)


STUDY = study.Study(
    name="zero_reward",
    options={"steps": 60, "eval_interval": 20, "n_test": 300, "task": ADDITION},
    arms=lambda settings: make_arms(settings["steps"], settings["task"]),
    work=work,
    report=report,
)

if __name__ == "__main__":
    STUDY.main(__doc__)

"""
Does trust-region behaviour blending do what its paper says (https://huggingface.co/papers/2605.31159)? On the add3cot
test-bed, on the CPU: training arms from the same checkpoint with equal prompts and steps, and two probes of the
rollouts at step 0, without training (the paper's Figures 7 and 4, in `trust_region_probes.py`):

```sh
python examples/reproduce/trust_region.py                    # all arms and the probes, 3 seeds, then the report
python examples/reproduce/trust_region.py --report           # only rebuild the report from the finished runs
python examples/reproduce/trust_region.py --arms vanilla probe --seeds 0 --steps 10 --output_dir try
```

A finished run is in `results/trust_region_runs.json` and not repeated: after an interruption, start the command again.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reproduce import study
from reproduce.study import DECODINGS, HELD, NOT_HELD, Claim, Estimate, Runs, difference, over_seeds, verdict


# isort: split
import numpy as np
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from benchmarks._report import machine
from reproduce import trust_region_probes as probes
from testbed.evaluate import load_checkpoint
from testbed.task import build_prompt_dataset, format_and_answer_reward, format_reward
from testbed.tasks import ADDITION, TASKS, Task
from trl_blend import TrustRegionOPDConfig, TrustRegionOPDTrainer


BATCH = 64  # rollouts of an optimizer step
ROLLOUTS_PER_PROMPT = 4  # as in the paper
LEARNING_RATE = 5e-5
# Share of the steps that a warmup lasts: 15 of 40. The paper's horizons are 15, 25 and 50
WARMUP_SHARE = 0.375
# Teacher entropies after the warmup that are closer than this share of vanilla OPD's count as aligned
ALIGNED = 0.1
PROBE = "probe"
PLACES = ("best", "last")  # the best checkpoint over training is the paper's protocol
MEASURES = {"sampled": "T = 1", "greedy": "greedy"}
METRICS = (
    *(f"blend/{name}" for name in ("kl_budget", "teacher_weight/mean", "teacher_feasible", "kl_behavior_student")),
    *(f"blend/{name}" for name in ("replaced_share", "teacher_entropy", "teacher_logp", "student_logp", "auroc")),
    *("blend/temperature", "blend/veto_weight", "rewards/format_and_answer_reward/mean", "loss"),
)
ENTROPY = "blend/teacher_entropy"


@dataclass(frozen=True)
class Arm:
    """
    One way to distil.

    Args:
        label (`str`):
            Name in tables and figures.
        style (`tuple`):
            Colour, marker and line.
        settings (`dict[str, Any]`):
            What differs from the common settings of [`make_trainer`].
        sft_steps (`int`, *optional*, defaults to `0`):
            Supervised steps on teacher rollouts that replace the first steps.
        student (`str`, *optional*, defaults to `"student"`):
            Checkpoint at step 0.
        steps (`int`, *optional*):
            If others than those of the study.
    """

    label: str
    style: study.Style
    settings: dict[str, Any] = field(default_factory=dict)
    sft_steps: int = 0
    student: str = "student"
    steps: int | None = None


def warmup_steps(steps: int) -> int:
    """Steps of every warmup in a run of `steps`."""
    return max(1, round(WARMUP_SHARE * steps))


def make_arms(steps: int) -> dict[str, Arm]:
    """All arms. Settings that the paper sweeps are set to one value of its range; the budget has three."""
    warmup = warmup_steps(steps)
    student = {"rollout_policy": "student"}
    constant = {"rollout_policy": "trust_region", "kl_budget": 0.01, "kl_budget_schedule": "constant"}
    skd = {"rollout_policy": "speculative_kd", "skd_top_k": 15, "skd_teacher_temperature": 0.2}
    veto = {"distillation_target": "veto", "veto_weight_start": 0.4, "veto_warmup_steps": warmup}
    temperature = {"temperature_warmup_start": 0.9, "temperature_warmup_steps": warmup}

    def trust_region(budget: float, color: str, marker: str) -> Arm:
        settings = {"rollout_policy": "trust_region", "kl_budget": budget, "blend_warmup_steps": warmup}
        return Arm(f"trust region {budget:g}, annealed", (color, marker, "-"), settings)

    return {
        "vanilla": Arm("vanilla OPD", (study.BLACK, "o", "-"), student),
        "trust_0.001": trust_region(0.001, study.SKY, "s"),
        "trust_0.01": trust_region(0.01, study.BLUE, "D"),
        "trust_0.05": trust_region(0.05, study.PURPLE, "^"),
        "fixed_0.01": Arm("fixed ε 0.01", (study.GREEN, "P", "--"), constant),
        "skd": Arm("SKD (K 15, τ 0.2)", (study.RED, "X", "--"), skd),
        "veto": Arm("Veto (0.4)", (study.ORANGE, "<", "-."), student | veto),
        "temperature": Arm("temperature warmup (0.9)", (study.GRAY, "v", "-."), student | temperature),
        "sft": Arm("SFT warmup", (study.YELLOW, "*", "-."), student, sft_steps=warmup),
    }


# Running


def training_prompts(seed: int, steps: int, task: Task = TASKS[ADDITION]) -> Dataset:
    """The prompts of a run in the order in which they are used, the same for every arm of a seed; none comes twice."""
    return task.prompts("train", steps * BATCH // ROLLOUTS_PER_PROMPT, seed)


def make_trainer(
    arm: Arm, model: Any, prompts: Dataset, seed: int, steps: int, scratch: str, task: Task = TASKS[ADDITION]
) -> TrustRegionOPDTrainer:
    """The trainer of an arm, which uses `prompts` in order."""
    args = TrustRegionOPDConfig(
        output_dir=scratch,
        per_device_train_batch_size=BATCH,
        num_rollouts_per_prompt=ROLLOUTS_PER_PROMPT,
        shuffle_dataset=False,
        max_completion_length=task.max_new_tokens,
        learning_rate=LEARNING_RATE,
        temperature=1.0,
        max_steps=steps,
        seed=seed,
        log_teacher_statistics=True,
        **study.COMMON,
        **arm.settings,
    )
    trainer = TrustRegionOPDTrainer(
        model=str(model),
        teacher_model=str(task.model("teacher")),
        args=args,
        train_dataset=prompts,
        reward_funcs=[format_and_answer_reward, format_reward],
    )
    return study.silenced(trainer)


@torch.no_grad()
def teacher_rollouts(prompts: Dataset, seed: int, task: Task = TASKS[ADDITION]) -> Dataset:
    """Rollouts of the teacher at temperature 1, [`ROLLOUTS_PER_PROMPT`] per prompt, as token ids for `SFTTrainer`."""
    torch.manual_seed(seed)
    teacher, tokenizer = load_checkpoint(task.model("teacher"))
    rows: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
    repeated = [prompt for prompt in prompts["prompt"] for _ in range(ROLLOUTS_PER_PROMPT)]
    ids, mask = study.left_padded(tokenizer, repeated)
    for start in range(0, len(ids), probes.BATCH):
        some = slice(start, start + probes.BATCH)
        drawn = study.generate(teacher, ids[some], mask[some], task.max_new_tokens)
        for prompt, kept, answer in zip(ids[some], mask[some], drawn.tolist(), strict=True):
            question = prompt[kept.bool()].tolist()
            answer = until_eos(answer, tokenizer.eos_token_id)
            rows["input_ids"].append(question + answer)
            rows["completion_mask"].append([0] * len(question) + [1] * len(answer))
    return Dataset.from_dict(rows)


def until_eos(tokens: list[int], eos_token_id: int) -> list[int]:
    """The tokens up to and including the first end of sequence."""
    return tokens[: tokens.index(eos_token_id) + 1] if eos_token_id in tokens else tokens


def supervise(
    rollouts: Dataset, seed: int, steps: int, curve: study.Curve, folder: str, model: str | Path, task: Task
) -> list[dict[str, Any]]:
    """Supervised steps of a checkpoint on [`teacher_rollouts`], in order, into a folder; returns the log."""
    torch.manual_seed(seed)
    student, tokenizer = load_checkpoint(model)
    args = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        completion_only_loss=True,
        max_length=None,
        learning_rate=task.sft_learning_rate,
        max_steps=steps,
        seed=seed,
        **study.COMMON,
    )
    trainer = SFTTrainer(model=student, args=args, train_dataset=rollouts, processing_class=tokenizer)
    study.silenced(trainer).add_callback(curve)
    trainer.train()
    trainer.save_model(folder)
    return trainer.state.log_history


def work(name: str, seed: int, settings: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Train one arm with one seed, probe the rollouts, or measure what there is before training."""
    if name == study.START:
        test = build_prompt_dataset("test", settings["n_test"])
        scores = {model: study.measure_student(*load_checkpoint(model), test, 0) for model in ("student", "teacher")}
        return {"n_test": settings["n_test"], **scores}
    if name == PROBE:
        return probes.run(seed, settings["n_probe"])
    return train(make_arms(settings["steps"])[name], name, seed, settings, scratch)


def train(arm: Arm, name: str, seed: int, settings: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Train one arm with one seed and measure its student on the way."""
    task = TASKS[settings.get("task", ADDITION)]
    test = task.prompts("test", settings["n_test"])
    steps, model = arm.steps or settings["steps"], task.model(arm.student)
    prompts = training_prompts(seed, steps, task)
    _, tokenizer = load_checkpoint(model)

    def measure(student: Any, step: int) -> dict[str, Any]:
        scores = study.measure_student(student, tokenizer, test, study.draw_of(seed, step), task.max_new_tokens)
        return scores | {"cpu_seconds": round(curve.cpu, 1)}

    curve = study.Curve(measure, settings["eval_interval"], steps)
    history: list[dict[str, Any]] = []
    if arm.sft_steps:
        used, folder = arm.sft_steps * BATCH // ROLLOUTS_PER_PROMPT, Path(scratch) / "sft"
        curve.start()  # drawing them is part of it
        first = teacher_rollouts(prompts.select(range(used)), seed, task)
        history = supervise(first, seed, arm.sft_steps, curve, str(folder), model, task)
        model = folder
        curve.first, prompts = arm.sft_steps, prompts.select(range(used, len(prompts)))
    trainer = make_trainer(arm, model, prompts, seed, steps - arm.sft_steps, scratch, task)
    trainer.add_callback(curve)
    trainer.train()
    history = [entry for entry in [*history, *trainer.state.log_history] if "loss" in entry]
    return {
        "arm": name,
        "seed": seed,
        **{option: settings[option] for option in ("steps", "n_test", "eval_interval")},
        "train_seconds": round(curve.wall, 1),
        "cpu_seconds": round(curve.cpu, 1),
        "machine": machine(),
        "metrics": {key: [study.rounded(entry.get(key)) for entry in history] for key in METRICS},
        "curve": curve.points,
    }


# Reading


class Results:
    """The finished runs, as rates of shape `(S, N)`: seeds, test prompts."""

    def __init__(self, runs: Runs) -> None:
        self.runs, self.start, self.probes = runs, runs.start, runs.of(PROBE)
        self.names = runs.names(make_arms(1))
        first = runs.of(self.names[0])[0] if self.names else {"steps": 0, "curve": {}, "eval_interval": 0}
        self.steps, self.interval = first["steps"], first["eval_interval"]
        self.points = sorted(map(int, first["curve"]))
        self.arms, self.warmup = make_arms(self.steps), warmup_steps(self.steps)
        self.trust_regions = [name for name in self.names if name.startswith("trust_")]

    def before(self, decoding: str, model: str = "student") -> np.ndarray:
        return study.as_rates(self.start[model][decoding], decoding)[None]

    def scores(self, name: str, decoding: str, step: int) -> np.ndarray:
        """Rates of each prompt at a step."""
        runs = self.runs.of(name)
        if step == 0:
            return np.repeat(self.before(decoding), len(runs), axis=0)
        return np.stack([study.as_rates(run["curve"][str(step)][decoding], decoding) for run in runs])

    def curve(self, name: str, decoding: str) -> tuple[list[int], np.ndarray]:
        """Steps, and the rates at each, of shape `(S, points)`."""
        steps = [0, *self.points]
        return steps, np.stack([self.scores(name, decoding, step).mean(axis=1) for step in steps], axis=1)

    def best_step(self, name: str, decoding: str) -> int:
        """The measured step of the highest mean over seeds."""
        steps, rates = self.curve(name, decoding)
        return steps[int(rates.mean(axis=0).argmax())]

    def at(self, name: str, decoding: str, place: str) -> np.ndarray:
        step = self.points[-1] if place == "last" else self.best_step(name, decoding)
        return self.scores(name, decoding, step)

    def rate(self, name: str, decoding: str, place: str) -> Estimate:
        return over_seeds(self.at(name, decoding, place).mean(axis=1))

    def gap(self, first: str, second: str, decoding: str, place: str) -> Estimate:
        return difference(self.at(first, decoding, place), self.at(second, decoding, place))

    def gap_at(self, name: str, step: int) -> Estimate:
        """Rate at T = 1 minus that of vanilla OPD after a step."""
        return difference(self.scores(name, "sampled", step), self.scores("vanilla", "sampled", step))

    def best_trust_region(self, decoding: str, place: str) -> str:
        return max(self.trust_regions, key=lambda name: self.rate(name, decoding, place).value)

    def metric(self, name: str, key: str) -> np.ndarray:
        """A logged metric at every step, of shape `(S, steps)`; NaN where it was not logged."""
        return np.array([run["metrics"][key] for run in self.runs.of(name)], dtype=float)

    def entropy_gap(self, name: str, steps: slice) -> Estimate:
        """Teacher's entropy on the visited prefixes, mean over some steps, minus that of vanilla OPD."""
        return self.runs.metric_gap(
            name, "vanilla", lambda run: float(np.nanmean(np.array(run["metrics"][ENTROPY], dtype=float)[steps]))
        )

    def budget(self, name: str) -> str:
        return f"{self.arms[name].settings['kl_budget']:g}"


# The paper's claims


def claims(found: Results) -> Iterator[Claim]:
    """Claims whose runs are not finished are left out."""
    if found.trust_regions:
        yield from _training_claims(found)
    if found.probes:
        yield from probes.claims(found.probes)
    yield (
        "The advantage holds for two pairs of Qwen3 models and seven benchmarks (Table 1).",
        study.UNTESTABLE,
        "One synthetic task and one pair of small models.",
    )


# (claim, rival, place, budget that is compared; by default the best)
_ABOVE = (
    ("Trust-region rollouts end above vanilla OPD (Table 1).", "vanilla", "best", None),
    (
        "Annealing the budget is better than keeping it fixed: trust region above fixed ε (Table 1).",
        "fixed_0.01",
        "best",
        "trust_0.01",
    ),
    (
        "A persistent fixed ε does not finish as high as the annealed trust region (Figure 2).",
        "fixed_0.01",
        "last",
        "trust_0.01",
    ),
    ("SFT warmup does not finish as high as the trust region (Figure 2).", "sft", "last", None),
    ("The strongest trust region is above SKD (Figures 5, 6; here with one setting of SKD).", "skd", "best", None),
)


def _training_claims(found: Results) -> Iterator[Claim]:
    rivals = [name for name in found.names if name not in found.trust_regions]
    if rivals:
        yield _best(found, rivals)
    for claim, rival, place, like in _ABOVE:
        if rival in found.names:
            yield _above(found, claim, rival, place, like)
    if "vanilla" in found.names:
        yield _early(found)
        yield from _entropy(found)


def _best(found: Results, rivals: list[str]) -> Claim:
    ours = found.best_trust_region("sampled", "best")
    gaps = {name: found.gap(ours, name, "sampled", "best") for name in rivals}
    strongest = max(rivals, key=lambda name: found.rate(name, "sampled", "best").value)
    place = "ranked first" if gaps[strongest].value > 0 else f"behind {found.arms[strongest].label}"
    numbers = "; ".join(f"minus {found.arms[name].label} {gap.signed()}" for name, gap in gaps.items())
    greedy = found.best_trust_region("greedy", "best")
    top = max(found.names, key=lambda name: found.rate(name, "greedy", "best").value)
    return (
        "The trust region attains the best score among the compared methods (Table 1).",
        study.all_of([verdict(gap) for gap in gaps.values()]),
        f"T = 1, best checkpoint: {found.arms[ours].label} {found.rate(ours, 'sampled', 'best')}, {place}; {numbers}. "
        f"Greedy: {found.arms[greedy].label} {found.rate(greedy, 'greedy', 'best')}, the best of all arms is "
        f"{found.arms[top].label} with {found.rate(top, 'greedy', 'best')}.",
    )


def _above(found: Results, claim: str, rival: str, place: str, like: str | None) -> Claim:
    """The best budget, or the one `like` it, against another arm; with the numbers of all budgets and of greedy."""
    ours = like if like in found.names else found.best_trust_region("sampled", place)
    parts = []
    for decoding, label in MEASURES.items():
        gaps = [
            f"{found.budget(name)}: {found.gap(name, rival, decoding, place).signed()}" for name in found.trust_regions
        ]
        parts.append(
            f"{label}: {found.arms[rival].label} {found.rate(rival, decoding, place)}, trust region minus that at "
            f"budget {', '.join(gaps)}"
        )
    gap = found.gap(ours, rival, "sampled", place)
    judged = f"Judged at T = 1, {place} checkpoint, with {found.arms[ours].label}: {gap.signed()}. "
    return claim, verdict(gap), judged + ". ".join(parts) + "."


def _early(found: Results) -> Claim:
    step = found.points[0]
    gaps = {name: found.gap_at(name, step) for name in found.names if name != "vanilla"}
    faster = [name for name, gap in gaps.items() if verdict(gap) == HELD]
    numbers = "; ".join(f"{found.arms[name].label} {gap.signed()}" for name, gap in gaps.items())
    return (
        "Several interventions rise faster than vanilla OPD at the start (Figure 2).",
        HELD if len(faster) > 1 else NOT_HELD,
        f"T = 1 after {step} steps, minus vanilla OPD: {numbers}.",
    )


def _entropy(found: Results) -> Iterator[Claim]:
    during, after = slice(0, found.warmup), slice(found.warmup, None)
    vanilla = found.metric("vanilla", ENTROPY)
    gaps, later = (
        {found.budget(name): found.entropy_gap(name, part) for name in found.trust_regions} for part in (during, after)
    )

    def listed(some: dict[str, Estimate]) -> str:
        return "; ".join(f"{label} {gap.signed(4)}" for label, gap in some.items())

    yield (
        "During the warmup the teacher's entropy on the visited prefixes is lower under the trust region than under "
        "vanilla OPD (Figure 3).",
        study.all_of([study.worse(gap) for gap in gaps.values()]),
        f"Vanilla OPD {vanilla[:, during].mean():.4f} nats over steps 1-{found.warmup}; trust region minus that, by "
        f"budget: {listed(gaps)}.",
    )
    if found.steps > found.warmup:
        level = float(vanilla[:, after].mean())
        aligned = [abs(gap.value) <= max(2 * gap.error, ALIGNED * level) for gap in later.values()]
        yield (
            "After the warmup the two entropies are largely aligned (Figure 3).",
            study.word(all(aligned)),
            f"Vanilla OPD {level:.4f} nats; trust region minus that, by budget: {listed(later)}. Our bar: within 2 "
            f"standard errors or {ALIGNED:.0%}.",
        )
    points = [step for step in found.points if step > found.warmup]
    if points:
        ours = found.best_trust_region("sampled", "best")
        above = {step: found.gap_at(ours, step) for step in points}
        numbers = "; ".join(f"step {step} {gap.signed()}" for step, gap in above.items())
        yield (
            "After the warmup the accuracy stays above that of vanilla OPD (Figure 3).",
            study.all_of([verdict(gap) for gap in above.values()]),
            f"T = 1, {found.arms[ours].label} minus vanilla OPD: {numbers}.",
        )


# Report


def report(runs: Runs, folder: Path) -> str:
    """Write the CSV file and the figures of what is finished; returns the Markdown."""
    found = Results(runs)
    names = {"sampled": "at T = 1", "greedy": "greedy"}
    start = "; ".join(
        f"`{model}` " + ", ".join(f"{found.before(d, model).mean():.3f} {n}" for d, n in names.items())
        for model in ("student", "teacher")
    )
    everything = [*(run for name in found.names for run in runs.of(name)), *found.probes]
    lines = [
        "# Trust-region rollouts on the add3cot task",
        "",
        "Written by `python examples/reproduce/trust_region.py`; do not edit. Student and teacher are the checkpoints "
        f"of the test-bed, before training: {start}. {study.machine_text(everything[0]['machine'])}",
        "",
    ]
    if found.names:
        study.write_csv(folder / "trust_region.csv", [_arm_row(found, name) for name in found.names])
        _plot_curves(found, folder / "trust_region_curves.png")
        _plot_entropy(found, folder / "trust_region_entropy.png")
        lines += _training(found)
    if found.probes:
        lines += probes.report(found.probes, folder)
    lines += [
        "## The paper's claims",
        "",
        "Verdicts are computed; a difference counts above 2 standard errors, which add the variance over seeds and "
        "over test prompts. The best budget is chosen on the test prompts that judge it, which favours the trust "
        "region. Baselines run with one setting, not the paper's sweep.",
        "",
        *study.claim_lines(claims(found)),
        "",
    ]
    return "\n".join(lines)


def _arm_row(found: Results, name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": name, "seeds": len(found.runs.of(name)), "steps": found.steps}
    for decoding in DECODINGS:
        row[f"{decoding}_before"] = float(found.before(decoding).mean())
        for place in PLACES:
            estimate = found.rate(name, decoding, place)
            row |= {f"{decoding}_{place}": estimate.value, f"{decoding}_{place}_se": estimate.error}
        row[f"{decoding}_best_step"] = found.best_step(name, decoding)
    return row | {key: round(found.runs.cost(name, key), 1) for key in ("train_seconds", "cpu_seconds")}


def _training(found: Results) -> list[str]:
    used = sorted({tuple(run["seed"] for run in found.runs.of(name)) for name in found.names})
    header = ["arm", "T = 1, best", "at step", "T = 1, last", "greedy, best", "greedy, last", "train s", "CPU s"]
    rows = [
        [
            found.arms[name].label,
            found.rate(name, "sampled", "best"),
            found.best_step(name, "sampled"),
            *(found.rate(name, *at) for at in (("sampled", "last"), ("greedy", "best"), ("greedy", "last"))),
            *(f"{found.runs.cost(name, key):.0f}" for key in ("train_seconds", "cpu_seconds")),
        ]
        for name in found.names
    ]
    return [
        "## Training",
        "",
        f"Seeds {'; '.join(', '.join(map(str, values)) for values in used)}; {found.steps} optimizer steps of {BATCH} "
        f"rollouts ({ROLLOUTS_PER_PROMPT} of each of {BATCH // ROLLOUTS_PER_PROMPT} prompts, no prompt twice), the "
        f"same prompts in the same order in every arm of a seed, learning rate {LEARNING_RATE:g} (constant), "
        f"temperature 1, full-vocabulary reverse KL. Every warmup lasts {found.warmup} steps; fixed ε and SKD act "
        "throughout, as in the paper. SFT warmup: supervised steps on teacher rollouts of the very prompts of the "
        "first steps, then ordinary distillation with a new optimizer on the others. Accuracy = right and in the "
        f"format, on {found.start['n_test']} test prompts every {found.interval} steps: T = 1 is the mean of "
        f"{study.SAMPLES} completions per prompt. Mean ± SE over seeds. *best*: the measured step of the highest mean "
        "over seeds, chosen on the same test prompts, as the paper does; *last*: after the last step. Times are means "
        "per run without evaluation.",
        "",
        study.markdown_table(header, rows),
        "",
        "![accuracy against step](trust_region_curves.png)",
        "",
        "![teacher entropy and log-probability on the visited prefixes](trust_region_entropy.png)",
        "",
    ]


def _plot_curves(found: Results, path: Path) -> None:
    """Accuracy against step, at temperature 1 and greedy."""
    figure, axes = study.panels(2, width=5.6, height=4.6, sharey=False)
    titles = {"sampled": "Temperature 1 (the paper's evaluation)", "greedy": "Greedy"}
    for axis, decoding in zip(axes, DECODINGS, strict=True):
        for name in found.names:
            study.band(axis, *found.curve(name, decoding), found.arms[name].style, found.arms[name].label)
        axis.axvspan(0, found.warmup, color=study.GRAY, alpha=0.08, linewidth=0)
        axis.set(title=titles[decoding], xlabel="optimizer step (shaded: warmup)")
    axes[0].set_ylabel(f"accuracy on {found.start['n_test']} test prompts (band: ±1 SE over seeds)")
    study.save(figure, path, legend_of=axes[0], columns=5)


def _plot_entropy(found: Results, path: Path) -> None:
    """The paper's Figure 3: what the teacher makes of the prefixes that training visits; centred means of 3 steps."""
    figure, axes = study.panels(2, width=5.6, sharey=False)
    titles = {ENTROPY: "Teacher's entropy", "blend/teacher_logp": "Teacher's log-probability"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name in (name for name in found.names if name in ("vanilla", "fixed_0.01", *found.trust_regions)):
            padded = np.pad(found.metric(name, key), ((0, 0), (1, 1)), constant_values=np.nan)
            values = np.nanmean(np.stack([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]]), axis=0)
            color, _, line = found.arms[name].style
            steps = np.arange(1, values.shape[1] + 1)
            study.band(axis, steps, values, (color, None, line), found.arms[name].label)
        axis.axvspan(0, found.warmup, color=study.GRAY, alpha=0.08, linewidth=0)
        axis.set(title=f"{title} on the visited prefixes", xlabel="optimizer step (shaded: warmup)")
    axes[0].set_ylabel("nats per token (mean of 3 steps, band: ±1 SE)")
    study.save(figure, path, legend_of=axes[0], columns=5)


STUDY = study.Study(
    name="trust_region",
    options={"steps": 40, "eval_interval": 10, "n_test": 500, "n_probe": 500},
    arms=lambda settings: [*make_arms(settings["steps"]), PROBE],
    work=work,
    report=report,
)

if __name__ == "__main__":
    STUDY.main(__doc__)

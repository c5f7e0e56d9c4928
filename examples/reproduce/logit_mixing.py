"""
Does logit mixing do what the papers say? All arms from the same checkpoints, on the add3cot task, on two CPU cores:

```sh
python examples/reproduce/logit_mixing.py --workers 2        # all arms, 3 seeds, then the report
python examples/reproduce/logit_mixing.py --report           # only rebuild the report from the finished runs
python examples/reproduce/logit_mixing.py --arms grpo mixed_0.1 --seeds 0 --steps 10 --output_dir try
```

A finished run is in `results/logit_mixing_runs.json` and not repeated: after an interruption, start the command again.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reproduce import study
from reproduce.study import Claim, Estimate, Runs, comparable, difference, larger, over_seeds, word


# isort: split
import numpy as np

from testbed.task import answer_reward, build_prompt_dataset, format_and_answer_reward, format_reward
from testbed.tasks import ADDITION, TASKS, Task
from trl_blend import LogitMixGRPOConfig, LogitMixGRPOTrainer


KINDS = ("solve", "answer", "format")  # in the order of REWARDS; "solve" = right and in the format
REWARDS = [format_and_answer_reward, answer_reward, format_reward]
COSTS = ("train_seconds", "cpu_seconds", "rollout_tokens", "validation_tokens", "validation_seconds")
ADAPTIVE_PROMPTS = 32
PAPER_ARM = "base_sft_0.5"  # the logit-averaging paper's setting: base policy trained, its SFT version as the anchor
ANCHOR_ARM = "base_base_0.5"
# Share of problems that exactly one policy solves from which we call it non-trivial; the paper's bar is not known
NONTRIVIAL = 0.05


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Args:
        label (`str`):
            Name in tables and figures.
        style (`tuple`):
            Colour, marker and line.
        settings (`dict[str, Any]`):
            What differs from the common settings of [`make_trainer`].
        student, reference (`str`, *optional*):
            Checkpoints: the trained policy at step 0, and the frozen partner.
    """

    label: str
    style: study.Style
    settings: dict[str, Any] = field(default_factory=dict)
    student: str = "student"
    reference: str = "teacher"

    @property
    def deployed(self) -> str:
        """The policy that the objective is written on."""
        mixes = self.settings["teacher_weight"] > 0 and self.settings.get("objective") != "student"
        return "mixed" if mixes else "student"


def make_arms(steps: int) -> dict[str, Arm]:
    """All arms. `student` is the SFT policy, `teacher` a stronger model, `base` adds but does not write the box."""

    def arm(
        label: str, style: study.Style, weight: float, models: tuple[str, str] = ("student", "teacher"), **settings
    ):
        return Arm(label, style, {"teacher_weight": weight, **settings}, *models)

    # The weight is 0 for the last fifth of the steps, which are plain GRPO
    decay = {"teacher_weight_schedule": "linear", "teacher_weight_decay_steps": max(1, round(0.8 * steps))}
    adaptive = {"teacher_weight_schedule": "adaptive", "adaptive_num_prompts": ADAPTIVE_PROMPTS}
    base = ("base", "student")
    return {
        "grpo": arm("GRPO", (study.BLACK, "o", "-"), 0.0),
        "grpo_kl": arm("GRPO + KL (0.04)", (study.GRAY, "v", "--"), 0.0, beta=0.04),
        "mixed_0.1": arm("fixed mixing 0.1", (study.SKY, "s", "-"), 0.1),
        "mixed_0.3": arm("fixed mixing 0.3", (study.BLUE, "D", "-"), 0.3),
        "mixed_0.5": arm("fixed mixing 0.5", (study.PURPLE, "^", "-"), 0.5),
        "adaptive": arm("adaptive mixing", (study.GREEN, "P", "-"), 0.3, **adaptive),
        "probs_0.3": arm("probability mixing 0.3", (study.RED, "X", "--"), 0.3, mixing_space="probs"),
        "decay_0.5": arm(
            "student objective, 0.5 to 0",
            (study.ORANGE, "<", "-."),
            0.5,
            objective="student",
            is_clip_mode="max",
            **decay,
        ),
        "base_grpo": arm("base: GRPO", (study.ORANGE, "<", "-."), 0.0, base),
        "base_sft_0.5": arm("base: mixing 0.5, SFT anchor", (study.BLUE, "D", "-"), 0.5, base),
        "base_base_0.5": arm("base: mixing 0.5, base anchor", (study.RED, "X", "--"), 0.5, ("base", "base")),
    }


FIGURES = {
    "curves": ("grpo", "grpo_kl", "mixed_0.1", "mixed_0.3", "mixed_0.5", "adaptive", "probs_0.3", "decay_0.5"),
    "anchor": ("grpo", "grpo_kl", "base_grpo", "base_sft_0.5", "base_base_0.5"),
}


# Running


def make_trainer(arm: Arm, seed: int, steps: int, scratch: str, task: Task = TASKS[ADDITION]) -> LogitMixGRPOTrainer:
    """The trainer of an arm: equal prompts, batch, learning rate and steps for every arm of a seed."""
    args = LogitMixGRPOConfig(
        output_dir=scratch,
        per_device_train_batch_size=128,
        num_generations=8,
        max_completion_length=task.max_new_tokens + 8,
        learning_rate=task.grpo_learning_rate,
        temperature=1.0,
        max_steps=steps,
        seed=seed,
        reward_weights=[1.0, 0.0, 0.0],
        **study.COMMON,
        **arm.settings,
    )
    trainer = LogitMixGRPOTrainer(
        model=str(task.model(arm.student)),
        teacher_model=str(task.model(arm.reference)),
        reward_funcs=REWARDS,
        args=args,
        train_dataset=task.prompts("train", 4000),
        eval_dataset=task.prompts("validation", 200),
    )
    return study.silenced(trainer)


def greedy_bits(
    trainer: LogitMixGRPOTrainer, rows: list[dict[str, Any]], weights: tuple[float, ...]
) -> dict[str, str]:
    """Greedy scores of a policy as one string of zeros and ones per kind."""
    columns = trainer.greedy_rewards(rows, weights).rewards.round().int().T.tolist()
    return {kind: "".join(map(str, column)) for kind, column in zip(KINDS, columns, strict=True)}


def measure(trainer: LogitMixGRPOTrainer, arm: Arm, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Greedy scores of the student alone and, where the arm mixes, of the mixed policy."""
    policies: dict[str, tuple[float, ...]] = {"student": (0.0,)}
    if arm.deployed == "mixed":
        policies["mixed"] = trainer.current_weights()
    return {name: {"weight": w[0], **greedy_bits(trainer, rows, w)} for name, w in policies.items()}


def work(name: str, seed: int, settings: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Train one arm with one seed, or measure what there is before training."""
    steps, rows = settings["steps"], list(build_prompt_dataset("test", settings["n_test"]))
    if name == study.START:
        return run_start(rows, scratch)
    arm = make_arms(steps)[name]
    trainer = make_trainer(arm, seed, steps, scratch)
    few = rows[: settings["n_curve"]]
    curve = study.Curve(lambda model, step: rates_of(measure(trainer, arm, few)), settings["eval_interval"], steps)
    trainer.add_callback(curve)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    curve.points.pop(str(steps))  # it is measured on all prompts
    return {
        "arm": name,
        "seed": seed,
        **{option: settings[option] for option in ("steps", "n_test", "n_curve")},
        "student": arm.student,
        "reference": arm.reference,
        "train_seconds": round(curve.wall, 1),
        "cpu_seconds": round(curve.cpu, 1),
        "rollout_tokens": round(
            sum(entry["completions/mean_length"] for entry in history) * trainer.args.generation_batch_size
        ),
        "validation_tokens": round(sum(entry.get("adaptive/decoded_tokens", 0.0) for entry in history)),
        "validation_seconds": round(sum(entry.get("adaptive/seconds", 0.0) for entry in history), 1),
        "rollout_reward": [round(entry["reward"], 3) for entry in history],
        "teacher_weight": [round(entry.get("mixing/teacher_weight", 0.0), 3) for entry in history],
        "curve": curve.points,
        "final": measure(trainer, arm, rows),
    }


def rates_of(point: dict[str, Any]) -> dict[str, Any]:
    """Means of the strings: the curve needs no more."""
    return {
        policy: {"weight": scores["weight"]} | {kind: scores[kind].count("1") / len(scores[kind]) for kind in KINDS}
        for policy, scores in point.items()
    }


def run_start(rows: list[dict[str, Any]], scratch: str) -> dict[str, Any]:
    """Greedy scores before training: each checkpoint alone (weight 0 and 1) and each starting mixture."""
    result: dict[str, Any] = {"n_test": len(rows), "alone": {}, "mixed": {}}
    for name, arm in make_arms(1).items():
        if not arm.settings["teacher_weight"]:
            continue
        trainer = make_trainer(arm, 0, 1, str(Path(scratch) / name))
        for checkpoint, weight in ((arm.student, 0.0), (arm.reference, 1.0)):
            if checkpoint not in result["alone"]:
                result["alone"][checkpoint] = greedy_bits(trainer, rows, (weight,))
        if arm.reference == arm.student:
            result["mixed"][name] = result["alone"][arm.student]
        elif arm.deployed == "mixed":
            result["mixed"][name] = greedy_bits(trainer, rows, trainer.current_weights())
    return result


# Reading


class Results:
    """The finished runs, as scores of shape `(S, N)`: seeds, test prompts."""

    def __init__(self, runs: Runs) -> None:
        self.runs, self.start = runs, runs.start
        self.names = runs.names(make_arms(1))
        self.steps = runs.of(self.names[0])[0]["steps"]
        self.arms = make_arms(self.steps)

    def final(self, name: str, policy: str = "deployed", kind: str = "solve") -> np.ndarray:
        """Scores after training. `policy` is `student`, `mixed` or `deployed`."""
        policy = self.arms[name].deployed if policy == "deployed" else policy
        return np.stack([study.as_rates(run["final"][policy][kind]) for run in self.runs.of(name)])

    def alone(self, checkpoint: str, kind: str = "solve") -> np.ndarray:
        """Scores of a checkpoint before training."""
        return study.as_rates(self.start["alone"][checkpoint][kind])[None]

    def before(self, name: str, policy: str, kind: str = "solve") -> np.ndarray:
        """Scores of an arm's policy at step 0."""
        if policy == "mixed":
            return study.as_rates(self.start["mixed"][name][kind])[None]
        return self.alone(self.arms[name].student, kind)

    def rate(self, name: str, policy: str = "deployed", kind: str = "solve") -> Estimate:
        return over_seeds(self.final(name, policy, kind).mean(axis=1))

    def policies(self, name: str) -> list[str]:
        return [policy for policy in ("mixed", "student") if policy in self.runs.of(name)[0]["final"]]

    def curve(self, name: str, policy: str) -> tuple[list[int], np.ndarray]:
        """Steps, and the solve rates on the first `n_curve` test prompts at each, of shape `(S, points)`."""
        runs = self.runs.of(name)
        n, middle = runs[0]["n_curve"], sorted(map(int, runs[0]["curve"]))
        first = float(self.before(name, policy)[0, :n].mean())
        last = self.final(name, policy)[:, :n].mean(axis=1)
        between = [[run["curve"][str(step)][policy]["solve"] for step in middle] for run in runs]
        return [0, *middle, self.steps], np.array([[first, *row, end] for row, end in zip(between, last, strict=True)])


# The papers' claims


def claims(found: Results) -> Iterator[Claim]:
    """Claims whose arms have no finished run are left out."""
    for needed, check in _CHECKS:
        if found.runs.has(*needed):
            yield check(found)
    yield (
        "The same holds for three datasets and three model sizes (Figures 2-5).",
        study.UNTESTABLE,
        "One synthetic task and one pair of small models.",
    )


def _against(found: Results, other: str, name: str = PAPER_ARM, policy: str = "mixed") -> tuple[Estimate, str]:
    theirs = policy if policy == "student" else "deployed"
    gap = difference(found.final(name, policy), found.final(other, theirs))
    return gap, f"{found.rate(name, policy)} against {found.rate(other, theirs)} ({gap.signed()})"


def _reward(found: Results, name: str) -> float:
    return float(np.mean([run["rollout_reward"] for run in found.runs.of(name)]))


def _kl_grpo(found: Results) -> Claim:
    gap, numbers = _against(found, "grpo_kl")
    kind = "higher" if larger(gap) else "comparable" if comparable(gap) else "lower"
    return (
        "Fixed mixing, base policy with SFT anchor, is higher than or comparable to KL-regularised GRPO that starts "
        "from the SFT policy (Figures 2-5).",
        word(kind != "lower"),
        f"{numbers}: {kind}.",
    )


def _plain_grpo(found: Results) -> Claim:
    (sft, sft_text), (base, base_text) = _against(found, "grpo"), _against(found, "base_grpo")
    return (
        "Fixed mixing outperforms GRPO without a KL term, whether GRPO starts from the SFT or from the base policy "
        "(Figure 3).",
        word(larger(sft) and larger(base)),
        f"From SFT: {sft_text}. From base: {base_text}; plain GRPO from the base policy got a mean rollout reward of "
        f"{_reward(found, 'base_grpo'):.3f}.",
    )


def _anchor(found: Results) -> Claim:
    gap, numbers = _against(found, ANCHOR_ARM)
    never = ": this base model never writes the box, so nothing could be learned, a starker case than the paper's"
    return (
        "An SFT anchor beats the base model as anchor (Figure 8).",
        word(larger(gap)),
        f"{numbers}. The mean rollout reward with the base anchor was {_reward(found, ANCHOR_ARM):.3f}"
        f"{never if _reward(found, ANCHOR_ARM) < 0.005 else ''}.",
    )


def _training_helps(found: Results) -> Claim:
    before = found.before(PAPER_ARM, "mixed")
    gap = difference(found.final(PAPER_ARM, "mixed"), before)
    return (
        "Training the mixed objective improves the mixed policy over mixing without training.",
        word(larger(gap)),
        f"{before.mean():.3f} before, {found.rate(PAPER_ARM, 'mixed')} after ({gap.signed()}).",
    )


def _pattern_1(found: Results) -> Claim:
    reference = found.arms[PAPER_ARM].reference
    gaps = {kind: difference(found.final(PAPER_ARM, "student", kind), found.alone(reference, kind)) for kind in KINDS}
    fmt = Estimate(-gaps["format"].value, gaps["format"].error)
    better = "where the trained policy is the better reasoner" if larger(gaps["answer"]) else "not larger either"
    return (
        "Pattern 1: the SFT reference is better at format, the trained policy at reasoning (Tables 1, 2).",
        f"format half {word(larger(fmt))}, reasoning half {word(larger(gaps['solve']))} as the paper scores it",
        f"Format: reference − trained {fmt.signed()}. Right and in the format (the paper's measure): trained − "
        f"reference {gaps['solve'].signed()}. Right in any format: {gaps['answer'].signed()}, {better}.",
    )


def _pattern_2(found: Results) -> Claim:
    student, reference = found.final(PAPER_ARM, "student"), found.alone(found.arms[PAPER_ARM].reference)
    only_student = float(np.mean(student * (1 - reference)))
    only_reference = float(np.mean((1 - student) * reference))
    return (
        "Pattern 2: exactly one of the two policies is right on a non-trivial share of problems (Table 3).",
        word(only_student + only_reference >= NONTRIVIAL),
        f"{only_student + only_reference:.3f} of the problems (only the trained policy {only_student:.3f}, only the "
        f"reference {only_reference:.3f}); our bar is {NONTRIVIAL}.",
    )


def _adaptive(found: Results) -> Claim:
    fixed = found.runs.names(("mixed_0.1", "mixed_0.3", "mixed_0.5"))
    gaps = {name: difference(found.final("adaptive", "mixed"), found.final(name, "mixed")) for name in fixed}
    numbers = "; ".join(f"minus {found.arms[name].label} {gap.signed()}" for name, gap in gaps.items())
    best = max(fixed, key=lambda name: found.rate(name, "mixed").value)
    weight = np.mean([run["teacher_weight"][-1] for run in found.runs.of("adaptive")])
    return (
        "Adaptive and fixed mixing end comparable (Figure 6; here with the stronger reference).",
        word(comparable(gaps[best])),
        f"Adaptive {found.rate('adaptive', 'mixed')}, {numbers} (judged against {found.arms[best].label}); last "
        f"weight {weight:.2f}.",
    )


def _overhead(found: Results) -> Claim:
    tokens = found.runs.cost("adaptive", "validation_tokens") / found.runs.cost("adaptive", "rollout_tokens")
    return (
        "The validation decodes of adaptive mixing add only a small overhead to the rollouts.",
        study.UNTESTABLE,
        f"The share is set by the sizes chosen: 2 x 32 validation decodes to 128 rollouts add {tokens:.0%} to the "
        "decoded tokens here.",
    )


def _logits_or_probs(found: Results) -> Claim:
    gap, numbers = _against(found, "probs_0.3", "mixed_0.3")
    start = difference(found.before("mixed_0.3", "mixed"), found.before("probs_0.3", "mixed"))
    return (
        "Logit mixing beats probability mixing inside training (Figure 9; here at equal weight 0.3, stronger "
        "reference).",
        word(larger(gap)),
        f"{numbers}; before training {start.signed()}.",
    )


def _fusion(found: Results) -> Claim:
    gap, numbers = _against(found, "grpo", "decay_0.5", "student")
    return (
        "Logit fusion: the student alone, trained with a decaying teacher weight, ends above plain GRPO of equal "
        "steps.",
        word(larger(gap)),
        f"{numbers}.",
    )


_CHECKS = [
    ((PAPER_ARM, "grpo_kl"), _kl_grpo),
    ((PAPER_ARM, "grpo", "base_grpo"), _plain_grpo),
    ((PAPER_ARM, ANCHOR_ARM), _anchor),
    ((PAPER_ARM,), _training_helps),
    ((PAPER_ARM,), _pattern_1),
    ((PAPER_ARM,), _pattern_2),
    (("adaptive", "mixed_0.1"), _adaptive),
    (("adaptive",), _overhead),
    (("mixed_0.3", "probs_0.3"), _logits_or_probs),
    (("decay_0.5", "grpo"), _fusion),
]


# Report


def report(runs: Runs, folder: Path) -> str:
    """Write a CSV file and two figures; returns the Markdown."""
    found = Results(runs)
    study.write_csv(folder / "logit_mixing.csv", [row for name in found.names for row in _arm_rows(found, name)])
    for figure, names in FIGURES.items():
        _plot(found, [name for name in names if name in found.names], folder / f"logit_mixing_{figure}.png")
    seeds = sorted({len(runs.of(name)) for name in found.names})
    alone = "; ".join(
        f"`{name}` " + ", ".join(f"{kind} {found.alone(name, kind).mean():.3f}" for kind in KINDS)
        for name in found.start["alone"]
    )
    return "\n".join([
        "# Logit mixing on the add3cot task",
        "",
        f"{'-'.join(map(str, seeds))} seeds per arm, {found.steps} optimizer steps of 128 completions (16 prompts x "
        "8), learning rate 3e-5, temperature 1, the same prompts in every arm of a seed. Greedy on the same "
        f"{found.start['n_test']} test prompts, mean ± SE over seeds. *solve* = right and in the format (the reward), "
        "*answer* = right in any format. Bold: the policy that the objective is written on. Times are means per run "
        "without the test-set evaluation, on two shared cores: wall seconds depend on the load, CPU seconds less so.",
        "",
        f"Checkpoints before training: {alone}. Arms without \"base:\" train `student` (SFT) with `teacher` (a "
        "stronger model) as the reference; the paper's own setting is \"base: mixing 0.5, SFT anchor\".",
        "",
        _result_table(found),
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
        _gains(found) if "grpo" in found.names else "",
        "",
        "## Complementarity of the trained policy and its reference (the paper's Tables 1-3)",
        "",
        f"Counts of {found.start['n_test']} problems, mean over seeds; right means right and in the format, as in the "
        "paper.",
        "",
        _complementarity(found),
        "",
        "## The papers' claims",
        "",
        "Verdicts are computed; a difference counts above 2 standard errors.",
        "",
        *study.claim_lines(claims(found)),
        "",
    ])  # fmt: skip


def _arm_rows(found: Results, name: str) -> Iterator[dict[str, Any]]:
    arm = found.arms[name]
    for policy in found.policies(name):
        row: dict[str, Any] = {"arm": name, "policy": policy, "deployed": policy == arm.deployed}
        row |= {"student": arm.student, "reference": arm.reference}
        row |= {"seeds": len(found.runs.of(name)), "steps": found.steps}
        for kind in KINDS:
            estimate = found.rate(name, policy, kind)
            row |= {f"{kind}_before": float(found.before(name, policy, kind).mean())}
            row |= {kind: estimate.value, f"{kind}_se": estimate.error}
        yield row | {cost: round(found.runs.cost(name, cost), 1) for cost in COSTS}


def _plot(found: Results, names: list[str], path: Path) -> None:
    figure, axes = study.panels(2, width=5.6, height=4.6)
    titles = {"deployed": "Deployed policy (mixed where the objective is)", "student": "Student alone"}
    for axis, (policy, title) in zip(axes, titles.items(), strict=True):
        for name in names:
            arm = found.arms[name]
            steps, rates = found.curve(name, arm.deployed if policy == "deployed" else policy)
            study.band(axis, steps, rates, arm.style, arm.label)
        axis.set(title=title, xlabel="optimizer step", ylim=(-0.03, 1.03))
    n_curve = found.runs.of(found.names[0])[0]["n_curve"]
    axes[0].set_ylabel(f"solve rate, greedy, {n_curve} test prompts")
    study.save(figure, path, legend_of=axes[0])


def _result_table(found: Results) -> str:
    header = ["arm", "policy", "solve before", "solve", "answer", "format"]
    rows = []
    for name in found.names:
        arm, cost = found.arms[name], {key: found.runs.cost(name, key) for key in COSTS[:4]}
        for policy in found.policies(name):
            bold = "**" if policy == arm.deployed else ""
            rows.append([
                arm.label,
                f"{bold}{policy if policy == 'mixed' else 'student alone'}{bold}",
                f"{found.before(name, policy).mean():.3f}",
                *(str(found.rate(name, policy, kind)) for kind in KINDS),
                *(f"{cost[key]:.0f}" for key in COSTS[:2]),
                *(f"{cost[key] / 1000:.0f}k" for key in COSTS[2:4]),
            ])  # fmt: skip
    return study.markdown_table([*header, "train s", "CPU s", "rollout tokens", "validation tokens"], rows)


def _complementarity(found: Results) -> str:
    """The paper's Tables 1 and 3: right means right and in the format, counts are means over seeds."""
    kinds = ("format", "solve", "answer")
    header = ["arm", "reference", *(f"{kind}: {who}" for kind in kinds for who in ("trained", "reference"))]
    header += ["both", "only trained", "only reference", "neither", "exactly one"]
    rows = []
    for name in found.names:
        if found.arms[name].deployed != "mixed" or name == "adaptive":
            continue
        reference = found.arms[name].reference
        trained, anchor = found.final(name, "student"), found.alone(reference)
        cells = [trained * anchor, trained * (1 - anchor), (1 - trained) * anchor, (1 - trained) * (1 - anchor)]
        row = [found.arms[name].label, f"`{reference}`"]
        for kind in kinds:
            row += [str(found.rate(name, "student", kind)), f"{found.alone(reference, kind).mean():.3f}"]
        row += [f"{over_seeds(cell.sum(axis=1)).value:.0f}" for cell in cells]
        rows.append([*row, f"{(cells[1] + cells[2]).mean():.3f}"])
    return study.markdown_table(header, rows)


def _gains(found: Results) -> str:
    rows, base = [], found.final("grpo", "student")
    for name in found.names:
        gaps = [difference(found.final(name, policy), base) for policy in ("deployed", "student")]
        if name != "grpo":
            shown = [gap.signed() + ("" if comparable(gap) else " *") for gap in gaps]
            rows.append([found.arms[name].label, *shown])
    return study.markdown_table(["arm", "deployed − GRPO", "student alone − GRPO"], rows)


STUDY = study.Study(
    name="logit_mixing",
    options={"steps": 30, "eval_interval": 10, "n_test": 500, "n_curve": 200},
    arms=lambda settings: make_arms(settings["steps"]),
    work=work,
    report=report,
)

if __name__ == "__main__":
    STUDY.main(__doc__)

"""
Does offline distillation do what the Lightning OPD paper says (https://huggingface.co/papers/2604.13010)? On the
add3cot test-bed, on the CPU: live and offline distillation of one SFT student, with the teacher whose samples it was
trained on and with another one:

```sh
python examples/reproduce/offline_opd.py                    # all arms, 3 seeds, memory, then the report
python examples/reproduce/offline_opd.py --report           # only rebuild the report from the finished runs
python examples/reproduce/offline_opd.py --arms live offline --seeds 0 --steps 10 --output_dir try
```

A finished run is in `results/offline_opd_runs.json` and not repeated: after an interruption, start the command again.
Two models that the test-bed does not ship are trained when they are missing, and kept with the scored rollouts in
`--work_dir`.
"""

import math
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reproduce import study
from reproduce.study import DECODINGS, UNTESTABLE, Claim, Estimate, Runs, difference, over_seeds


# isort: split
import numpy as np
from transformers import Trainer
from trl import DistillationConfig

from benchmarks._memory import reset_peak, resident_bytes
from benchmarks._report import machine
from reproduce.live_opd import LiveOPDTrainer, SampledTokenOPDTrainer
from reproduce.offline_opd_data import BATCH, ROLES, TOP_K, Data, collect, make_data, model_folder, score
from reproduce.offline_opd_policies import PROMPTS, gradient_discrepancy, policy_measures
from testbed.evaluate import load_checkpoint
from testbed.task import build_prompt_dataset
from testbed.tasks import TASKS
from trl_blend import OfflineOPDConfig, OfflineOPDTrainer, RolloutStore


LEARNING_RATE = 5e-5
METRICS = ("loss", "grad_norm", "live/reverse_kl", "offline/reverse_kl", "offline/drift_kl", "offline/advantage")
MEMORY, DATA = "memory", "data_"
# Of these arms memory is measured: a few steps on rollouts of their own, which are fewer than those of the runs
MEMORY_ARMS = ("live_full", "live", "offline", "offline_topk")
MEMORY_STEPS, MEMORY_SEED = 3, 10_000


@dataclass(frozen=True)
class Arm:
    """
    One way to distil.

    Args:
        label (`str`):
            Name in tables and figures.
        style (`tuple`):
            Colour, marker and line.
        loss (`str`):
            `"full"` (TRL's, live only), `"sampled"`, and, offline only, `"ratio"` (sampled tokens with
            `importance_correction="token"`) and `"top_k"`.
        data (`Data`):
            Student, teacher and, of an offline arm, the rollouts. A live arm draws them from the full distribution.
        offline (`bool`, *optional*, defaults to `False`):
            Whether the teacher's scores are read from disk.
        probed (`bool`, *optional*, defaults to `False`):
            Whether offline and live gradients are compared on the way.
        learning_rate (`float`, *optional*):
            Constant learning rate.
        settings (`dict[str, Any]`, *optional*):
            Further ones of an offline arm.
    """

    label: str
    style: study.Style
    loss: str
    data: Data = Data()
    offline: bool = False
    probed: bool = False
    learning_rate: float = LEARNING_RATE
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def top_k(self) -> int | None:
        """How many of the teacher's tokens its data hold."""
        return TOP_K if self.loss == "top_k" or "advantage_baseline" in self.settings else None


def _live(label: str, style: study.Style, loss: str = "sampled", **settings: Any) -> Arm:
    return Arm(label, style, loss, **settings)


def _offline(label: str, style: study.Style, loss: str = "sampled", **settings: Any) -> Arm:
    return Arm(label, style, loss, offline=True, **settings)


_PAPER = {"temperature": 0.7, "top_p": 0.9}
_SECOND, _LATE, _LATE_PAPER = Data(teacher="second"), Data(student="late"), Data(student="late", **_PAPER)
_TOP = f"top-{TOP_K} reverse KL"
ARMS = {
    "live_full": _live("live, full KL (TRL)", (study.BLACK, "o", "-"), "full"),
    "live": _live("live, sampled token", (study.BLUE, "s", "-")),
    "offline": _offline("offline, sampled token", (study.RED, "D", "-"), probed=True),
    "offline_4": _offline(
        "offline, sampled token, 4 per prompt", (study.ORANGE, "^", "-"), data=Data(rollouts_per_prompt=4)
    ),
    "offline_paper": _offline(
        "offline, sampled token, T 0.7, top-p 0.9", (study.YELLOW, "v", "-"), data=Data(**_PAPER)
    ),
    "offline_ratio": _offline("offline, sampled token, with the ratio", (study.PURPLE, "X", "-"), "ratio"),
    "offline_topk": _offline(f"offline, {_TOP}", (study.GREEN, "P", "-"), "top_k"),
    "live_second": _live("live, sampled token, second teacher", (study.BLUE, "s", ":"), data=_SECOND),
    "offline_second": _offline(
        "offline, sampled token, second teacher", (study.RED, "D", ":"), data=_SECOND, probed=True
    ),
    "offline_topk_second": _offline(
        f"offline, {_TOP}, second teacher", (study.GREEN, "P", ":"), "top_k", data=_SECOND
    ),
    "late_live": _live("late student: live, sampled token", (study.BLUE, "s", "--"), data=_LATE),
    "late_offline": _offline("late student: offline, sampled token", (study.RED, "D", "--"), data=_LATE, probed=True),
    "late_offline_topk": _offline(f"late student: offline, {_TOP}", (study.GREEN, "P", "--"), "top_k", data=_LATE),
    "gentle_live": _live(
        "late student, rate 5e-6: live, sampled token", (study.BLUE, "o", "-."), data=_LATE, learning_rate=5e-6
    ),
    "gentle_offline": _offline(
        "late student, rate 5e-6: offline, sampled token, T 0.7, top-p 0.9",
        (study.RED, "o", "-."),
        data=_LATE_PAPER,
        learning_rate=5e-6,
    ),
}


# Running


class ProbedCurve(study.Curve):
    """The curve; `probe(model, step)` is called before the first step and after the last one."""

    def __init__(self, *args: Any, probe: Callable[[Any, int], Any] | None = None) -> None:
        super().__init__(*args)
        self.probe = probe
        self.probes: dict[str, dict[str, float]] = {}

    def _probe(self, model: Any, step: int) -> None:
        if self.probe is not None:
            with self.paused():
                self.probes[str(step)] = self.probe(model, step)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control)
        self._probe(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model)
        if state.global_step == self.last:
            self._probe(model, state.global_step)


def make_trainer(arm: Arm, work: Path, seed: int, steps: int, scratch: str) -> Trainer:
    """The trainer of an arm, without what prints. An inconsistent teacher is let through with a warning."""
    student, teacher = (str(arm.data.model(role, work)) for role in (arm.data.student, arm.data.teacher))
    task = TASKS[arm.data.task]
    settings: dict[str, Any] = {
        "output_dir": scratch,
        "max_steps": steps,
        "seed": seed,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "learning_rate": arm.learning_rate,
        **study.COMMON,
    }
    if arm.offline:
        args = OfflineOPDConfig(
            offline_loss="top_k_reverse_kl" if arm.loss == "top_k" else "sampled_token",
            importance_correction="token" if arm.loss == "ratio" else "none",
            **arm.settings,
            teacher_consistency="strict" if arm.data.teacher == "first" else "warn",
            **settings,
        )
        return study.silenced(
            OfflineOPDTrainer(model=student, args=args, train_dataset=open_data(arm, work, seed, steps))
        )
    args = DistillationConfig(
        max_completion_length=task.max_new_tokens, temperature=1.0, beta=1.0, shuffle_dataset=False, **settings
    )
    trainer_class = LiveOPDTrainer if arm.loss == "full" else SampledTokenOPDTrainer
    prompts = task.prompts("train", steps * BATCH, seed)
    return study.silenced(trainer_class(model=student, teacher_model=teacher, args=args, train_dataset=prompts))


def open_data(arm: Arm, work: Path, seed: int, steps: int) -> RolloutStore:
    """The scored rollouts of an offline arm, made where they are missing."""
    rollouts = collect(arm.data, work, seed, steps)
    return score(arm.data, rollouts, work, seed, arm.top_k)


def run_arm(name: str, seed: int, settings: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Train one arm with one seed and measure it."""
    arm, work, steps = ARMS[name], settings["work_dir"], settings["steps"]
    trainer = make_trainer(arm, work, seed, steps, scratch)
    student, teacher = (model_folder(role, work) for role in (arm.data.student, arm.data.teacher))
    _, tokenizer = load_checkpoint(student)
    test = build_prompt_dataset("test", settings["n_test"])
    prompts = list(build_prompt_dataset("train", PROMPTS, 1000 + seed)["prompt"])
    pair = [load_checkpoint(path)[0] for path in (student, teacher)]
    curve = ProbedCurve(
        lambda model, step: study.measure_student(model, tokenizer, test, study.draw_of(seed, step)),
        settings["eval_interval"],
        steps,
        probe=(lambda model, step: gradient_discrepancy(model, *pair, tokenizer, prompts, study.draw_of(seed, step)))
        if arm.probed
        else None,
    )
    trainer.add_callback(curve)
    trainer.train()
    if arm.offline:
        costs = {"tokens": trainer.rollout_store.manifest.num_completion_tokens}
        costs["findings"] = {finding.name: finding.severity for finding in trainer.consistency_report.findings}
    else:
        costs = {"tokens": sum(trainer.tokens[:steps])}
        costs |= {"rollout_seconds": trainer.rollout_seconds, "teacher_seconds": trainer.teacher_seconds}
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "arm": name,
        "seed": seed,
        **{option: settings[option] for option in ("steps", "n_test", "eval_interval")},
        **costs,
        "train_seconds": curve.wall,
        "train_cpu_seconds": curve.cpu,
        "machine": machine(),
        "metrics": {key: [study.rounded(entry[key]) for entry in history] for key in METRICS if key in history[-1]},
        "curve": curve.points,
        "probes": curve.probes,
        "policy": policy_measures(trainer.model, student, teacher, seed),
    }


def run_start(n_test: int, work: Path) -> dict[str, Any]:
    """Scores of both students and both teachers before training, and the KL of each pair."""
    test = build_prompt_dataset("test", n_test)
    result: dict[str, Any] = {"n_test": n_test}
    for role in ROLES:
        result[role] = study.measure_student(*load_checkpoint(model_folder(role, work)), test, 0)
    for student, teacher in (("early", "first"), ("early", "second"), ("late", "first")):
        folders = model_folder(student, work), model_folder(teacher, work)
        result[f"{student}_{teacher}"] = policy_measures(load_checkpoint(folders[0])[0], *folders, 0)
    return result


def measure_memory(name: str, work: Path) -> dict[str, Any]:
    """
    Memory of a few steps of one arm, in bytes. Call it in a new process.

    Returns:
        `dict[str, Any]`: `weights` of the models that the trainer holds; `resident`, the peak of resident memory
        beyond what the process had before a model was loaded.
    """
    study.be_quiet()
    arm = ARMS[name]
    with tempfile.TemporaryDirectory() as scratch:
        if arm.offline:  # elsewhere: collecting and scoring are not part of training
            _in_new_process(open_data, arm, work, MEMORY_SEED, MEMORY_STEPS)
        reset_peak()
        before = resident_bytes("VmRSS")
        trainer = make_trainer(arm, work, MEMORY_SEED, MEMORY_STEPS, scratch)
        trainer.train()
    held = [trainer.model, *([] if arm.offline else [trainer.teacher_model])]
    weights = sum(parameter.nbytes for model in held for parameter in model.parameters())
    return {"weights": weights, "resident": resident_bytes("VmHWM") - before}


def _in_new_process(function: Any, *arguments: Any) -> Any:
    """The result of `function(*arguments)`, called in a process that ends with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def work(name: str, seed: int, settings: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Train one arm, make the data of some, or measure what does not depend on a seed."""
    settings = settings | {"work_dir": Path(settings["work_dir"])}
    if name == study.START:
        return run_start(settings["n_test"], settings["work_dir"])
    if name == MEMORY:
        return {arm: _in_new_process(measure_memory, arm, settings["work_dir"]) for arm in MEMORY_ARMS}
    if not name.startswith(DATA):
        return run_arm(name, seed, settings, scratch)
    using = [arm for arm in ARMS.values() if arm.data.name() == name.removeprefix(DATA)]
    with_top_k = any(arm.offline and arm.top_k for arm in using)
    return make_data(using[0].data, settings["work_dir"], seed, settings["steps"], with_top_k)


def plan(names: list[str], settings: dict[str, Any]) -> list[list[str]]:
    """Rollouts with the scores of the first teacher, the same with those of the second, and the training arms."""
    needed = [ARMS[name].data for name in names if ARMS[name].offline]
    first = [replace(data, teacher="first") for data in needed]
    second = [data for data in needed if data.teacher == "second"]
    return [*([DATA + data.name() for data in dict.fromkeys(stage)] for stage in (first, second)), names]


# Reading


class Results:
    """The finished runs; rates are of shape `(S, N)`: seeds, test prompts."""

    def __init__(self, runs: Runs) -> None:
        self.runs, self.start, self.has = runs, runs.start, runs.has
        self.memory = runs.results.get(MEMORY, {})
        self.names = runs.names(ARMS)
        if not self.names:
            raise SystemExit(f"No finished runs of an arm in {runs.path}.")
        first = runs.of(self.names[0])[0]
        self.steps, self.points = first["steps"], sorted(map(int, first["curve"]))

    # Accuracy

    def before(self, model: str, decoding: str) -> np.ndarray:
        """Rates of each prompt before training, of shape `(1, N)`. `model` is `early`, `late`, `first` or `second`."""
        return study.as_rates(self.start[model][decoding], decoding)[None]

    def scores(self, name: str, decoding: str, step: int | None = None) -> np.ndarray:
        """Rates of each prompt after a step, by default the last."""
        step, runs = self.points[-1] if step is None else step, self.runs.of(name)
        if step == 0:
            return np.repeat(self.before(ARMS[name].data.student, decoding), len(runs), axis=0)
        return np.stack([study.as_rates(run["curve"][str(step)][decoding], decoding) for run in runs])

    def rate(self, name: str, decoding: str) -> Estimate:
        """Rate after the last step, mean over seeds."""
        return over_seeds(self.scores(name, decoding).mean(axis=1))

    def gap(self, first: str, second: str, decoding: str) -> Estimate:
        """Rate of one arm minus that of another after the last step, with the variance of seeds and prompts."""
        return difference(self.scores(first, decoding), self.scores(second, decoding))

    def gain(self, name: str, decoding: str) -> Estimate:
        """Rate after the last step minus that before training."""
        return difference(self.scores(name, decoding), self.before(ARMS[name].data.student, decoding))

    # Policies and gradients

    def policy(self, name: str, key: str) -> Estimate:
        """`kl_to_start` or `kl_to_teacher` after training, nats per token."""
        return over_seeds([run["policy"][key] for run in self.runs.of(name)])

    def probe(self, name: str, step: int, key: str) -> Estimate:
        """A quantity of [`~reproduce.offline_opd_policies.gradient_discrepancy`]."""
        return over_seeds([run["probes"][str(step)][key] for run in self.runs.of(name)])

    def drift(self, name: str) -> Estimate:
        """`offline/drift_kl`, mean of the last ten steps; NaN for a live arm."""
        if not ARMS[name].offline:
            return Estimate(math.nan, math.nan)
        return over_seeds([float(np.mean(run["metrics"]["offline/drift_kl"][-10:])) for run in self.runs.of(name)])

    def errors(self, name: str) -> set[str]:
        """Consistency checks that found an error in any run of an offline arm."""
        found = [run["findings"].items() for run in self.runs.of(name)]
        return {check for run in found for check, severity in run if severity == "error"}

    # Costs

    def throughput(self, name: str, one_time: bool = False) -> dict[int, float]:
        """Completion tokens trained on per CPU second, by seed: of training alone, or with collecting and scoring."""
        return {
            run["seed"]: run["tokens"]
            / (run["train_cpu_seconds"] + (sum(self.one_time(name, run["seed"])) if one_time else 0.0))
            for run in self.runs.of(name)
        }

    def speedup(self, name: str, over: str, one_time: bool = False) -> Estimate:
        """Ratio of the throughputs of two arms, paired by seed."""
        ours, theirs = (self.throughput(arm, one_time) for arm in (name, over))
        return over_seeds([ours[seed] / theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])

    def one_time(self, name: str, seed: int) -> tuple[float, float]:
        """CPU seconds of collecting and scoring the data of an offline arm; zeros for a live one."""
        arm = ARMS[name]
        if not arm.offline:
            return 0.0, 0.0
        # Both teachers score the same rollouts, which were collected for the first
        collected, scored = (
            self.runs.results[f"{DATA}{data.name()}-seed{seed}"]
            for data in (replace(arm.data, teacher="first"), arm.data)
        )
        scoring = "score_top_k" if arm.loss == "top_k" else "score"
        return collected["collect_cpu_seconds"], scored[f"{scoring}_cpu_seconds"]

    def mean_one_time(self, name: str) -> np.ndarray:
        """[`one_time`], mean over seeds, of shape `(2,)`."""
        return np.mean([self.one_time(name, run["seed"]) for run in self.runs.of(name)], axis=0)


# The paper's claims

MEASURES = {"sampled": "T = 1", "greedy": "greedy"}
SPEEDUP_BAR = 3.0
# Norm of the difference of both gradients by that of the live one
DISCREPANCY_BAR = 0.5
# Below this rate a policy has forgotten the task, and two such policies cannot be told apart
FLOOR = 0.02


def claims(found: Results) -> Iterator[Claim]:
    """Verdicts on the Lightning OPD paper; claims whose runs are not finished are left out."""
    like = "With a consistent teacher, offline distillation performs like live distillation"
    for offline, live, where in (
        ("offline", "live", "early student"),
        ("late_offline", "late_live", "late student"),
        ("gentle_offline", "gentle_live", "late student, a tenth of the learning rate, the paper's sampling"),
    ):
        if found.has(offline, live):
            yield _comparison(found, f"{like}: {where}.", [(offline, live)], study.not_worse)
    if found.has("offline", "live", "offline_second", "live_second"):
        yield _comparison(
            found,
            "Another teacher than that of the SFT stage is worse, live and offline.",
            [("live_second", "live"), ("offline_second", "offline")],
            study.worse,
        )
        yield _comparison(
            found,
            "With an inconsistent teacher, offline distillation does not match live distillation.",
            [("offline_second", "live_second")],
            study.worse,
        )
    yield from _gradients(found)
    yield from _drift(found)
    yield from _efficiency(found)
    yield (
        "Results on mathematics and code, up to a 30B mixture of experts.",
        UNTESTABLE,
        "One synthetic task and small models.",
    )


OURS = (
    (
        "Offline, the reverse KL over the teacher's stored top tokens performs like TRL's live full KL.",
        ("offline_topk", "live_full"),
        study.not_worse,
    ),
    (
        "It performs at least as well as live distillation on sampled tokens.",
        ("offline_topk", "live"),
        study.not_worse,
    ),
    (
        "The same from the late student, against live distillation on sampled tokens.",
        ("late_offline_topk", "late_live"),
        study.not_worse,
    ),
    (
        "What sets the paper's loss apart from live distillation is the missing ratio to the rollout policy: with "
        "it, offline distillation on sampled tokens performs like live distillation.",
        ("offline_ratio", "live"),
        study.not_worse,
    ),
    (
        "Offline, it performs at least as well as the loss on sampled tokens.",
        ("offline_topk", "offline"),
        study.not_worse,
    ),
    (
        "With that loss, too, the second teacher is worse.",
        ("offline_topk_second", "offline_topk"),
        study.worse,
    ),
    (
        "As many rollouts of a quarter of the prompts, 4 each, perform as well.",
        ("offline_4", "offline"),
        study.not_worse,
    ),
    (
        "Rollouts at temperature 0.7 and top-p 0.9 perform at least as well as at temperature 1.",
        ("offline_paper", "offline"),
        study.not_worse,
    ),
)


def ours(found: Results) -> Iterator[Claim]:
    """The same for what this package adds."""
    for claim, pair, judge in OURS:
        if found.has(*pair):
            yield _comparison(found, claim, [pair], judge)
    offline = [name for name in found.names if ARMS[name].offline]
    wrong = [name for name in offline if ARMS[name].data.teacher == "second"]
    if wrong:
        caught = [name for name in wrong if "teacher" in found.errors(name)]
        false_alarms = [name for name in offline if name not in wrong and found.errors(name)]
        yield (
            "`check_teacher_consistency` tells the second teacher from the first before training.",
            study.word(len(caught) == len(wrong) and not false_alarms),
            f"An error in {len(caught)} of {len(wrong)} arms with the second teacher, and in {len(false_alarms)} of "
            f"{len(offline) - len(wrong)} with the first.",
        )


def _comparison(found: Results, claim: str, pairs: list[tuple[str, str]], judge: Callable[[Estimate], str]) -> Claim:
    words, numbers = [], []
    for first, second in pairs:
        gaps = {decoding: found.gap(first, second, decoding) for decoding in DECODINGS}
        at_floor = all(found.rate(name, decoding).value < FLOOR for name in (first, second) for decoding in DECODINGS)
        words += [UNTESTABLE if at_floor else judge(gap) for gap in gaps.values()]
        shown = ", ".join(f"{MEASURES[decoding]} {gap.signed()}" for decoding, gap in gaps.items())
        floor = " (neither can do the task any more)" if at_floor else ""
        numbers.append(f"{ARMS[first].label} minus {ARMS[second].label}: {shown}{floor}")
    return claim, study.all_of(words), f"{'. '.join(numbers)}."


def _gradients(found: Results) -> Iterator[Claim]:
    names = [name for name in found.names if ARMS[name].probed]
    consistent = [name for name in names if ARMS[name].data.teacher == "first"]
    if not consistent:
        return
    last = found.points[-1]
    parts = []
    for name in names:
        shown = [
            f"step {step} {found.probe(name, step, 'relative')} (chance {found.probe(name, step, 'chance_relative')}, "
            f"cosine {found.probe(name, step, 'cosine')})"
            for step in (0, last)
        ]
        parts.append(f"{ARMS[name].label}: {', '.join(shown)}")
    yield (
        "With a consistent teacher the offline gradient stays close to the live one (the paper bounds the gap without "
        f"a number; bar of ours after training: {DISCREPANCY_BAR:g} of the norm of the live gradient).",
        study.all_of(
            [study.word(found.probe(name, last, "relative").value <= DISCREPANCY_BAR) for name in consistent]
        ),
        f"Norm of the difference by that of the live gradient: {'; '.join(parts)}.",
    )


def _drift(found: Results) -> Iterator[Claim]:
    pairs = [(f"{start}offline", f"{start}live") for start in ("", "late_", "gentle_")]
    pairs = [pair for pair in pairs if found.has(*pair)]
    if not pairs:
        return
    gaps = [found.runs.metric_gap(*pair, lambda run: run["policy"]["kl_to_start"]) for pair in pairs]
    shown = [", ".join(f"{ARMS[name].label} {found.policy(name, 'kl_to_start')}" for name in pair) for pair in pairs]
    yield (
        "Offline distillation regularises by itself: it drifts less from the SFT student than live distillation.",
        study.all_of([study.worse(gap) for gap in gaps]),
        f"KL to the student before training, nats per token: {'; '.join(shown)}.",
    )


def _efficiency(found: Results) -> Iterator[Claim]:
    lives = ("live", "live_full")
    if not found.has("offline", *lives):
        return
    ratios = {live: found.speedup("offline", live) for live in lives}
    numbers = "; ".join(
        f"against {ARMS[live].label} {ratio}, with collecting and scoring {found.speedup('offline', live, True)}"
        for live, ratio in ratios.items()
    )
    yield (
        f"Training is several times as efficient without a live teacher (4.0 times in the paper; bar here: "
        f"{SPEEDUP_BAR:g} times the tokens per second, without one-time costs).",
        study.word(all(ratio.value >= SPEEDUP_BAR for ratio in ratios.values())),
        f"{numbers} (CPU time).",
    )


# Report

MIB = 2**20
_NAMES = {"sampled": "at T = 1", "greedy": "greedy"}
_MODELS = {"early": "early student", "late": "late student", "first": "teacher", "second": "second teacher"}
_PAIRS = {
    "early_first": "early student to the teacher",
    "early_second": "to the second teacher",
    "late_first": "late student to the teacher",
}


def report(runs: Runs, folder: Path) -> str:
    """Write the CSV file and the figures of what is finished; returns the Markdown."""
    found = Results(runs)
    study.write_csv(folder / "offline_opd.csv", [_csv_row(found, name) for name in found.names])
    _plot_curves(found, folder / "offline_opd_curves.png")
    _plot_costs(found, folder / "offline_opd_costs.png")
    if any(ARMS[name].probed for name in found.names):
        _plot_gradients(found, folder / "offline_opd_gradients.png")
    start = "; ".join(
        f"{label} " + ", ".join(f"{found.before(model, d).mean():.3f} {n}" for d, n in _NAMES.items())
        for model, label in _MODELS.items()
    )
    return "\n".join(
        [
            "# Offline distillation on the add3cot task",
            "",
            "Written by `python examples/reproduce/offline_opd.py`; do not edit. Accuracy before training: "
            f"{start}. {study.machine_text(runs.of(found.names[0])[0]['machine'])}",
            "",
            *_accuracy(found),
            *_costs(found),
            "## The paper's claims",
            "",
            f"Verdicts are computed, at {' and '.join(MEASURES.values())}; a difference counts above 2 standard "
            "errors, which add the variance over seeds and over test prompts.",
            "",
            *study.claim_lines(claims(found)),
            "",
            "## What this package adds",
            "",
            *study.claim_lines(ours(found)),
            "",
        ]
    )


def _csv_row(found: Results, name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": name, "seeds": len(found.runs.of(name)), "steps": found.steps}
    estimates = {decoding: found.rate(name, decoding) for decoding in DECODINGS}
    estimates |= {key: found.policy(name, key) for key in ("kl_to_start", "kl_to_teacher")}
    estimates["offline_drift_kl"] = found.drift(name)
    for key, (value, error) in estimates.items():
        row |= {key: value, f"{key}_se": error}
    for key in ("tokens", "train_seconds", "train_cpu_seconds"):
        row[key] = found.runs.cost(name, key)
    row["collect_cpu_seconds"], row["score_cpu_seconds"] = map(float, found.mean_one_time(name))
    return row


def _accuracy(found: Results) -> list[str]:
    header = ["arm", "T = 1", "gain", "greedy", "gain", "KL to the start", "KL to the teacher", "drift logged"]
    rows = [
        [
            ARMS[name].label,
            *(cell for d in DECODINGS for cell in (found.rate(name, d), found.gain(name, d).signed())),
            found.policy(name, "kl_to_start"),
            found.policy(name, "kl_to_teacher"),
            found.drift(name) if ARMS[name].offline else "",
        ]
        for name in found.names
    ]
    seeds = sorted({tuple(run["seed"] for run in found.runs.of(name)) for name in found.names})
    gaps = "; ".join(f"{label} {found.start[key]['kl_to_teacher']:.3f}" for key, label in _PAIRS.items())
    return [
        "## Accuracy",
        "",
        f"Seeds {'; '.join(', '.join(map(str, values)) for values in seeds)}; {found.steps} optimizer steps of "
        f"{BATCH} rollouts, learning rate {LEARNING_RATE:g} (constant) unless said otherwise, the same optimizer in "
        "every arm. Both students were trained on the first teacher's own samples, with one recipe: the early one is"
        " the `sft_student` of the test-bed, the late one was stopped later. Arms without another name start from "
        "the early one. The second teacher is the first, fine-tuned to write its chain of thought in another style. "
        "*live*: rollouts of the current student at temperature 1. *offline*: rollouts of the student before "
        "training, at temperature 1 unless said otherwise, each used once. *sampled token*: the paper's loss; *with "
        "the ratio*: times the ratio of the current student's probability of the token to that under which it was "
        "drawn. *full KL*: "
        f"`trl.DistillationTrainer`. *top-{TOP_K} reverse KL*: over the teacher's {TOP_K} stored tokens and one event "
        f"for all others. Accuracy = right and in the format, on {found.start['n_test']} test prompts; T = 1 is the "
        "mean of 2 completions per prompt. Mean ± SE over seeds; gains over the start with the variance of seeds and "
        "prompts. KLs are exact, in nats per token, on the trained policy's own rollouts; the drift is "
        "`offline/drift_kl`, estimated from the stored rollouts, mean of the last 10 steps. Before training, KL from "
        f"the {gaps}.",
        "",
        study.markdown_table(header, rows),
        "",
        "![accuracy against step](offline_opd_curves.png)",
        "",
        "![offline against live gradients](offline_opd_gradients.png)",
        "",
    ]


def _costs(found: Results) -> list[str]:
    header = ["arm", "train s", "train CPU s", "teacher s", "rollouts s", "one-time CPU s: collect", "score"]
    header += ["tokens/CPU s", "with one-time"]
    rows = []
    for name in found.names:
        offline, cost = ARMS[name].offline, found.runs.cost
        rows.append(
            [
                ARMS[name].label,
                *(f"{cost(name, key):.0f}" for key in ("train_seconds", "train_cpu_seconds")),
                *("0" if offline else f"{cost(name, key):.0f}" for key in ("teacher_seconds", "rollout_seconds")),
                *(f"{value:.0f}" if offline else "" for value in found.mean_one_time(name)),
                *(f"{np.mean(list(found.throughput(name, one_time).values())):.0f}" for one_time in (False, True)),
            ]
        )
    return [
        "## Cost",
        "",
        "Means per run, without evaluation and without loading models. Tokens are the completion tokens trained on. "
        "CPU time counts only what this process computed; wall time (`train s`, `teacher s`, `rollouts s`) also "
        "counts what others did on the machine meanwhile. One-time costs fall once per data set, however often it is "
        "trained on; here each rollout is used once.",
        "",
        study.markdown_table(header, rows),
        "",
        *_storage(found),
        "![time of a run](offline_opd_costs.png)",
        "",
    ]


def _storage(found: Results) -> Iterator[str]:
    if made := found.runs.of(DATA + Data().name()):
        sampled, top = (np.mean([data[f"bytes_per_token{kind}"] for data in made]) for kind in ("", "_top_k"))
        yield (
            f"On disk: {sampled:.1f} bytes per completion token with the sampled token's log-probabilities, {top:.1f} "
            f"with the teacher's top {TOP_K} besides."
        )
        yield ""
    if found.memory:
        shown = "; ".join(
            f"{ARMS[name].label} {used['weights'] / MIB:.1f} MiB of weights, {used['resident'] / MIB:.0f} MiB peak"
            for name, used in found.memory.items()
        )
        yield (
            f"Memory of a training process beyond what it had before a model was loaded: {shown}. With models this "
            "small, activations and libraries dominate."
        )
        yield ""


def _plot_curves(found: Results, path: Path) -> None:
    """Accuracy against step, at temperature 1 and greedy."""
    figure, axes = study.panels(2, width=5.6, height=4.6, sharey=False)
    steps = [0, *found.points]
    for axis, (decoding, title) in zip(axes, (("sampled", "Temperature 1"), ("greedy", "Greedy")), strict=True):
        for name in found.names:
            values = np.stack([found.scores(name, decoding, step).mean(axis=1) for step in steps], axis=1)
            study.band(axis, steps, values, ARMS[name].style, ARMS[name].label)
        axis.set(title=title, xlabel="optimizer step")
    axes[0].set_ylabel(f"accuracy on {found.start['n_test']} test prompts (band: ±1 SE over seeds)")
    study.save(figure, path, legend_of=axes[0], columns=3)


def _plot_costs(found: Results, path: Path) -> None:
    """CPU time of each arm: training, and what falls once."""
    figure, (axis,) = study.panels(1, width=7.0, height=4.4)
    names = found.names[::-1]
    made = np.array([found.mean_one_time(name) for name in names])
    train = np.array([found.runs.cost(name, "train_cpu_seconds") for name in names])
    parts = {"training": train, "collecting (once)": made[:, 0], "scoring (once)": made[:, 1]}
    left = np.zeros(len(names))
    for (label, values), color in zip(parts.items(), (study.BLUE, study.SKY, study.ORANGE), strict=True):
        axis.barh([ARMS[name].label for name in names], values, left=left, color=color, label=label)
        left += values
    axis.set(title=f"{found.steps} optimizer steps", xlabel="CPU seconds of a run, without evaluation")
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    study.save(figure, path)


def _plot_gradients(found: Results, path: Path) -> None:
    """How far the expected offline gradient is from the live one, before and after training."""
    figure, axes = study.panels(2, width=4.8, sharey=False)
    steps = (0, found.points[-1])
    for axis, key in zip(axes, ("relative", "cosine"), strict=True):
        for name in (name for name in found.names if ARMS[name].probed):
            color, marker, line = ARMS[name].style
            values = [found.probe(name, step, key) for step in steps]
            chance = [found.probe(name, step, f"chance_{key}").value for step in steps]
            axis.errorbar(
                steps, [v.value for v in values], [v.error for v in values],
                color=color, marker=marker, ls=line, capsize=2, label=ARMS[name].label,
            )  # fmt: skip
            axis.plot(steps, chance, color=study.GRAY, marker=marker, ls=line, lw=1, ms=3)
        axis.set_xticks(steps)
        axis.set_xlabel("optimizer step (grey: two live gradients)")
    axes[0].set(title="Norm of the difference / norm of the live gradient", ylim=(0.0, None))
    axes[1].set(title="Cosine of offline and live gradient")
    study.save(figure, path, legend_of=axes[0], columns=2)


STUDY = study.Study(
    "offline_opd",
    options={"steps": 40, "n_test": 500, "eval_interval": 20, "work_dir": "outputs/offline_opd"},
    arms=lambda settings: ARMS,
    work=work,
    report=report,
    stages=plan,
    once=(study.START, MEMORY),
)

if __name__ == "__main__":
    STUDY.main(__doc__)

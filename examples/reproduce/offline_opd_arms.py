"""The training arms of `offline_opd.py` and how one of them is trained and measured."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from trl import DistillationConfig

from reproduce.jobs import machine
from reproduce.live_opd import LiveOPDTrainer, SampledTokenOPDTrainer
from reproduce.offline_opd_data import BATCH, TOP_K, Data, collect, score
from reproduce.offline_opd_models import models
from reproduce.offline_opd_policies import PROMPTS, gradient_discrepancy, policy_measures
from reproduce.trust_region_arms import CurveCallback, measure
from testbed.evaluate import load_checkpoint
from testbed.task import MAX_NEW_TOKENS, build_prompt_dataset
from trl_blend import OfflineOPDConfig, OfflineOPDTrainer, RolloutStore


LEARNING_RATE = 5e-5
METRICS = ("loss", "grad_norm", "live/reverse_kl", "offline/reverse_kl", "offline/drift_kl", "offline/advantage")


@dataclass(frozen=True)
class Arm:
    """
    One way to distil.

    Args:
        label (`str`):
            Name in tables and figures.
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
    """

    label: str
    loss: str
    data: Data = Data()
    offline: bool = False
    probed: bool = False
    learning_rate: float = LEARNING_RATE


_PAPER = {"temperature": 0.7, "top_p": 0.9}
_SECOND, _LATE = Data(teacher="second"), Data(student="late")
ARMS = {
    "live_full": Arm("live, full KL (TRL)", "full"),
    "live": Arm("live, sampled token", "sampled"),
    "offline": Arm("offline, sampled token", "sampled", offline=True, probed=True),
    "offline_4": Arm("offline, sampled token, 4 per prompt", "sampled", Data(rollouts_per_prompt=4), offline=True),
    "offline_paper": Arm("offline, sampled token, T 0.7, top-p 0.9", "sampled", Data(**_PAPER), offline=True),
    "offline_ratio": Arm("offline, sampled token, with the ratio", "ratio", offline=True),
    "offline_topk": Arm(f"offline, top-{TOP_K} reverse KL", "top_k", offline=True),
    "live_second": Arm("live, sampled token, second teacher", "sampled", _SECOND),
    "offline_second": Arm("offline, sampled token, second teacher", "sampled", _SECOND, offline=True, probed=True),
    "offline_topk_second": Arm(f"offline, top-{TOP_K} reverse KL, second teacher", "top_k", _SECOND, offline=True),
    "late_live": Arm("late student: live, sampled token", "sampled", _LATE),
    "late_offline": Arm("late student: offline, sampled token", "sampled", _LATE, offline=True, probed=True),
    "late_offline_topk": Arm(f"late student: offline, top-{TOP_K} reverse KL", "top_k", _LATE, offline=True),
    "gentle_live": Arm("late student, rate 5e-6: live, sampled token", "sampled", _LATE, learning_rate=5e-6),
    "gentle_offline": Arm(
        "late student, rate 5e-6: offline, sampled token, T 0.7, top-p 0.9",
        "sampled",
        Data(student="late", **_PAPER),
        offline=True,
        learning_rate=5e-6,
    ),
}
# Of a step and of all else, measured on one core; only the printed plan uses them
LIVE_SECONDS, OFFLINE_SECONDS = (1.1, 35.0), (0.45, 50.0)
_COMMON: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": 1,
    "adam_beta2": 0.999,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


class ProbedCurve(CurveCallback):
    """The curve; with a `pair` of student and teacher also the gap of offline and live gradients, at both ends."""

    def __init__(self, *args: Any, pair: tuple[Path, Path] | None = None):
        super().__init__(*args)
        self.probes: dict[str, dict[str, float]] = {}
        self.models = None if pair is None else tuple(load_checkpoint(path)[0] for path in pair)
        self.prompts = list(build_prompt_dataset("train", PROMPTS, 1000 + self.seed)["prompt"])

    def _probe(self, model: Any, step: int) -> None:
        if self.models is None:
            return
        started, cpu = time.perf_counter(), time.process_time()
        draw = 100_000 * (self.seed + 1) + step
        self.probes[str(step)] = gradient_discrepancy(model, *self.models, self.tokenizer, self.prompts, draw)
        self.seconds += time.perf_counter() - started
        self.cpu_seconds += time.process_time() - cpu

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._probe(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model, **kwargs)
        if state.global_step == self.last:
            self._probe(model, state.global_step)


class StepClock(TrainerCallback):
    """Wall and CPU time of training, from its beginning to its end, without what `curve` takes."""

    def __init__(self, curve: CurveCallback):
        self.curve = curve
        self.wall = self.cpu = 0.0

    def _now(self) -> tuple[float, float]:
        return time.perf_counter() - self.curve.seconds, time.process_time() - self.curve.cpu_seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        wall, cpu = self._now()
        self.wall, self.cpu = wall - self._begin[0], cpu - self._begin[1]


def make_trainer(arm: Arm, work: Path, seed: int, steps: int, scratch: str) -> Trainer:
    """The trainer of an arm, without what prints. An inconsistent teacher is let through with a warning."""
    found = models(work)
    student, teacher = (str(getattr(found, role)) for role in (arm.data.student, arm.data.teacher))
    settings: dict[str, Any] = {"output_dir": scratch, "max_steps": steps, "seed": seed, **_COMMON}
    settings["learning_rate"] = arm.learning_rate
    if arm.offline:
        args = OfflineOPDConfig(
            offline_loss="top_k_reverse_kl" if arm.loss == "top_k" else "sampled_token",
            importance_correction="token" if arm.loss == "ratio" else "none",
            teacher_consistency="strict" if arm.data.teacher == "first" else "warn",
            **settings,
        )
        trainer = OfflineOPDTrainer(model=student, args=args, train_dataset=open_data(arm, work, seed, steps))
    else:
        trainer_class = LiveOPDTrainer if arm.loss == "full" else SampledTokenOPDTrainer
        trainer = trainer_class(
            model=student,
            teacher_model=teacher,
            args=DistillationConfig(
                max_completion_length=MAX_NEW_TOKENS, temperature=1.0, beta=1.0, shuffle_dataset=False, **settings
            ),
            train_dataset=build_prompt_dataset("train", steps * BATCH, seed),
        )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def open_data(arm: Arm, work: Path, seed: int, steps: int) -> RolloutStore:
    """The scored rollouts of an offline arm, made where they are missing."""
    rollouts = collect(arm.data, work, seed, steps)
    return score(arm.data, rollouts, work, seed, TOP_K if arm.loss == "top_k" else None)


def run_arm(name: str, seed: int, steps: int, n_test: int, interval: int, work: Path, scratch: str) -> dict[str, Any]:
    """
    Train one arm with one seed; returns what is written to its JSON file.

    Args:
        name (`str`):
            One of [`ARMS`].
        seed (`int`):
            Seed of the prompts, of the rollouts and of training.
        steps (`int`):
            Optimizer steps.
        n_test (`int`):
            Test prompts.
        interval (`int`):
            Steps between two measurements.
        work (`Path`):
            Folder of models and stores.
        scratch (`str`):
            Folder for the trainer's output.
    """
    arm = ARMS[name]
    trainer = make_trainer(arm, work, seed, steps, scratch)
    found = models(work)
    student, teacher = (getattr(found, role) for role in (arm.data.student, arm.data.teacher))
    _, tokenizer = load_checkpoint(student)
    pair = (student, teacher) if arm.probed else None
    curve = ProbedCurve(seed, tokenizer, build_prompt_dataset("test", n_test), interval, steps, pair=pair)
    clock = StepClock(curve)
    trainer.add_callback(curve)
    trainer.add_callback(clock)
    trainer.train()
    result: dict[str, Any] = {"arm": name, "seed": seed, "steps": steps, "n_test": n_test, "interval": interval}
    if arm.offline:
        tokens = trainer.rollout_store.manifest.num_completion_tokens
        result["findings"] = {finding.name: finding.severity for finding in trainer.consistency_report.findings}
    else:
        tokens = sum(trainer.tokens[:steps])
        result |= {"rollout_seconds": trainer.rollout_seconds, "teacher_seconds": trainer.teacher_seconds}
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return result | {
        "tokens": tokens,
        "train_seconds": clock.wall,
        "train_cpu_seconds": clock.cpu,
        "machine": machine(),
        "metrics": {key: [rounded(entry[key]) for entry in history] for key in METRICS if key in history[-1]},
        "curve": curve.points,
        "probes": curve.probes,
        "policy": policy_measures(trainer.model, student, teacher, seed),
    }


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


def run_start(n_test: int, work: Path) -> dict[str, Any]:
    """Scores of both students and both teachers before training, see [`~reproduce.trust_region_arms.measure`]."""
    test = build_prompt_dataset("test", n_test)
    found = models(work)
    result: dict[str, Any] = {"n_test": n_test}
    for name, path in found._asdict().items():
        result[name] = measure(*load_checkpoint(path), test, 0)
    for student, teacher in (("early", "first"), ("early", "second"), ("late", "first")):
        folders = getattr(found, student), getattr(found, teacher)
        result[f"{student}_{teacher}"] = policy_measures(load_checkpoint(folders[0])[0], *folders, 0)
    return result

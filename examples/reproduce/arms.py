"""The arms of `logit_mixing.py` and how one of them is trained and measured."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from testbed.evaluate import CHECKPOINTS
from testbed.task import answer_reward, build_prompt_dataset, format_and_answer_reward, format_reward
from trl_blend import LogitMixGRPOConfig, LogitMixGRPOTrainer


KINDS = ("solve", "answer", "format")  # in the order of REWARDS; "solve" = right and in the format
REWARDS = [format_and_answer_reward, answer_reward, format_reward]
ADAPTIVE_PROMPTS = 32


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Args:
        label (`str`):
            Name in tables and figures.
        settings (`dict[str, Any]`):
            What differs from the common settings of [`make_trainer`].
        student, reference (`str`, *optional*):
            Checkpoints: the trained policy at step 0, and the frozen partner.
        seconds_per_step (`float`, *optional*):
            Measured on one core, evaluation left out; only the printed plan uses it.
    """

    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    student: str = "student"
    reference: str = "teacher"
    seconds_per_step: float = 3.3

    @property
    def mixes(self) -> bool:
        return self.settings["teacher_weight"] > 0

    @property
    def deployed(self) -> str:
        """The policy that the objective is written on."""
        return "mixed" if self.mixes and self.settings.get("objective") != "student" else "student"


def _fixed(weight: float, **settings: Any) -> dict[str, Any]:
    return {"teacher_weight": weight, **settings}


def make_arms(steps: int) -> dict[str, Arm]:
    """All arms. `student` is the SFT policy, `teacher` a stronger model, `base` adds but does not write the box."""
    # The weight is 0 for the last fifth of the steps, which are plain GRPO
    decay = {
        "objective": "student",
        "teacher_weight_schedule": "linear",
        "teacher_weight_decay_steps": max(1, round(0.8 * steps)),
    }
    adaptive = {"teacher_weight_schedule": "adaptive", "adaptive_num_prompts": ADAPTIVE_PROMPTS}
    base = {"student": "base", "reference": "student"}
    return {
        "grpo": Arm("GRPO", _fixed(0.0), seconds_per_step=1.5),
        "grpo_kl": Arm("GRPO + KL (0.04)", _fixed(0.0, beta=0.04), seconds_per_step=1.7),
        "mixed_0.1": Arm("fixed mixing 0.1", _fixed(0.1)),
        "mixed_0.3": Arm("fixed mixing 0.3", _fixed(0.3)),
        "mixed_0.5": Arm("fixed mixing 0.5", _fixed(0.5)),
        "adaptive": Arm("adaptive mixing", _fixed(0.3, **adaptive), seconds_per_step=4.0),
        "probs_0.3": Arm("probability mixing 0.3", _fixed(0.3, mixing_space="probs")),
        "decay_0.5": Arm("student objective, 0.5 to 0", _fixed(0.5, **decay)),
        "base_grpo": Arm("base: GRPO", _fixed(0.0), seconds_per_step=1.5, **base),
        "base_sft_0.5": Arm("base: mixing 0.5, SFT anchor", _fixed(0.5), seconds_per_step=2.0, **base),
        "base_base_0.5": Arm(
            "base: mixing 0.5, base anchor", _fixed(0.5), student="base", reference="base", seconds_per_step=2.0
        ),
    }


def make_trainer(arm: Arm, seed: int, steps: int, scratch: str, **overrides: Any) -> LogitMixGRPOTrainer:
    """The trainer of an arm: equal prompts, batch, learning rate and steps for every arm of a seed."""
    args = LogitMixGRPOConfig(
        output_dir=scratch,
        per_device_train_batch_size=128,
        num_generations=8,
        max_completion_length=56,
        learning_rate=3e-5,
        lr_scheduler_type="constant",
        temperature=1.0,
        max_steps=steps,
        seed=seed,
        reward_weights=[1.0, 0.0, 0.0],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **(arm.settings | overrides),
    )
    trainer = LogitMixGRPOTrainer(
        model=str(CHECKPOINTS / arm.student),
        teacher_model=str(CHECKPOINTS / arm.reference),
        reward_funcs=REWARDS,
        args=args,
        train_dataset=build_prompt_dataset("train", 4000),
        eval_dataset=build_prompt_dataset("validation", 200),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def measure(trainer: LogitMixGRPOTrainer, arm: Arm, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Greedy scores of the student alone and, where the arm mixes, of the mixed policy, one 0/1 string per kind."""
    policies: dict[str, tuple[float, ...]] = {"student": (0.0,)}
    if arm.deployed == "mixed":
        policies["mixed"] = trainer.current_weights()
    return {
        policy: {"weight": weights[0], **bits(trainer.greedy_rewards(rows, weights).rewards)}
        for policy, weights in policies.items()
    }


def bits(rewards: torch.Tensor) -> dict[str, str]:
    """Rewards of shape `(N, 3)` as one string of N zeros and ones per kind."""
    columns = rewards.round().int().T.tolist()
    return {kind: "".join(map(str, column)) for kind, column in zip(KINDS, columns, strict=True)}


class CurveCallback(TrainerCallback):
    """Measure every `interval` steps; the time it takes is kept out of the arm's training time."""

    def __init__(self, arm: Arm, rows: list[dict[str, Any]], interval: int):
        self.arm, self.rows, self.interval = arm, rows, interval
        self.points: dict[int, dict[str, Any]] = {}
        self.seconds = self.cpu_seconds = 0.0
        self.trainer: LogitMixGRPOTrainer | None = None

    def on_step_end(self, args, state, control, **kwargs):
        # The last step is measured after training, on all prompts
        if state.global_step % self.interval == 0 and state.global_step < state.max_steps:
            started, cpu = time.perf_counter(), time.process_time()
            self.points[state.global_step] = measure(self.trainer, self.arm, self.rows)
            self.seconds += time.perf_counter() - started
            self.cpu_seconds += time.process_time() - cpu


def run_arm(
    name: str, seed: int, steps: int, n_test: int, n_curve: int, interval: int, scratch: str
) -> dict[str, Any]:
    """Train one arm with one seed; returns what is written to its JSON file."""
    arm = make_arms(steps)[name]
    rows = list(build_prompt_dataset("test", n_test))
    curve = CurveCallback(arm, rows[:n_curve], interval)
    trainer = make_trainer(arm, seed, steps, str(Path(scratch) / f"{name}-{seed}"))
    curve.trainer = trainer
    trainer.add_callback(curve)
    started, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    seconds = time.perf_counter() - started - curve.seconds
    cpu_seconds = time.process_time() - cpu - curve.cpu_seconds
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    batch = trainer.args.generation_batch_size
    return {
        "arm": name,
        "seed": seed,
        "steps": steps,
        "n_test": n_test,
        "n_curve": n_curve,
        "student": arm.student,
        "reference": arm.reference,
        "train_seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "rollout_tokens": round(sum(entry["completions/mean_length"] for entry in history) * batch),
        "validation_tokens": round(sum(entry.get("adaptive/decoded_tokens", 0.0) for entry in history)),
        "validation_seconds": round(sum(entry.get("adaptive/seconds", 0.0) for entry in history), 1),
        "rollout_reward": [round(entry["reward"], 3) for entry in history],
        "teacher_weight": [round(entry.get("mixing/teacher_weight", 0.0), 3) for entry in history],
        "curve": {str(step): _rates(point) for step, point in curve.points.items()},
        "final": measure(trainer, arm, rows),
    }


def _rates(point: dict[str, Any]) -> dict[str, Any]:
    """Means of the 0/1 strings: the curve needs no more."""
    return {
        policy: {"weight": scores["weight"]} | {kind: scores[kind].count("1") / len(scores[kind]) for kind in KINDS}
        for policy, scores in point.items()
    }


def run_start(n_test: int, scratch: str) -> dict[str, Any]:
    """Greedy scores before training: each checkpoint alone (weight 0 and 1) and each starting mixture."""
    rows = list(build_prompt_dataset("test", n_test))
    result: dict[str, Any] = {"n_test": n_test, "alone": {}, "mixed": {}}
    mixing = {name: arm for name, arm in make_arms(1).items() if arm.mixes}
    for name, arm in mixing.items():
        trainer = make_trainer(arm, 0, 1, str(Path(scratch) / f"start-{name}"))
        for checkpoint, weight in ((arm.student, 0.0), (arm.reference, 1.0)):
            if checkpoint not in result["alone"]:
                result["alone"][checkpoint] = bits(trainer.greedy_rewards(rows, (weight,)).rewards)
        if arm.reference == arm.student:
            result["mixed"][name] = result["alone"][arm.student]
        elif arm.deployed == "mixed":
            result["mixed"][name] = bits(trainer.greedy_rewards(rows, trainer.current_weights()).rewards)
    return result

"""The training arms of `trust_region.py` and how one of them is trained and measured."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from reproduce.jobs import machine
from testbed.evaluate import CHECKPOINTS, generate_texts, load_checkpoint
from testbed.task import MAX_NEW_TOKENS, build_prompt_dataset, format_and_answer_reward, format_reward
from trl_blend import TrustRegionOPDConfig, TrustRegionOPDTrainer


BATCH = 64  # rollouts of an optimizer step
ROLLOUTS_PER_PROMPT = 4  # as in the paper
LEARNING_RATE = 5e-5
# Share of the steps that a warmup lasts: 15 of 40. The paper's horizons are 15, 25 and 50
WARMUP_SHARE = 0.375
SAMPLES = 2  # completions at temperature 1 of each test prompt
EVALUATION_BATCH = 250
METRICS = (
    "blend/kl_budget",
    "blend/teacher_weight/mean",
    "blend/teacher_feasible",
    "blend/kl_behavior_student",
    "blend/replaced_share",
    "blend/teacher_entropy",
    "blend/teacher_logp",
    "blend/student_logp",
    "blend/auroc",
    "blend/temperature",
    "blend/veto_weight",
    "rewards/format_and_answer_reward/mean",
    "loss",
)


@dataclass(frozen=True)
class Arm:
    """
    One way to distil.

    Args:
        label (`str`):
            Name in tables and figures.
        settings (`dict[str, Any]`):
            What differs from the common settings of [`make_trainer`].
        sft_steps (`int`, *optional*, defaults to `0`):
            Supervised steps on teacher rollouts that replace the first steps.
        seconds_per_step (`float`, *optional*):
            Measured on one core, evaluation left out; only the printed plan uses it.
    """

    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    sft_steps: int = 0
    seconds_per_step: float = 1.05


def warmup_steps(steps: int) -> int:
    """Steps of every warmup in a run of `steps`."""
    return max(1, round(WARMUP_SHARE * steps))


def make_arms(steps: int) -> dict[str, Arm]:
    """All arms. Settings that the paper sweeps are set to one value of its range; the budget has three."""
    warmup = warmup_steps(steps)

    def trust_region(budget: float) -> Arm:
        settings = {"rollout_policy": "trust_region", "kl_budget": budget, "blend_warmup_steps": warmup}
        return Arm(f"trust region {budget:g}, annealed", settings, seconds_per_step=1.3)

    student = {"rollout_policy": "student"}
    constant = {"rollout_policy": "trust_region", "kl_budget": 0.01, "kl_budget_schedule": "constant"}
    skd = {"rollout_policy": "speculative_kd", "skd_top_k": 15, "skd_teacher_temperature": 0.2}
    veto = {"distillation_target": "veto", "veto_weight_start": 0.4, "veto_warmup_steps": warmup}
    temperature = {"temperature_warmup_start": 0.9, "temperature_warmup_steps": warmup}
    return {
        "vanilla": Arm("vanilla OPD", student),
        "trust_0.001": trust_region(0.001),
        "trust_0.01": trust_region(0.01),
        "trust_0.05": trust_region(0.05),
        "fixed_0.01": Arm("fixed ε 0.01", constant, seconds_per_step=1.7),
        "skd": Arm("SKD (K 15, τ 0.2)", skd, seconds_per_step=1.7),
        "veto": Arm("Veto (0.4)", student | veto),
        "temperature": Arm("temperature warmup (0.9)", student | temperature),
        "sft": Arm("SFT warmup", student, sft_steps=warmup, seconds_per_step=0.95),
    }


def training_prompts(seed: int, steps: int) -> Dataset:
    """The prompts of a run in the order in which they are used, the same for every arm of a seed; none comes twice."""
    return build_prompt_dataset("train", steps * BATCH // ROLLOUTS_PER_PROMPT, seed)


def make_trainer(
    arm: Arm, model: str | Path, prompts: Dataset, seed: int, steps: int, scratch: str
) -> TrustRegionOPDTrainer:
    """The trainer of an arm, which uses `prompts` in order."""
    args = TrustRegionOPDConfig(
        output_dir=scratch,
        per_device_train_batch_size=BATCH,
        num_rollouts_per_prompt=ROLLOUTS_PER_PROMPT,
        shuffle_dataset=False,
        max_completion_length=MAX_NEW_TOKENS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        temperature=1.0,
        max_steps=steps,
        seed=seed,
        log_teacher_statistics=True,
        **_COMMON,
        **arm.settings,
    )
    trainer = TrustRegionOPDTrainer(
        model=str(model),
        teacher_model=str(CHECKPOINTS / "teacher"),
        args=args,
        train_dataset=prompts,
        reward_funcs=[format_and_answer_reward, format_reward],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


_COMMON = {
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test: Dataset, draw: int) -> dict[str, str]:
    """
    Scores of the student on the test prompts, one digit per prompt: `greedy` 0 or 1, `sampled` the number of right
    completions among [`SAMPLES`] at temperature 1, drawn with the seed `draw`. Leaves the random state as it was.
    """
    state = torch.get_rng_state()
    torch.manual_seed(draw)
    answers = list(test["answer"])
    sampled = [0] * len(answers)
    greedy: list[int] = []
    for sample in range(SAMPLES + 1):
        texts = generate_texts(model, tokenizer, list(test["prompt"]), EVALUATION_BATCH, do_sample=sample > 0)
        right = [int(reward) for reward in format_and_answer_reward(texts, answers)]
        if sample == 0:
            greedy = right
        else:
            sampled = [total + one for total, one in zip(sampled, right, strict=True)]
    torch.set_rng_state(state)
    return {"greedy": "".join(map(str, greedy)), "sampled": "".join(map(str, sampled))}


class CurveCallback(TrainerCallback):
    """Measure every `interval` steps and after the last; the time it takes is kept out of the training time."""

    def __init__(self, seed: int, tokenizer: PreTrainedTokenizerBase, test: Dataset, interval: int, last: int):
        self.seed, self.tokenizer, self.test, self.interval, self.last = seed, tokenizer, test, interval, last
        self.first = 0  # steps of the stages before
        self.points: dict[str, dict[str, str]] = {}
        self.seconds = self.cpu_seconds = 0.0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        step = self.first + state.global_step
        if step % self.interval == 0 or step == self.last:
            started, cpu = time.perf_counter(), time.process_time()
            draw = 100_000 * (self.seed + 1) + step  # the same in every arm of a seed
            self.points[str(step)] = measure(model, self.tokenizer, self.test, draw)
            self.seconds += time.perf_counter() - started
            self.cpu_seconds += time.process_time() - cpu


@torch.no_grad()
def teacher_rollouts(prompts: Dataset) -> Dataset:
    """Rollouts of the teacher at temperature 1, [`ROLLOUTS_PER_PROMPT`] per prompt, as token ids for `SFTTrainer`."""
    teacher, tokenizer = load_checkpoint("teacher")
    rows: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
    repeated = [prompt for prompt in prompts["prompt"] for _ in range(ROLLOUTS_PER_PROMPT)]
    for start in range(0, len(repeated), EVALUATION_BATCH):
        inputs = tokenizer.apply_chat_template(
            repeated[start : start + EVALUATION_BATCH],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
            tokenizer_kwargs={"padding_side": "left"},
        )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        output = teacher.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=MAX_NEW_TOKENS
        )
        for row, prompt, kept in zip(output.tolist(), ids.tolist(), mask.tolist(), strict=True):
            question = [token for token, keep in zip(prompt, kept, strict=True) if keep]
            answer = until_eos(row[len(prompt) :], tokenizer.eos_token_id)
            rows["input_ids"].append(question + answer)
            rows["completion_mask"].append([0] * len(question) + [1] * len(answer))
    return Dataset.from_dict(rows)


def until_eos(tokens: list[int], eos_token_id: int) -> list[int]:
    """The tokens up to and including the first end of sequence."""
    return tokens[: tokens.index(eos_token_id) + 1] if eos_token_id in tokens else tokens


def supervise(prompts: Dataset, seed: int, steps: int, curve: CurveCallback, scratch: str) -> tuple[str, list[dict]]:
    """Supervised steps of the student on teacher rollouts of `prompts`, in order; returns the folder of the model."""
    torch.manual_seed(seed)
    folder = str(Path(scratch) / "sft")
    student, tokenizer = load_checkpoint("student")
    args = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        completion_only_loss=True,
        max_length=None,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=steps,
        seed=seed,
        **_COMMON,
    )
    trainer = SFTTrainer(model=student, args=args, train_dataset=teacher_rollouts(prompts), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(curve)
    trainer.train()
    trainer.save_model(folder)
    return folder, trainer.state.log_history


def run_arm(name: str, seed: int, steps: int, n_test: int, interval: int, scratch: str) -> dict[str, Any]:
    """Train one arm with one seed; returns what is written to its JSON file."""
    arm = make_arms(steps)[name]
    prompts = training_prompts(seed, steps)
    _, tokenizer = load_checkpoint("student")
    curve = CurveCallback(seed, tokenizer, build_prompt_dataset("test", n_test), interval, steps)
    model: str | Path = CHECKPOINTS / "student"
    started, cpu = time.perf_counter(), time.process_time()
    history: list[dict[str, Any]] = []
    if arm.sft_steps:
        used = arm.sft_steps * BATCH // ROLLOUTS_PER_PROMPT
        model, history = supervise(prompts.select(range(used)), seed, arm.sft_steps, curve, scratch)
        curve.first, prompts = arm.sft_steps, prompts.select(range(used, len(prompts)))
    trainer = make_trainer(arm, model, prompts, seed, steps - arm.sft_steps, scratch)
    trainer.add_callback(curve)
    trainer.train()
    seconds = time.perf_counter() - started - curve.seconds
    cpu_seconds = time.process_time() - cpu - curve.cpu_seconds
    history = [entry for entry in [*history, *trainer.state.log_history] if "loss" in entry]
    return {
        "arm": name,
        "seed": seed,
        "steps": steps,
        "n_test": n_test,
        "interval": interval,
        "train_seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "machine": machine(),
        "metrics": {key: [_rounded(entry.get(key)) for entry in history] for key in METRICS},
        "curve": curve.points,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def run_start(n_test: int) -> dict[str, Any]:
    """Scores of the student and the teacher before training, see [`measure`]."""
    test = build_prompt_dataset("test", n_test)
    return {"n_test": n_test} | {name: measure(*load_checkpoint(name), test, 0) for name in ("student", "teacher")}

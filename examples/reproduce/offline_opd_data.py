"""
What `offline_opd.py` trains on: models, and rollouts that a teacher has scored.

The test-bed ships a teacher and an early student; two models are trained when they are missing. The *second teacher*
is the test-bed's, fine-tuned to the same task in another style. Its chain of thought puts the carry first and divides
the columns by semicolons:

    first teacher     <think>3+6+0=09,2+5+0=07,1+4+0=05</think>\\boxed{579}
    second teacher    <think>0:3+6=09;0:2+5=07;0:1+4=05</think>\\boxed{579}

The *late student* is the test-bed's `sft_student` with the same recipe, the same samples of the first teacher and the
same seed, stopped later.
"""

import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from filelock import FileLock

from benchmarks._report import machine
from testbed.evaluate import load_checkpoint
from testbed.task import chain_of_thought, prompt_text, sample_operands
from testbed.tasks import ADDITION, TASKS, Task
from testbed.tokenizer import build_tokenizer
from testbed.train import BATCH_SIZE, LARGE, RECIPES, Recipe, build_model, build_training_data, fit
from trl_blend import (
    RolloutConfig,
    RolloutStore,
    ScoringConfig,
    TeacherProvenanceCallback,
    collect_rollouts,
    score_rollouts,
)


BATCH = 64  # rollouts of an optimizer step, and of a batch of `generate`
TOP_K = 16
SECOND_TEACHER = Recipe(**LARGE, learning_rate=5e-4, max_steps=150, eval_every=50, warmup_steps=10, seed=1)
LATE_STUDENT = replace(RECIPES["sft_student"], stop_at=0.8, eval_every=20)
_COLUMN = re.compile(r"(\d)\+(\d)\+(\d)=(\d\d)")


# Models


SHIPPED = {"early": "sft_student", "first": "teacher"}
ROLES = ("early", "late", "first", "second")
"""Students before distillation, and teachers."""


def model_folder(role: str, work: Path, task: Task = TASKS[ADDITION]) -> Path:
    """Folder of one of [`ROLES`]. What is not shipped is trained into `work` if need be, for some minutes."""
    if role in SHIPPED:
        return task.model(SHIPPED[role])
    folder = work / {"late": "late_student", "second": "second"}[role]
    work.mkdir(parents=True, exist_ok=True)
    with FileLock(work / "models.lock"):
        if (folder / "model.safetensors").exists():
            return folder
        if role == "second":
            teacher, _ = load_checkpoint(model_folder("first", work))
            data = restyled_dataset(SECOND_TEACHER.max_steps * BATCH_SIZE, SECOND_TEACHER.seed)
            fit(teacher.train(), SECOND_TEACHER, data, folder, SECOND_TEACHER.seed)
        else:
            recipe = LATE_STUDENT
            callback = TeacherProvenanceCallback(os.path.relpath(model_folder("first", work)))
            student = build_model(recipe, build_tokenizer(), recipe.seed)
            fit(student, recipe, build_training_data(recipe, recipe.seed), folder, recipe.seed, [callback])
    return folder


def restyle(chain: str) -> str:
    """The chain of thought of the first teacher in the style of the second."""
    return ";".join(_COLUMN.sub(r"\3:\1+\2=\4", column) for column in chain.split(","))


def restyled_dataset(n: int, seed: int) -> Dataset:
    """Prompts and reference completions in the second style."""
    pairs = sample_operands("train", n, seed)
    random.Random(seed).shuffle(pairs)
    answers = [rf"<think>{restyle(chain_of_thought(a, b))}</think>\boxed{{{a + b}}}" for a, b in pairs]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": prompt_text(a, b)}] for a, b in pairs],
            "completion": [[{"role": "assistant", "content": answer}] for answer in answers],
        }
    )


# Rollouts


@dataclass(frozen=True)
class Data:
    """
    One set of scored rollouts.

    Args:
        student, teacher (`str`):
            Of [`ROLES`]; those that are not shipped are there for addition only.
        rollouts_per_prompt (`int`, *optional*, defaults to `1`):
            With more rollouts there are as many fewer prompts.
        temperature, top_p (`float`, *optional*, default to `1.0`):
            How the rollouts are drawn. The paper's are 0.7 and 0.9; 1 is what live distillation draws.
        task (`str`, *optional*, defaults to `"addition"`):
            Of [`~testbed.tasks.TASKS`].
    """

    student: str = "early"
    teacher: str = "first"
    rollouts_per_prompt: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    task: str = ADDITION

    def model(self, role: str, work: Path) -> Path:
        return model_folder(role, work, TASKS[self.task])

    def folder(self, work: Path, seed: int) -> Path:
        task = "" if self.task == ADDITION else f"{self.task}-"
        sampling = f"{task}{self.student}-{self.rollouts_per_prompt}-{self.temperature:g}-{self.top_p:g}-seed{seed}"
        return work / "stores" / sampling

    def name(self) -> str:
        return f"{self.student}_{self.teacher}_{self.rollouts_per_prompt}x_{self.temperature:g}_{self.top_p:g}"


def collect(data: Data, work: Path, seed: int, steps: int) -> RolloutStore:
    """Rollouts for `steps` optimizer steps. Returns at once where they are there already."""
    task = TASKS[data.task]
    return collect_rollouts(
        str(data.model(data.student, work)),
        task.prompts("train", steps * BATCH // data.rollouts_per_prompt, seed),
        RolloutConfig(
            output_dir=str(data.folder(work, seed) / "rollouts"),
            num_rollouts_per_prompt=data.rollouts_per_prompt,
            temperature=data.temperature,
            top_p=data.top_p,
            max_completion_length=task.max_new_tokens,
            batch_size=BATCH,
            seed=seed,
            dtype="float32",
            disable_tqdm=True,
        ),
    )


def score(data: Data, rollouts: RolloutStore, work: Path, seed: int, top_k: int | None) -> RolloutStore:
    """The teacher's scores of the rollouts. Returns at once where they are there already."""
    folder = data.folder(work, seed) / (f"{data.teacher}-top{top_k}" if top_k else data.teacher)
    args = ScoringConfig(output_dir=str(folder), top_k=top_k, dtype="float32", disable_tqdm=True)
    return score_rollouts(rollouts, str(data.model(data.teacher, work)), args)


def make_data(data: Data, work: Path, seed: int, steps: int, with_top_k: bool) -> dict[str, Any]:
    """Collect and score, and return what both cost; with and without the teacher's top tokens where asked for."""
    result: dict[str, Any] = {"data": asdict(data), "seed": seed, "steps": steps, "machine": machine()}
    for role in (data.student, data.teacher):
        data.model(role, work)  # its training is not part of collecting
    with _timed(result, "collect"):
        rollouts = collect(data, work, seed, steps)
    result["tokens"] = rollouts.manifest.num_completion_tokens
    for top_k in (None, TOP_K) if with_top_k else (None,):
        with _timed(result, "score_top_k" if top_k else "score"):
            scored = score(data, rollouts, work, seed, top_k)
        result["bytes_per_token_top_k" if top_k else "bytes_per_token"] = round(scored.bytes_per_token, 2)
    return result


@contextmanager
def _timed(result: dict[str, Any], name: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    result[f"{name}_seconds"] = round(time.perf_counter() - wall, 2)
    result[f"{name}_cpu_seconds"] = round(time.process_time() - cpu, 2)

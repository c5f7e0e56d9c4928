"""
The models of `offline_opd.py`: what the test-bed ships, and two that are trained once when they are missing.

The *second teacher* is the test-bed's, fine-tuned to the same task in another style. Its chain of thought puts the
carry first and divides the columns by semicolons:

    first teacher     <think>3+6+0=09,2+5+0=07,1+4+0=05</think>\\boxed{579}
    second teacher    <think>0:3+6=09;0:2+5=07;0:1+4=05</think>\\boxed{579}

The *late student* is the test-bed's `sft_student` with the same recipe, the same samples of the first teacher and the
same seed, stopped later.
"""

import os
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from testbed.evaluate import CHECKPOINTS, load_checkpoint
from testbed.task import chain_of_thought, prompt_text, sample_operands
from testbed.tokenizer import build_tokenizer
from testbed.train import BATCH_SIZE, LARGE, RECIPES, Recipe, build_model, build_training_data, fit
from trl_blend import TeacherProvenanceCallback


SECOND_TEACHER = Recipe(**LARGE, learning_rate=5e-4, max_steps=150, eval_every=50, warmup_steps=10, seed=1)
LATE_STUDENT = replace(RECIPES["sft_student"], stop_at=0.8, eval_every=20)
_COLUMN = re.compile(r"(\d)\+(\d)\+(\d)=(\d\d)")


class Models(NamedTuple):
    """Folders of the models: students before distillation, and teachers."""

    early: Path
    late: Path
    first: Path
    second: Path


def models(folder: Path) -> Models:
    """Where the models are; those that are not shipped, below `folder`."""
    return Models(CHECKPOINTS / "sft_student", folder / "late_student", CHECKPOINTS / "teacher", folder / "second")


def make_models(folder: Path) -> None:
    """Train what is missing: 10 minutes on one core."""
    found = models(folder)
    if not (found.second / "model.safetensors").exists():
        model, _ = load_checkpoint(found.first)
        data = restyled_dataset(SECOND_TEACHER.max_steps * BATCH_SIZE, SECOND_TEACHER.seed)
        fit(model.train(), SECOND_TEACHER, data, found.second, SECOND_TEACHER.seed)
    if not (found.late / "model.safetensors").exists():
        recipe = LATE_STUDENT
        callback = TeacherProvenanceCallback(os.path.relpath(found.first))
        model = build_model(recipe, build_tokenizer(), recipe.seed)
        fit(model, recipe, build_training_data(recipe, recipe.seed), found.late, recipe.seed, [callback])


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

"""Scored rollouts of the tiny models, and a builder of trainers on them."""

import itertools
import shutil

import pytest

from tests.rollouts.collecting import collect, score
from tests.trainers import scored
from tests.trainers.runs import PROMPTS
from trl_blend.consistency.provenance import record_teacher


@pytest.fixture
def build_offline(models, rows, tmp_path):
    """`build_offline(**settings)` makes a trainer with an output folder of its own, see [`scored.build_offline`]."""
    numbers = itertools.count()

    def builder(**kwargs):
        kwargs.setdefault("train_dataset", rows)
        return scored.build_offline(models, tmp_path / f"run{next(numbers)}", **kwargs)

    return builder


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """The tiny models, the SFT student with its record among them, and a store of scored rollouts."""
    folder = tmp_path_factory.mktemp("stores")
    for name in ("student", "teacher", "second"):
        shutil.copytree(models / name, folder / name)
    shutil.copytree(folder / "student", folder / "unrecorded")
    record_teacher(folder / "student", str(folder / "teacher"))
    prompts = [{"prompt": prompt} for prompt in PROMPTS]
    options = {"max_completion_length": 8, "rows_per_shard": 3, "dtype": "float32"}
    collect(str(folder / "student"), prompts, folder / "rollouts", **options)
    for name in ("teacher", "second"):
        score(folder / "rollouts", str(folder / name), folder / f"scored_{name}", top_k=4, dtype="float32")
    return folder


@pytest.fixture
def build_on_store(folder, tmp_path):
    """`build_on_store(student=…, store=…, **settings)` makes a trainer on a store of `folder`, strict by default."""

    def builder(student="student", store="scored_teacher", **kwargs):
        kwargs = {"teacher_consistency": "strict", "train_dataset": str(folder / store), **kwargs}
        return scored.build_offline(folder, tmp_path / "run", student=str(folder / student), **kwargs)

    return builder

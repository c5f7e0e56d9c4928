"""Fixtures of the trainer tests: tiny models in a folder, made once, and a builder of trainers on them."""

import gc
import itertools
import os
import shutil


# wandb's service would otherwise be asked for by every trainer that reports to it
os.environ.setdefault("WANDB_SILENT", "true")

import pytest  # noqa: E402

from tests.tiny import tiny_model, tiny_tokenizer  # noqa: E402
from tests.trainers import runs, scored  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _frozen_imports():
    """`Trainer.train` collects garbage twice: a third of these tests' time, unless imported modules are left out."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder with the tiny models `student`, `teacher` and `second`, each beside its tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher", "second")):
        model = tiny_model(seed=seed)
        model.generation_config.eos_token_id = list(runs.EOS_IDS)
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def rows(models):
    """Scored rollouts in memory."""
    return scored.scored_rollouts(scored.load(models, "student"), scored.load(models, "teacher"))


@pytest.fixture(scope="session")
def make(models, rows, tmp_path_factory):
    """`make(kind, **settings)`: a trainer, or with `parent=True` TRL's, of `"grpo"`, `"opd"` or `"offline"`."""
    makers = {"grpo": runs.build, "opd": runs.build_opd, "offline": scored.build_offline}

    def maker(kind, **settings):
        if kind == "offline":
            settings.setdefault("train_dataset", rows)
        return makers[kind](models, tmp_path_factory.mktemp(kind), **settings)

    return maker


@pytest.fixture
def build(models, tmp_path):
    """`build(**settings)` makes a trainer with an output folder of its own, see [`runs.build`]."""
    numbers = itertools.count()

    def builder(**kwargs):
        return runs.build(models, tmp_path / f"run{next(numbers)}", **kwargs)

    return builder


@pytest.fixture
def build_opd(models, tmp_path):
    """The same for distillation trainers, see [`runs.build_opd`]."""
    numbers = itertools.count()

    def builder(**kwargs):
        return runs.build_opd(models, tmp_path / f"run{next(numbers)}", **kwargs)

    return builder


@pytest.fixture
def other_tokenizer(models, tmp_path):
    """A copy of the teacher's folder with two tokens swapped."""
    folder = tmp_path / "other"
    shutil.copytree(models / "teacher", folder)
    path = folder / "tokenizer.json"
    text = path.read_text()
    assert '"a": 16' in text and '"b": 17' in text
    path.write_text(text.replace('"a": 16', '"a": 17').replace('"b": 17', '"b": 16', 1))
    return folder

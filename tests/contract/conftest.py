"""Tiny TRL trainers: the upstream classes themselves, whose seams these tests hold still."""

from pathlib import Path

import pytest
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import runs


def build(folder: Path, trainer_class: type = GRPOTrainer, **settings):
    return trainer_class(
        model=tiny_model(),
        reward_funcs=runs.reward,
        args=runs.config(folder, GRPOConfig, **settings),
        train_dataset=runs.dataset(),
        processing_class=tiny_tokenizer(),
    )


def build_distillation(folder: Path, trainer_class: type = DistillationTrainer, **settings):
    """`student`, `teacher` and `train_dataset` in the place of the defaults; `teacher=None` for none."""
    arguments = {"student": tiny_model(), "teacher": tiny_model(seed=1), "train_dataset": runs.dataset()}
    arguments |= {name: settings.pop(name) for name in list(settings) if name in arguments}
    return trainer_class(
        model=arguments["student"],
        teacher_model=arguments["teacher"],
        args=runs.opd_config(folder, DistillationConfig, **settings),
        train_dataset=arguments["train_dataset"],
        processing_class=tiny_tokenizer(),
    )


@pytest.fixture
def make_trainer(tmp_path):
    """`make_trainer(trainer_class=GRPOTrainer, **settings)`."""
    return lambda *args, **settings: build(tmp_path, *args, **settings)


@pytest.fixture
def make_distillation(tmp_path):
    """`make_distillation(trainer_class=DistillationTrainer, **settings)`."""
    return lambda *args, **settings: build_distillation(tmp_path, *args, **settings)


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    """One trainer for the tests that leave it as it was."""
    return build(tmp_path_factory.mktemp("grpo"), loss_type="grpo")


@pytest.fixture(scope="module")
def distillation(tmp_path_factory):
    """The same of the distillation trainer."""
    return build_distillation(tmp_path_factory.mktemp("distillation"))

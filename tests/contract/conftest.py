"""A tiny `trl.GRPOTrainer`: the upstream class itself, whose seams these tests hold still."""

from pathlib import Path

import pytest
from trl import GRPOConfig, GRPOTrainer

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


@pytest.fixture
def make_trainer(tmp_path):
    """`make_trainer(trainer_class=GRPOTrainer, **settings)`."""
    return lambda *args, **settings: build(tmp_path, *args, **settings)


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    """One trainer for the tests that leave it as it was."""
    return build(tmp_path_factory.mktemp("grpo"), loss_type="grpo")

"""Scored rollouts of the tiny models, and a builder of trainers on them."""

import itertools

import pytest

from tests.trainers import scored


@pytest.fixture(scope="session")
def rows(models):
    """Scored rollouts in memory."""
    return scored.scored_rollouts(scored.load(models, "student"), scored.load(models, "teacher"))


@pytest.fixture
def build_offline(models, rows, tmp_path):
    """`build_offline(**settings)` makes a trainer with an output folder of its own, see [`scored.build_offline`]."""
    numbers = itertools.count()

    def builder(**kwargs):
        kwargs.setdefault("train_dataset", rows)
        return scored.build_offline(models, tmp_path / f"run{next(numbers)}", **kwargs)

    return builder

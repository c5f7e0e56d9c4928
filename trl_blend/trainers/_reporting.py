"""Callbacks that show a run while it goes on and when it is over."""

from typing import Any


def add_callbacks(trainer: Any) -> None:
    """Give a trainer the callbacks that every trainer of this package has."""

"""Pushing a run to the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def explained_errors(trainer: Any) -> Iterator[None]:
    """Errors of the Hub's client, with what to do."""
    yield

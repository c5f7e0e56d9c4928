"""Tile sizes of the tests."""

import pytest

from trl_blend.ops.head import tiles as tiling


def set_tiles(monkeypatch, tokens, vocab):
    monkeypatch.setattr(tiling, "TOKEN_TILE", tokens)
    monkeypatch.setattr(tiling, "VOCAB_TILE", vocab)


@pytest.fixture
def small_tiles(monkeypatch):
    """Neither the number of tokens nor the vocabulary of a test is a multiple of them."""
    set_tiles(monkeypatch, 3, 4)


@pytest.fixture(params=[(3, 4), (100, 100)], ids=["small tiles", "one tile"])
def tiles(request, monkeypatch):
    set_tiles(monkeypatch, *request.param)

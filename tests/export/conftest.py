"""Fixtures of the tests of this folder: code that comes with a repository is copied to a folder of the test."""

import importlib
import sys

import pytest
import transformers.dynamic_module_utils as dynamic


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """An `HF_MODULES_CACHE` of the test's own, forgotten with everything imported from it."""
    cache, before, path = tmp_path / "modules_cache", set(sys.modules), list(sys.path)
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(cache))
    yield cache
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if "transformers_modules" in name:
            del sys.modules[name]
    importlib.invalidate_caches()

"""Settings of the whole suite: no network, one thread, CPU, and the same seed for every test."""

import os
import random
import signal
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]

# Before torch, transformers or trl is imported, and inherited by the processes that tests start.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# Tolerances and seeds are those of CPU kernels; TRL_BLEND_TEST_GPU=1 leaves the accelerators visible.
if os.environ.get("TRL_BLEND_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# `pythonpath` of the pytest configuration reaches this process only.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "examples"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import pytest  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def sigint():
    """Python's handler of Ctrl-C, which a suite that runs in the background has not; put back afterwards."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state, whatever ran before it in the same worker."""
    random.seed(0)
    torch.manual_seed(0)

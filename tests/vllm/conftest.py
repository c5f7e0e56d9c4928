"""Runs vLLM inside the test process, on a CPU, in float32; `make test-vllm` sets the environment it needs."""

import functools

import pytest
import torch

from tests.distributed.conftest import free_port


def keep_weights_on_the_cpu(patch):
    """Lets a colocated engine take new weights on a CPU, where vLLM otherwise packs them and drops the originals."""
    from trl.generation import vllm_generation
    from vllm.model_executor.layers import utils

    def keep_weight(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    patch.setattr(utils, "dispatch_cpu_unquantized_gemm", keep_weight)
    engine = functools.partial(vllm_generation.LLM, dtype="float32", enforce_eager=True)
    patch.setattr(vllm_generation, "LLM", engine)


def expand_on_the_cpu(patch):
    """
    Lets an engine sample drafts on a CPU, where the kernel that repeats a value of a request for each of its tokens
    writes into a copy, so that vLLM reads whatever was in memory.
    """
    from vllm.utils import cpu_triton_utils

    def expand(output, values, ends, replace_from, replace_to, MAX_NUM_TOKENS=None):
        values = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
        sizes = ends.diff(prepend=ends.new_zeros(1))
        output.copy_(values.repeat_interleave(sizes, output_size=len(output)))

    patch.setattr(cpu_triton_utils, "_expand_kernel_impl", expand)


@pytest.fixture(autouse=True)
def no_engine_outlives_its_test(monkeypatch):
    """An old engine takes what a later one draws with along, whenever the garbage collector comes to it."""
    from vllm.v1.engine.core_client import InprocClient

    start, started = InprocClient.__init__, []

    def start_and_keep(client, *args, **kwargs):
        start(client, *args, **kwargs)
        started.append(client)

    monkeypatch.setattr(InprocClient, "__init__", start_and_keep)
    yield
    for client in started:
        client.shutdown()


@pytest.fixture
def cpu_engine(monkeypatch):
    """Trainers may be built; what their engine has set up for all processes together is gone after the test."""
    from vllm.distributed import cleanup_dist_env_and_memory

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # TRL sets them: they go after the test
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    # TRL's own choice is that of any other run on the machine
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    keep_weights_on_the_cpu(monkeypatch)
    yield
    cleanup_dist_env_and_memory()

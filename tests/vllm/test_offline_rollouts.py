"""Rollouts and scores with a real vLLM engine, in this process and as a server, on the CPU (`make test-vllm`)."""

import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from testbed import task
from tests.rollouts.collecting import assert_logps, collect, ends_well, rows_of, score
from trl_blend.errors import ConfigError
from trl_blend.rollouts.engines.local import score_sequences


pytestmark = pytest.mark.vllm

STUDENT = str(Path(task.__file__).resolve().parent / "checkpoints" / "student")
SAMPLING = {
    "temperature": 0.8,
    "top_p": 0.9,
    "top_k": 30,
    "max_completion_length": 40,
    "num_rollouts_per_prompt": 2,
    "seed": 3,
}
EXACT = {"logps_dtype": "float32", "dtype": "float32"}
SHARDS = {"rows_per_shard": 8}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(STUDENT, dtype="float32").eval()


@pytest.fixture(scope="module")
def prompts():
    return task.build_prompt_dataset("train", 8)


@contextmanager
def serving(*options, model=STUDENT):
    """A server of a model, the student by default; gives its root URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "128", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 240
        while True:
            assert time.monotonic() < deadline and process.poll() is None, "the server ended, or does not begin"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def server():
    with serving("--logprobs-mode", "processed_logprobs", "--no-enable-prefix-caching") as url:
        yield url


@pytest.fixture(scope="module")
def collected(server, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts") / "store"
    return collect(STUDENT, prompts, folder, vllm_server_base_url=server, **SAMPLING, **EXACT, **SHARDS)


def assert_rows(model, store):
    settings = {name: SAMPLING[name] for name in ("temperature", "top_p", "top_k")}
    eos = store.manifest.sampling["eos_token_ids"]
    rows = rows_of(store)
    assert len(rows) == 16
    for row in rows:
        ids = row["prompt_ids"], row["completion_ids"]
        assert_logps(model, *ids, row["rollout_logps"], row["student_logps"], atol=1e-4, **settings)
        assert ends_well(row["completion_ids"], row["truncated"], SAMPLING["max_completion_length"], eos)
    assert {row["truncated"] for row in rows} == {False, True}


def test_rollouts_of_a_server(model, collected):
    assert collected.manifest.engine["name"] == "vllm-server"
    assert_rows(model, collected)


@pytest.mark.parametrize("top_k", [None, 8])
def test_server_and_local_scores_agree(server, collected, tmp_path, top_k):
    options = {"top_k": top_k, **EXACT}
    remote = rows_of(score(collected, STUDENT, tmp_path / "remote", vllm_server_base_url=server, **options))
    local = rows_of(score(collected, STUDENT, tmp_path / "local", **options))
    for one, other in zip(remote, local, strict=True):
        assert one["key"] == other["key"]
        np.testing.assert_allclose(one["teacher_logps"], other["teacher_logps"], rtol=0, atol=1e-4)
        if top_k is not None:
            assert one["teacher_topk_ids"] == other["teacher_topk_ids"]
            np.testing.assert_allclose(one["teacher_topk_logps"], other["teacher_topk_logps"], rtol=0, atol=1e-4)
            mass, exact = np.exp(one["teacher_tail_logmass"]), np.exp(other["teacher_tail_logmass"])
            np.testing.assert_allclose(mass, exact, rtol=0, atol=1e-5)


def test_a_server_continues_what_was_interrupted(server, prompts, collected, tmp_path):
    folder = tmp_path / "store"
    call = (STUDENT, prompts, folder)
    options = {"vllm_server_base_url": server, **SAMPLING, **EXACT, **SHARDS}
    collect(*call, **options)
    (folder / "data" / "part-00001.parquet").unlink()
    again = collect(*call, repair=True, **options)
    ids = [[row["completion_ids"] for row in rows_of(store)] for store in (again, collected)]
    assert ids[0] == ids[1]


def test_a_server_of_other_log_probabilities_is_refused(prompts, tmp_path):
    with serving() as url, pytest.raises(ConfigError, match="--logprobs-mode processed_logprobs"):
        collect(STUDENT, prompts, tmp_path / "x", vllm_server_base_url=url, **SAMPLING, **EXACT)


def test_rollouts_of_an_engine_in_this_process(model, prompts, tmp_path):
    engine = {"max_model_len": 128, "enforce_eager": True}
    folder = tmp_path / "store"
    store = collect(STUDENT, prompts, folder, use_vllm=True, vllm_kwargs=engine, **SAMPLING, **EXACT, **SHARDS)
    assert store.manifest.engine["name"] == "vllm"
    assert_rows(model, store)
    row = rows_of(store)[0]
    (scores,) = score_sequences(model, [row["prompt_ids"]], [row["completion_ids"]])
    np.testing.assert_allclose(row["student_logps"], scores.logps, rtol=0, atol=1e-4)

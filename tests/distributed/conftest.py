"""Launches of the workers: alone, with torchrun and with accelerate, each once per test session."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import runs


ROOT = Path(__file__).resolve().parents[2]
FSDP2_CONFIG = ROOT / "examples" / "accelerate_configs" / "fsdp2_cpu.yaml"
# A deadlock is what these tests would show it by
TIMEOUT = 300
# What a training run prints besides its errors
PROGRESS = ("Loading weights", "Writing model shards", "{")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(launch: str) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    accelerate = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(FSDP2_CONFIG)]
    return {
        "single": [sys.executable],
        "ddp": [sys.executable, *torchrun, "--master_addr", "127.0.0.1", "--master_port", str(free_port())],
        "fsdp2": [sys.executable, *accelerate, "--main_process_port", str(free_port())],
    }[launch]


def start(folder: Path, launch: str, worker: str) -> None:
    """Run a worker to its end; an error or a deadlock fails the test with the end of its output."""
    (folder / launch).mkdir()
    log = folder / f"{launch}.log"
    with log.open("w") as output:
        arguments = [*command(launch), str(Path(__file__).with_name(worker)), str(folder), launch]
        # In a session of its own, so that a deadlock takes only this launch's processes with it
        process = subprocess.Popen(
            arguments, stdout=output, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True
        )
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = f"none after {TIMEOUT} s (deadlock?)"
    if code != 0:
        lines = [line for line in log.read_text().splitlines() if not line.startswith(PROGRESS)]
        pytest.fail(f"launch {launch!r}: exit code {code}\n" + "\n".join(lines[-80:]))


def make_models(folder: Path) -> None:
    for seed, name in enumerate(("student", "teacher")):
        model = tiny_model(seed=seed)
        model.generation_config.eos_token_id = list(runs.EOS_IDS)
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)


def launcher(tmp_path_factory: Any, worker: str) -> Callable[[str], list[dict[str, Any]]]:
    """`launch(name)` gives what each rank of `"single"`, `"ddp"` or `"fsdp2"` found, after launching it once."""
    # One folder for all processes of pytest-xdist: they wait for a launch instead of repeating it
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / f"distributed_{Path(worker).stem}"
    folder.mkdir(exist_ok=True)

    def launch(name: str) -> list[dict[str, Any]]:
        if name != "single":
            launch("single")  # records the rollouts
        with FileLock(folder / f"{name}.lock"):
            if not (folder / "models").exists():
                (folder / "rollouts").mkdir()
                make_models(folder / "models")
            if not (folder / name).exists():
                start(folder, name, worker)
            files = [folder / name / f"{rank}.pt" for rank in range(1 if name == "single" else 2)]
            if not all(file.exists() for file in files):
                pytest.fail(f"launch {name!r} failed before, see the first failing test")
            return [torch.load(file, weights_only=False) for file in files]

    return launch


@pytest.fixture(scope="session")
def launched(tmp_path_factory):
    """Launches of `worker.py`, see [`launcher`]."""
    return launcher(tmp_path_factory, "worker.py")


@pytest.fixture(scope="session")
def launched_opd(tmp_path_factory):
    """Launches of `opd_worker.py`, see [`launcher`]."""
    return launcher(tmp_path_factory, "opd_worker.py")


@pytest.fixture(scope="session")
def launched_offline(tmp_path_factory):
    """Launches of `offline_worker.py`, see [`launcher`]."""
    return launcher(tmp_path_factory, "offline_worker.py")

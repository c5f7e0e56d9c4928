"""Peak memory of the training steps of `offline_opd.py`, each arm in a process of its own."""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


STEPS = 3
SEED = 10_000  # its stores are not those of the runs, which have more rows


def measure_memory(name: str, work: Path) -> dict[str, Any]:
    """
    Memory of [`STEPS`] steps of one arm, in bytes. Call it in a new process.

    Returns:
        `dict[str, Any]`: `weights` of the models that the trainer holds; `resident`, the peak of resident memory
        beyond what the process had before a model was loaded.
    """
    from benchmarks._memory import reset_peak, resident_bytes
    from reproduce.jobs import be_quiet
    from reproduce.offline_opd_arms import ARMS, make_trainer

    be_quiet()
    arm = ARMS[name]
    with tempfile.TemporaryDirectory() as scratch:
        if arm.offline:  # elsewhere: collecting and scoring are not part of training
            in_new_process(_make_data, name, work)
        reset_peak()
        before = resident_bytes("VmRSS")
        trainer = make_trainer(arm, work, SEED, STEPS, scratch)
        trainer.train()
    models = [trainer.model, *([] if arm.offline else [trainer.teacher_model])]
    weights = sum(parameter.nbytes for model in models for parameter in model.parameters())
    return {"weights": weights, "resident": resident_bytes("VmHWM") - before}


def in_new_process(function: Any, *arguments: Any) -> Any:
    """The result of `function(*arguments)`, called in a process that ends with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _make_data(name: str, work: Path) -> None:
    from reproduce.jobs import be_quiet
    from reproduce.offline_opd_arms import ARMS, open_data

    be_quiet()
    open_data(ARMS[name], work, SEED, STEPS)

"""Resumable jobs of the long comparisons: one JSON file per finished run, several worker processes."""

import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm


class Job(NamedTuple):
    """One run: the file it writes when it is finished, and the arguments of the function that makes it."""

    path: Path
    arguments: tuple


def unfinished(jobs: list[Job], settings: dict[str, Any]) -> list[Job]:
    """
    Jobs without a file.

    Raises:
        `SystemExit`: If a file was made with other values of `settings`.
    """
    for job in jobs:
        done = json.loads(job.path.read_text(encoding="utf-8")) if job.path.exists() else {}
        for name, value in settings.items():
            if done.get(name, value) != value:
                raise SystemExit(
                    f"{job.path} was run with {name}={done[name]}, not {value}: remove it, or set another "
                    "`--output_dir`."
                )
    return [job for job in jobs if not job.path.exists()]


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write `result` so that the file is there only once it is whole."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
    partial.replace(path)


def be_quiet() -> None:
    """Silence what libraries print once per run."""
    import warnings

    import transformers
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def run_jobs(function: Callable[..., None], jobs: list[Job], workers: int) -> int:
    """Call `function(*arguments, path)` for each job in worker processes; returns the number that failed."""
    failed = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, tqdm(total=len(jobs), mininterval=1) as bar:
        futures: dict[Future, Path] = {pool.submit(function, *job.arguments, job.path): job.path for job in jobs}
        for future in as_completed(futures):
            name = futures[future].stem
            if error := future.exception():
                failed += 1
                tqdm.write(f"{name} failed: " + "".join(traceback.format_exception(error)))
            else:
                tqdm.write(f"{name} written")
            bar.update()
            sys.stdout.flush()
    return failed


def machine() -> dict[str, Any]:
    """Cores, threads and versions, to be kept beside what was measured. Call it in the process that measures."""
    import platform

    import torch
    import transformers
    import trl

    return {
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }

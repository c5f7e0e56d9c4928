"""
Does logit mixing do what the papers say? All arms from the same checkpoints, on the add3cot task, on two CPU cores:

```sh
python examples/reproduce/logit_mixing.py                    # all arms, 3 seeds, then the report
python examples/reproduce/logit_mixing.py --report           # only rebuild the report from results/runs
python examples/reproduce/logit_mixing.py --arms grpo mixed_0.1 --seeds 0 --steps 10 --output_dir try
```

Every (arm, seed) writes one JSON file when it is finished, and a finished one is not run again: after an interruption,
start the command again. Remove a file to repeat its run.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ["OMP_NUM_THREADS"] = "1"  # one thread per worker, set before torch is imported
for _name, _value in (("TRL_EXPERIMENTAL_SILENCE", "1"), ("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false")):
    os.environ.setdefault(_name, _value)

RESULTS = Path(__file__).resolve().parent / "results"
START = "start"
# Measured on one core: loading, curve points and the final measurement of one run
EVALUATION_SECONDS = 20.0


def work(name: str, seed: int, steps: int, n_test: int, n_curve: int, interval: int, path: Path) -> None:
    """Run one job in a worker process and write its JSON file."""
    import warnings

    import transformers
    from transformers.utils import logging

    from reproduce.arms import run_arm, run_start

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        if name == START:
            result: dict[str, Any] = run_start(n_test, scratch)
        else:
            result = run_arm(name, seed, steps, n_test, n_curve, interval, scratch)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
    partial.replace(path)


def plan(args: argparse.Namespace, names: list[str]) -> list[tuple[str, int, Path]]:
    """Jobs that are not finished, seed by seed, so that an interrupted run has every arm for the first seeds."""
    runs = args.output_dir / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    jobs = [(START, 0, runs / "start.json")]
    jobs += [(name, seed, runs / f"{name}-seed{seed}.json") for seed in args.seeds for name in names]
    for _, _, path in jobs:
        done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name in ("steps", "n_test"):
            if done.get(name, getattr(args, name)) != getattr(args, name):
                raise SystemExit(
                    f"{path} was run with {name}={done[name]}, not {getattr(args, name)}: remove it, or set another "
                    "`--output_dir`."
                )
    return [job for job in jobs if not job[2].exists()]


def run(args: argparse.Namespace) -> int:
    """Run what is missing; returns the number of jobs that failed."""
    from reproduce.arms import make_arms

    arms = make_arms(args.steps)
    unknown = set(args.arms) - set(arms)
    if unknown:
        raise SystemExit(f"Unknown arms {sorted(unknown)}. Choose among {', '.join(arms)}.")
    names = args.arms or list(arms)
    jobs = plan(args, names)
    seconds = sum(arms[n].seconds_per_step * args.steps + EVALUATION_SECONDS for n, _, _ in jobs if n != START)
    print(
        f"{len(jobs)} runs to do: {len(names)} arms, seeds {args.seeds}, {args.steps} steps of 128 completions; about "
        f"{seconds / 60:.0f} core-minutes, {seconds / 60 / args.workers:.0f} minutes with {args.workers} workers",
        flush=True,
    )
    failed = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool, tqdm(total=len(jobs), mininterval=1) as bar:
        futures: dict[Future, tuple[str, int, Path]] = {
            pool.submit(work, n, s, args.steps, args.n_test, args.n_curve, args.eval_interval, path): (n, s, path)
            for n, s, path in jobs
        }
        for future in as_completed(futures):
            name, seed, path = futures[future]
            if error := future.exception():
                failed += 1
                tqdm.write(f"{name} seed {seed} failed: " + "".join(traceback.format_exception(error)))
            else:
                tqdm.write(f"{path.name} written")
            bar.update()
            sys.stdout.flush()
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=[], help="arms to run; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--eval_interval", type=int, default=10, help="steps between two points of the curves")
    parser.add_argument("--n_test", type=int, default=500, help="test prompts after training")
    parser.add_argument("--n_curve", type=int, default=200, help="test prompts of a point of the curves")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only rebuild the tables and the figure")
    args = parser.parse_args()

    failed = 0 if args.report else run(args)
    from reproduce.report import write_report

    print(write_report(args.output_dir))
    if failed:
        raise SystemExit(f"{failed} runs failed")


if __name__ == "__main__":
    main()

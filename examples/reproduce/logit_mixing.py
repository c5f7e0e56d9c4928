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
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ["OMP_NUM_THREADS"] = "1"  # one thread per worker, set before torch is imported
for _name, _value in (("TRL_EXPERIMENTAL_SILENCE", "1"), ("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false")):
    os.environ.setdefault(_name, _value)

from reproduce.jobs import Job, be_quiet, run_jobs, unfinished, write_json  # noqa: E402


RESULTS = Path(__file__).resolve().parent / "results"
START = "start"
# Measured on one core: loading, curve points and the final measurement of one run
EVALUATION_SECONDS = 20.0


def work(name: str, seed: int, steps: int, n_test: int, n_curve: int, interval: int, path: Path) -> None:
    """Run one job in a worker process and write its JSON file."""
    from reproduce.arms import run_arm, run_start

    be_quiet()
    with tempfile.TemporaryDirectory() as scratch:
        if name == START:
            result: dict[str, Any] = run_start(n_test, scratch)
        else:
            result = run_arm(name, seed, steps, n_test, n_curve, interval, scratch)
    write_json(path, result)


def plan(args: argparse.Namespace, names: list[str]) -> list[Job]:
    """Jobs that are not finished, seed by seed, so that an interrupted run has every arm for the first seeds."""
    runs = args.output_dir / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    settings = (args.steps, args.n_test, args.n_curve, args.eval_interval)
    jobs = [Job(runs / "start.json", (START, 0, *settings))]
    jobs += [Job(runs / f"{name}-seed{seed}.json", (name, seed, *settings)) for seed in args.seeds for name in names]
    return unfinished(jobs, {"steps": args.steps, "n_test": args.n_test})


def run(args: argparse.Namespace) -> int:
    """Run what is missing; returns the number of jobs that failed."""
    from reproduce.arms import make_arms

    arms = make_arms(args.steps)
    unknown = set(args.arms) - set(arms)
    if unknown:
        raise SystemExit(f"Unknown arms {sorted(unknown)}. Choose among {', '.join(arms)}.")
    names = args.arms or list(arms)
    jobs = plan(args, names)
    trained = [job.arguments[0] for job in jobs if job.arguments[0] != START]
    seconds = sum(arms[name].seconds_per_step * args.steps + EVALUATION_SECONDS for name in trained)
    print(
        f"{len(jobs)} runs to do: {len(names)} arms, seeds {args.seeds}, {args.steps} steps of 128 completions; about "
        f"{seconds / 60:.0f} core-minutes, {seconds / 60 / args.workers:.0f} minutes with {args.workers} workers",
        flush=True,
    )
    return run_jobs(work, jobs, args.workers)


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

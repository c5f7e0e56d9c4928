"""
Does trust-region behaviour blending do what its paper says (https://huggingface.co/papers/2605.31159)? On the add3cot
test-bed, on the CPU: training arms from the same checkpoint with equal prompts and steps, and two probes of the
rollouts at step 0, without training (the paper's Figures 7 and 4):

```sh
python examples/reproduce/trust_region.py                    # all arms and the probes, 3 seeds, then the report
python examples/reproduce/trust_region.py --report           # only rebuild the report from results/trust_region_runs
python examples/reproduce/trust_region.py --arms vanilla probe --seeds 0 --steps 10 --output_dir try
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
os.environ["CUDA_VISIBLE_DEVICES"] = ""
for _name, _value in (("TRL_EXPERIMENTAL_SILENCE", "1"), ("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false")):
    os.environ.setdefault(_name, _value)

from reproduce.jobs import Job, be_quiet, run_jobs, unfinished, write_json  # noqa: E402


RESULTS = Path(__file__).resolve().parent / "results"
RUNS = "trust_region_runs"
START, PROBE = "start", "probe"
# Measured on one core: loading and one point of the curves; a probe
LOADING_SECONDS, POINT_SECONDS, PROBE_SECONDS = 5.0, 4.5, 200.0


def work(name: str, seed: int, steps: int, n_test: int, n_probe: int, interval: int, path: Path) -> None:
    """Run one job in a worker process and write its JSON file."""
    from reproduce.trust_region_arms import run_arm, run_start
    from reproduce.trust_region_probes import run_probe

    be_quiet()
    with tempfile.TemporaryDirectory() as scratch:
        if name == START:
            result: dict[str, Any] = run_start(n_test)
        elif name == PROBE:
            result = run_probe(seed, n_probe)
        else:
            result = run_arm(name, seed, steps, n_test, interval, scratch)
    write_json(path, result)


def plan(args: argparse.Namespace, names: list[str]) -> list[Job]:
    """Jobs that are not finished, seed by seed, so that an interrupted run has every arm for the first seeds."""
    runs = args.output_dir / RUNS
    runs.mkdir(parents=True, exist_ok=True)
    settings = (args.steps, args.n_test, args.n_probe, args.eval_interval)
    jobs = [Job(runs / "start.json", (START, 0, *settings))]
    jobs += [Job(runs / f"{name}-seed{seed}.json", (name, seed, *settings)) for seed in args.seeds for name in names]
    fixed = {"steps": args.steps, "n_test": args.n_test, "n_probe": args.n_probe, "interval": args.eval_interval}
    return unfinished(jobs, fixed)


def run(args: argparse.Namespace) -> int:
    """Run what is missing; returns the number of jobs that failed."""
    from reproduce.trust_region_arms import BATCH, make_arms

    arms = make_arms(args.steps)
    unknown = set(args.arms) - {*arms, PROBE}
    if unknown:
        raise SystemExit(f"Unknown arms {sorted(unknown)}. Choose among {', '.join([*arms, PROBE])}.")
    jobs = plan(args, args.arms or [*arms, PROBE])
    names = [job.arguments[0] for job in jobs if job.arguments[0] != START]
    points = -(-args.steps // args.eval_interval)
    seconds = sum(
        PROBE_SECONDS
        if name == PROBE
        else arms[name].seconds_per_step * args.steps + LOADING_SECONDS + points * POINT_SECONDS
        for name in names
    )
    print(
        f"{len(jobs)} runs to do, seeds {args.seeds}, {args.steps} steps of {BATCH} rollouts; about "
        f"{seconds / 60:.0f} core-minutes, {seconds / 60 / args.workers:.0f} minutes with {args.workers} worker(s)",
        flush=True,
    )
    return run_jobs(work, jobs, args.workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=[], help="arms to run, or `probe`; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--eval_interval", type=int, default=10, help="steps between two points of the curves")
    parser.add_argument("--n_test", type=int, default=500, help="test prompts")
    parser.add_argument("--n_probe", type=int, default=500, help="training prompts of the probes")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only rebuild the tables and figures")
    args = parser.parse_args()

    failed = 0 if args.report else run(args)
    from reproduce.trust_region_report import write_report

    print(write_report(args.output_dir))
    if failed:
        raise SystemExit(f"{failed} runs failed")


if __name__ == "__main__":
    main()

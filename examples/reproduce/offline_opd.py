"""
Does offline distillation do what the Lightning OPD paper says (https://huggingface.co/papers/2604.13010)? On the
add3cot test-bed, on the CPU: live and offline distillation of one SFT student, with the teacher whose samples it was
trained on and with another one:

```sh
python examples/reproduce/offline_opd.py                    # all arms, 3 seeds, memory, then the report
python examples/reproduce/offline_opd.py --report           # only rebuild the report from results/offline_opd_runs
python examples/reproduce/offline_opd.py --arms live offline --seeds 0 --steps 10 --output_dir try
```

Every (arm, seed) writes one JSON file when it is finished, and a finished one is not run again: after an interruption,
start the command again. Remove a file to repeat its run. Two models that the test-bed does not ship are trained when
they are missing, and kept with the scored rollouts in `--work_dir`.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ["OMP_NUM_THREADS"] = "1"  # one thread per worker, set before torch is imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""
for _name, _value in (("TRL_EXPERIMENTAL_SILENCE", "1"), ("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false")):
    os.environ.setdefault(_name, _value)

from reproduce.jobs import Job, be_quiet, run_jobs, unfinished, write_json  # noqa: E402


RESULTS = Path(__file__).resolve().parent / "results"
RUNS = "offline_opd_runs"
START, MEMORY, DATA = "start", "memory", "data_"
# Measured in a process of its own: the memory of these arms
MEMORY_ARMS = ("live_full", "live", "offline", "offline_topk")


def work(name: str, seed: int, steps: int, n_test: int, interval: int, folder: Path, path: Path) -> None:
    """Run one job in a worker process and write its JSON file."""
    from reproduce.offline_opd_arms import ARMS, run_arm, run_start
    from reproduce.offline_opd_data import make_data
    from reproduce.offline_opd_memory import in_new_process, measure_memory

    be_quiet()
    if name == START:
        result = run_start(n_test, folder)
    elif name == MEMORY:
        result = {arm: in_new_process(measure_memory, arm, folder) for arm in MEMORY_ARMS}
    elif name.startswith(DATA):
        using = [arm for arm in ARMS.values() if arm.data.name() == name.removeprefix(DATA)]
        with_top_k = any(arm.offline and arm.loss == "top_k" for arm in using)
        result = make_data(using[0].data, folder, seed, steps, with_top_k)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            result = run_arm(name, seed, steps, n_test, interval, folder, scratch)
    write_json(path, result)


def plan(args: argparse.Namespace, names: list[str]) -> list[list[Job]]:
    """
    Jobs that are not finished, in stages: rollouts scored by the first teacher, the same by the second, and all that
    follows, seed by seed, so that an interrupted run has every arm for the first seeds.
    """
    from reproduce.offline_opd_arms import ARMS

    runs = args.output_dir / RUNS
    runs.mkdir(parents=True, exist_ok=True)
    settings = (args.steps, args.n_test, args.eval_interval, args.work_dir)

    def jobs(names: list[str], seed: int) -> list[Job]:
        return [Job(runs / f"{name}-seed{seed}.json", (name, seed, *settings)) for name in names]

    offline = [ARMS[name].data for name in names if ARMS[name].offline]
    by_teacher: dict[str, dict[str, None]] = {"first": {}, "second": {}}
    for data in offline:
        by_teacher["first"][DATA + replace(data, teacher="first").name()] = None
        by_teacher[data.teacher][DATA + data.name()] = None
    stages = [[job for seed in args.seeds for job in jobs(list(data), seed)] for data in by_teacher.values()]
    then = [Job(runs / f"{START}.json", (START, 0, *settings))]
    then += [job for seed in args.seeds for job in jobs(names, seed)]
    then += [Job(runs / f"{MEMORY}.json", (MEMORY, 0, *settings))]
    fixed = {"steps": args.steps, "n_test": args.n_test, "interval": args.eval_interval}
    return [unfinished(stage, fixed) for stage in (*stages, then)]


def run(args: argparse.Namespace) -> int:
    """Run what is missing; returns the number of jobs that failed."""
    from reproduce.offline_opd_arms import ARMS, LIVE_SECONDS, OFFLINE_SECONDS
    from reproduce.offline_opd_data import BATCH
    from reproduce.offline_opd_models import make_models

    if unknown := set(args.arms) - set(ARMS):
        raise SystemExit(f"Unknown arms {sorted(unknown)}. Choose among {', '.join(ARMS)}.")
    make_models(args.work_dir)
    stages = plan(args, args.arms or list(ARMS))
    trained = [ARMS[job.arguments[0]] for job in stages[-1] if job.arguments[0] in ARMS]
    sets = sum(map(len, stages[:-1]))
    costs = [OFFLINE_SECONDS if arm.offline else LIVE_SECONDS for arm in trained]
    seconds = sum(per_step * args.steps + other for per_step, other in costs) + args.steps * sets
    print(
        f"{sets} sets of scored rollouts and {len(stages[-1])} runs to do, seeds {args.seeds}, {args.steps} steps of "
        f"{BATCH} rollouts; about {seconds / 60:.0f} core-minutes, {seconds / 60 / args.workers:.0f} minutes with "
        f"{args.workers} worker(s)",
        flush=True,
    )
    for stage in stages:
        if stage and (failed := run_jobs(work, stage, args.workers)):
            return failed
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=[], help="arms to run; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--eval_interval", type=int, default=20, help="steps between two points of the curves")
    parser.add_argument("--n_test", type=int, default=500, help="test prompts")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/offline_opd"), help="models and rollouts")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only rebuild the tables and figures")
    args = parser.parse_args()

    failed = 0 if args.report else run(args)
    from reproduce.offline_opd_report import write_report

    print(write_report(args.output_dir))
    if failed:
        raise SystemExit(f"{failed} runs failed")


if __name__ == "__main__":
    main()

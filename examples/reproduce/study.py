"""
What the studies of the papers' claims share: resumable runs in one file, statistics, verdicts, tables and figures.

A study names its arms, says how one of them is run with one seed, and writes a report from what is finished. Import
this module before torch: a worker has one thread.
"""

import argparse
import csv
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple


os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
for _name, _value in (
    ("TRL_EXPERIMENTAL_SILENCE", "1"),
    ("HF_HUB_OFFLINE", "1"),
    ("TOKENIZERS_PARALLELISM", "false"),
    # Of studies that draw with vLLM, as `make test-vllm` sets them
    ("TORCHDYNAMO_DISABLE", "1"),
    ("VLLM_CPU_KVCACHE_SPACE", "1"),
    ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    ("VLLM_NO_USAGE_STATS", "1"),
):
    os.environ.setdefault(_name, _value)

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import PrinterCallback, ProgressCallback, TrainerCallback  # noqa: E402

from testbed.evaluate import generate_texts  # noqa: E402
from testbed.task import MAX_NEW_TOKENS, format_and_answer_reward  # noqa: E402
from testbed.tasks import ADDITION, TASKS, Task  # noqa: E402


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


RESULTS = Path(__file__).resolve().parent / "results"
START = "start"
DECODINGS = ("sampled", "greedy")
SAMPLES = 2  # completions at temperature 1 of each test prompt
# Settings of every trainer
COMMON: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


# Runs


@dataclass(frozen=True)
class Study:
    """
    One study.

    Args:
        name (`str`):
            Of its files in `results/`; the runs are in `<name>_runs.json`, with an option `task` other than addition
            in `<name>_<task>_runs.json`.
        options (`dict[str, Any]`):
            Settings of a run with their defaults; options of the command line. A finished run with other values of
            those that it records is not continued.
        arms (`Callable`):
            Names of the jobs of a seed, from the settings.
        work (`Callable`):
            `(name, seed, settings, scratch folder) -> result`, called in a process of its own; it has to be picklable.
        report (`Callable`):
            `(runs, folder) -> Markdown`; writes the CSV files and figures.
        stages (`Callable`, *optional*):
            `(names, settings) -> [names, ...]`: jobs that have to be finished before others. By default there is one.
        once (`tuple[str, ...]`, *optional*):
            Jobs without a seed, which belong to the last stage.
    """

    name: str
    options: dict[str, Any]
    arms: Callable[[dict[str, Any]], Iterable[str]]
    work: Callable[[str, int, dict[str, Any], str], dict[str, Any]]
    report: Callable[["Runs", Path], str]
    stages: Callable[[list[str], dict[str, Any]], list[list[str]]] = field(default=lambda names, settings: [names])
    once: tuple[str, ...] = (START,)

    def main(self, description: str) -> None:
        """The command line: run what is missing, then write the report."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--arms", nargs="+", default=[], help="what to run; all by default")
        parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
        for name, default in self.options.items():
            choices = TASKS if name == "task" else None
            parser.add_argument(f"--{name}", type=type(default), default=default, choices=choices)
        parser.add_argument("--workers", type=int, default=1)
        parser.add_argument("--output_dir", type=Path, default=RESULTS)
        parser.add_argument("--report", action="store_true", help="only rebuild the report from the finished runs")
        args = parser.parse_args()
        settings = {name: getattr(args, name) for name in self.options}
        task = settings.get("task", ADDITION)
        runs = Runs(args.output_dir / f"{self.name if task == ADDITION else f'{self.name}_{task}'}_runs.json")
        failed = 0 if args.report else self.run(runs, settings, args)
        if not all(name in runs.results for name in self.once[:1]):
            raise SystemExit(f"No finished runs in {runs.path}: start without `--report` first.")
        print(write_report(self, runs, args.output_dir))
        if failed:
            raise SystemExit(f"{failed} runs failed; start the same command again to repeat them.")

    def run(self, runs: "Runs", settings: dict[str, Any], args: argparse.Namespace) -> int:
        """
        Run what is missing, seed by seed, so that an interruption leaves every arm for the first seeds. Returns the
        number of runs of a stage that failed; the next stage is then not begun.
        """
        known = list(self.arms(settings))
        if unknown := sorted(set(args.arms) - set(known)):
            raise SystemExit(f"Unknown arms {unknown}. Choose among {', '.join(known)}.")
        *stages, last = self.stages(args.arms or known, settings)
        for stage, once in (*((stage, ()) for stage in stages), (last, self.once)):
            jobs = [(name, seed) for seed in args.seeds for name in stage] + [(name, None) for name in once]
            todo = [job for job in jobs if runs.missing(*job, settings)]
            print(f"{self.name}: {len(todo)} of {len(jobs)} runs to do", flush=True)
            if failed := _run_jobs(self, runs, todo, settings, args.workers):
                return failed
        return 0


def write_report(study: Study, runs: "Runs", folder: Path) -> str:
    """Write the report of what is finished; returns its Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    text = study.report(runs, folder)
    (folder / f"{runs.name}.md").write_text(text, encoding="utf-8")
    return text


class Runs:
    """
    The finished runs of a study, in one JSON file with a run per line. Remove a line to repeat its run.

    Args:
        path (`Path`):
            The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @property
    def name(self) -> str:
        """What the files of its report are called."""
        return self.path.name.removesuffix("_runs.json")

    @property
    def task(self) -> Task:
        return TASKS[self.start.get("task", ADDITION)]

    @property
    def command(self) -> str:
        """The options that name it."""
        task = self.start.get("task", ADDITION)
        return "" if task == ADDITION else f" --task {task}"

    @property
    def start(self) -> dict[str, Any]:
        """What was measured before any training."""
        return self.results[START]

    def of(self, name: str) -> list[dict[str, Any]]:
        """Runs of an arm, by seed."""
        return [run for key, run in self.results.items() if key.rpartition("-seed")[0] == name]

    def names(self, among: Iterable[str]) -> list[str]:
        """Those of `among` that have a finished run, in their order."""
        return [name for name in among if self.of(name)]

    def has(self, *names: str) -> bool:
        return all(self.of(name) for name in names)

    def cost(self, name: str, key: str) -> float:
        """Mean of a number of the runs, such as `train_seconds`."""
        return float(np.mean([run[key] for run in self.of(name)]))

    def metric_gap(self, first: str, second: str, value: Callable[[dict[str, Any]], float]) -> "Estimate":
        """A number of the runs, one arm minus another, paired by the seeds that both have."""
        values = [{run["seed"]: value(run) for run in self.of(name)} for name in (first, second)]
        return over_seeds([values[0][seed] - values[1][seed] for seed in values[0] if seed in values[1]])

    def missing(self, name: str, seed: int | None, settings: dict[str, Any]) -> bool:
        """Whether a run is not finished. `SystemExit` if it was made with other settings."""
        done = self.results.get(run_key(name, seed))
        for setting, value in settings.items():
            if done is not None and done.get(setting, value) != value:
                raise SystemExit(
                    f"{run_key(name, seed)} in {self.path} was run with {setting}={done[setting]}, not {value}: "
                    "remove it, or set another `--output_dir`."
                )
        return done is None

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Add a finished run; the file is there whole at every moment."""
        self.results[key] = result
        partial = self.path.with_suffix(".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(self.results[key])}" for key in sorted(self.results))
        partial.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        partial.replace(self.path)


def run_key(name: str, seed: int | None) -> str:
    """Name of a run in the file."""
    return name if seed is None else f"{name}-seed{seed}"


def _run_jobs(
    study: Study, runs: Runs, jobs: list[tuple[str, int | None]], settings: dict[str, Any], workers: int
) -> int:
    failed = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        futures = {pool.submit(_run_one, study.work, *job, settings): job for job in jobs}
        for future in tqdm(as_completed(futures), total=len(jobs), mininterval=1):
            key = run_key(*futures[future])
            if error := future.exception():
                failed += 1
                tqdm.write(f"{key} failed: " + "".join(traceback.format_exception(error)))
            else:
                runs.add(key, future.result())
    return failed


def _run_one(
    work: Callable[..., dict[str, Any]], name: str, seed: int | None, settings: dict[str, Any]
) -> dict[str, Any]:
    be_quiet()
    with tempfile.TemporaryDirectory() as scratch:
        return work(name, seed, settings, scratch)


def be_quiet() -> None:
    """Silence what libraries print once per run."""
    import warnings

    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def machine_text(host: dict[str, Any]) -> str:
    """[`~benchmarks._report.machine`] in words."""
    return (
        f"Machine: {host['cpu_cores']} CPU cores shared with other work, {host['torch_threads']} thread per run, "
        f"{host['architecture']}, torch {host['torch']}, transformers {host['transformers']}, TRL {host['trl']}."
    )


# Training and measuring


def vllm_on_the_cpu() -> None:
    """Before a trainer is made whose rollouts vLLM draws, in an environment of `make test-vllm`."""
    sys.path.append(str(RESULTS.parents[2]))  # the tests' patch of vLLM
    from tests.vllm.conftest import free_port, keep_weights_on_the_cpu

    keep_weights_on_the_cpu(SimpleNamespace(setattr=setattr))
    os.environ["MASTER_PORT"] = str(free_port())  # TRL's own choice is that of any other run on the machine


def silenced(trainer: Any) -> Any:
    """A trainer without the callbacks that print."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


class Curve(TrainerCallback):
    """
    Measures every `interval` steps and after the last one; times training without that.

    Args:
        measure (`Callable`):
            `(model, step) -> JSON value`.
        interval, last (`int`):
            Steps between two measurements, and the last step.

    Attributes:
        points (`dict[str, Any]`): Measurements by step.
        wall, cpu (`float`): Seconds of training so far.
        first (`int`): Steps of the stages before this trainer's.
    """

    def __init__(self, measure: Callable[[Any, int], Any], interval: int, last: int) -> None:
        self.measure, self.interval, self.last = measure, interval, last
        self.points: dict[str, Any] = {}
        self.first = 0
        self.wall = self.cpu = 0.0
        self._began: tuple[float, float] | None = None
        self._paused = (0.0, 0.0)

    def start(self) -> None:
        """Start the clock, which the training does where nobody has: for what is done before it and belongs to it."""
        self._began = self._began or (time.perf_counter(), time.process_time())

    def on_train_begin(self, args, state, control, **kwargs):
        self.start()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = time.perf_counter(), time.process_time()
        self.wall, self.cpu = (a - b - c for a, b, c in zip(now, self._began, self._paused, strict=True))
        step = self.first + state.global_step
        if step % self.interval == 0 or step == self.last:
            with self.paused():
                self.points[str(step)] = self.measure(model, step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is not training."""
        started = time.perf_counter(), time.process_time()
        yield
        taken = time.perf_counter() - started[0], time.process_time() - started[1]
        self._paused = self._paused[0] + taken[0], self._paused[1] + taken[1]


def measure_student(
    model: Any, tokenizer: Any, test: Any, draw: int, max_new_tokens: int = MAX_NEW_TOKENS
) -> dict[str, str]:
    """
    Scores of a student on the test prompts, one digit per prompt: `greedy` 0 or 1, `sampled` the number of right
    completions among [`SAMPLES`] at temperature 1, drawn with the seed `draw`. Leaves the random state as it was.
    """
    state = torch.get_rng_state()
    torch.manual_seed(draw)
    rights = []
    for sample in range(SAMPLES + 1):
        texts = generate_texts(model, tokenizer, list(test["prompt"]), 250, max_new_tokens, do_sample=sample > 0)
        rights.append([int(reward) for reward in format_and_answer_reward(texts, list(test["answer"]))])
    torch.set_rng_state(state)
    greedy, sampled = rights[0], np.sum(rights[1:], axis=0).tolist()
    return {"greedy": "".join(map(str, greedy)), "sampled": "".join(map(str, sampled))}


def draw_of(seed: int, step: int) -> int:
    """Seed of the sampled completions at a step, the same in every arm of a seed."""
    return 100_000 * (seed + 1) + step


def as_rates(digits: str, decoding: str = "greedy") -> np.ndarray:
    """Success rate of each prompt, of shape `(N,)`, from one digit per prompt (see [`measure_student`])."""
    return np.array([int(digit) for digit in digits]) / (SAMPLES if decoding == "sampled" else 1)


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


# Rollouts


def left_padded(tokenizer: Any, prompts: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of conversations, `(N, P)`."""
    inputs = tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
        tokenizer_kwargs={"padding_side": "left"},
    )
    return inputs["input_ids"], inputs["attention_mask"]


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Completions at temperature 1 from the full vocabulary."""
    output = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=new_tokens)
    return output[:, ids.size(1) :]


def completion_mask(completions: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """1 up to and including the first end of sequence of each row of `(N, T)` token ids."""
    ends = completions == eos_token_id
    return (ends.cumsum(dim=1) - ends.long() == 0).long()


# Statistics and verdicts


class Estimate(NamedTuple):
    """A value and its standard error; NaN where it cannot be estimated, "—" in print."""

    value: float
    error: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "—"
        return f"{self.value:.3f} ± {self.error:.3f}" if math.isfinite(self.error) else f"{self.value:.3f}"

    def signed(self, digits: int = 3) -> str:
        return "—" if math.isnan(self.value) else f"{self.value:+.{digits}f} ± {self.error:.{digits}f}"


def over_seeds(values: Iterable[float]) -> Estimate:
    """Mean over seeds and its standard error; NaN for a single seed."""
    values = list(values)
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(np.mean(values)), float(error))


def difference(first: np.ndarray, second: np.ndarray) -> Estimate:
    """
    Mean of `first - second` and a conservative standard error.

    The variance of the seeds (the two sets of seeds taken as independent) is added to the variance of the test prompts
    (paired: the same prompts). The prompts' part guards against three seeds that agree by chance.

    Args:
        first, second (`numpy.ndarray` of shape `(S, N)`):
            Scores of each seed on the same `N` prompts; what was not trained has `S = 1`.
    """
    per_prompt = first.mean(axis=0) - second.mean(axis=0)
    variance = per_prompt.var(ddof=1) / per_prompt.size
    for scores in (first, second):
        if len(scores) > 1:
            variance += scores.mean(axis=1).var(ddof=1) / len(scores)
    return Estimate(float(per_prompt.mean()), math.sqrt(variance))


HELD, NOT_HELD, UNTESTABLE = "held", "did not hold", "not testable here"
NO_DIFFERENCE, REVERSE = "did not hold: no difference", "did not hold: the reverse"
Claim = tuple[str, str, str]
"""A claim, the verdict on it and the numbers that decide it."""


def word(held: bool) -> str:
    return HELD if held else NOT_HELD


def larger(gap: Estimate) -> bool:
    return gap.value > 2 * gap.error


def comparable(gap: Estimate) -> bool:
    return abs(gap.value) <= 2 * gap.error


def verdict(gap: Estimate, sign: int = 1) -> str:
    """What a difference says about the claim that it is positive; with `sign=-1`, that it is negative."""
    if larger(Estimate(sign * gap.value, gap.error)):
        return HELD
    return REVERSE if larger(Estimate(-sign * gap.value, gap.error)) else NO_DIFFERENCE


def worse(gap: Estimate) -> str:
    """Verdict on the claim that a method is worse than another, from the difference."""
    return verdict(gap, -1)


def not_worse(gap: Estimate) -> str:
    """Verdict on the claim that a method is at least as good as another, from the difference."""
    return NOT_HELD if gap.value < -2 * gap.error else HELD


def all_of(verdicts: list[str]) -> str:
    """Verdict of a claim that makes several comparisons."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    reversed_ones = f", {count} the reverse" if (count := verdicts.count(REVERSE)) else ""
    return f"{NOT_HELD} throughout: {verdicts.count(HELD)} of {len(verdicts)} comparisons did{reversed_ones}"


def claim_lines(claims: Iterable[Claim]) -> list[str]:
    """Claims as a Markdown list."""
    return [f"* {claim} **{found[0].upper() + found[1:]}.** {numbers}" for claim, found, numbers in claims]


# Tables and figures

# Okabe and Ito's colours, which stay apart under the common kinds of colour blindness
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GRAY = "#777777"
Style = tuple[str, str | None, str]
"""Colour, marker and line."""


def panels(count: int, width: float = 5.2, height: float = 4.2, *, sharey: bool = True) -> tuple[Any, list[Any]]:
    """A row of `count` panels with a light grid, which share their vertical axis unless told otherwise."""
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), sharey=sharey, squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def band(axis: Any, steps: Any, values: np.ndarray, style: Style, label: str) -> None:
    """Mean over seeds of `(S, points)` values, with a band of one standard error."""
    color, marker, line = style
    mean = values.mean(axis=0)
    axis.plot(steps, mean, color=color, marker=marker, ls=line, ms=5, label=label)
    if len(values) > 1:
        error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
        axis.fill_between(steps, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)


def save(figure: Any, path: Path, *, legend_of: Any = None, columns: int = 4) -> None:
    """Write the figure at 150 dots per inch and close it; the legend of one panel goes below all of them."""
    if legend_of is not None:
        handles, labels = legend_of.get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=columns, frameon=False, bbox_to_anchor=(0.5, 0.0))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with equal keys; numbers keep four decimals."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})


def markdown_table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; cells are written with `str`."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])

"""
Is a training run whose rollouts vLLM draws the same, in distribution, as one whose rollouts transformers draws? The
settings are those of `make demo` (`examples/configs/grpo_mix_testbed.yaml`), 12 of its 20 steps. Needs vLLM: `make
test-vllm` makes the environment, for the CPU.

```sh
.venv-vllm/bin/python examples/reproduce/engines.py            # both arms, 3 seeds, then the report
.venv-vllm/bin/python examples/reproduce/engines.py --report   # only rebuild it from the finished runs
```

A finished run is in `results/engines_runs.json` and not repeated: after an interruption, start the command again.
"""

import importlib.util
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reproduce import study
from reproduce.study import Claim, Runs, comparable, difference, over_seeds, word


# isort: split
import numpy as np

from benchmarks._report import machine
from reproduce import logit_mixing
from testbed.task import build_prompt_dataset
from trl_blend import LogitMixing, blended_generation


WEIGHT = 0.1
MIXED = {"teacher_weight": WEIGHT}
ARMS = {
    "transformers": logit_mixing.Arm("transformers", (study.BLACK, "o", "-"), MIXED),
    "vllm": logit_mixing.Arm(
        "vLLM",
        (study.BLUE, "D", "-"),
        MIXED | {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 128},
    ),
}
METRICS = {
    "reward": "reward",
    "completions/mean_length": "tokens of a completion",
    "entropy": "entropy of the mixture",
}
LAST = 5  # steps
DIFFERENCE = "sampling/sampling_logp_difference/max"
POLICIES = {"mixed": "mixture", "student": "student alone"}
DECODINGS = {"greedy": "greedy", "sampled": "T = 1"}


def work(name: str, seed: int, settings: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Train one arm with one seed. What it ends with is decoded by transformers in both arms."""
    if name == "vllm":
        study.vllm_on_the_cpu()
    steps, test = settings["steps"], build_prompt_dataset("test", settings["n_test"])
    trainer = logit_mixing.make_trainer(ARMS[name], seed, steps, scratch)
    clock = study.Curve(lambda model, step: None, steps + 1, steps + 1)
    trainer.add_callback(clock)
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    final = {"student": study.measure_student(model, tokenizer, test, study.draw_of(seed, steps))}
    with blended_generation(model, trainer.partners[0], LogitMixing(WEIGHT)):
        final["mixed"] = study.measure_student(model, tokenizer, test, study.draw_of(seed, steps))
    return {
        "arm": name,
        "seed": seed,
        **{option: settings[option] for option in ("steps", "n_test")},
        "machine": machine(),
        "seconds_per_step": study.rounded(clock.wall / steps),
        "cpu_seconds_per_step": study.rounded(clock.cpu / steps),
        "peak_gib": study.rounded(peak),
        "metrics": {key: [study.rounded(entry.get(key)) for entry in history] for key in (*METRICS, DIFFERENCE)},
        "final": final,
    }


class Results:
    """The finished runs."""

    def __init__(self, runs: Runs) -> None:
        if not runs.has(*ARMS):
            raise SystemExit(f"{runs.path} does not have a finished run of each of {', '.join(ARMS)}.")
        self.runs, self.first = runs, runs.of("vllm")[0]

    def metric(self, name: str, key: str) -> np.ndarray:
        """Of shape `(S, steps)`."""
        return np.array([run["metrics"][key] for run in self.runs.of(name)], dtype=float)

    def final(self, name: str, policy: str, decoding: str) -> np.ndarray:
        """Of shape `(S, N)`: seeds, test prompts."""
        return np.stack([study.as_rates(run["final"][policy][decoding], decoding) for run in self.runs.of(name)])

    def compared(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """What both arms have, and its values."""
        for key, text in METRICS.items():
            values = [self.metric(name, key) for name in ("vllm", "transformers")]
            yield f"{text}, all steps", *values
            if key == "reward":
                yield f"{text}, last {LAST} steps", *(one[:, -LAST:] for one in values)
        for policy, text in POLICIES.items():
            for decoding, how in DECODINGS.items():
                values = [self.final(name, policy, decoding) for name in ("vllm", "transformers")]
                yield f"solved by the {text}, {how}", *values


def claims(found: Results) -> Iterator[Claim]:
    gaps = {what: difference(first, second) for what, first, second in found.compared()}
    apart = [what for what, gap in gaps.items() if not comparable(gap)]
    numbers = f"{len(gaps) - len(apart)} of {len(gaps)} quantities are{'; not ' if apart else ''}{', '.join(apart)}."
    yield "With vLLM and with transformers all is within two standard errors.", word(not apart), numbers


def report(runs: Runs, folder: Path) -> str:
    """Write a CSV file; returns the Markdown."""
    found, rows, cells = Results(runs), [], []
    for what, first, second in found.compared():
        one, other, gap = (*(over_seeds(values.mean(axis=1)) for values in (first, second)), difference(first, second))
        ratio = abs(gap.value) / gap.error
        rows.append({
            "quantity": what,
            "vllm": one.value,
            "vllm_se": one.error,
            "transformers": other.value,
            "transformers_se": other.error,
            "difference": gap.value,
            "difference_se": gap.error,
        })  # fmt: skip
        cells.append([what, one, other, gap.signed(), f"{ratio:.1f}"])
    study.write_csv(folder / "engines.csv", rows)
    costs = {"seconds_per_step": "seconds per step", "cpu_seconds_per_step": "CPU s per step", "peak_gib": "peak GiB"}
    seeds = sorted({len(runs.of(name)) for name in ARMS})
    worst = found.metric("vllm", DIFFERENCE).max()
    return "\n".join([
        "# Rollouts by vLLM and by transformers",
        "",
        "Written by `python examples/reproduce/engines.py`; do not edit. The demo's settings: mixed objective at "
        f"weight {WEIGHT}, {found.first['steps']} steps of 128 rollouts (16 prompts, equal in both arms of a seed), "
        f"learning rate 3e-5, {' or '.join(map(str, seeds))} seeds, {found.first['n_test']} test prompts, mean ± SE "
        f"over seeds; T = 1 is the mean of {study.SAMPLES} completions. What is trained is decoded by transformers. "
        f"{study.machine_text(found.first['machine'])}",
        "",
        study.markdown_table(["quantity", "vLLM", "transformers", "difference", "in SE"], cells),
        "",
        "The standard error of a difference adds the variance over seeds and over test prompts, or steps.",
        "",
        *study.claim_lines(claims(found)),
        f"* Log-probabilities of drawn tokens by engine and trainer differ by at most {worst:.1e} nats.",
        "",
        "## Cost",
        "",
        study.markdown_table(
            ["rollouts", *costs.values()],
            [
                [arm.label, *(over_seeds(run[key] for run in runs.of(name)) for key in costs)]
                for name, arm in ARMS.items()
            ],
        ),
        "",
    ])  # fmt: skip


STUDY = study.Study(
    name="engines",
    options={"steps": 12, "n_test": 200},
    arms=lambda settings: ARMS,
    work=work,
    report=report,
    once=(),
)

if __name__ == "__main__":
    if importlib.util.find_spec("vllm") is None and "--report" not in sys.argv:
        raise SystemExit("vLLM is not installed here. Run `make test-vllm`, then this with `.venv-vllm/bin/python`.")
    STUDY.main(__doc__)

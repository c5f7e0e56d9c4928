"""Tables and figures of `offline_opd.py`, rebuilt from the JSON files of the runs."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from reproduce import figures
from reproduce.offline_opd_arms import LEARNING_RATE
from reproduce.offline_opd_claims import MEASURES, claims, ours
from reproduce.offline_opd_data import BATCH, TOP_K
from reproduce.offline_opd_figures import plot_costs, plot_curves, plot_gradients
from reproduce.offline_opd_runs import DECODINGS, Runs, load_runs
from reproduce.runs import Estimate


MIB = 2**20


def write_report(output_dir: Path) -> str:
    """Write the CSV file, the figures and `offline_opd.md` of what is finished; returns the Markdown."""
    runs = load_runs(output_dir / "offline_opd_runs")
    figures.write_csv(output_dir / "offline_opd.csv", [_csv_row(runs, name) for name in runs.by_arm])
    plot_curves(runs, output_dir / "offline_opd_curves.png")
    plot_costs(runs, output_dir / "offline_opd_costs.png")
    if any(runs.arm(name).probed for name in runs.by_arm):
        plot_gradients(runs, output_dir / "offline_opd_gradients.png")
    text = "\n".join([*_heading(runs), *_accuracy(runs), *_costs(runs), *_verdicts(runs)])
    (output_dir / "offline_opd.md").write_text(text, encoding="utf-8")
    return text


def _csv_row(runs: Runs, name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": name, "seeds": len(runs.by_arm[name]), "steps": runs.steps}
    estimates = {decoding: runs.rate(name, decoding) for decoding in DECODINGS}
    estimates |= {key: runs.policy(name, key) for key in ("kl_to_start", "kl_to_teacher")}
    estimates["offline_drift_kl"] = runs.drift(name)
    for key, (value, error) in estimates.items():
        row |= {key: value, f"{key}_se": error}
    for key in ("tokens", "train_seconds", "train_cpu_seconds"):
        row[key] = runs.cost(name, key).value
    made = [runs.one_time(name, run["seed"]) for run in runs.by_arm[name]]
    row["collect_cpu_seconds"], row["score_cpu_seconds"] = (float(value) for value in np.mean(made, axis=0))
    return row


# Markdown


def _heading(runs: Runs) -> list[str]:
    host = next(iter(runs.by_arm.values()))[0]["machine"]
    start = "; ".join(
        f"{label} " + ", ".join(f"{runs.before(model, d).mean():.3f} {n}" for d, n in _NAMES.items())
        for model, label in _MODELS.items()
    )
    return [
        "# Offline distillation on the add3cot task",
        "",
        f"Written by `python examples/reproduce/offline_opd.py`; do not edit. Accuracy before training: {start}. "
        f"Machine: {host['cpu_cores']} CPU cores shared with other work, {host['torch_threads']} thread per run, "
        f"{host['architecture']}, torch {host['torch']}, transformers {host['transformers']}, TRL {host['trl']}.",
        "",
    ]


_NAMES = {"sampled": "at T = 1", "greedy": "greedy"}
_MODELS = {"early": "early student", "late": "late student", "first": "teacher", "second": "second teacher"}


def _accuracy(runs: Runs) -> list[str]:
    header = ["arm", "T = 1", "gain", "greedy", "gain", "KL to the start", "KL to the teacher", "drift logged"]
    rows = [
        [
            runs.arm(name).label,
            *(cell for d in DECODINGS for cell in (str(runs.rate(name, d)), runs.gain(name, d).signed())),
            str(runs.policy(name, "kl_to_start")),
            str(runs.policy(name, "kl_to_teacher")),
            _blank(runs.drift(name)),
        ]
        for name in runs.by_arm
    ]
    seeds = sorted({tuple(run["seed"] for run in finished) for finished in runs.by_arm.values()})
    gaps = "; ".join(
        f"{label} {runs.start[key]['kl_to_teacher']:.3f}"
        for key, label in (
            ("early_first", "early student to the teacher"),
            ("early_second", "to the second teacher"),
            ("late_first", "late student to the teacher"),
        )
    )
    return [
        "## Accuracy",
        "",
        f"Seeds {'; '.join(', '.join(map(str, values)) for values in seeds)}; {runs.steps} optimizer steps of {BATCH} "
        f"rollouts, learning rate {LEARNING_RATE:g} (constant) unless said otherwise, the same optimizer in every "
        "arm. Both students were trained on the first teacher's own samples, with one recipe: the early one is the "
        "`sft_student` of the test-bed, the late one was stopped later. Arms without another name start from the "
        "early one. The second "
        "teacher is the first, fine-tuned to write its chain of thought in another style. *live*: rollouts of the "
        "current student at temperature 1. *offline*: rollouts of the student before training, at temperature 1 "
        "unless said otherwise, each used once. *sampled token*: the paper's loss; *with the ratio*: times the ratio "
        "of the current student's probability of the token to that under which it was drawn. *full KL*: "
        f"`trl.DistillationTrainer`. *top-{TOP_K} reverse KL*: over the teacher's {TOP_K} stored tokens and one event "
        f"for all others. Accuracy = right and in the format, on {runs.start['n_test']} test prompts; T = 1 is the "
        "mean of 2 completions per prompt. Mean ± SE over seeds; gains over the start with the variance of seeds and "
        "prompts. KLs are exact, in nats per token, on the trained policy's own rollouts; the drift is "
        "`offline/drift_kl`, estimated from the stored rollouts, mean of the last 10 steps. Before training, KL from "
        f"the {gaps}.",
        "",
        figures.markdown_table(header, rows),
        "",
        "![accuracy against step](offline_opd_curves.png)",
        "",
        "![offline against live gradients](offline_opd_gradients.png)",
        "",
    ]


def _blank(estimate: Estimate) -> str:
    return "" if math.isnan(estimate.value) else str(estimate)


def _costs(runs: Runs) -> list[str]:
    header = ["arm", "train s", "train CPU s", "teacher s", "rollouts s", "one-time CPU s: collect", "score"]
    header += ["tokens/CPU s", "with one-time"]
    rows = []
    for name in runs.by_arm:
        offline = runs.arm(name).offline
        made = np.mean([runs.one_time(name, run["seed"]) for run in runs.by_arm[name]], axis=0)
        rows.append(
            [
                runs.arm(name).label,
                *(f"{runs.cost(name, f'train_{clock}seconds').value:.0f}" for clock in ("", "cpu_")),
                "0" if offline else f"{runs.cost(name, 'teacher_seconds').value:.0f}",
                "0" if offline else f"{runs.cost(name, 'rollout_seconds').value:.0f}",
                *(f"{value:.0f}" if offline else "" for value in made),
                *(
                    f"{np.mean(list(runs.throughput(name, one_time=one_time).values())):.0f}"
                    for one_time in (False, True)
                ),
            ]
        )
    return [
        "## Cost",
        "",
        "Means per run, without evaluation and without loading models. Tokens are the completion tokens trained on. "
        "CPU time counts only what this process computed; wall time (`train s`, `teacher s`, `rollouts s`) also "
        "counts what others did on the machine meanwhile. One-time costs fall once per data set, however often it is "
        "trained on; here each rollout is used once.",
        "",
        figures.markdown_table(header, rows),
        "",
        *_storage(runs),
        "![time of a run](offline_opd_costs.png)",
        "",
    ]


def _storage(runs: Runs) -> list[str]:
    lines = []
    made = runs.data.get("early_first_1x_1_1")
    if made:
        lines += [
            f"On disk: {np.mean([data['bytes_per_token'] for data in made]):.1f} bytes per completion token with the "
            f"sampled token's log-probabilities, {np.mean([data['bytes_per_token_top_k'] for data in made]):.1f} with "
            f"the teacher's top {TOP_K} besides.",
            "",
        ]
    if runs.memory:
        shown = "; ".join(
            f"{runs.arm(name).label} {used['weights'] / MIB:.1f} MiB of weights, {used['resident'] / MIB:.0f} MiB peak"
            for name, used in runs.memory.items()
        )
        lines += [
            f"Memory of a training process beyond what it had before a model was loaded: {shown}. With models this "
            "small, activations and libraries dominate.",
            "",
        ]
    return lines


def _verdicts(runs: Runs) -> list[str]:
    def lines(triples: Any) -> list[str]:
        return [f"* {claim} **{word[0].upper() + word[1:]}.** {numbers}" for claim, word, numbers in triples]

    return [
        "## The paper's claims",
        "",
        f"Verdicts are computed, at {' and '.join(MEASURES.values())}; a difference counts above 2 standard errors, "
        "which add the variance over seeds and over test prompts.",
        "",
        *lines(claims(runs)),
        "",
        "## What this package adds",
        "",
        *lines(ours(runs)),
        "",
    ]

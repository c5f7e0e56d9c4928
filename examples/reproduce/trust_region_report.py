"""Tables and figures of `trust_region.py`, rebuilt from the JSON files of the runs."""

from pathlib import Path
from typing import Any

from reproduce import figures
from reproduce.runs import over_seeds
from reproduce.trust_region_arms import BATCH, LEARNING_RATE, ROLLOUTS_PER_PROMPT, SAMPLES
from reproduce.trust_region_claims import claims
from reproduce.trust_region_figures import plot_curves, plot_entropy, plot_prefixes, plot_support
from reproduce.trust_region_runs import CHECKPOINTS, DECODINGS, Runs, load_runs


SUPPORT = ("teacher_logp", "reward", "auroc", "teacher_entropy", "teacher_weight", "teacher_feasible")
SUPPORT += ("kl_behavior_student",)


def write_report(output_dir: Path) -> str:
    """Write the CSV files, figures and `trust_region.md` of what is finished; returns the Markdown."""
    runs = load_runs(output_dir / "trust_region_runs")
    if runs.by_arm:
        figures.write_csv(output_dir / "trust_region.csv", _arm_rows(runs))
        figures.write_csv(output_dir / "trust_region_curves.csv", _curve_rows(runs))
        plot_curves(runs, output_dir / "trust_region_curves.png")
        plot_entropy(runs, output_dir / "trust_region_entropy.png")
    if runs.probes:
        figures.write_csv(output_dir / "trust_region_support.csv", _support_rows(runs))
        figures.write_csv(output_dir / "trust_region_prefixes.csv", _prefix_rows(runs))
        plot_support(runs, output_dir / "trust_region_support.png")
        plot_prefixes(runs, output_dir / "trust_region_prefixes.png")
    text = "\n".join([*_heading(runs), *_training(runs), *_probes(runs), *_verdicts(runs)])
    (output_dir / "trust_region.md").write_text(text, encoding="utf-8")
    return text


# CSV files


def _arm_rows(runs: Runs) -> list[dict[str, Any]]:
    rows = []
    for name, finished in runs.by_arm.items():
        row: dict[str, Any] = {"arm": name, "seeds": len(finished), "steps": runs.steps}
        for decoding in DECODINGS:
            row[f"{decoding}_before"] = float(runs.before(decoding).mean())
            for checkpoint in CHECKPOINTS:
                estimate = runs.rate(name, decoding, checkpoint)
                row |= {f"{decoding}_{checkpoint}": estimate.value, f"{decoding}_{checkpoint}_se": estimate.error}
            row[f"{decoding}_best_step"] = runs.best_step(name, decoding)
        rows.append(row | {field: round(runs.cost(name, field), 1) for field in ("train_seconds", "cpu_seconds")})
    return rows


def _curve_rows(runs: Runs) -> list[dict[str, Any]]:
    rows = []
    for name, finished in runs.by_arm.items():
        curves = {decoding: runs.curve(name, decoding) for decoding in DECODINGS}
        for index, run in enumerate(finished):
            for point, step in enumerate(curves["greedy"][0]):
                rates = {decoding: float(rates[index, point]) for decoding, (_, rates) in curves.items()}
                rows.append({"arm": name, "seed": run["seed"], "step": step, **rates})
    return rows


def _support_rows(runs: Runs) -> list[dict[str, Any]]:
    return [
        {"policy": policy, "seed": probe["seed"]} | {key: probe["support"][policy].get(key, "") for key in SUPPORT}
        for policy in runs.policies
        for probe in runs.probes
    ]


def _prefix_rows(runs: Runs) -> list[dict[str, Any]]:
    rows = []
    for policy in ("0.0", *runs.prefix_policies):
        for model in ("teacher", "student"):
            for length in runs.lengths:
                gain = runs.prefix_gain(policy, model, length)
                rows.append({
                    "budget": float(policy),
                    "continued_by": model,
                    "length": length,
                    "success": float(runs.prefix_scores(policy, model, length).mean()),
                    "gain": gain.value,
                    "gain_se": gain.error,
                    "ended_before": sum(probe["ended"][policy][str(length)] for probe in runs.probes),
                    "prompts": runs.prefix_scores(policy, model, length).size,
                })  # fmt: skip
    return rows


# Markdown


def _heading(runs: Runs) -> list[str]:
    everything = [run for finished in runs.by_arm.values() for run in finished] + runs.probes
    host = everything[0]["machine"]
    start = "; ".join(
        f"`{model}` " + ", ".join(f"{runs.before(d, model).mean():.3f} {n}" for d, n in _NAMES.items())
        for model in ("student", "teacher")
    )
    return [
        "# Trust-region rollouts on the add3cot task",
        "",
        "Written by `python examples/reproduce/trust_region.py`; do not edit. Student and teacher are the checkpoints "
        f"of the test-bed, before training: {start}. Machine: {host['cpu_cores']} CPU cores shared with other work, "
        f"{host['torch_threads']} thread per run, {host['architecture']}, torch {host['torch']}, transformers "
        f"{host['transformers']}, TRL {host['trl']}.",
        "",
    ]


_NAMES = {"sampled": "at T = 1", "greedy": "greedy"}


def _training(runs: Runs) -> list[str]:
    if not runs.by_arm:
        return []
    seeds = {name: [run["seed"] for run in finished] for name, finished in runs.by_arm.items()}
    used = sorted({tuple(values) for values in seeds.values()})
    header = ["arm", "T = 1, best", "at step", "T = 1, last", "greedy, best", "greedy, last", "train s", "CPU s"]
    rows = [
        [
            runs.arms[name].label,
            str(runs.rate(name, "sampled", "best")),
            runs.best_step(name, "sampled"),
            *(str(runs.rate(name, *place)) for place in (("sampled", "last"), ("greedy", "best"), ("greedy", "last"))),
            f"{runs.cost(name, 'train_seconds'):.0f}",
            f"{runs.cost(name, 'cpu_seconds'):.0f}",
        ]
        for name in runs.by_arm
    ]
    return [
        "## Training",
        "",
        f"Seeds {'; '.join(', '.join(map(str, values)) for values in used)}; {runs.steps} optimizer steps of {BATCH} "
        f"rollouts ({ROLLOUTS_PER_PROMPT} of each of {BATCH // ROLLOUTS_PER_PROMPT} prompts, no prompt twice), the "
        f"same prompts in the same order in every arm of a seed, learning rate {LEARNING_RATE:g} (constant), "
        f"temperature 1, full-vocabulary reverse KL. Every warmup lasts {runs.warmup} steps; fixed ε and SKD act "
        "throughout, as in the paper. SFT warmup: supervised steps on teacher rollouts of the very prompts of the "
        "first steps, then ordinary distillation with a new optimizer on the others. Accuracy = right and in the "
        f"format, on {runs.start['n_test']} test prompts every {_interval(runs)} steps: T = 1 is the mean of "
        f"{SAMPLES} completions per prompt. Mean ± SE over seeds. *best*: the measured step of the highest mean over "
        "seeds, chosen on the same test prompts, as the paper does; *last*: after the last step. Times are means per "
        "run without evaluation.",
        "",
        figures.markdown_table(header, rows),
        "",
        "![accuracy against step](trust_region_curves.png)",
        "",
        "![teacher entropy and log-probability on the visited prefixes](trust_region_entropy.png)",
        "",
    ]


def _interval(runs: Runs) -> int:
    return next(iter(runs.by_arm.values()))[0]["interval"]


def _probes(runs: Runs) -> list[str]:
    if not runs.probes:
        return []
    n, per_prompt = runs.probes[0]["n_probe"], runs.probes[0]["rollouts_per_prompt"]
    header = ["policy", "teacher log-prob", "reward", "AUROC", "teacher entropy", "mean β*", "teacher feasible", "KL"]
    rows = [
        [_policy(policy), *(str(over_seeds(runs.support(policy, key))).replace("nan", "") for key in SUPPORT)]
        for policy in runs.policies
    ]
    return [
        "## Rollouts at step 0 (Figure 7), without training",
        "",
        f"Sampling seeds {', '.join(str(probe['seed']) for probe in runs.probes)}, each with its own {n} training "
        f"prompts and {per_prompt} rollouts of each at temperature 1, the same prompts for every policy; mean ± SE "
        "over seeds. Log-probabilities (under the teacher, per token of the rollout), entropies and KL (of the "
        "rollout policy to the student) in nats. AUROC: of `mean_t(log p_T - log p_S)`, right against wrong rollouts.",
        "",
        figures.markdown_table(header, rows),
        "",
        "![teacher support of the rollouts](trust_region_support.png)",
        "",
        "## Prefixes at step 0 (Figure 4), without training",
        "",
        "The same rollouts, cut after t tokens and continued at temperature 1. A rollout that ended within t tokens "
        f"has nothing to continue and counts as it is ({_ended(runs)}). Differences are paired by prompt, ± SE over "
        f"the {n * len(runs.probes)} prompts of all seeds.",
        "",
        *_prefix_table(runs),
        "",
        "![success of prefixes](trust_region_prefixes.png)",
        "",
    ]


def _policy(policy: str) -> str:
    return "teacher alone" if policy == "teacher" else "student (ε = 0)" if policy == "0.0" else f"ε = {policy}"


def _ended(runs: Runs) -> str:
    longest = str(max(runs.lengths))
    counts = [sum(probe["ended"][policy][longest] for probe in runs.probes) for policy in runs.probes[0]["ended"]]
    total = runs.probes[0]["n_probe"] * runs.probes[0]["rollouts_per_prompt"] * len(runs.probes)
    return f"at t = {longest}, {min(counts)} to {max(counts)} of {total}"


def _prefix_table(runs: Runs) -> list[str]:
    header = ["continued by", "t", "vanilla prefixes"]
    header += [f"{_policy(policy)}: difference" for policy in runs.prefix_policies]
    rows = [
        [
            model,
            length,
            f"{runs.prefix_scores('0.0', model, length).mean():.3f}",
            *(runs.prefix_gain(policy, model, length).signed() for policy in runs.prefix_policies),
        ]
        for model in ("teacher", "student")
        for length in runs.lengths
    ]
    return [figures.markdown_table(header, rows)]


def _verdicts(runs: Runs) -> list[str]:
    return [
        "## The paper's claims",
        "",
        "Verdicts are computed; a difference counts above 2 standard errors, which add the variance over seeds and "
        "over test prompts. The best budget is chosen on the test prompts that judge it, which favours the trust "
        "region. Baselines run with one setting, not the paper's sweep.",
        "",
        *(f"* {claim} **{word[0].upper() + word[1:]}.** {numbers}" for claim, word, numbers in claims(runs)),
        "",
    ]

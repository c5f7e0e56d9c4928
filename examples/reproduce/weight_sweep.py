"""
Weight sweep without training (Table 4 of the logit-averaging paper, https://huggingface.co/papers/2605.20555).

A student that adds but does not write the required box, and a reference that was fine-tuned on the format, are mixed
in the logits or in the probabilities at weights 0, 0.1, ..., 1 of the reference, and decoded greedily:

```sh
python examples/reproduce/weight_sweep.py
```

`format` is the share of completions in the required format, `solve` of those that are also right.
"""

import argparse
import sys
from pathlib import Path


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reproduce import study
from reproduce.study import Estimate, difference, larger, word


# isort: split
import numpy as np
from tqdm import tqdm

from testbed.evaluate import EvalResult, evaluate, load_checkpoint, standard_error
from testbed.task import build_prompt_dataset, format_and_answer_reward, format_reward
from trl_blend.generation import LogitMixing, ProbabilityMixing, blended_generation


RULES = {"logits": LogitMixing, "probs": ProbabilityMixing}
Scores = dict[str, np.ndarray]


def sweep(student_name: str, reference_name: str, n: int, weights: list[float]) -> dict[tuple[str, float], Scores]:
    """Per-prompt `format` and `solve` scores, of shape `(1, n)`, of each space and weight."""
    student, tokenizer = load_checkpoint(student_name)
    reference, _ = load_checkpoint(reference_name)
    dataset = build_prompt_dataset("test", n)
    results: dict[tuple[str, float], Scores] = {}
    jobs = [(space, weight) for space in RULES for weight in weights]
    for space, weight in tqdm(jobs, desc="sweep", mininterval=5):
        if weight in (0.0, 1.0) and space == "probs":  # the end points are one model alone in either space
            results[space, weight] = results["logits", weight]
            continue
        with blended_generation(student, reference, RULES[space](weight)):
            result: EvalResult = evaluate(student, tokenizer, dataset)
        texts = list(result.completions)
        results[space, weight] = {
            "format": np.array([format_reward(texts)]),
            "solve": np.array([format_and_answer_reward(texts, list(dataset["answer"]))]),
        }
    return results


def observations(results: dict[tuple[str, float], Scores], weights: list[float]) -> list[str]:
    """The paper's three observations, each with the numbers that decide it. A difference counts above 2 SE."""

    def rates(space: str, kind: str) -> dict[float, float]:
        return {weight: results[space, weight][kind].mean() for weight in weights}

    def gap(kind: str, first: tuple[str, float], second: tuple[str, float]) -> Estimate:
        return difference(results[first][kind], results[second][kind])

    formats, solves = ({space: rates(space, kind) for space in RULES} for kind in ("format", "solve"))
    half = (formats["logits"][weights[0]] + formats["logits"][weights[-1]]) / 2
    reach = {space: min(w for w in weights if formats[space][w] >= half) for space in RULES}
    early = gap("format", ("logits", reach["logits"]), ("probs", reach["logits"]))
    peak = {space: max(weights, key=solves[space].get) for space in RULES}
    higher = gap("solve", ("logits", peak["logits"]), ("probs", peak["probs"]))
    alone = "logits", weights[-1]
    gains = {space: gap("solve", (space, peak[space]), alone) for space in RULES}
    opposite = peak["logits"] <= 0.5 <= peak["probs"] and peak["logits"] < peak["probs"]
    return [
        "(i) Logit mixing improves at a smaller weight: "
        f"**{word(reach['logits'] < reach['probs'] and larger(early))}**. "
        f"Half of the way to the reference's format rate ({half:.2f}) is reached at weight {reach['logits']} by logit "
        f"mixing and at {reach['probs']} by probability mixing; at weight {reach['logits']} their format rates differ "
        f"by {early.signed()}.",
        f"(ii) Logit mixing peaks higher: **{word(larger(higher))}**; both peaks exceed the reference alone: "
        f"**{word(all(map(larger, gains.values())))}**. Best solve rates {solves['logits'][peak['logits']]:.3f} "
        f"(logits, weight {peak['logits']}) and {solves['probs'][peak['probs']]:.3f} (probabilities, weight "
        f"{peak['probs']}): difference {higher.signed()}; over the reference alone "
        f"({results[alone]['solve'].mean():.3f}) {gains['logits'].signed()} and {gains['probs'].signed()}.",
        f"(iii) The peaks lie on opposite sides of 0.5: **{word(opposite)}** (logits {peak['logits']}, "
        f"probabilities {peak['probs']}). From its peak to weight 1 logit mixing loses {gains['logits']}.",
    ]


def plot(results: dict[tuple[str, float], Scores], weights: list[float], n: int, path: Path) -> None:
    figure, axes = study.panels(2)
    styles = {
        "logits": (study.BLUE, "o", "-", "logit mixing"),
        "probs": (study.RED, "s", "--", "probability mixing"),
    }
    titles = {"format": "Format rate", "solve": "Solve rate (right and in the format)"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for space, (color, marker, line, label) in styles.items():
            rates = [results[space, weight][kind].mean() for weight in weights]
            bars = [2 * standard_error(rate, n) for rate in rates]
            axis.errorbar(weights, rates, bars, color=color, marker=marker, ls=line, ms=5, capsize=2, label=label)
        axis.set(title=title, xlabel="weight of the reference", ylim=(-0.03, 1.03))
    axes[0].set_ylabel(f"share of {n} test prompts (bars: ±2 SE)")
    axes[0].legend(frameon=False)
    study.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="base", help="shipped checkpoint or path")
    parser.add_argument("--reference", default="student", help="shipped checkpoint or path")
    parser.add_argument("--n", type=int, default=500, help="test prompts")
    parser.add_argument("--output_dir", type=Path, default=study.RESULTS)
    args = parser.parse_args()

    weights = [step / 10 for step in range(11)]
    results = sweep(args.student, args.reference, args.n, weights)
    rows, cells = [], []
    for weight in weights:
        row: dict[str, float] = {"weight": weight}
        line = [f"{weight:.1f}"]
        for space in RULES:
            for kind in ("format", "solve"):
                rate = results[space, weight][kind].mean()
                error = standard_error(rate, args.n)
                row |= {f"{space}_{kind}": rate, f"{space}_{kind}_se": error}
                line.append(f"{rate:.3f} ± {error:.3f}")
        rows.append(row)
        cells.append(line)
    header = ["weight", "logits: format", "logits: solve", "probabilities: format", "probabilities: solve"]
    text = "\n".join([
        "# Weight sweep without training",
        "",
        f"Student `{args.student}`, reference `{args.reference}` (weight 0 is the student alone, 1 the reference), "
        f"greedy, {args.n} test prompts, ± binomial standard error.",
        "",
        study.markdown_table(header, cells),
        "",
        "The paper's three observations (differences over the same prompts, counted when above 2 standard errors):",
        "",
        *(f"* {line}" for line in observations(results, weights)),
        "",
    ])  # fmt: skip
    study.write_csv(args.output_dir / "weight_sweep.csv", rows)
    plot(results, weights, args.n, args.output_dir / "weight_sweep.png")
    (args.output_dir / "weight_sweep.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

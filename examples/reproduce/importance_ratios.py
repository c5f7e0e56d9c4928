"""
Bias and noise of the importance ratios of `objective="student"`: gradients of the student from rollouts of the mixture
against those from its own rollouts, without training:

```sh
python examples/reproduce/importance_ratios.py --workers 2    # then the report
python examples/reproduce/importance_ratios.py --report       # only rebuild it from the finished runs
```
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reproduce import study
from reproduce.study import Runs, over_seeds


# isort: split
import numpy as np
import torch
from torch import Tensor

from benchmarks._report import machine
from testbed.evaluate import load_checkpoint
from testbed.task import MAX_NEW_TOKENS, build_prompt_dataset, format_and_answer_reward
from trl_blend import LogitMixing, blended_generation
from trl_blend.ops.importance import floored_log_ratio


WEIGHTS = (0.5, 0.25, 0.1)
CAP, PROMPTS, GROUP, BATCHES = 3.0, 16, 8, 8
# Coefficient of `A ∇log π` from the log ratios of the tokens, `(B, T)`, their mask and the advantages `(B, 1)`
RATIOS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "unbiased (product of the ratios)": lambda ratio, mask, A: (ratio * mask).sum(1, keepdim=True).exp(),
    "token ratios": lambda ratio, mask, A: ratio.exp(),
    "token ratios, cap 3": lambda ratio, mask, A: ratio.exp().clamp(max=CAP),
    "sequence ratios (geometric mean)": lambda ratio, mask, A: (
        (ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    ).exp(),
    "floor": lambda ratio, mask, A: floored_log_ratio(ratio, A, CAP).exp(),
    "none (ratio 1)": lambda ratio, mask, A: torch.ones_like(ratio),
}
ON_POLICY = "on-policy"
_STYLES = (
    (study.GRAY, "*", "-."),
    (study.ORANGE, "X", "--"),
    (study.RED, "X", "-"),
    (study.PURPLE, "<", "--"),
    (study.BLUE, "D", "-"),
    (study.GREEN, "o", ":"),
)


def logps_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def gradients(
    models: tuple[Any, Any], tokenizer: Any, prompts: Any, weight: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """
    Policy gradients of the student from one batch of rollouts, flat, and what the batch is like. The advantage is the
    reward minus the mean of its group, without the division by the deviation, so that the first row is unbiased.
    """
    student, teacher = models
    ids, mask = study.left_padded(tokenizer, [prompt for prompt in prompts["prompt"] for _ in range(GROUP)])
    with torch.no_grad():
        if weight:
            with blended_generation(student, teacher, LogitMixing(weight)):
                completions = study.generate(student, ids, mask, MAX_NEW_TOKENS)
        else:
            completions = study.generate(student, ids, mask, MAX_NEW_TOKENS)
    valid = study.completion_mask(completions, tokenizer.eos_token_id)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    answers = [answer for answer in prompts["answer"] for _ in range(GROUP)]
    rewards = torch.tensor(format_and_answer_reward(texts, answers))
    advantages = (rewards.view(-1, GROUP) - rewards.view(-1, GROUP).mean(1, keepdim=True)).view(-1, 1)

    whole, whole_mask = torch.cat([ids, completions], 1), torch.cat([mask, valid], 1)
    inputs = {
        "input_ids": whole,
        "attention_mask": whole_mask,
        "position_ids": (whole_mask.cumsum(1) - 1).clamp(min=0),
    }
    kept = slice(ids.size(1) - 1, -1)
    logits = student(**inputs).logits[:, kept]
    logps = logps_of(logits, completions)
    with torch.no_grad():
        mixed = (1 - weight) * logits + weight * teacher(**inputs).logits[:, kept] if weight else logits
        log_ratio = (logps - logps_of(mixed, completions)) * valid
    parameters, found = [p for p in student.parameters() if p.requires_grad], {}
    for name, coefficient in RATIOS.items() if weight else [(ON_POLICY, RATIOS["none (ratio 1)"])]:
        loss = (coefficient(log_ratio, valid, advantages) * advantages * logps * valid).sum() / len(rewards)
        pieces = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        found[name] = torch.cat([piece.flatten() for piece in pieces])
    return found, {"reward": rewards.mean().item(), "rewarded": (advantages.abs() > 0).float().mean().item()}


def work(name: str, seed: int, settings: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Gradients of one checkpoint of the student, with one set of rollouts."""
    if name == study.START:
        return {"machine": machine()}
    torch.manual_seed(seed)
    student, tokenizer = load_checkpoint(name)
    teacher, _ = load_checkpoint("teacher")
    drawn: dict[str, dict[str, list[Tensor]]] = {}
    rewards: dict[str, list[float]] = {}
    for weight in (0.0, *WEIGHTS):
        of_weight = drawn.setdefault(str(weight), {})
        # The on-policy gradient is what the others are compared with: four times as many batches
        for batch in range(settings["batches"] * (1 if weight else 4)):
            prompts = build_prompt_dataset("train", PROMPTS, 1000 * seed + batch)
            found, measured = gradients((student, teacher), tokenizer, prompts, weight)
            rewards.setdefault(str(weight), []).append(measured["reward"])
            for ratio, gradient in found.items():
                of_weight.setdefault(ratio, []).append(gradient)
    truth = torch.stack(drawn["0.0"][ON_POLICY])
    halves = truth[::2].mean(0), truth[1::2].mean(0)
    rows = {}
    for weight, ratios in drawn.items():
        for ratio, batches in ratios.items():
            stacked = torch.stack(batches)
            mean = stacked.mean(0)
            rows[f"{weight} {ratio}"] = {
                "cosine": cosine(*halves) if ratio == ON_POLICY else cosine(mean, truth.mean(0)),
                "norm": mean.norm().item(),
                "deviation": (stacked - mean).square().sum(1).mean().sqrt().item(),
                "between_batches": between(stacked),
            }
    means = {weight: sum(values) / len(values) for weight, values in rewards.items()}
    return {"arm": name, "seed": seed, "batches": settings["batches"], "reward": means, "rows": rows}


def cosine(first: Tensor, second: Tensor) -> float | None:
    norms = first.norm() * second.norm()
    return (first @ second / norms).item() if norms else None


def between(stacked: Tensor) -> float | None:
    """Mean cosine between the gradients of two batches that are not 0."""
    unit = torch.nn.functional.normalize(stacked[stacked.norm(dim=1) > 0], dim=1)
    count = len(unit)
    return ((unit.sum(0).square().sum() - count) / (count * (count - 1))).item() if count > 1 else None


def report(runs: Runs, folder: Path) -> str:
    """Write a CSV file and a figure; returns the Markdown."""
    rows, cells = [], []
    for name in runs.names(STUDY.arms({})):
        first = runs.of(name)[0]
        # A student without reward has no gradient of its own to be compared with
        silent = any(run["rows"][f"0.0 {ON_POLICY}"]["cosine"] is None for run in runs.of(name))
        for key in first["rows"]:
            weight, _, ratio = key.partition(" ")
            row: dict[str, Any] = {"student": name, "weight": weight, "ratio": ratio}
            row["reward"] = over_seeds(run["reward"][weight] for run in runs.of(name)).value
            for column in ("cosine", "norm", "deviation", "between_batches"):
                values = [run["rows"][key][column] for run in runs.of(name)]
                unknown = None in values or (column == "cosine" and silent)
                row[column] = "—" if unknown else over_seeds(values)
            row["floor_minus_it"] = "—"
            if row["cosine"] != "—" and ratio not in (ON_POLICY, "floor"):
                floor = [run["rows"][f"{weight} floor"]["cosine"] for run in runs.of(name)]
                own = [run["rows"][key]["cosine"] for run in runs.of(name)]
                row["floor_minus_it"] = over_seeds(a - b for a, b in zip(floor, own, strict=True))
            cells.append([f"`{name}`", *(f"{v:.2f}" if isinstance(v, float) else v for v in list(row.values())[1:])])
            rows.append({k: v if isinstance(v, (str, float)) else v.value for k, v in row.items()})
    study.write_csv(folder / "importance_ratios.csv", rows)
    _plot(runs, folder / "importance_ratios.png")
    seeds = len(runs.of(runs.names(STUDY.arms({}))[0]))
    batches = first["batches"]
    header = [
        "student",
        "weight",
        "ratio",
        "reward",
        "cosine",
        "norm",
        "deviation",
        "between batches",
        "floor minus it",
    ]
    return "\n".join([
        "# Importance ratios: bias and noise",
        "",
        "Written by `python examples/reproduce/importance_ratios.py`; do not edit. Gradients of a student that is not "
        f"trained, from {batches} batches of {PROMPTS * GROUP} rollouts of its mixture with `teacher`, for each ratio "
        f"the same rollouts; {seeds} sets of rollouts, mean ± SE. {study.machine_text(runs.start['machine'])}",
        "",
        f"*cosine* is that of the mean gradient with the student's own (on-policy, {4 * batches} batches; its own "
        "line compares two halves of them); *norm* that of the mean; "
        "*deviation* of one batch from it; *between batches* the mean cosine of two batches, near 0 where a gradient "
        "is noise; *floor minus it* by how much the floor's cosine is larger, from the same rollouts. —: half of the "
        "student's own batches of one set have no reward, so that its own gradient is next to 0.",
        "",
        study.markdown_table(header, cells),
        "",
        "![cosine with the on-policy gradient and between batches](importance_ratios.png)",
        "",
    ])  # fmt: skip


def _plot(runs: Runs, path: Path) -> None:
    panels = [("student", "cosine"), *((name, "between_batches") for name in runs.names(STUDY.arms({})))]
    figure, axes = study.panels(len(panels), width=4.2, sharey=False)
    names = {"cosine": "cosine with the on-policy gradient", "between_batches": "cosine between two batches"}
    for axis, (name, column) in zip(axes, panels, strict=True):
        for style, ratio in zip(_STYLES, RATIOS, strict=True):
            found = [[run["rows"][f"{weight} {ratio}"][column] for weight in WEIGHTS] for run in runs.of(name)]
            study.band(axis, WEIGHTS, np.array(found, dtype=float), style, ratio)
        own = over_seeds(run["rows"][f"0.0 {ON_POLICY}"][column] or 0.0 for run in runs.of(name)).value
        axis.axhline(own, color=study.BLACK, linewidth=1, linestyle=":", label="on-policy")
        axis.set(title=f"`{name}`", xlabel="weight of the teacher", ylabel=names[column], xticks=WEIGHTS)
    figure.tight_layout()
    study.save(figure, path, legend_of=axes[0])


STUDY = study.Study(
    name="importance_ratios",
    options={"batches": BATCHES},
    arms=lambda settings: ["student", "base"],
    work=work,
    report=report,
)

if __name__ == "__main__":
    STUDY.main(__doc__)

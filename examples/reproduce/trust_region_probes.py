"""
The probes of `trust_region.py` and `off_task.py`: rollouts of an untrained student under budgets of the trust region.

* Support (the paper's Figure 7): log-probability of the rollouts under the teacher, their reward, and how well the
  teacher's support `mean_t(log p_T - log p_S)` tells right rollouts from wrong ones.
* Prefixes (Figure 4): rollouts cut after `t` tokens and continued by the teacher or by the student at temperature 1.
  A rollout that ended within its first `t` tokens has nothing to continue and counts as it is.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks._report import machine
from reproduce import study
from reproduce.study import HELD, NOT_HELD, REVERSE, Claim, Estimate, over_seeds, verdict
from testbed.evaluate import load_checkpoint
from testbed.task import MAX_NEW_TOKENS, build_prompt_dataset, format_and_answer_reward
from trl_blend.generation import TrustRegion, blended_generation
from trl_blend.trainers.trust_region_opd.diagnostics import auroc


BUDGETS = (0.0, 0.001, 0.005, 0.01, 0.02, 0.05)
TEACHER = "teacher"
PREFIX_BUDGETS = (0.0, 0.01, 0.05)
LENGTHS = (5, 10, 15, 20, 25)
ROLLOUTS = 2  # per prompt
BATCH = 250
SUPPORT = (
    *("teacher_logp", "reward", "auroc", "teacher_entropy", "teacher_weight", "teacher_feasible"),
    "kl_behavior_student",
)


class Rollouts(NamedTuple):
    """
    Completions of `N` left-padded prompts.

    Args:
        prompts, prompt_mask (`torch.Tensor` of shape `(N, P)`):
            Token ids and 1 where they are not padding.
        completions, mask (`torch.Tensor` of shape `(N, T)`):
            Token ids, and 1 up to and including the end of sequence.
        statistics (`dict[str, float]`):
            Means of the blend rule's statistics over the tokens of the completions.
    """

    prompts: Tensor
    prompt_mask: Tensor
    completions: Tensor
    mask: Tensor
    statistics: dict[str, float]


def padded(completions: Tensor, pad_token_id: int) -> Tensor:
    """Token ids widened to [`~testbed.task.MAX_NEW_TOKENS`] columns: `generate` stops at the longest of its batch."""
    return torch.nn.functional.pad(completions, (0, MAX_NEW_TOKENS - completions.size(1)), value=pad_token_id)


def truncate(rollouts: Rollouts, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Prompts with the first `length` tokens of their completions, where those have not ended by then.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Token ids and mask, both `(M, P + length)`, of the rollouts
        that go on after `length` tokens, and their rows `(M,)`.

    Raises:
        `ValueError`: If `length` is not below the width of the completions: one cut by the limit would look ended.
    """
    if not 0 <= length < rollouts.mask.size(1):
        raise ValueError(f"`length` is {length}, of completions of {rollouts.mask.size(1)} tokens. Set it below that.")
    rows = (rollouts.mask.sum(dim=1) > length).nonzero().squeeze(1)
    ids = torch.cat([rollouts.prompts[rows], rollouts.completions[rows, :length]], dim=1)
    mask = torch.cat([rollouts.prompt_mask[rows], rollouts.mask[rows, :length]], dim=1)
    return ids, mask, rows


class Prober:
    """
    Both models and the prompts of one sampling seed.

    Args:
        seed (`int`):
            Draws the training prompts and the rollouts.
        n (`int`):
            Number of prompts.
        student (`str`, *optional*, defaults to `"student"`):
            Checkpoint.
    """

    def __init__(self, seed: int, n: int, student: str = "student"):
        self.seed = seed
        self.student, self.tokenizer = load_checkpoint(student)
        self.teacher, _ = load_checkpoint(TEACHER)
        rows = build_prompt_dataset("train", n, seed)
        self.prompts, self.prompt_mask = study.left_padded(self.tokenizer, list(rows["prompt"]) * ROLLOUTS)
        self.answers = list(rows["answer"]) * ROLLOUTS

    def reward(self, completions: Tensor) -> list[float]:
        """1 for a completion that is right and in the format, given the completions of all prompts."""
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        return format_and_answer_reward(texts, self.answers)

    def rollouts(self, budget: float | str) -> Rollouts:
        """Rollouts at temperature 1 of the student (budget 0), of the trust region, or of the teacher."""
        torch.manual_seed(self.seed)
        completions, statistics = [], []
        for start in range(0, len(self.prompts), BATCH):
            ids, mask = self.prompts[start : start + BATCH], self.prompt_mask[start : start + BATCH]
            if budget in (TEACHER, 0.0):
                model = self.teacher if budget == TEACHER else self.student
                drawn, recorded = study.generate(model, ids, mask, MAX_NEW_TOKENS), {}
            else:
                rule = TrustRegion(float(budget))
                with blended_generation(self.student, self.teacher, rule, record=True) as session:
                    drawn = study.generate(self.student, ids, mask, MAX_NEW_TOKENS)
                recorded = session.records[0].statistics
            completions.append(padded(drawn, self.tokenizer.pad_token_id))
            statistics.append({name: padded(values, 0) for name, values in recorded.items()})
        tokens = torch.cat(completions)
        mask = study.completion_mask(tokens, self.tokenizer.eos_token_id)
        means = {
            name: (torch.cat([batch[name] for batch in statistics]) * mask).sum().item() / mask.sum().item()
            for name in statistics[0]
        }
        return Rollouts(self.prompts, self.prompt_mask, tokens, mask, means)

    def logps(self, model: Any, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Log-probability of the completions' tokens and entropy at their prefixes, both `(N, T)`, in nats."""
        parts = []
        for start in range(0, len(rollouts.prompts), BATCH):
            rows = slice(start, start + BATCH)
            completions = rollouts.completions[rows]
            ids = torch.cat([rollouts.prompts[rows], completions], dim=1)
            mask = torch.cat([rollouts.prompt_mask[rows], rollouts.mask[rows]], dim=1)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            kept = completions.size(1) + 1
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=kept).logits
            logprobs = logits[:, :-1].log_softmax(dim=-1)
            entropy = torch.special.entr(logprobs.exp()).sum(dim=-1)
            parts.append((logprobs.gather(-1, completions.unsqueeze(-1)).squeeze(-1), entropy))
        return torch.cat([logps for logps, _ in parts]), torch.cat([entropy for _, entropy in parts])

    def support(self, rollouts: Rollouts) -> dict[str, float]:
        """What Figure 7 shows of a policy's rollouts, with the teacher's entropy and the rule's statistics."""
        mask = rollouts.mask
        (teacher, entropy), (student, _) = (self.logps(model, rollouts) for model in (self.teacher, self.student))
        right = torch.tensor(self.reward(rollouts.completions))
        scores = ((teacher - student) * mask).sum(dim=1) / mask.sum(dim=1)
        return {
            "teacher_logp": ((teacher * mask).sum() / mask.sum()).item(),
            "reward": right.mean().item(),
            "auroc": auroc(scores, right),
            "teacher_entropy": ((entropy * mask).sum() / mask.sum()).item(),
            "length": mask.sum().item() / len(mask),
            **rollouts.statistics,
        }

    def continued(self, rollouts: Rollouts, length: int, model: Any) -> str:
        """Right rollouts of each prompt, one digit each, when `model` continues their first `length` tokens."""
        torch.manual_seed(10_000 * (self.seed + 1) + length)
        ids, mask, rows = truncate(rollouts, length)
        completions = rollouts.completions.clone()
        for start in range(0, len(ids), BATCH):
            some = slice(start, start + BATCH)
            drawn = study.generate(model, ids[some], mask[some], MAX_NEW_TOKENS - length)
            whole = torch.cat([rollouts.completions[rows[some], :length], drawn], dim=1)
            completions[rows[some]] = padded(whole, self.tokenizer.pad_token_id)
        rewards = torch.tensor(self.reward(completions)).view(ROLLOUTS, -1)
        return "".join(str(int(count)) for count in rewards.sum(dim=0))


@torch.no_grad()
def run(
    seed: int,
    n: int,
    student: str = "student",
    budgets: tuple[float, ...] = BUDGETS,
    prefix_budgets: tuple[float, ...] = PREFIX_BUDGETS,
) -> dict[str, Any]:
    """Both probes with one sampling seed; all budgets of the second, the first of which is 0, are in the first."""
    prober = Prober(seed, n, student)
    result: dict[str, Any] = {"seed": seed, "n_probe": n, "rollouts_per_prompt": ROLLOUTS, "machine": machine()}
    result |= {"support": {}, "prefixes": {}, "ended": {}}
    for budget in (*budgets, TEACHER):
        rollouts = prober.rollouts(budget)
        measured = prober.support(rollouts)
        result["support"][f"{budget}"] = {name: float(f"{value:.6g}") for name, value in measured.items()}
        if budget in prefix_budgets:
            models = {"teacher": prober.teacher, "student": prober.student}
            result["prefixes"][f"{budget}"] = {
                name: {str(length): prober.continued(rollouts, length, model) for length in LENGTHS}
                for name, model in models.items()
            }
            ended = {str(length): n * ROLLOUTS - len(truncate(rollouts, length)[2]) for length in LENGTHS}
            result["ended"][f"{budget}"] = ended
    return result


# Reading: a list of probes, one per seed


def support(probes: list[dict[str, Any]], policy: str, key: str) -> list[float]:
    """A quantity of the support probe, by seed; NaN where it was not measured."""
    return [probe["support"][policy].get(key, math.nan) for probe in probes]


def support_gap(probes: list[dict[str, Any]], first: str, second: str, key: str) -> Estimate:
    """A quantity of the support probe, one policy minus another, paired by seed."""
    return over_seeds(np.subtract(support(probes, first, key), support(probes, second, key)))


def success(probes: list[dict[str, Any]], policy: str, model: str, length: int) -> np.ndarray:
    """Success rate when `model` continues the prefixes of each prompt: prompts of all seeds, `(S * N,)`."""
    digits = "".join(probe["prefixes"][policy][model][str(length)] for probe in probes)
    return np.array([int(digit) for digit in digits]) / probes[0]["rollouts_per_prompt"]


def gain(probes: list[dict[str, Any]], policy: str, model: str, length: int) -> Estimate:
    """Success of a policy's prefixes minus that of the student's own, paired by prompt."""
    gaps = success(probes, policy, model, length) - success(probes, "0.0", model, length)
    return Estimate(float(gaps.mean()), float(gaps.std(ddof=1) / math.sqrt(gaps.size)))


def _budgets(probes: list[dict[str, Any]]) -> list[str]:
    return [policy for policy in probes[0]["support"] if policy != TEACHER]


def _cut(probes: list[dict[str, Any]]) -> tuple[list[str], list[int]]:
    """Budgets whose prefixes were continued, without the student's own, and the lengths."""
    prefixes = probes[0]["prefixes"]
    return [policy for policy in prefixes if policy != "0.0"], [int(length) for length in prefixes["0.0"]["teacher"]]


# The paper's claims


def trend(gaps: list[Estimate], overall: Estimate, sign: int = 1) -> str:
    """Verdict of a claim that a quantity rises (with `sign=-1`: falls): overall, and with no step back."""
    if verdict(overall, sign) == HELD and any(verdict(gap, sign) == REVERSE for gap in gaps):
        return f"{NOT_HELD}: it {'rises' if sign > 0 else 'falls'} overall but not at every step"
    return verdict(overall, sign)


def claims(probes: list[dict[str, Any]]) -> Iterator[Claim]:
    """Verdicts on Figures 7 and 4."""
    budgets, (policies, lengths) = _budgets(probes), _cut(probes)
    quantities = {
        "teacher_logp": ("The teacher's log-probability of the rollouts rises with the budget (Figure 7).", 1),
        "reward": ("The reward of the rollouts rises with the budget (Figure 7).", 1),
        "auroc": ("The AUROC of the teacher's support score falls as the budget rises (Figure 7).", -1),
    }
    for key, (claim, sign) in quantities.items():
        steps = [support_gap(probes, b, a, key) for a, b in zip(budgets, budgets[1:], strict=False)]
        overall = support_gap(probes, budgets[-1], budgets[0], key)
        values = "; ".join(f"{budget} {over_seeds(support(probes, budget, key))}" for budget in budgets)
        yield (
            claim,
            study.UNTESTABLE if math.isnan(overall.value) else trend(steps, overall, sign),
            f"By budget: {values}; from the first to the last {overall.signed()}. The teacher's own rollouts: "
            f"{over_seeds(support(probes, TEACHER, key))}.",
        )
    for model in ("teacher", "student"):
        gains = {(policy, n): gain(probes, policy, model, n) for policy in policies for n in lengths}
        numbers = ". ".join(
            f"Budget {policy}: " + ", ".join(f"{n} tokens {gains[policy, n].signed()}" for n in lengths)
            for policy in policies
        )
        yield (
            f"Trust-region prefixes give higher success than vanilla ones at all lengths when the {model} continues "
            "them (Figure 4).",
            study.all_of([verdict(one) for one in gains.values()]),
            f"{numbers}.",
        )


# Report


def report(probes: list[dict[str, Any]], folder: Path, stem: str = "trust_region") -> list[str]:
    """Write two figures, whose names begin with `stem`; returns Markdown lines."""
    policies, lengths = _cut(probes)
    all_policies = list(probes[0]["support"])
    _plot_support(probes, folder / f"{stem}_support.png")
    _plot_prefixes(probes, folder / f"{stem}_prefixes.png")
    n, per_prompt = probes[0]["n_probe"], probes[0]["rollouts_per_prompt"]
    longest = str(max(lengths))
    ended = [sum(probe["ended"][policy][longest] for probe in probes) for policy in probes[0]["ended"]]
    header = ["policy", "teacher log-prob", "reward", "AUROC", "teacher entropy", "mean β*", "teacher feasible", "KL"]
    rows = [
        [_shown(policy), *(over_seeds(support(probes, policy, key)) for key in SUPPORT)] for policy in all_policies
    ]
    prefixes = [
        [
            model,
            length,
            f"{success(probes, '0.0', model, length).mean():.3f}",
            *(gain(probes, policy, model, length).signed() for policy in policies),
        ]
        for model in ("teacher", "student")
        for length in lengths
    ]
    return [
        "## Rollouts at step 0 (Figure 7), without training",
        "",
        f"Sampling seeds {', '.join(str(probe['seed']) for probe in probes)}, each with its own {n} training "
        f"prompts and {per_prompt} rollouts of each at temperature 1, the same prompts for every policy; mean ± SE "
        "over seeds. Log-probabilities (under the teacher, per token of the rollout), entropies and KL (of the "
        "rollout policy to the student) in nats. AUROC: of `mean_t(log p_T - log p_S)`, right against wrong rollouts.",
        "",
        study.markdown_table(header, rows),
        "",
        f"![teacher support of the rollouts]({stem}_support.png)",
        "",
        "## Prefixes at step 0 (Figure 4), without training",
        "",
        "The same rollouts, cut after t tokens and continued at temperature 1. A rollout that ended within t tokens "
        f"has nothing to continue and counts as it is (at t = {longest}, {min(ended)} to {max(ended)} of "
        f"{n * per_prompt * len(probes)}). Differences are paired by prompt, ± SE over the {n * len(probes)} prompts "
        "of all seeds.",
        "",
        study.markdown_table(
            ["continued by", "t", "vanilla prefixes", *(f"{_shown(policy)}: difference" for policy in policies)],
            prefixes,
        ),
        "",
        f"![success of prefixes]({stem}_prefixes.png)",
        "",
    ]


def _shown(policy: str) -> str:
    return "teacher alone" if policy == TEACHER else "student (ε = 0)" if policy == "0.0" else f"ε = {policy}"


def _plot_support(probes: list[dict[str, Any]], path: Path) -> None:
    """The paper's Figure 7."""
    figure, (axis,) = study.panels(1, width=6.4)
    budgets = _budgets(probes)
    x, y, color = (
        [over_seeds(support(probes, b, key)) for b in budgets] for key in ("teacher_logp", "auroc", "reward")
    )
    bars = [e.error for e in y], [e.error for e in x]
    axis.errorbar([e.value for e in x], [e.value for e in y], *bars, color=study.GRAY, lw=1, capsize=2, zorder=1)
    points = axis.scatter([e.value for e in x], [e.value for e in y], c=[e.value for e in color], s=70, zorder=2)
    for budget, first, second in zip(budgets, x, y, strict=True):
        axis.annotate(f"ε = {float(budget):g}", (first.value, second.value), xytext=(6, 6), textcoords="offset points")
    figure.colorbar(points, label="mean reward")
    axis.margins(0.14)
    axis.locator_params(axis="x", nbins=6)
    axis.set_title("Rollouts of the untrained student (bars: ±1 SE over seeds)")
    axis.set(xlabel="mean log-probability per token under the teacher", ylabel="AUROC of the teacher's support")
    study.save(figure, path)


def _plot_prefixes(probes: list[dict[str, Any]], path: Path) -> None:
    """The paper's Figure 4, in differences of success."""
    figure, axes = study.panels(2)
    policies, lengths = _cut(probes)
    width = 0.8 / len(policies)
    for axis, model in zip(axes, ("teacher", "student"), strict=True):
        for index, (policy, color) in enumerate(zip(policies, (study.BLUE, study.PURPLE, study.SKY), strict=False)):
            gains = [gain(probes, policy, model, length) for length in lengths]
            places = np.arange(len(gains)) + (index + 0.5) * width - 0.4
            values, errors = [one.value for one in gains], [one.error for one in gains]
            axis.bar(places, values, width, yerr=errors, color=color, capsize=2, label=f"ε = {float(policy):g}")
        axis.set_xticks(range(len(lengths)), lengths)
        axis.axhline(0, color=study.BLACK, linewidth=0.8)
        axis.set(title=f"continued by the {model}", xlabel="length of the prefix in tokens")
    axes[0].set_ylabel("success minus that of vanilla prefixes (bars: ±1 SE)")
    axes[0].legend(frameon=False)
    study.save(figure, path)

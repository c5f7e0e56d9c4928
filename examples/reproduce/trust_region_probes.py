"""
The probes of `trust_region.py`: rollouts of the untrained student under budgets of the trust region, without training.

* Support (the paper's Figure 7): log-probability of the rollouts under the teacher, their reward, and how well the
  teacher's support `mean_t(log p_T - log p_S)` tells right rollouts from wrong ones.
* Prefixes (Figure 4): rollouts cut after `t` tokens and continued by the teacher or by the student at temperature 1.
  A rollout that ended within its first `t` tokens has nothing to continue and counts as it is.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reproduce.jobs import machine
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


def completion_mask(completions: Tensor, eos_token_id: int) -> Tensor:
    """1 up to and including the first end of sequence of each row of `(N, T)` token ids."""
    ends = completions == eos_token_id
    return (ends.cumsum(dim=1) - ends.long() == 0).long()


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
    """

    def __init__(self, seed: int, n: int):
        self.seed = seed
        self.student, self.tokenizer = load_checkpoint("student")
        self.teacher, _ = load_checkpoint(TEACHER)
        rows = build_prompt_dataset("train", n, seed)
        inputs = self.tokenizer.apply_chat_template(
            list(rows["prompt"]) * ROLLOUTS,
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
            tokenizer_kwargs={"padding_side": "left"},
        )
        self.prompts, self.prompt_mask = inputs["input_ids"], inputs["attention_mask"]
        self.answers = list(rows["answer"]) * ROLLOUTS

    def reward(self, completions: Tensor) -> list[float]:
        """1 for a completion that is right and in the format, given the completions of all prompts."""
        return format_and_answer_reward(
            self.tokenizer.batch_decode(completions, skip_special_tokens=True), self.answers
        )

    def _generate(self, model: PreTrainedModel, ids: Tensor, mask: Tensor, new_tokens: int) -> Tensor:
        output = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=new_tokens)
        return output[:, ids.size(1) :]

    def rollouts(self, budget: float | str) -> Rollouts:
        """Rollouts at temperature 1 of the student (budget 0), of the trust region, or of the teacher."""
        torch.manual_seed(self.seed)
        completions, statistics = [], []
        for start in range(0, len(self.prompts), BATCH):
            ids, mask = self.prompts[start : start + BATCH], self.prompt_mask[start : start + BATCH]
            if budget in (TEACHER, 0.0):
                model = self.teacher if budget == TEACHER else self.student
                drawn, recorded = self._generate(model, ids, mask, MAX_NEW_TOKENS), {}
            else:
                rule = TrustRegion(float(budget))
                with blended_generation(self.student, self.teacher, rule, record=True) as session:
                    drawn = self._generate(self.student, ids, mask, MAX_NEW_TOKENS)
                recorded = session.records[0].statistics
            completions.append(padded(drawn, self.tokenizer.pad_token_id))
            statistics.append({name: padded(values, 0) for name, values in recorded.items()})
        tokens = torch.cat(completions)
        mask = completion_mask(tokens, self.tokenizer.eos_token_id)
        means = {
            name: (torch.cat([batch[name] for batch in statistics]) * mask).sum().item() / mask.sum().item()
            for name in statistics[0]
        }
        return Rollouts(self.prompts, self.prompt_mask, tokens, mask, means)

    def logps(self, model: PreTrainedModel, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Log-probability of the completions' tokens and entropy at their prefixes, both `(N, T)`, in nats."""
        parts = []
        for start in range(0, len(rollouts.prompts), BATCH):
            rows = slice(start, start + BATCH)
            completions = rollouts.completions[rows]
            ids = torch.cat([rollouts.prompts[rows], completions], dim=1)
            mask = torch.cat([rollouts.prompt_mask[rows], rollouts.mask[rows]], dim=1)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            length = completions.size(1)
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=length + 1
            ).logits[:, :-1]
            logprobs = logits.log_softmax(dim=-1)
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

    def continued(self, rollouts: Rollouts, length: int, model: PreTrainedModel) -> str:
        """Right rollouts of each prompt, one digit each, when `model` continues their first `length` tokens."""
        torch.manual_seed(10_000 * (self.seed + 1) + length)
        ids, mask, rows = truncate(rollouts, length)
        completions = rollouts.completions.clone()
        for start in range(0, len(ids), BATCH):
            some = slice(start, start + BATCH)
            drawn = self._generate(model, ids[some], mask[some], MAX_NEW_TOKENS - length)
            whole = torch.cat([rollouts.completions[rows[some], :length], drawn], dim=1)
            completions[rows[some]] = padded(whole, self.tokenizer.pad_token_id)
        rewards = torch.tensor(self.reward(completions)).view(ROLLOUTS, -1)
        return "".join(str(int(count)) for count in rewards.sum(dim=0))


@torch.no_grad()
def run_probe(seed: int, n: int) -> dict[str, Any]:
    """Both probes with one sampling seed; returns what is written to its JSON file."""
    prober = Prober(seed, n)
    support: dict[str, dict[str, float]] = {}
    prefixes: dict[str, dict[str, dict[str, str]]] = {}
    ended: dict[str, dict[str, int]] = {}
    for budget in (*BUDGETS, TEACHER):
        rollouts = prober.rollouts(budget)
        support[f"{budget}"] = {name: float(f"{value:.6g}") for name, value in prober.support(rollouts).items()}
        if budget in PREFIX_BUDGETS:
            models = {"teacher": prober.teacher, "student": prober.student}
            prefixes[f"{budget}"] = {
                name: {str(length): prober.continued(rollouts, length, model) for length in LENGTHS}
                for name, model in models.items()
            }
            ended[f"{budget}"] = {str(length): n * ROLLOUTS - len(truncate(rollouts, length)[2]) for length in LENGTHS}
    return {
        "seed": seed,
        "n_probe": n,
        "rollouts_per_prompt": ROLLOUTS,
        "machine": machine(),
        "support": support,
        "prefixes": prefixes,
        "ended": ended,
    }


__all__ = ["BUDGETS", "LENGTHS", "PREFIX_BUDGETS", "TEACHER", "Prober", "Rollouts", "run_probe", "truncate"]

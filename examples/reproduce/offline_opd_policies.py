"""How far the policies of `offline_opd.py` are from each other, and how far live and offline gradients are apart."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reproduce import study
from testbed.evaluate import load_checkpoint
from testbed.task import MAX_NEW_TOKENS, build_prompt_dataset


PROMPTS = 200


class Rollouts(NamedTuple):
    """
    Rollouts at temperature 1.

    Args:
        ids, mask (`torch.Tensor` of shape `(B, P + T)`):
            Prompts, padded on the left, with completions, padded on the right.
        width (`int`):
            `P`.
    """

    ids: Tensor
    mask: Tensor
    width: int

    @property
    def tokens(self) -> Tensor:
        """Completion tokens, of shape `(B, T)`."""
        return self.ids[:, self.width :]

    @property
    def counts(self) -> Tensor:
        """Whether a completion token counts, of shape `(B, T)`."""
        return self.mask[:, self.width :].bool()


@torch.no_grad()
def roll_out(model: PreTrainedModel, prompts: list[Any], tokenizer: Any, seed: int) -> Rollouts:
    """One rollout per prompt at temperature 1 from the full vocabulary. Leaves the random state as it was."""
    ids, mask = study.left_padded(tokenizer, prompts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = study.generate(model, ids, mask, MAX_NEW_TOKENS)
    counts = study.completion_mask(drawn, tokenizer.eos_token_id)
    return Rollouts(torch.cat([ids, drawn], dim=1), torch.cat([mask, counts], dim=1), ids.shape[1])


def completion_logprobs(model: PreTrainedModel, rollouts: Rollouts) -> Tensor:
    """Log-probabilities of every token at the positions of the completions, of shape `(B, T, V)`."""
    positions = (rollouts.mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(input_ids=rollouts.ids, attention_mask=rollouts.mask, position_ids=positions).logits
    return logits[:, rollouts.width - 1 : -1].log_softmax(dim=-1)


def mean_kl(logprobs: Tensor, other: Tensor, counts: Tensor) -> float:
    """Mean over the tokens that count of the exact `KL(p‖q)`, in nats."""
    return float((logprobs.exp() * (logprobs - other)).sum(dim=-1)[counts].double().mean())


@torch.no_grad()
def policy_measures(model: PreTrainedModel, start: Path, teacher: Path, seed: int) -> dict[str, float]:
    """
    Exact reverse KL per token of a policy, on its own rollouts of test prompts, to the student that it started from
    (how far it went) and to the teacher (how far it has to go).
    """
    training = model.training
    model.eval()
    student, tokenizer = load_checkpoint(start)
    others = {"kl_to_start": student, "kl_to_teacher": load_checkpoint(teacher)[0]}
    rollouts = roll_out(model, list(build_prompt_dataset("test", PROMPTS)["prompt"]), tokenizer, seed)
    logprobs = completion_logprobs(model, rollouts)
    measures = {
        name: mean_kl(logprobs, completion_logprobs(other, rollouts), rollouts.counts)
        for name, other in others.items()
    }
    model.train(training)
    return measures


def gradient_discrepancy(
    model: PreTrainedModel,
    start: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: Any,
    prompts: list[Any],
    seed: int,
) -> dict[str, float]:
    r"""
    How far the expected gradient of offline distillation is from that of live distillation, at one student.

    Live: prefixes of fresh rollouts, the next token averaged over the student `p_θ`, which gives the gradient of
    `KL(p_θ‖p_T)`. Offline: prefixes of rollouts of the student that training started from, `p_0`, the next token
    averaged over that one:

    $$
    g = \frac{1}{B} \sum_b \frac{1}{|y_b|} \sum_t \sum_v q(v)\,
    \mathrm{sg}\left[\log p_\theta(v) - \log p_T(v)\right] \nabla \log p_\theta(v), \qquad q \in \{p_\theta, p_0\}
    $$

    Only the sampling of prefixes is left to chance. Its part is measured by a second live gradient on other rollouts
    of the same prompts.

    Returns:
        `dict[str, float]`: `cosine` and `relative` (norm of the difference by the norm of the live gradient) of
        offline against live, and the same of live against live with the prefix `chance_`; `norm` of the live one.
    """
    training = model.training
    model.eval()
    fresh = [roll_out(model, prompts, tokenizer, seed + draw) for draw in (0, 1)]
    stored = roll_out(start, prompts, tokenizer, seed + 2)
    live, other = (_expected_gradient(model, model, teacher, rollouts) for rollouts in fresh)
    offline = _expected_gradient(model, start, teacher, stored)
    model.train(training)
    return {
        "cosine": float(torch.cosine_similarity(offline, live, dim=0)),
        "relative": float((offline - live).norm() / live.norm()),
        "chance_cosine": float(torch.cosine_similarity(other, live, dim=0)),
        "chance_relative": float((other - live).norm() / live.norm()),
        "norm": float(live.norm()),
    }


def _expected_gradient(
    model: PreTrainedModel, sampler: PreTrainedModel, teacher: PreTrainedModel, rollouts: Rollouts
) -> Tensor:
    """One flat vector; the gradients of `model` are left as they were."""
    with torch.no_grad():
        teacher_logprobs = completion_logprobs(teacher, rollouts)
        probs = completion_logprobs(sampler, rollouts).exp()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        logprobs = completion_logprobs(model, rollouts)
        weights = probs * (logprobs.detach() - teacher_logprobs)
        per_token = (weights * logprobs).sum(dim=-1) * rollouts.counts
        loss = (per_token.sum(dim=1) / rollouts.counts.sum(dim=1)).mean()
        gradients = torch.autograd.grad(loss, parameters)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])

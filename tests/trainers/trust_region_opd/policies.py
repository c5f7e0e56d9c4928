"""
What the rollouts and the loss of a recorded batch should be, token by token from full logits in float64.

Imports nothing of `trl_blend`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests import reference_divergences, reference_trust_region
from tests.tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer
from tests.trainers import forced, runs


Eos = tuple[int, list[int]] | None
Policy = Callable[[list[float], list[float]], list[float]]


def padded_models(student_rows: int, teacher_rows: int) -> dict[str, Any]:
    """Arguments of [`runs.build_opd`] for two models of one tokenizer whose output layers are padded differently."""
    models = [tiny_model(seed=seed, vocab_size=rows) for seed, rows in enumerate((student_rows, teacher_rows))]
    for model in models:
        model.generation_config.eos_token_id = list(runs.EOS_IDS)
    return {
        "student": models[0],
        "teacher": models[1],
        "trainer_kwargs": {"processing_class": tiny_tokenizer()},
    }


def eos_pair(teacher_ids: list[int]) -> Eos:
    """Stop event of the tiny student (`runs.EOS_IDS`, the tokenizer's first) and a teacher with other ids."""
    merged = sorted({*runs.EOS_IDS, *teacher_ids} - {runs.EOS_IDS[0]})
    return runs.EOS_IDS[0], merged


def token_logits(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """`(V,)` logits at every token of the batch, row by row, of the tokens that both models have."""
    return [token[:VOCAB_SIZE] for row in forced.completion_logits(model, inputs) for token in row]


@torch.no_grad()
def logprob_rows(model: nn.Module, inputs: dict[str, Any], temperature: float, eos: Eos = None) -> list[list[float]]:
    """Tempered log-probabilities with one stop event, `(V,)` at every token of the batch."""
    return [
        reference_divergences.canonical_logprobs(row, temperature, eos).tolist() for row in token_logits(model, inputs)
    ]


def emitted(inputs: dict[str, Any]) -> list[int]:
    return [token for row in forced.tokens(inputs) for token in row]


def kept(values: Tensor, inputs: dict[str, Any]) -> list[float]:
    """Per-token values of decoding, `(B, T)` with or without columns past the longest row, row by row."""
    lengths = inputs["completion_mask"].sum(1).tolist()
    return [value for row, length in zip(values.tolist(), lengths, strict=True) for value in row[:length]]


def trust_region(budget: float) -> Policy:
    def policy(student: list[float], teacher: list[float]) -> list[float]:
        weight = reference_trust_region.largest_weight(student, teacher, budget, halvings=30)
        return reference_trust_region.path(student, teacher, weight)

    return policy


def fixed_weight(weight: float) -> Policy:
    return lambda student, teacher: reference_trust_region.path(student, teacher, weight)


def chernoff() -> Policy:
    def policy(student: list[float], teacher: list[float]) -> list[float]:
        weight = reference_trust_region.chernoff_weight(student, teacher, halvings=30)
        return reference_trust_region.path(student, teacher, weight)

    return policy


def contrastive(alpha: float, beta: float) -> Policy:
    def policy(student: list[float], teacher: list[float]) -> list[float]:
        probs = reference_trust_region.contrastive_distribution(teacher, student, alpha, beta)
        return torch.tensor(probs, dtype=torch.float64).log().tolist()

    return policy


def speculative(top_k: int, teacher_temperature: float) -> Policy:
    def policy(student: list[float], teacher: list[float]) -> list[float]:
        probs = reference_trust_region.speculative_distribution(student, teacher, top_k, teacher_temperature)
        return torch.tensor(probs, dtype=torch.float64).log().tolist()

    return policy


def mean(values: list[float]) -> float:
    return sum(values) / len(values)

"""
The independent reference of the generation tests: full forward passes without cache or padding, and float64 loops.

Imports nothing of `trl_blend`.
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from tests.tiny import EOS_ID, PAD_ID


PROMPT_LENGTHS = (7, 4, 6)
SAMPLING = {"do_sample": True, "top_k": 0, "max_new_tokens": 6, "pad_token_id": PAD_ID}
# The argument and the field that hold the cache: transformers 5.24 renamed them
_ARGUMENTS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = next(name for name in ("cache", "past_key_values") if name in _ARGUMENTS)
DETAILS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


def left_padded_prompts(pad_id: int, lengths: tuple[int, ...] = PROMPT_LENGTHS, seed: int = 0) -> dict[str, Tensor]:
    """Prompts of random tokens from 5 to 55, left-padded. The pad id also occurs inside a prompt, unmasked."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    input_ids = torch.full((len(lengths), width), pad_id)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        input_ids[row, width - length :] = torch.randint(5, 56, (length,), generator=generator)
        mask[row, width - length :] = 1
    input_ids[0, 2] = pad_id
    return {"input_ids": input_ids, "attention_mask": mask}


@torch.no_grad()
def teacher_forced_logits(model: Any, sequences: Tensor, prompt_mask: Tensor, vocab_size: int | None = None) -> Tensor:
    """
    `(B, T, V)` logits that precede each generated token: one forward pass per row, alone and without its padding.

    With `vocab_size`, truncated or padded with `-inf` to it.
    """
    expand = sequences.shape[0] // prompt_mask.shape[0]
    prompt_mask = prompt_mask.repeat_interleave(expand, dim=0)
    width, rows = prompt_mask.shape[1], []
    for sequence, row_mask in zip(sequences, prompt_mask, strict=True):
        padding = int((row_mask == 0).sum())
        logits = model(input_ids=sequence[None, padding:], use_cache=False).logits[0]
        rows.append(logits[width - padding - 1 : -1])
    logits = torch.stack(rows)
    if vocab_size is not None:
        missing = max(0, vocab_size - logits.shape[-1])
        logits = torch.nn.functional.pad(logits[..., :vocab_size], (0, missing), value=-math.inf)
    return logits


def mixture_logprobs(models_logits: list[Tensor], weights: list[float], temperature: float, space: str) -> Tensor:
    """Normalised log-probabilities of the mixture, in float64, straight from the definitions."""
    scaled = [logits.double() / temperature for logits in models_logits]
    if space == "logits":
        product = sum(w * z for w, z in zip(weights, scaled, strict=True))
        return product - product.logsumexp(-1, keepdim=True)
    probs = sum(w * z.exp() / z.exp().sum(-1, keepdim=True) for w, z in zip(weights, scaled, strict=True))
    return probs.log()


def loop_kl(p: list[float], q: list[float]) -> float:
    """`KL(p‖q)` in nats of two probability vectors."""
    total = 0.0
    for p_v, q_v in zip(p, q, strict=True):
        if p_v == 0.0:
            continue
        if q_v == 0.0:
            return math.inf
        total += p_v * (math.log(p_v) - math.log(q_v))
    return total


def loop_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(z - top) for z in logits]
    return [power / math.fsum(powers) for power in powers]


def sample(model, prompts, seed=0, **settings):
    torch.manual_seed(seed)
    return model.generate(**prompts, **{**SAMPLING, **settings})


def recorded_logps(models, output, prompts, weight=0.4, temperature=1.0):
    """Teacher-forced behaviour log-probabilities of the emitted tokens, and the mask of those before a row's end."""
    sequences = getattr(output, "sequences", output)
    logits = [teacher_forced_logits(model, sequences, prompts["attention_mask"]) for model in models]
    logprobs = mixture_logprobs(logits, [1.0 - weight, weight], temperature, "logits")
    tokens = sequences[:, -logprobs.shape[1] :]
    ended = (tokens == EOS_ID).int().cumsum(1)
    return logprobs.gather(-1, tokens[..., None]).squeeze(-1).float(), (ended == 0) | (ended.cumsum(1) == 1)


def assert_recorded(record, models, output, prompts, **settings):
    expected, valid = recorded_logps(models, output, prompts, **settings)
    torch.testing.assert_close(record.behavior_logps[valid], expected[valid], rtol=0, atol=1e-5)

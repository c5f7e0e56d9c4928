"""
Log-probabilities that a model in this process gives to tokens that exist already.

Hidden states are taken from the backbone and projected in tiles ([`~trl_blend.ops.score_tokens`]), so that
`(B, T, V)` logits are never built.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from trl_blend import _compat
from trl_blend.errors import ConfigError, TokenizerMismatchError, UnsupportedError
from trl_blend.generation.partner import evaluation_mode, innermost_model
from trl_blend.ops.mixed_head import LMHead
from trl_blend.ops.token_scores import TokenLogProbs, score_tokens
from trl_blend.teacher.sampling import OnRows


@dataclass(frozen=True)
class TokenScores:
    """
    What a model thinks of one completion: log-probabilities in nats, at temperature 1, over its whole vocabulary.

    Args:
        logps (`numpy.ndarray` of shape `(T,)`):
            Log-probability of every completion token.
        topk_ids (`numpy.ndarray` of shape `(T, K)`, *optional*):
            The `K` most probable tokens, the last one replaced by the sampled token where that is not among them.
        topk_logps (`numpy.ndarray` of shape `(T, K)`, *optional*):
            Their log-probabilities.
        tail_logmass (`numpy.ndarray` of shape `(T,)`, *optional*):
            Logarithm of the probability of all other tokens together.
    """

    logps: np.ndarray
    topk_ids: np.ndarray | None = None
    topk_logps: np.ndarray | None = None
    tail_logmass: np.ndarray | None = None


def score_sequences(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    top_k: int | None = None,
    tokens_per_batch: int = 16384,
    on_rows: OnRows | None = None,
) -> list[TokenScores]:
    """
    Log-probability of every completion token given its prefix: one forward pass, no sampling, no gradient.

    Rows of similar length share a batch, padded on the right, of at most `tokens_per_batch` tokens with the padding
    (always at least one row). The model runs in evaluation mode and is left as it was.

    Args:
        model ([`~transformers.PreTrainedModel`] or `peft.PeftModel`):
            Causal language model.
        prompt_ids (`Sequence[Sequence[int]]`):
            Token ids of the prompts, at least one per row.
        completion_ids (`Sequence[Sequence[int]]`):
            Token ids of the completions, at least one per row.
        top_k (`int`, *optional*):
            Number of token ids to keep at every position, see [`~trl_blend.ops.score_tokens`].
        tokens_per_batch (`int`, *optional*, defaults to `16384`):
            Budget of one forward pass.
        on_rows (`Callable[[int, int], object]`, *optional*):
            Called after every forward pass with its number of rows and of completion tokens.

    Returns:
        `list[TokenScores]`: One per row, in the order given, in float32 (float64 for a float64 model).

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a row is empty or longer than the model's context, or a setting is out
            of range.
        [`~trl_blend.errors.TokenizerMismatchError`]: If a token id is beyond the model's vocabulary.
        [`~trl_blend.errors.UnsupportedError`]: If the output layer is not a plain linear layer.
    """
    inner: Any = innermost_model(model, "model")
    _check_rows(inner, prompt_ids, completion_ids)
    if tokens_per_batch < 1:
        raise ConfigError(f"`tokens_per_batch={tokens_per_batch}` must be at least 1.")
    _check_head(inner)
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    scores: dict[int, TokenScores] = {}
    with torch.no_grad(), evaluation_mode(inner), _fused_head(inner):
        for batch in length_sorted_batches(lengths, tokens_per_batch):
            rows = [[*prompt_ids[index], *completion_ids[index]] for index in batch]
            starts = [len(prompt_ids[index]) for index in batch]
            scores.update(zip(batch, _score_batch(inner, rows, starts, top_k), strict=True))
            if on_rows is not None:
                on_rows(len(batch), sum(len(completion_ids[index]) for index in batch))
    return [scores[index] for index in range(len(lengths))]


def length_sorted_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """
    Indices of rows in batches of similar length, longest first, each of at most `tokens_per_batch` padded tokens.

    A row longer than the budget gets a batch of its own.
    """
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * width > tokens_per_batch:
            batches.append([])
            width = lengths[index]
        batches[-1].append(index)
    return batches


def _score_batch(
    model: Any, rows: Sequence[Sequence[int]], starts: Sequence[int], top_k: int | None
) -> list[TokenScores]:
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
        labels[index, start : len(row)] = ids[index, start : len(row)]
    scored: list[TokenLogProbs] = []

    def score(head: LMHead, targets: Tensor, temperature: float, outputs: tuple[str, ...]) -> tuple[Any, ...]:
        chosen = (labels[:, 1:] != -100).flatten().to(targets.device)
        placeholder = torch.zeros(targets.shape, device=targets.device)
        # TRL hands over all positions, or only the labelled ones (kernels on an accelerator)
        if head.hidden.shape[0] == chosen.numel():
            head, targets = head._replace(hidden=head.hidden[chosen]), targets[chosen]
        scored.append(score_tokens(head, targets, top_k, gather_parameters=_compat.gather_lm_head))
        return placeholder, None, None, None, None

    device = model.get_input_embeddings().weight.device
    with _compat.fused_log_prob_function(score):
        model(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device), fused_lm_head=True)
    columns = [None if column is None else column.cpu().numpy() for column in scored[0]]
    ends = np.cumsum([len(row) - start for row, start in zip(rows, starts, strict=True)])
    split = [[None] * len(rows) if column is None else np.split(column, ends[:-1]) for column in columns]
    return [TokenScores(*parts) for parts in zip(*split, strict=True)]


@contextmanager
def _fused_head(model: Any) -> Iterator[None]:
    """TRL's fused head on `model`, taken off on exit: a caller's model is left as it was."""
    own = model.__dict__.get("forward")
    _compat.add_fused_lm_head(model, temperature=1.0, cast_lm_head_to_fp32=False)
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _check_rows(model: Any, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> None:
    if len(prompt_ids) != len(completion_ids):
        raise ConfigError(
            f"`prompt_ids` has {len(prompt_ids)} rows and `completion_ids` {len(completion_ids)}. Pass one completion "
            "per prompt."
        )
    limit, rows = context_length(model.config), _num_tokens(model)
    for index, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        for name, ids in (("prompt_ids", prompt), ("completion_ids", completion)):
            if len(ids) == 0:
                raise ConfigError(f"`{name}[{index}]` is empty. A score needs a prefix and a token: drop the row.")
            if not 0 <= min(ids) <= max(ids) < rows:
                bad = max(ids) if max(ids) >= rows else min(ids)
                raise TokenizerMismatchError(
                    f"`{name}[{index}]` holds token id {bad}, but the model has the {rows} tokens 0 to {rows - 1}. "
                    "Score with a model that shares the tokenizer of the data."
                )
        if limit is not None and len(prompt) + len(completion) > limit:
            raise ConfigError(
                f"Row {index} has {len(prompt)} prompt and {len(completion)} completion tokens, more than the model's "
                f"context of {limit} (`max_position_embeddings`). Drop the row, or use a model with a longer context."
            )


def _num_tokens(model: Any) -> int:
    sizes = [model.config.get_text_config().vocab_size]
    sizes += [getattr(model.get_input_embeddings(), "num_embeddings", sizes[0])]
    return min(sizes)


def _check_head(model: Any) -> None:
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise UnsupportedError(
            f"`model` is a {type(model).__name__} without an output layer (`get_output_embeddings()`), so its "
            "log-probabilities cannot be computed from hidden states. Use a causal language model."
        )
    if hasattr(head, "base_layer") or not head.weight.dtype.is_floating_point:
        raise UnsupportedError(
            f"The output layer of `model` is a {type(head).__name__} with an adapter or quantized weights, which the "
            "fused log-probabilities cannot read. Merge the adapter (`merge_and_unload`), or keep `lm_head` out of "
            "the quantization (`llm_int8_skip_modules`)."
        )


def context_length(config: PretrainedConfig) -> int | None:
    """Number of positions that a model was built for, `None` where its configuration does not say."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None

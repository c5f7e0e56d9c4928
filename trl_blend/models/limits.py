"""What a model takes: the positions it was built for, and the rows of its vocabulary that are tokens."""

from collections.abc import Iterable, Iterator
from typing import Any


_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
# Their factor says by how much the positions of the configuration are stretched; those of others are in it already
_STRETCHING = {"linear", "dynamic", "yarn"}
# What tokenizers write for "no limit"
_NO_LIMIT = 10**12


def context_length(config: Any, tokenizer: Any = None) -> int | None:
    """
    Number of positions that a model was built for, or where its configuration gives none, the `model_max_length` of
    its tokenizer. `None` where nothing says it, as for recurrent models.

    A sliding window does not count: it bounds what a token sees, not where a text ends. Of several fields that give a
    length, as with RoPE scaling, the longest one counts: a model is not refused what one of them allows.
    """
    text = config.get_text_config()
    lengths = [value for name in (*_LENGTHS, "model_max_length") if _is_length(value := getattr(text, name, None))]
    declared = max(lengths, default=0)
    for scaling in _rope_scalings(text):
        factor, original = scaling.get("factor") or 1.0, scaling.get("original_max_position_embeddings")
        if _is_length(original):
            lengths.append(int(original * factor))
        elif scaling.get("rope_type", scaling.get("type")) in _STRETCHING and declared:
            lengths.append(int(declared * factor))
    if not lengths and _is_length(value := getattr(tokenizer, "model_max_length", None)):
        lengths.append(value)
    return max(lengths, default=None)


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _NO_LIMIT


def _rope_scalings(config: Any) -> Iterator[dict[str, Any]]:
    """Every RoPE scaling of a configuration: one, or one per kind of layer."""
    value = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    yield from ([value] if "factor" in value else [one for one in value.values() if isinstance(one, dict)])


def eos_token_ids(*holders: Any) -> list[int]:
    """End-of-sequence tokens of the first of some configurations and tokenizers that names any."""
    for holder in holders:
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return sorted({ids} if isinstance(ids, int) else set(ids))
    return []


def num_token_ids(tokenizer: Any, eos_token_ids: Iterable[int] = ()) -> int:
    """
    One more than the largest id that is a token of a tokenizer or processor, added tokens and `eos_token_ids`, which a
    tokenizer may not know, included. Rows of a model beyond it are padding.

    This is not `len(tokenizer)`, which counts the tokens: ids may be left out below it.
    """
    vocabulary = getattr(tokenizer, "tokenizer", tokenizer).get_vocab()
    return max([*vocabulary.values(), *eos_token_ids], default=-1) + 1


def vocabulary_rows(model: Any) -> int:
    """
    Number of ids that a model can read and give: the rows that its embedding and its output layer both have. Of a
    configuration it is the `vocab_size`, which a resized model may not have any more.
    """
    sizes = []
    for find, name in (("get_input_embeddings", "num_embeddings"), ("get_output_embeddings", "out_features")):
        layer = getattr(model, find, lambda: None)()
        if isinstance(size := getattr(layer, name, None), int):
            sizes.append(size)
    return min(sizes) if sizes else getattr(model, "config", model).get_text_config().vocab_size

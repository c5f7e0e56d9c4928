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
    Number of positions that a model was built for. `None` where nothing says it, as for recurrent models.

    A sliding window does not count: it bounds what a token sees, not where a text ends.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Configuration of the model. Where several of its fields give a length, as with RoPE scaling, the longest
            one counts: a model is not refused what one of them allows.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its `model_max_length` counts where the configuration gives none.
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


def num_token_ids(tokenizer: Any, eos_token_ids: Iterable[int] = ()) -> int:
    """
    One more than the largest id that is a token, added tokens included. Rows of a model beyond it are padding.

    This is not `len(tokenizer)`, which counts the tokens: ids may be left out below it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            The tokenizer, or a processor that holds it.
        eos_token_ids (`Iterable[int]`, *optional*):
            Tokens that end the model's texts, which its tokenizer may not know.
    """
    vocabulary = getattr(tokenizer, "tokenizer", tokenizer).get_vocab()
    return max([*vocabulary.values(), *eos_token_ids], default=-1) + 1


def vocabulary_rows(model: Any) -> int:
    """
    Number of ids that a model can read and give: the rows that its embedding and its output layer both have. Of a
    configuration it is the `vocab_size`, which a resized model may not have any more.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~transformers.PretrainedConfig`]):
            The model, or its configuration.
    """
    sizes = []
    for find, name in (("get_input_embeddings", "num_embeddings"), ("get_output_embeddings", "out_features")):
        layer = getattr(model, find, lambda: None)()
        if isinstance(size := getattr(layer, name, None), int):
            sizes.append(size)
    return min(sizes) if sizes else getattr(model, "config", model).get_text_config().vocab_size

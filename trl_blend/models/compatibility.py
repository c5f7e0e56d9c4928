"""
Checks that a partner's logits can be combined with the student's: same tokens at the same ids, a causal language
model.

Each check returns nothing or raises. They read attributes only and load nothing, so they run before any weights are.
"""

from typing import Any

from trl_blend.errors import TokenizerMismatchError, UnsupportedError


def check_tokenizers(
    student_tokenizer: Any, partner_tokenizer: Any, *, partner_name: str = "teacher_model", remedy: str = ""
) -> None:
    """
    Check that two tokenizers map the same tokens to the same ids, added tokens included.

    Special roles may differ: base and chat models of one family use different tokens as EOS or padding, over the same
    map. Not compared: how text is split into tokens, and the chat template.

    Args:
        student_tokenizer, partner_tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            The tokenizers, or processors that hold them.
        partner_name (`str`, *optional*, defaults to `"teacher_model"`):
            Name of the argument that holds the partner, for the error message.
        remedy (`str`, *optional*, defaults to `""`):
            Sentence to end the error message with.

    Raises:
        [`~trl_blend.errors.TokenizerMismatchError`]: If an id is a different token in the two maps, or is a token in
            only one of them. The message names the first such id and both tokens.
    """
    student_vocab, partner_vocab = _vocab(student_tokenizer), _vocab(partner_tokenizer)
    if student_vocab == partner_vocab:
        return
    student_tokens, partner_tokens = _tokens_by_id(student_vocab), _tokens_by_id(partner_vocab)
    differing = [
        index for index in student_tokens | partner_tokens if student_tokens.get(index) != partner_tokens.get(index)
    ]
    first = min(differing)
    raise TokenizerMismatchError(
        f"The tokenizer of `{partner_name}` is not the student's: id {first} is {_name(student_tokens.get(first))} "
        f"for the student and {_name(partner_tokens.get(first))} for `{partner_name}` ({len(differing)} of "
        f"{len(student_tokens | partner_tokens)} ids differ). Use a `{partner_name}` with the student's tokenizer, "
        "usually a model of the same family; if only added tokens differ, add the same ones to both in the same order."
        f"{remedy and ' ' + remedy}"
    )


def check_vocab_sizes(
    student_config_vocab: int, partner_config_vocab: int, tokenizer_len: int, *, partner_name: str = "teacher_model"
) -> None:
    """
    Check that both output layers have a row for every token.

    Checkpoints of one family pad their output layers to different sizes; rows beyond the tokenizer's ids are no
    tokens, so their number may differ.

    Args:
        student_config_vocab, partner_config_vocab (`int`):
            `config.vocab_size` of the models.
        tokenizer_len (`int`):
            `len(tokenizer)` of the tokenizer they share, added tokens included.
        partner_name (`str`, *optional*, defaults to `"teacher_model"`):
            Name of the argument that holds the partner, for the error message.

    Raises:
        [`~trl_blend.errors.TokenizerMismatchError`]: If a model has fewer rows than the tokenizer has tokens.
    """
    for name, rows in (("model", student_config_vocab), (partner_name, partner_config_vocab)):
        if rows < tokenizer_len:
            raise TokenizerMismatchError(
                f"`{name}` has `config.vocab_size={rows}`, fewer rows than the tokenizer's {tokenizer_len} tokens. "
                f"Resize it (`resize_token_embeddings({tokenizer_len})`) and train the new rows, or use the tokenizer "
                f"that `{name}` was trained with."
            )


def check_decoder_only(config: Any, name: str) -> None:
    """Refuse the configuration of an encoder-decoder model, held by the argument `name`."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"`{name}` is an encoder-decoder model (model_type={config.model_type!r}), which does not continue a "
            "token sequence. Use a decoder-only causal language model."
        )


def check_partner_model(model: Any, name: str = "teacher_model") -> None:
    """
    Check that a partner, held by the argument `name`, is a decoder-only language model that can generate.

    Raises:
        [`~trl_blend.errors.UnsupportedError`]: If it is an encoder-decoder model, or not a causal language model with
            `generate`.
    """
    kind = type(model).__name__
    check_decoder_only(getattr(model, "config", None), name)
    if "_repository" in getattr(vars(model).get("generate"), "keywords", {}):  # of an export's own `generate`
        raise UnsupportedError(
            f"`{name}` is a mixed policy of several models, whose forward pass is that of its student alone. Pass one "
            "of the models that its mixing.json names."
        )
    can_generate = getattr(model, "can_generate", None)
    if not callable(getattr(model, "generate", None)) or (callable(can_generate) and not can_generate()):
        raise UnsupportedError(
            f"`{name}` is a {kind}, which cannot generate text. Load it with `AutoModelForCausalLM.from_pretrained`."
        )


def _vocab(tokenizer: Any) -> dict[str, int]:
    return dict(getattr(tokenizer, "tokenizer", tokenizer).get_vocab())


def _tokens_by_id(vocab: dict[str, int]) -> dict[int, tuple[str, ...]]:
    tokens: dict[int, tuple[str, ...]] = {}
    for token, index in sorted(vocab.items()):  # an id may have several spellings
        tokens[index] = (*tokens.get(index, ()), token)
    return tokens


def _name(tokens: tuple[str, ...] | None) -> str:
    return "no token" if tokens is None else " or ".join(repr(token) for token in tokens)

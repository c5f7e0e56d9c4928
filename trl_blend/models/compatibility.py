"""
Checks that a partner's logits can be combined with the student's: same tokens at the same ids, a causal language
model.

Each check returns nothing or raises. They read attributes only and load nothing, so they run before any weights are.
"""

from typing import Any

from trl_blend.errors import TokenizerMismatchError, UnsupportedError
from trl_blend.models.limits import num_token_ids


def check_tokenizers(
    student_tokenizer: Any, partner_tokenizer: Any, *, partner_name: str = "teacher_model", remedy: str = ""
) -> None:
    """
    Check that two tokenizers, or those of two processors, map the same tokens to the same ids, added tokens included.

    Special roles may differ: base and chat models of one family use different tokens as EOS or padding, over the same
    map. Not compared: how text is split into tokens, and the chat template. `partner_name` is the argument that holds
    the partner, and `remedy` a sentence to end the message with.

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
    student_rows: int, partner_rows: int, tokenizer: Any = None, *, partner_name: str = "teacher_model"
) -> None:
    """
    Check that a partner, held by the argument `partner_name`, has a row for every token of the student, and both one
    for the special tokens, which occur in every run.

    Checkpoints of one family pad their output layers to different sizes; rows (see
    [`~trl_blend.models.limits.vocabulary_rows`]) beyond the tokenizer's ids are no tokens, so their number may differ.
    Without a tokenizer every row of the student counts as one. A tokenizer may have ids beyond the student's rows too,
    such as the image tokens of relatives: they are only refused where they occur.

    Raises:
        [`~trl_blend.errors.TokenizerMismatchError`]: If a row is missing.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    tokens = student_rows if tokenizer is None else min(num_token_ids(tokenizer), student_rows)
    if partner_rows < tokens:
        raise TokenizerMismatchError(
            f"`{partner_name}` has {partner_rows} rows, fewer than the {tokens} tokens of `model`. Use a model of the "
            "student's family, with a row for each of its tokens."
        )
    for name, rows in (("model", student_rows), (partner_name, partner_rows)):
        for role in ("eos_token", "pad_token", "bos_token"):
            token_id = getattr(tokenizer, f"{role}_id", None)
            if token_id is not None and token_id >= rows:
                raise TokenizerMismatchError(
                    f"`{name}` has {rows} rows, and the tokenizer's `{role}` {getattr(tokenizer, role)!r} has id "
                    f"{token_id}. Use the tokenizer that `{name}` was trained with, or resize the model "
                    f"(`resize_token_embeddings({token_id + 1})`) and train the new rows."
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
    own_generate = getattr(model, "__dict__", {}).get("generate")
    if "_repository" in getattr(own_generate, "keywords", {}):  # that of an export
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

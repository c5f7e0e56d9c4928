"""Which tokenizer and which chat template a model has."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ADDED_TOKEN_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")

# What two templates must render alike to be exchangeable for a plain conversation
_SYSTEM = {"role": "system", "content": "Be brief."}
_TURNS = [
    {"role": "user", "content": "2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": " And 3 - 2?\n"},
]
_PROBES = ([_TURNS[0]], [_SYSTEM, _TURNS[0]], _TURNS, [_SYSTEM, *_TURNS])
_DATE = "26 Jul 2024"  # templates that print the date take it from here


@dataclass(frozen=True)
class TokenizerFingerprint:
    """
    Identity of a tokenizer: what decides which id a token has.

    Left out on purpose: normaliser, pre-tokeniser and decoder. Scored rollouts hold token ids, and ids are compared.

    Args:
        sha256 (`str`):
            SHA-256 over `parts`.
        parts (`dict[str, str]`):
            SHA-256 of the vocabulary (token to id, added tokens included), the merges, the added tokens (with their
            flags) and the special tokens (role to token).
        vocab_size (`int`):
            Number of tokens, added ones included.
        eos_token_id, pad_token_id (`int`, *optional*):
            Ids of these two roles.
    """

    sha256: str
    parts: dict[str, str]
    vocab_size: int
    eos_token_id: int | None
    pad_token_id: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TokenizerFingerprint":
        return cls(**{**fields, "parts": dict(fields["parts"])})


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def fingerprint_tokenizer(tokenizer: Any) -> TokenizerFingerprint:
    """
    Fingerprint of a tokenizer (of a processor: of its tokenizer).

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Fast or slow.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    vocabulary = tokenizer.get_vocab()
    added = [
        [index, *(getattr(token, flag) for flag in _ADDED_TOKEN_FLAGS)]
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
    ]
    roles = {role: getattr(tokenizer, role, None) for role in _ROLES}
    parts = {
        "vocabulary": digest(vocabulary),
        "merges": digest(_merges(tokenizer)),
        "added_tokens": digest(added),
        "special_tokens": digest({role: str(token) for role, token in roles.items() if token is not None}),
    }
    return TokenizerFingerprint(
        digest(parts), parts, len(vocabulary), tokenizer.eos_token_id, getattr(tokenizer, "pad_token_id", None)
    )


def _merges(tokenizer: Any) -> list[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return []
    merges = json.loads(backend.to_str())["model"].get("merges") or []
    # Older versions of tokenizers write a merge as one string
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def chat_template_sha256(tokenizer: Any) -> str | None:
    """SHA-256 of the text of the chat template(s); `None` without one."""
    template = getattr(tokenizer, "chat_template", None)
    return digest(template) if template else None


def chat_rendering_sha256(tokenizer: Any) -> str | None:
    """
    SHA-256 of what the chat template makes of a few fixed conversations: two templates whose texts differ, by TRL's
    generation markers for instance, may be the same where it matters. `None` without a template.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    return digest([_render(tokenizer, messages) for messages in _PROBES])


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string=_DATE)
    except Exception as error:  # a template raises whatever it likes, for want of a system role for instance
        return f"raised {type(error).__name__}"

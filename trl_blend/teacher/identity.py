"""
Identity of a model: weights, adapter, tokenizer, chat template, end-of-sequence ids and the configuration that decides
what the weights compute.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trl_blend.teacher.tokenizer_identity import TokenizerFingerprint
from trl_blend.teacher.weights import WeightsFingerprint


@dataclass(frozen=True)
class AdapterFingerprint:
    """
    Identity of a PEFT adapter.

    Args:
        weights ([`WeightsFingerprint`]):
            The adapter's own tensors.
        config_sha256 (`str`):
            SHA-256 of the settings that change what the adapter computes (rank, scaling, target modules, …).
        base_name (`str`, *optional*):
            The base model it names.
        is_neutral (`bool`):
            Whether the adapter changes nothing yet (a LoRA whose `B` matrices are all zero), so that the model is its
            base.
    """

    weights: WeightsFingerprint
    config_sha256: str
    base_name: str | None
    is_neutral: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "AdapterFingerprint":
        return cls(**{**fields, "weights": WeightsFingerprint.from_dict(fields["weights"])})


@dataclass(frozen=True)
class ModelIdentity:
    """
    Which model it is. A folder and a model in memory that hold the same weights have the same fingerprints.

    Args:
        name (`str`, *optional*):
            Hub id or folder, as it was given, or as the model in memory remembers it.
        commit (`str`, *optional*):
            Commit of the Hub repository. A model in memory has the one it was loaded from.
        weights ([`WeightsFingerprint`], *optional*):
            Weights; with an adapter, those of its base. `None` where they could not be hashed, see `unhashed`.
        adapter ([`AdapterFingerprint`], *optional*):
            PEFT adapter.
        tokenizer ([`TokenizerFingerprint`], *optional*):
            Tokenizer; `None` where none was found.
        chat_template_sha256 (`str`, *optional*):
            SHA-256 of the chat template's text.
        chat_rendering_sha256 (`str`, *optional*):
            SHA-256 of what the template makes of a few fixed conversations.
        eos_token_ids (`list[int]`):
            Ids that end a sequence: of the generation config, else of the model config, else of the tokenizer. Sorted.
        config (`dict[str, Any]`):
            Fields of the configuration that change what the weights compute.
        unhashed (`str`, *optional*):
            Why `weights` is `None`.
    """

    name: str | None = None
    commit: str | None = None
    weights: WeightsFingerprint | None = None
    adapter: AdapterFingerprint | None = None
    tokenizer: TokenizerFingerprint | None = None
    chat_template_sha256: str | None = None
    chat_rendering_sha256: str | None = None
    eos_token_ids: list[int] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    unhashed: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON value. Empty entries are kept, so that every identity has the same keys."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelIdentity":
        """The identity that [`to_dict`] wrote. Keys it does not know, of a newer release, are ignored."""
        known = {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
        parts = {"weights": WeightsFingerprint, "adapter": AdapterFingerprint, "tokenizer": TokenizerFingerprint}
        for name, part in parts.items():
            if known.get(name) is not None:
                known[name] = part.from_dict(known[name])  # type: ignore[attr-defined]
        return cls(**known)

    def describe(self) -> str:
        """One line for messages and cards: name, commit, the first digits of the fingerprints."""
        text = self.name or "a model without a name"
        if self.commit:
            text += f"@{self.commit[:8]}"
        digests = [f"weights {self.weights.sha256[:12]}" if self.weights else "weights not hashed"]
        if self.adapter is not None:
            digests.append(f"adapter {self.adapter.weights.sha256[:12]}")
        return f"{text} ({', '.join(digests)})"

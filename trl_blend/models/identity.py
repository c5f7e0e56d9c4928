"""
Identity of a model: weights, adapter, tokenizer, chat template, end-of-sequence ids and the configuration that decides
what the weights compute; and whether two models are the same.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class WeightsFingerprint:
    """
    Identity of a set of weights.

    Args:
        sha256 (`str`):
            SHA-256 over (name, shape, values) of every tensor in the order of the names. Values are taken as float32,
            so the same values stored in another dtype have the same fingerprint. A float64 tensor is rounded to
            float32 and integers are taken as they are.
        sha256_bfloat16 (`str`):
            The same over the values rounded to bfloat16. It equals `sha256` exactly when every value is a bfloat16
            number already: that is how a bfloat16 copy of float32 weights is recognised.
        dtypes (`dict[str, int]`):
            Number of elements stored in each dtype. Not part of the fingerprint.
        num_parameters (`int`):
            Number of elements, tied ones once.
    """

    sha256: str
    sha256_bfloat16: str
    dtypes: dict[str, int]
    num_parameters: int

    @property
    def is_bfloat16(self) -> bool:
        """Whether every value is a bfloat16 number, in whatever dtype it is stored."""
        return self.sha256 == self.sha256_bfloat16


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
        known = _known(cls, fields)
        if known.get("weights"):
            known["weights"] = WeightsFingerprint(**_known(WeightsFingerprint, known["weights"]))
        if known.get("adapter"):
            adapter = _known(AdapterFingerprint, known["adapter"])
            weights = WeightsFingerprint(**_known(WeightsFingerprint, adapter["weights"]))
            known["adapter"] = AdapterFingerprint(**{**adapter, "weights": weights})
        if known.get("tokenizer"):
            known["tokenizer"] = TokenizerFingerprint(**_known(TokenizerFingerprint, known["tokenizer"]))
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


def _known(kind: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in kind.__dataclass_fields__ if name in fields}


def compare_weights(first: WeightsFingerprint, second: WeightsFingerprint) -> str:
    """
    How two sets of weights are related.

    Returns:
        `"same"`; `"bfloat16_copy"` where one is the other rounded to bfloat16; `"equal_in_bfloat16"` where neither is,
        but both round to the same (two float32 models that differ a little); else `"different"`.
    """
    if first.sha256 == second.sha256:
        return "same"
    if first.sha256_bfloat16 != second.sha256_bfloat16:
        return "different"
    return "bfloat16_copy" if first.is_bfloat16 or second.is_bfloat16 else "equal_in_bfloat16"


_WEIGHTS = {
    "different": "the weights",
    "equal_in_bfloat16": "the weights (equal after rounding both to bfloat16: an update that small, or noise)",
}


@dataclass(frozen=True)
class Comparison:
    """
    Args:
        relation (`str`):
            `"same"`, `"bfloat16_copy"` (one is the other rounded to bfloat16), `"different"` or `"unknown"`.
        by (`str`):
            `"weights"` where fingerprints were compared, `"name"` where there was nothing but names and commits.
        differences (`list[str]`):
            What differs.
    """

    relation: Literal["same", "bfloat16_copy", "different", "unknown"]
    by: Literal["weights", "name"]
    differences: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"relation": self.relation, "compared_by": self.by, "differences": list(self.differences)}


def compare_identities(first: ModelIdentity, second: ModelIdentity) -> Comparison:
    """
    Compare weights, adapters and what the configuration makes of them; names and commits where the weights of one of
    the two were not hashed. An adapter that changes nothing yet counts as none.

    Names decide little: the same name may stand for other weights, and two names of which one is a folder may stand
    for the same ones (`"unknown"`).
    """
    differences, rounded = _compare_adapters(_effective(first.adapter), _effective(second.adapter))
    for key in sorted(first.config.keys() & second.config.keys()):
        if first.config[key] != second.config[key]:
            differences.append(f"config.{key} ({first.config[key]} and {second.config[key]})")
    if first.weights is not None and second.weights is not None:
        relation = compare_weights(first.weights, second.weights)
        rounded |= relation == "bfloat16_copy"
        if relation in _WEIGHTS:
            differences.insert(0, _WEIGHTS[relation])
        if differences:
            return Comparison("different", "weights", differences)
        return Comparison("bfloat16_copy" if rounded else "same", "weights")
    if differences:
        return Comparison("different", "weights", differences)
    return _compare_names(first, second)


def _effective(adapter: AdapterFingerprint | None) -> AdapterFingerprint | None:
    return None if adapter is None or adapter.is_neutral else adapter


def _compare_adapters(first: AdapterFingerprint | None, second: AdapterFingerprint | None) -> tuple[list[str], bool]:
    if first is None or second is None:
        return ([] if first is second else ["an adapter that only one of them has"]), False
    relation = compare_weights(first.weights, second.weights)
    differences = ["the adapter's weights"] if relation in _WEIGHTS else []
    if first.config_sha256 != second.config_sha256:
        differences.append("the adapter's settings")
    return differences, relation == "bfloat16_copy"


def _compare_names(first: ModelIdentity, second: ModelIdentity) -> Comparison:
    names = [first.name, second.name]
    if not (first.name and second.name):
        return Comparison("unknown", "name")
    if first.name.lower() != second.name.lower():
        relation: Literal["different", "unknown"] = "different" if all(map(_is_hub_id, names)) else "unknown"
        return Comparison(relation, "name", [f"the names ({first.name} and {second.name})"])
    if first.commit and second.commit and first.commit != second.commit:
        return Comparison("different", "name", [f"the commits ({first.commit} and {second.commit})"])
    return Comparison("same", "name")


def _is_hub_id(name: str | None) -> bool:
    return bool(name) and str(name).count("/") == 1 and str(name)[0] not in "./~"

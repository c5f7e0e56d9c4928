"""Finding out the identity of a checkpoint or of a model in memory."""

import datetime
import json
import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from transformers import AutoConfig, PretrainedConfig

from trl_blend.errors import ConfigError
from trl_blend.models.checkpoints import Checkpoint, LazyTensor, find_checkpoint, weight_tensors
from trl_blend.models.identity import AdapterFingerprint, ModelIdentity, TokenizerFingerprint, digest
from trl_blend.models.limits import eos_token_ids
from trl_blend.models.loading import find_generation_config, find_tokenizer
from trl_blend.models.weights import (
    ADAPTER_LAYOUT,
    fingerprint_tensors,
    hashable_state,
    layout_of,
    unhashable_reason,
)
from trl_blend.models.wrappers import AdapterConfig


# Fields that change what the same weights compute. Compared where both sides have them.
_FORWARD_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "layer_types",
    "sliding_window",
    "rms_norm_eps",
    "layer_norm_epsilon",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "logit_scale",
    "logits_scaling",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "num_experts_per_tok",
    "norm_topk_prob",
)


def identify_model(
    model: Any,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    hash_weights: bool = True,
    local_files_only: bool = False,
) -> ModelIdentity:
    """
    Identity of a checkpoint or of a model in memory.

    A checkpoint is read tensor by tensor from its files, without building the model. A model in memory is hashed
    under the names that `save_pretrained` would give. Of an adapter, base and adapter are hashed apart.

    What cannot be hashed: weights that are quantised in memory (bitsandbytes and the like), offloaded, sharded by FSDP
    or DeepSpeed, or into which an adapter has been merged in place. Such a model has `weights=None` and the reason in
    `unhashed`; identify the checkpoint that it was loaded from instead. A checkpoint that is stored quantised is
    hashed as stored, so it is another model than its original. A float16 copy of other than float16 values is not
    recognised as a copy.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Folder, Hub id or model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer. By default the one beside the checkpoint (for a model in memory: beside the one that it was
            loaded from), if there is one.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub id.
        hash_weights (`bool`, *optional*, defaults to `True`):
            Whether to read the weights at all: most of the time goes there.
        local_files_only (`bool`, *optional*, defaults to `False`):
            Whether to look for a Hub id in the cache only.

    Returns:
        [`ModelIdentity`]

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the name is neither a folder nor a repository that can be had, or
            weights are missing there.
        [`~trl_blend.errors.UnsupportedError`]: If several adapters are active.
    """
    if isinstance(model, (str, os.PathLike)):
        checkpoint = find_checkpoint(os.fspath(model), revision, local_files_only)
        return _identify_checkpoint(checkpoint, tokenizer, hash_weights)
    return _identify_in_memory(model, tokenizer, hash_weights)


def _identify_checkpoint(checkpoint: Checkpoint, tokenizer: Any, hash_weights: bool) -> ModelIdentity:
    tokenizer = tokenizer or _found(find_tokenizer, checkpoint)
    if checkpoint.is_adapter:
        return _identify_adapter(checkpoint, tokenizer, hash_weights)
    if not (checkpoint.folder / "config.json").is_file():
        raise ConfigError(f"{checkpoint.name!r} is no model: it has neither config.json nor adapter_config.json.")
    # Of a checkpoint with code of its own the fields are there all the same
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except ValueError:
        config = PretrainedConfig.from_pretrained(checkpoint.folder)
    weights = fingerprint_tensors(weight_tensors(checkpoint), layout_of(config)) if hash_weights else None
    return ModelIdentity(
        name=checkpoint.name,
        commit=checkpoint.commit,
        weights=weights,
        **_tokenizer_fields(tokenizer),
        eos_token_ids=eos_token_ids(_found(find_generation_config, checkpoint), config, tokenizer),
        config=_forward_config(config),
        unhashed=None if hash_weights else "not asked for",
    )


def _identify_adapter(checkpoint: Checkpoint, tokenizer: Any, hash_weights: bool) -> ModelIdentity:
    settings = AdapterConfig.of_folder(checkpoint.folder)
    base, unhashed = ModelIdentity(), None
    try:
        base = identify_model(
            settings.base_name or "",
            revision=settings.base_revision,
            hash_weights=hash_weights,
            local_files_only=checkpoint.local_files_only,
        )
    except ConfigError as error:
        unhashed = f"the adapter's base model cannot be read: {error}"
    tensors: dict[str, LazyTensor] = weight_tensors(checkpoint, "adapter_model") if hash_weights else {}
    own_eos = eos_token_ids(_found(find_generation_config, checkpoint))
    return ModelIdentity(
        name=checkpoint.name,
        commit=checkpoint.commit,
        weights=base.weights,
        adapter=_fingerprint_adapter(settings, tensors) if hash_weights else None,
        **_tokenizer_fields(tokenizer),
        eos_token_ids=own_eos or base.eos_token_ids or eos_token_ids(tokenizer),
        config=base.config,
        unhashed=unhashed or base.unhashed,
    )


def _identify_in_memory(model: Any, tokenizer: Any, hash_weights: bool) -> ModelIdentity:
    name, commit = getattr(model.config, "_name_or_path", None) or None, getattr(model.config, "_commit_hash", None)
    settings = AdapterConfig.of_model(model)
    if tokenizer is None and name:
        try:
            tokenizer = _found(find_tokenizer, find_checkpoint(name, commit, local_files_only=True))
        except ConfigError:
            tokenizer = None  # the name is of another machine; weights and configuration are here
    unhashed = unhashable_reason(model) if hash_weights else "not asked for"
    weights = adapter = None
    if hash_weights:
        base, own = hashable_state(model, settings, with_base=unhashed is None)
        weights = fingerprint_tensors(base, layout_of(model.config)) if unhashed is None else None
        adapter = _fingerprint_adapter(settings, own) if settings is not None else None
    return ModelIdentity(
        name=name,
        commit=commit,
        weights=weights,
        adapter=adapter,
        **_tokenizer_fields(tokenizer),
        eos_token_ids=eos_token_ids(getattr(model, "generation_config", None), model.config, tokenizer),
        config=_forward_config(model.config),
        unhashed=unhashed,
    )


def _found(find: Callable[..., Any], checkpoint: Checkpoint) -> Any:
    """What there is without running code of the checkpoint's own; `None` where that code is needed."""
    local = checkpoint.local_files_only
    try:
        return find(str(checkpoint.folder), "model", trust_remote_code=False, local_files_only=local)
    except ConfigError:
        return None


def _fingerprint_adapter(settings: AdapterConfig, tensors: dict[str, LazyTensor]) -> AdapterFingerprint:
    weights = fingerprint_tensors(tensors, ADAPTER_LAYOUT)
    return AdapterFingerprint(weights, settings.sha256, settings.base_name, settings.is_neutral(tensors))


def _forward_config(config: Any) -> dict[str, Any]:
    fields = config.get_text_config().to_dict()
    return {name: fields[name] for name in _FORWARD_FIELDS if fields.get(name) is not None}


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
_DATE = "26 Jul 2024"  # templates that print the date take it from here, or from the clock


class _StoppedClock(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "_StoppedClock":
        return cls(2024, 7, 26, tzinfo=tz)

    today = utcnow = now


def chat_rendering_sha256(tokenizer: Any) -> str | None:
    """
    SHA-256 of what a tokenizer's chat template makes of a few fixed conversations; `None` without a template. Two
    templates whose texts differ, by TRL's generation markers for instance, may render the same.

    The clock stands still meanwhile, so that a template which prints the date renders the same on any day.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    # What a template calls for the date, `strftime_now` in transformers, reads this module's clock
    with patch("transformers.utils.chat_template_utils.datetime", _StoppedClock):
        return digest([_render(tokenizer, probe) for probe in _PROBES])


def _tokenizer_fields(tokenizer: Any) -> dict[str, Any]:
    template = getattr(tokenizer, "chat_template", None)
    return {
        "tokenizer": None if tokenizer is None else fingerprint_tokenizer(tokenizer),
        "chat_template_sha256": digest(template) if template else None,
        "chat_rendering_sha256": chat_rendering_sha256(tokenizer),
    }


def fingerprint_tokenizer(tokenizer: Any) -> TokenizerFingerprint:
    """Fingerprint of a tokenizer, fast or slow; of a processor, that of its tokenizer."""
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


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string=_DATE)
    except Exception as error:  # a template raises whatever it likes, for want of a system role for instance
        return f"raised {type(error).__name__}"

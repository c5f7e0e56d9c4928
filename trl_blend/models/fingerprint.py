"""Finding out the identity of a checkpoint or of a model in memory."""

import os
from typing import Any

from trl_blend.errors import ConfigError
from trl_blend.models.checkpoints import Checkpoint, find_checkpoint, weight_tensors
from trl_blend.models.identity import AdapterFingerprint, ModelIdentity
from trl_blend.models.model_state import ADAPTER_LAYOUT, AdapterConfig, hashable_state, unhashable_reason
from trl_blend.models.tokenizer_identity import (
    TokenizerFingerprint,
    chat_rendering_sha256,
    chat_template_sha256,
    fingerprint_tokenizer,
)
from trl_blend.models.weights import WeightsFingerprint, compare_weights, fingerprint_tensors, layout_of


__all__ = [
    "AdapterFingerprint",
    "ModelIdentity",
    "TokenizerFingerprint",
    "WeightsFingerprint",
    "compare_weights",
    "identify_model",
]

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
    tokenizer = tokenizer or _load_tokenizer(checkpoint)
    if checkpoint.is_adapter:
        return _identify_adapter(checkpoint, tokenizer, hash_weights)
    config = _load_config(checkpoint)
    weights = fingerprint_tensors(weight_tensors(checkpoint), layout_of(config)) if hash_weights else None
    return ModelIdentity(
        name=checkpoint.name,
        commit=checkpoint.commit,
        weights=weights,
        **_tokenizer_fields(tokenizer),
        eos_token_ids=_eos_token_ids(_generation_config(checkpoint), config, tokenizer),
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
    adapter = None
    if hash_weights:
        tensors = weight_tensors(checkpoint, "adapter_model")
        adapter = AdapterFingerprint(
            fingerprint_tensors(tensors, ADAPTER_LAYOUT),
            settings.sha256,
            settings.base_name,
            settings.is_neutral(tensors),
        )
    own = _tokenizer_fields(tokenizer) if tokenizer is not None else _inherited(base)
    generation_config = _generation_config(checkpoint)
    eos = _eos_token_ids(generation_config, None, tokenizer) if generation_config else base.eos_token_ids
    return ModelIdentity(
        name=checkpoint.name,
        commit=checkpoint.commit,
        weights=base.weights,
        adapter=adapter,
        **own,
        eos_token_ids=eos or _eos_token_ids(None, None, tokenizer),
        config=base.config,
        unhashed=unhashed or base.unhashed,
    )


def _identify_in_memory(model: Any, tokenizer: Any, hash_weights: bool) -> ModelIdentity:
    name = getattr(model.config, "_name_or_path", None) or None
    adapter_config = AdapterConfig.of_model(model)
    if tokenizer is None and name:
        try:
            commit = getattr(model.config, "_commit_hash", None)
            tokenizer = _load_tokenizer(find_checkpoint(name, commit, local_files_only=True))
        except ConfigError:
            tokenizer = None  # the name is of another machine; weights and configuration are here
    unhashed = unhashable_reason(model) if hash_weights else "not asked for"
    weights = adapter = None
    if hash_weights:
        base, own = hashable_state(model, adapter_config, with_base=unhashed is None)
        weights = fingerprint_tensors(base, layout_of(model.config)) if unhashed is None else None
        if adapter_config is not None:
            neutral = adapter_config.is_neutral(own)
            adapter = AdapterFingerprint(
                fingerprint_tensors(own, ADAPTER_LAYOUT), adapter_config.sha256, adapter_config.base_name, neutral
            )
    return ModelIdentity(
        name=name,
        commit=getattr(model.config, "_commit_hash", None),
        weights=weights,
        adapter=adapter,
        **_tokenizer_fields(tokenizer),
        eos_token_ids=_eos_token_ids(getattr(model, "generation_config", None), model.config, tokenizer),
        config=_forward_config(model.config),
        unhashed=unhashed,
    )


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    if not any((checkpoint.folder / file).is_file() for file in ("tokenizer_config.json", "tokenizer.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except ValueError:
        return None  # code of the checkpoint's own: its identity is unknown unless it is given


def _load_config(checkpoint: Checkpoint) -> Any:
    from transformers import AutoConfig, PretrainedConfig

    if not (checkpoint.folder / "config.json").is_file():
        raise ConfigError(f"{checkpoint.name!r} is no model: it has neither config.json nor adapter_config.json.")
    try:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except ValueError:  # code of the checkpoint's own: the fields are there all the same
        return PretrainedConfig.from_pretrained(checkpoint.folder)


def _generation_config(checkpoint: Checkpoint) -> Any:
    from transformers import GenerationConfig

    if not (checkpoint.folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(checkpoint.folder)


def _tokenizer_fields(tokenizer: Any) -> dict[str, Any]:
    return {
        "tokenizer": None if tokenizer is None else fingerprint_tokenizer(tokenizer),
        "chat_template_sha256": chat_template_sha256(tokenizer),
        "chat_rendering_sha256": chat_rendering_sha256(tokenizer),
    }


def _inherited(base: ModelIdentity) -> dict[str, Any]:
    return {name: getattr(base, name) for name in ("tokenizer", "chat_template_sha256", "chat_rendering_sha256")}


def _eos_token_ids(generation_config: Any, config: Any, tokenizer: Any) -> list[int]:
    for holder in (generation_config, config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return sorted({ids} if isinstance(ids, int) else set(ids))
    return []


def _forward_config(config: Any) -> dict[str, Any]:
    fields = config.get_text_config().to_dict()
    return {name: fields[name] for name in _FORWARD_FIELDS if fields.get(name) is not None}

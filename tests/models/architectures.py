"""A tiny model of every causal language model that transformers has, from its configuration class alone."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel


# Set where a configuration has a field of that name
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "decoder_start_token_id", "bos_token_id"), 2),
    **dict.fromkeys(("sliding_window", "attention_window_size", "rotary_dim", "state_size", "mamba_d_state"), 4),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups", "n_groups", "eos_token_id"), 1),
    "vocab_size": 64,
    "v_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "pad_token_id": 0,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "is_decoder": True,
}


def tiny_architecture(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A model of `model_type` with random weights, biases and scales among them; `overrides` of its configuration."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    sizes = {name: value for name, value in _SIZES.items() if hasattr(default, name)} | overrides
    config = config_class(**{name: value for name, value in sizes.items() if value is not ...})
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = model_class._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.dim() > 1 else 0.1
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model

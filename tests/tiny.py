"""
Tiny random models and an offline tokenizer for the tests: float32, two layers, 64 tokens, seconds rather than minutes.

The weights are drawn with a large standard deviation, so that next-token distributions are far from uniform and a test
that compares two of them can fail.
"""

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)


SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>")
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz +-*/=.,:!?()[]{}<>\\'\n"
VOCAB_SIZE = 64
PAD_ID, EOS_ID = 0, 1
ARCHITECTURES = ("qwen3", "llama", "gemma2", "gemma3", "gpt2")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '<assistant>' }}{% generation %}{{ message['content'] + '<eos>' }}{% endgeneration %}"
    "{%- else -%}{{ '<' + message['role'] + '>' + message['content'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}"
)

_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "pad_token_id": PAD_ID,
    "eos_token_id": EOS_ID,
    "bos_token_id": None,
}
# A window shorter than the shortest test sequence: a cache that ignores it gives other logits
_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True}),
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "mistral": (MistralConfig, {"tie_word_embeddings": False, "sliding_window": 4}),
    "gemma2": (
        Gemma2Config,
        {**_SLIDING, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0, "attn_implementation": "eager"},
    ),
    "gemma3": (Gemma3TextConfig, {**_SLIDING, "query_pre_attn_scalar": 8, "tie_word_embeddings": False}),
    "gpt2": (GPT2Config, {}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "tie_word_embeddings": False},
    ),
}


def tiny_model(arch: str = "qwen3", seed: int = 0, vocab_size: int = VOCAB_SIZE, **overrides: Any) -> PreTrainedModel:
    """
    A random causal language model in evaluation mode, the same weights for the same arguments.

    Args:
        arch (`str`, *optional*, defaults to `"qwen3"`):
            `"qwen3"`, `"llama"`, `"gemma2"` (sliding window, soft-capped logits), `"gemma3"` (sliding window),
            `"qwen3_moe"` (experts) or `"gpt2"` (learned absolute positions: the only one to notice that all positions
            are shifted).
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global random state is left as it was.
        vocab_size (`int`, *optional*, defaults to `64`):
            Rows of the embedding and of the output layer.
        overrides:
            Fields of the configuration.
    """
    config_class, fields = _CONFIGS[arch]
    config = config_class(vocab_size=vocab_size, **{**_SHAPE, **fields, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_lora(model: PreTrainedModel, seed: int = 0, **overrides: Any) -> Any:
    """`model` with a LoRA adapter of random, non-zero weights on all linear layers, in evaluation mode."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **overrides}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()


def tiny_tokenizer(**overrides: Any) -> PreTrainedTokenizerFast:
    """
    A tokenizer of 64 tokens, one per character: `<pad>` is 0, `<eos>` is 1. Text is lower-cased; what is unknown
    becomes `<unk>`. The chat template has generation markers.

    Args:
        overrides:
            Arguments of [`~transformers.PreTrainedTokenizerFast`], such as `eos_token="<pad>"`.
    """
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    assert len(vocab) == VOCAB_SIZE
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?m:.)"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    settings = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "padding_side": "left", **overrides}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"], **settings
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

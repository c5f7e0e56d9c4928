"""How long a model's texts may be, and which of its rows are tokens."""

import pytest
from transformers import AutoConfig, GPT2Config, LlamaConfig, MambaConfig, Qwen3Config

from tests.tiny import tiny_model, tiny_tokenizer
from trl_blend.models.limits import context_length, num_token_ids, vocabulary_rows


def llama(**settings):
    return LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=1, **settings)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (llama(max_position_embeddings=4096), 4096),
        (GPT2Config(n_positions=77), 77),
        (Qwen3Config(max_position_embeddings=4096, use_sliding_window=True, sliding_window=128), 4096),
        (
            llama(
                max_position_embeddings=64, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
            ),
            256,
        ),
        (
            llama(
                max_position_embeddings=32768,
                rope_parameters={
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                    "rope_theta": 1e4,
                },
            ),
            131072,
        ),
        (
            llama(
                max_position_embeddings=131072,  # stretched already
                rope_parameters={
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "rope_theta": 1e4,
                },
            ),
            131072,
        ),
    ],
)
def test_context_length(config, length):
    assert context_length(config) == length


def test_without_a_length_the_tokenizer_is_asked():
    config, tokenizer = MambaConfig(vocab_size=8, hidden_size=8), tiny_tokenizer()
    assert context_length(config) is None
    assert context_length(config, tokenizer) is None  # "no limit" is a large number
    tokenizer.model_max_length = 99
    assert context_length(config, tokenizer) == 99
    assert context_length(llama(max_position_embeddings=512), tokenizer) == 512


def test_a_configuration_with_a_text_model():
    text = {"model_type": "gemma3_text", "max_position_embeddings": 222, "vocab_size": 33}
    config = AutoConfig.for_model("gemma3", text_config=text)
    assert context_length(config) == 222 and vocabulary_rows(config) == 33


def test_token_ids_are_counted_by_the_largest():
    tokenizer = tiny_tokenizer()
    assert num_token_ids(tokenizer) == 64 == num_token_ids(tokenizer, [1])
    assert num_token_ids(tokenizer, [1, 70]) == 71
    tokenizer.add_tokens(["<new>"])
    assert num_token_ids(tokenizer) == 65
    holes = tiny_tokenizer()
    holes.get_vocab = lambda: {"a": 0, "b": 40}
    assert num_token_ids(holes) == 41


def test_rows_are_those_of_a_resized_model():
    model = tiny_model()
    model.resize_token_embeddings(70)
    model.config.vocab_size = 64
    assert vocabulary_rows(model) == 70 and vocabulary_rows(model.config) == 64

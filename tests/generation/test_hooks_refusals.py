import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache

from tests.generation.teacher_forced import CACHE, sample
from tests.tiny import tiny_model
from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.generation import LogitMixing, blended_generation


RULE = LogitMixing(0.4)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_beams": 2}, "beam"),
        ({"num_beams": 2, "do_sample": False}, "num_beams=2"),
        ({"prompt_lookup_num_tokens": 2}, "assisted"),
        ({"do_sample": False, "top_k": 4, "penalty_alpha": 0.6}, "contrastive"),
        ({"custom_generate": lambda *args, **kwargs: None}, "custom_generate"),
        ({"cache_implementation": "paged"}, "paged"),
        ({"position_ids": torch.zeros(3, 7, dtype=torch.long)}, "position_ids"),
        ({"token_type_ids": torch.zeros(3, 7, dtype=torch.long)}, "token_type_ids"),
        ({"inputs_embeds": torch.zeros(3, 7, 32)}, "inputs_embeds"),
    ],
)
def test_decoding_that_would_be_wrong_is_refused(student, teacher, prompts, settings, message):
    with blended_generation(student, teacher, RULE), pytest.raises(UnsupportedError, match=message):
        sample(student, prompts, **settings)


def test_assistant_model_is_refused(student, teacher, prompts):
    with blended_generation(student, teacher, RULE), pytest.raises(UnsupportedError, match="assisted"):
        sample(student, {name: values[:1] for name, values in prompts.items()}, assistant_model=tiny_model("llama"))


def test_prompt_that_the_teacher_cannot_see_is_refused(student, teacher, prompts):
    cache = DynamicCache(config=student.config)
    student(**prompts, **{CACHE: cache}, use_cache=True)
    with blended_generation(student, teacher, RULE):
        with pytest.raises(UnsupportedError, match=f"`{CACHE}` already holds 7 positions"):
            sample(student, prompts, **{CACHE: cache})
        sample(student, prompts, **{CACHE: DynamicCache(config=student.config)})  # an empty one is fine
        with pytest.raises(UnsupportedError, match="attention_mask"):
            sample(student, {**prompts, "input_ids": prompts["input_ids"][:, -1:]})
        with pytest.raises(UnsupportedError, match="input_ids"):
            student.generate(bos_token_id=3)
        with pytest.raises(UnsupportedError, match="generate_batch"):
            student.generate_batch([[5, 6]])


def test_models_that_cannot_be_blended_are_refused(student):
    seq2seq = BartForConditionalGeneration(
        BartConfig(
            vocab_size=64,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=1,
            decoder_attention_heads=1,
        )
    )
    for arguments in ((seq2seq, student), (student, seq2seq)):
        with pytest.raises(UnsupportedError, match="encoder-decoder"), blended_generation(*arguments, RULE):
            pass
    wrapped = torch.nn.Sequential(student)
    for arguments in ((wrapped, student), (student, wrapped), (student, [student.model])):
        with pytest.raises(UnsupportedError, match="unwrap"), blended_generation(*arguments, RULE):
            pass
    with pytest.raises(ConfigError, match="empty"), blended_generation(student, [], RULE):
        pass
    with pytest.raises(ConfigError, match="rule"), blended_generation(student, student, 0.5):
        pass

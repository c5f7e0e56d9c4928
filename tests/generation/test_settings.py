"""The table of generation settings: each row does what it says, and each query finds its rows."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, WatermarkingConfig
from transformers.generation.configuration_utils import GenerationMode

from tests.tiny import EOS_ID, PAD_ID, tiny_model, tiny_tokenizer
from trl_blend.errors import ConfigError
from trl_blend.generation.settings import (
    CUTS,
    ENDS,
    FORBIDS,
    GENERATION_SETTINGS,
    RESHAPES,
    SAMPLES,
    SEARCHES,
    active_settings,
    check_one_sequence,
    distribution_warpers,
    names_with,
)


PROMPT = torch.tensor([[7, 21, 9, 7, 21]])
# For each setting a value that is not neutral on this model and prompt
ACTIVE = {
    "do_sample": False,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.5,
    "min_p": 0.3,
    "top_h": 0.5,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.3,
    "repetition_penalty": 2.0,
    "encoder_repetition_penalty": 2.0,
    "exponential_decay_length_penalty": (0, 3.0),
    "guidance_scale": 3.0,
    "watermarking_config": WatermarkingConfig(bias=5.0),
    "sequence_bias": [[[30], 5.0]],
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[30]],
    "suppress_tokens": [30],
    "begin_suppress_tokens": [30],
    "forced_bos_token_id": 0,
    "forced_eos_token_id": EOS_ID,
    "min_length": 8,
    "min_new_tokens": 3,
    "stop_strings": ["a"],
    "num_beams": 2,
    "penalty_alpha": 0.6,
    "force_words_ids": [[30]],
}
# What another setting needs to have its effect
WITH = {"penalty_alpha": {"top_k": 4, "do_sample": False}, "force_words_ids": {"num_beams": 2, "do_sample": False}}
LENGTHS = {"exponential_decay_length_penalty": 3, "forced_bos_token_id": 1}


def scores(**settings):
    """Log-probabilities that the next tokens are drawn from, without a caller's settings those of the model."""
    plain = {"do_sample": True, "top_k": 0, "max_new_tokens": 1, "pad_token_id": PAD_ID, "eos_token_id": EOS_ID}
    torch.manual_seed(0)
    prompt = settings.pop("prompt", PROMPT)
    output = tiny_model().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        output_scores=True,
        return_dict_in_generate=True,
        **{**plain, **settings},
    )
    return output.sequences, torch.stack(output.scores).log_softmax(-1)


def test_every_row_is_tried():
    assert ACTIVE.keys() == GENERATION_SETTINGS.keys()
    for name, value in ACTIVE.items():
        assert active_settings({name: value}, *GENERATION_SETTINGS[name].effects) == {name: value}


@pytest.mark.parametrize("name", sorted(names_with(SAMPLES, CUTS, RESHAPES, FORBIDS) - {"do_sample"}))
def test_the_distribution_of_a_token_is_another(name):
    settings = {"max_new_tokens": LENGTHS.get(name, 1)}
    if name == "forced_bos_token_id":
        settings["prompt"] = PROMPT[:, :1]  # the only token so far
    if name == "forced_eos_token_id":
        settings["max_new_tokens"] = 1  # at the length limit
    plain, changed = scores(**settings)[1], scores(**settings, **{name: ACTIVE[name]})[1]
    different = plain.shape != changed.shape or not torch.allclose(plain, changed, atol=1e-4)
    assert different, f"`{name}` has no effect"
    if GENERATION_SETTINGS[name].effects & {CUTS, FORBIDS} and name != "sequence_bias":
        assert changed[-1].isneginf().sum() > plain[-1].isneginf().sum()


# `None` and an empty list leave a setting out
NEUTRAL = [
    (name, value)
    for name, setting in GENERATION_SETTINGS.items()
    for value in setting.neutral
    if value not in (None, [])
]


@pytest.mark.parametrize(("name", "value"), NEUTRAL)
def test_a_neutral_value_changes_nothing(name, value):
    plain, with_value = scores(max_new_tokens=3), scores(max_new_tokens=3, **{name: value})
    assert all(torch.equal(one, other) for one, other in zip(plain, with_value, strict=True))


def test_sampling_may_be_off():
    plain, greedy = scores(max_new_tokens=6)[0], scores(max_new_tokens=6, do_sample=False)[0]
    assert not torch.equal(plain, greedy)
    assert active_settings({"do_sample": None}, SAMPLES)  # `generate` takes it for False


@pytest.mark.parametrize("name", sorted(names_with(SAMPLES, CUTS) - {"do_sample"}))
def test_greedy_decoding_does_not_read_it(name):
    greedy = {"do_sample": False, "max_new_tokens": 3, "top_k": None}
    assert torch.equal(scores(**greedy)[1], scores(**{**greedy, name: ACTIVE[name]})[1])


@pytest.mark.parametrize("name", sorted(names_with(ENDS)))
def test_a_text_ends_earlier(name):
    plain = scores(max_new_tokens=8)[0]
    word = tiny_tokenizer().decode(plain[0, PROMPT.shape[1] + 1])
    ended = scores(max_new_tokens=8, stop_strings=[word], tokenizer=tiny_tokenizer())[0]
    assert ended.shape[1] == PROMPT.shape[1] + 2 < plain.shape[1]


@pytest.mark.parametrize("name", sorted(names_with(SEARCHES)))
def test_another_loop_decodes(name):
    settings = GenerationConfig(**{"do_sample": True, **WITH.get(name, {}), name: ACTIVE[name]})
    mode = settings.get_generation_mode()
    assert mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)


# Queries


def config(**settings):
    defaults = {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
    return SimpleNamespace(**{**defaults, "generation_kwargs": None, **settings})


@pytest.mark.parametrize("name", sorted(names_with(SAMPLES, CUTS, RESHAPES)))
def test_whatever_changes_the_distribution_is_found(name):
    setting = {name: ACTIVE[name]}
    assert distribution_warpers(config(generation_kwargs=setting)) == setting


def test_warpers_of_a_configuration():
    assert distribution_warpers(config()) == {}
    assert distribution_warpers(config(top_k=5, min_p=0.1)) == {"top_k": 5, "min_p": 0.1}
    # `generation_kwargs` have the last word
    assert distribution_warpers(config(top_k=5, generation_kwargs={"top_k": 0})) == {}
    assert distribution_warpers(config(generation_kwargs={"typical_p": 0.5})) == {"typical_p": 0.5}
    for value in (None, False):
        assert distribution_warpers(config(generation_kwargs={"do_sample": value})) == {"do_sample": value}
    # Only the temperature of the loss is the one that is meant
    assert distribution_warpers(config(generation_kwargs={"temperature": 0.7})) == {}
    assert distribution_warpers(config(generation_kwargs={"temperature": 1.0})) == {"temperature": 1.0}
    # What forbids tokens acts on the blend too
    assert distribution_warpers(config(generation_kwargs={"suppress_tokens": [3], "min_new_tokens": 2})) == {}


def test_what_is_left_open_comes_from_the_checkpoint():
    checkpoint = GenerationConfig(do_sample=True, top_k=5, typical_p=0.5, temperature=0.3)
    assert distribution_warpers(config(), checkpoint) == {"typical_p": 0.5}
    assert distribution_warpers(config(top_k=None), checkpoint) == {"top_k": 5, "typical_p": 0.5}
    assert distribution_warpers(config(generation_kwargs={"typical_p": 1.0}), checkpoint) == {}


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
def test_one_sequence_per_row(name):
    for settings in (None, {}, {name: None}, {name: 1}):
        check_one_sequence(settings, "num_generations")
    with pytest.raises(ConfigError, match=f"`{name}=2`.*the number of completions is `num_generations`"):
        check_one_sequence({name: 2}, "num_generations")

"""Log-probabilities that `LocalEngine` records, against a teacher-forced recomputation in float64."""

import pytest
import torch
from transformers import GenerationConfig

from tests.ops.head.recorder import Recorder
from tests.rollouts.collecting import assert_logps, ends_well
from tests.tiny import EOS_ID, PAD_ID, tiny_lora, tiny_model
from trl_blend.errors import UnsupportedError
from trl_blend.rollouts.config import RolloutConfig
from trl_blend.rollouts.engines.base import SamplingSettings
from trl_blend.rollouts.engines.local import LocalEngine


PROMPTS = [[5, 9, 22, 7], [31], [8, 8, 40, 41, 12, 60, 13], [17, 50]] * 3
SEEDS = list(range(100, 100 + len(PROMPTS)))
MAX_NEW = 12
EOS_IDS = [EOS_ID, *range(20, 26)]  # so that some completions end by themselves, and some do not

SAMPLINGS = [
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 0.9, "top_p": 0.8, "top_k": 12},
    {"temperature": 1.1, "min_p": 0.1},
    {"temperature": 0.8, "top_p": 0.95, "top_k": 20, "min_p": 0.05},
]


def engine_of(model, eos=(EOS_ID,), pad=PAD_ID, **settings):
    """An engine that is ready to draw."""
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "max_new_tokens": MAX_NEW}
    engine = LocalEngine(model, "model", RolloutConfig(output_dir=""))
    counts = {"num_rollouts_per_prompt": 1, "seed": 0}
    engine.load(None, SamplingSettings(**plain | counts | settings, eos_token_ids=list(eos), pad_token_id=pad))
    return engine


def assert_correct(model, rollouts, prompts=PROMPTS, eos=(EOS_ID,), **settings):
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        assert_logps(model, prompt, *rollout[:3], **settings)
        assert ends_well(rollout.completion_ids, rollout.truncated, MAX_NEW, eos)


@pytest.mark.parametrize("settings", SAMPLINGS, ids=lambda settings: "-".join(settings) or "plain")
def test_logps_are_those_of_what_was_sampled_from_and_of_the_model(settings):
    model = tiny_model()
    rollouts = engine_of(model, EOS_IDS, **settings).sample(PROMPTS, SEEDS)
    assert_correct(model, rollouts, eos=EOS_IDS, **settings)
    # Rows that ended beside rows that went on
    assert {rollout.truncated for rollout in rollouts} == {True, False}
    if settings:
        assert any(r.rollout_logps != pytest.approx(r.student_logps, abs=1e-3) for r in rollouts)


@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "gpt2", "llama"])
def test_every_architecture(arch):
    model, settings = tiny_model(arch), SAMPLINGS[1]
    engine = engine_of(model, **settings)
    # Float rounding of these models' cached attention is larger than that of the others
    for prompt, rollout in zip(PROMPTS, engine.sample(PROMPTS, SEEDS), strict=True):
        assert_logps(model, prompt, *rollout[:3], atol=1e-4, **settings)


def test_several_end_tokens_and_padding_with_one_of_them():
    model = tiny_model()
    rollouts = engine_of(model, EOS_IDS, pad=EOS_IDS[1]).sample(PROMPTS, SEEDS)
    assert_correct(model, rollouts, eos=EOS_IDS)
    assert len({rollout.completion_ids[-1] for rollout in rollouts if not rollout.truncated}) > 1


def test_the_checkpoints_own_generation_settings_are_left_out(caplog):
    model = tiny_model()
    model.generation_config = own = GenerationConfig(
        repetition_penalty=3.0, top_k=1, temperature=0.1, suppress_tokens=[11], min_new_tokens=5, eos_token_id=EOS_ID
    )
    settings = SAMPLINGS[1]
    rollouts = engine_of(model, **settings).sample(PROMPTS, SEEDS)
    assert_correct(model, rollouts, **settings)
    assert "['min_new_tokens', 'repetition_penalty', 'suppress_tokens']" in caplog.text
    assert model.generation_config is own
    plain = engine_of(tiny_model(), **settings).sample(PROMPTS, SEEDS)
    assert rollouts == plain


def test_the_first_seed_decides_and_the_global_state_is_left_alone():
    model = tiny_model(attention_dropout=0.5).train()
    engine = engine_of(model)
    state = torch.get_rng_state()
    first = engine.sample(PROMPTS, SEEDS)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    torch.rand(7)
    assert engine.sample(PROMPTS, SEEDS) == first
    assert engine.sample(PROMPTS, [1, *SEEDS[1:]]) != first
    assert_correct(model.eval(), first)


def test_an_adapter_takes_part():
    model = tiny_lora(tiny_model())
    rollouts = engine_of(model).sample(PROMPTS, SEEDS)
    assert_correct(model.merge_and_unload(), rollouts, atol=1e-4)


def test_one_token():
    engine = engine_of(tiny_model(), max_new_tokens=1)
    (rollout,) = engine.sample([[5]], [0])
    assert len(rollout.completion_ids) == 1
    assert_logps(engine.model, [5], *rollout[:3])


def test_logits_of_a_batch_are_never_built():
    batch, length, vocab = 8, 60, 5000
    engine = engine_of(tiny_model(vocab_size=vocab), top_p=0.9)
    recorder = Recorder()
    with recorder:
        engine.sample([[5 + row] * length for row in range(batch)], list(range(batch)))
    assert batch * vocab <= max(recorder.sizes) <= batch * vocab * 2 < length * vocab


def test_progress_is_reported():
    seen = []
    engine_of(tiny_model()).sample(PROMPTS, SEEDS, seen.append)
    assert seen == [len(PROMPTS)]


def test_a_model_without_generate():
    with pytest.raises(UnsupportedError, match="`model` is a Linear"):
        engine_of(torch.nn.Linear(2, 2))

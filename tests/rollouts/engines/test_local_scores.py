"""`score_sequences` against one plain forward pass per row, in float64 loops."""

import copy

import numpy as np
import pytest
import torch

from tests import reference
from tests.ops.head.recorder import Recorder
from tests.tiny import ARCHITECTURES, tiny_lora, tiny_model
from trl_blend.errors import ConfigError, TokenizerMismatchError, UnsupportedError
from trl_blend.models.fingerprint import identify_model
from trl_blend.ops.head import tiles
from trl_blend.rollouts.engines import local
from trl_blend.rollouts.engines.local import length_sorted_batches, score_sequences


SHAPES = [(3, 4), (7, 1), (1, 9), (5, 5), (2, 12)]


def random_rows(shapes=SHAPES, seed=0, vocab=64):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda count: torch.randint(0, vocab, (count,), generator=generator).tolist()  # noqa: E731
    return [draw(prompt) for prompt, _ in shapes], [draw(completion) for _, completion in shapes]


@torch.no_grad()
def forced_logprobs(model, prompt, completion):
    """`log p(. | prefix)` for every completion token: one row, no padding, no cache, in float64."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0].double()
    return [reference.log_softmax(row) for row in logits[len(prompt) - 1 : -1]]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tokens_per_batch", [1, 30, 16384])
def test_scores_are_those_of_a_plain_forward_pass(arch, tokens_per_batch):
    model, (prompts, completions) = tiny_model(arch), random_rows()
    scores = score_sequences(model, prompts, completions, tokens_per_batch=tokens_per_batch)
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        rows = forced_logprobs(model, prompt, completion)
        expected = [row[token].item() for row, token in zip(rows, completion, strict=True)]
        np.testing.assert_allclose(score.logps, expected, rtol=0, atol=2e-5)
        assert score.logps.dtype == np.float32 and score.topk_ids is None and score.tail_logmass is None


def test_top_k_of_every_position():
    model, (prompts, completions) = tiny_model(), random_rows()
    scores = score_sequences(model, prompts, completions, top_k=5, tokens_per_batch=30)
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        assert score.topk_ids.shape == score.topk_logps.shape == (len(completion), 5)
        for t, row in enumerate(forced_logprobs(model, prompt, completion)):
            kept = row.argsort(descending=True)[:5].tolist()
            kept = kept if completion[t] in kept else [*kept[:4], completion[t]]
            assert score.topk_ids[t].tolist() == kept
            np.testing.assert_allclose(score.topk_logps[t], row[kept], rtol=0, atol=2e-5)
            rest = sum(row[v].exp().item() for v in range(64) if v not in kept)
            np.testing.assert_allclose(score.tail_logmass[t], np.log(rest), rtol=0, atol=2e-5)
            at_token = score.topk_logps[t][kept.index(completion[t])]
            np.testing.assert_allclose(at_token, score.logps[t], rtol=0, atol=1e-6)


def test_the_model_is_left_as_it_was():
    model, (prompts, completions) = tiny_model(attention_dropout=0.5).train(), random_rows()
    before = copy.deepcopy(model.state_dict())
    scores = score_sequences(model, prompts, completions)
    assert model.training and "forward" not in model.__dict__
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = score_sequences(model, prompts, completions)  # dropout would make them differ
    np.testing.assert_array_equal(np.concatenate([s.logps for s in scores]), np.concatenate([s.logps for s in again]))
    own = model.forward = model.forward  # as TRL's trainers leave it
    score_sequences(model, prompts, completions)
    assert model.forward is own


def test_adapters_take_part():
    prompts, completions = random_rows()
    model = tiny_lora(tiny_model(), target_modules=["q_proj", "v_proj"])
    scores = score_sequences(model, prompts, completions)
    merged = model.merge_and_unload()
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        rows = forced_logprobs(merged, prompt, completion)
        expected = [row[token].item() for row, token in zip(rows, completion, strict=True)]
        np.testing.assert_allclose(score.logps, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"]}, {"trainable_token_indices": [6, 20]}])
def test_an_adapter_on_the_output_layer_takes_part(settings, tied):
    prompts, completions = random_rows()
    model = tiny_lora(tiny_model(tie_word_embeddings=tied), **settings)
    identity = identify_model(model)
    scores = score_sequences(model, prompts, completions)
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        rows = forced_logprobs(model, prompt, completion)
        expected = [row[token].item() for row, token in zip(rows, completion, strict=True)]
        np.testing.assert_allclose(score.logps, expected, rtol=0, atol=5e-5)
    assert identify_model(model) == identity


def test_logits_of_a_batch_are_never_built(monkeypatch):
    vocab, tile = 5000, 256
    monkeypatch.setattr(tiles, "TOKEN_TILE", 16)
    monkeypatch.setattr(tiles, "VOCAB_TILE", tile)
    model, (prompts, completions) = tiny_model(vocab_size=vocab), random_rows([(4, 28)] * 8, vocab=vocab)
    tokens = 8 * 28
    for top_k in (None, 4):
        recorder = Recorder()
        with recorder:
            score_sequences(model, prompts, completions, top_k=top_k)
        # Tiles, attention weights and layers are all smaller than one row's logits
        assert max(recorder.sizes) < 28 * vocab < tokens * vocab


def test_batches_keep_to_the_budget_and_lose_no_row():
    lengths = [5, 9, 2, 40, 9, 1, 7]
    batches = length_sorted_batches(lengths, 18)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 18 for batch in batches)
    assert batches == [[3], [1, 4], [6, 0], [2, 5]]
    assert length_sorted_batches([], 18) == []


@pytest.mark.parametrize(
    ("prompts", "completions", "error", "message"),
    [
        ([[5]], [[]], ConfigError, r"`completion_ids\[0\]` is empty"),
        ([[5], []], [[6], [7]], ConfigError, r"`prompt_ids\[1\]` is empty"),
        ([[5]], [[6, 64]], TokenizerMismatchError, r"`completion_ids\[0\]` holds token id 64, but .* 64 tokens"),
        ([[-1]], [[6]], TokenizerMismatchError, r"`prompt_ids\[0\]` holds token id -1"),
        ([[5]], [], ConfigError, "`prompt_ids` has 1 rows and `completion_ids` 0"),
        ([[5] * 200], [[6] * 57], ConfigError, "200 prompt and 57 completion tokens, more than .* context of 256"),
    ],
)
def test_rows_that_cannot_be_scored(prompts, completions, error, message):
    with pytest.raises(error, match=message):
        score_sequences(tiny_model(), prompts, completions)


def test_a_budget_of_zero_is_refused():
    with pytest.raises(ConfigError, match="`tokens_per_batch=0` must be at least 1"):
        score_sequences(tiny_model(), [[5]], [[6]], tokens_per_batch=0)


def test_a_model_without_generate_is_refused():
    with pytest.raises(UnsupportedError, match="`model` is a Linear"):
        score_sequences(torch.nn.Linear(2, 2), [[5]], [[6]])


@pytest.mark.parametrize("arch", ["qwen3", "gpt2"])
def test_the_context_is_read_from_the_configuration(arch):
    assert local.context_length(tiny_model(arch).config) == 256

"""Scores and rollouts from a server that speaks vLLM's protocol, and every way in which it can fail."""

import math
import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.rollouts.collecting import assert_logps, ends_well, forced_logits, log_softmax, save_model
from tests.rollouts.engines.test_local_scores import random_rows
from tests.rollouts.vllm_fake import FakeVllm, serving
from tests.tiny import EOS_ID, tiny_model
from trl_blend.errors import ConfigError, EngineError
from trl_blend.rollouts.config import RolloutConfig
from trl_blend.rollouts.engines import vllm_server
from trl_blend.rollouts.engines.base import RowError, SamplingSettings
from trl_blend.rollouts.engines.local import score_sequences
from trl_blend.rollouts.engines.vllm_server import VllmServerEngine, request_settings, scores_of_prompt_logprobs


ONE = ([[5, 6, 7]], [[8, 9]])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def fake(model):
    return FakeVllm(model)


@pytest.fixture
def url(fake):
    with serving(fake) as url:
        yield url


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were to be waited between attempts."""
    seen = []

    async def sleep(seconds):
        seen.append(seconds)

    monkeypatch.setattr(vllm_server.anyio, "sleep", sleep)
    return seen


def engine_at(url, model="teacher", concurrency=64):
    args = RolloutConfig(output_dir="", vllm_server_base_url=url, vllm_concurrency=concurrency)
    return VllmServerEngine(model, "teacher", args)


def score(url, rows=ONE, top_k=None, **options):
    return engine_at(url, **options).score(*rows, top_k)


# -------------------- scores


@pytest.mark.parametrize("top_k", [None, 1, 6])
def test_server_and_local_scores_agree(model, fake, url, top_k):
    rows = random_rows()
    seen, fake.awaited = [], 3
    scores = engine_at(url, concurrency=3).score(*rows, top_k, seen.append)
    for remote, local in zip(scores, score_sequences(model, *rows, top_k=top_k), strict=True):
        np.testing.assert_allclose(remote.logps, local.logps, rtol=0, atol=1e-4)
        if top_k is None:
            assert remote.topk_ids is None
            continue
        np.testing.assert_array_equal(remote.topk_ids, local.topk_ids)
        np.testing.assert_allclose(remote.topk_logps, local.topk_logps, rtol=0, atol=1e-4)
        np.testing.assert_allclose(remote.tail_logmass, local.tail_logmass, rtol=0, atol=1e-4)
    assert seen == [1] * len(rows[0])
    assert fake.most_at_once == 3
    # Ids go in, one token comes out, and the temperature is the one that scores are at
    request = fake.scoring_requests[0]
    assert request["prompt"] in [[*prompt, *completion] for prompt, completion in zip(*rows)]
    assert (request["max_tokens"], request["temperature"], request["prompt_logprobs"]) == (1, 1.0, top_k or 0)


def test_the_tail_is_never_minus_infinity():
    scores = scores_of_prompt_logprobs([{3: 0.0, 5: -30.0}], [3], 2)
    assert scores.topk_ids.tolist() == [[3, 5]] and scores.tail_logmass[0] == pytest.approx(-24 * math.log(2))


@pytest.mark.parametrize("failures", [[503, 429, 500, 503], ["drop", "drop"], [502, "drop", 408]])
def test_what_passes_is_tried_again(model, fake, url, waits, failures):
    fake.failures = list(failures)
    (result,) = score(url)
    np.testing.assert_allclose(result.logps, score_sequences(model, *ONE)[0].logps, rtol=0, atol=1e-4)
    assert len(fake.scoring_requests) == len(failures) + 1
    assert waits == [0.5, 1.0, 2.0, 4.0][: len(failures)]


def test_what_does_not_pass_is_given_up(fake, url, waits):
    fake.failures = [503] * 100
    with pytest.raises(
        EngineError, match=r"does not answer \(7 attempts; the last: HTTP 503: injected 503\).*is kept"
    ):
        score(url)
    assert len(fake.scoring_requests) == 7


@pytest.mark.parametrize(
    ("status", "message"),
    [(400, "not repeated"), (401, "VLLM_API_KEY"), (404, "Check the URL"), (422, "not repeated")],
)
def test_a_refusal_is_not_repeated(fake, url, status, message):
    fake.failures = [status]
    answer = rf"refused /v1/completions \(HTTP {status}: injected {status}\).*{message}"
    with pytest.raises(EngineError, match=answer):
        score(url)
    assert len(fake.requests) == 1


def test_the_first_error_ends_all_requests(fake, url):
    fake.failures = [400]
    with pytest.raises(EngineError):
        score(url, random_rows([(3, 3)] * 40), concurrency=2)
    assert len(fake.requests) < 10


def test_what_hangs_is_broken_off_with_the_first_error(fake, url):
    fake.failures = ["hang", "hang", 400]
    start = time.perf_counter()
    with pytest.raises(EngineError, match="injected 400"):
        score(url, random_rows([(3, 3)] * 3), concurrency=3)
    assert time.perf_counter() - start < 30  # the fake one hangs for 60 seconds


def test_ctrl_c_breaks_off_what_hangs(sigint, fake, url):
    fake.failures = ["hang"] * 3

    def interrupt():
        while len(fake.requests) < 3:  # earlier, the signal could reach code that is not waiting
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    start = time.perf_counter()
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        score(url, random_rows([(3, 3)] * 3))
    assert time.perf_counter() - start < 30
    assert len(fake.requests) == 3


def test_an_unreachable_server(waits):
    with pytest.raises(EngineError, match="http://127.0.0.1:9 does not answer.*ConnectError.*Check that it runs"):
        engine_at("http://127.0.0.1:9")
    assert len(waits) == 2


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "", "http://host:port"])
def test_what_is_no_url(url):
    with pytest.raises(ConfigError, match="is no URL"):
        engine_at(url)


def test_the_url_may_end_in_v1(url):
    assert engine_at(f"{url}/v1/").client.url == url


def test_the_wrong_model(url):
    with pytest.raises(
        ConfigError, match=r"`teacher='other'` is not what .* serves: \['teacher'\].*--served-model-name"
    ):
        engine_at(url, model="other")
    assert engine_at(url, model="/weights/teacher").model_id == "teacher"  # what it was loaded from


def test_a_loaded_model_has_no_name(model):
    with pytest.raises(ConfigError, match="vLLM has models by name, but `teacher` is a loaded Qwen3"):
        engine_at("http://host:1", model=model)


def test_the_key_is_sent_along(monkeypatch, fake, url):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    engine_at(url)
    assert fake.headers[0]["Authorization"] == "Bearer secret"


def without(answer):
    answer["choices"][0]["prompt_logprobs"] = None
    return answer


def incomplete(answer):
    answer["choices"][0]["prompt_logprobs"][1] = None
    return answer


def other_ids(answer):
    answer["choices"][0]["prompt_token_ids"] = [1, 2, 3]
    return answer


def other_tokens(answer):
    answer["choices"][0]["prompt_logprobs"][-1] = {"63": {"logprob": -1.0}}
    return answer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, "without `prompt_logprobs`.*one of vLLM"),
        (incomplete, "with incomplete `prompt_logprobs`.*--no-enable-prefix-caching"),
        (other_ids, r"read other token ids than it was sent \(\[1, 2, 3\] instead of \[5, 6, 7, 8, 9\]\)"),
        (other_tokens, "no log-probability for token 9 at position 1"),
        (lambda answer: {"text": "hello"}, "without `choices`"),
        (lambda answer: b"<html>", "not JSON"),
    ],
)
def test_answers_that_cannot_be_used(fake, url, change, message):
    fake.change = change
    with pytest.raises(EngineError, match=message):
        score(url)
    assert len(fake.requests) == 1


def test_fewer_log_probabilities_than_asked_for():
    with pytest.raises(EngineError, match="2 log-probabilities where `top_k=5`.*position 0.*--max-logprobs 5"):
        scores_of_prompt_logprobs([{3: -0.1, 5: -3.0}], [3], 5)


@pytest.mark.parametrize("value", [-9999.0, -1e4, -3.4e38, 3.0, None, "NaN", "-Infinity", float("nan"), [], "x"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_value_that_is_no_log_probability(fake, url, value, top_k):
    def change(answer):
        entries = answer["choices"][0]["prompt_logprobs"]
        entries[-1] = {token: {"logprob": value} for token in entries[-1]}
        return answer

    fake.change = change
    with pytest.raises(RowError, match="as the log-probability of token .* at position 1 of the completion") as error:
        score(url, ([[5, 6]], [[7, 8]]), top_k)
    assert error.value.row == 0 and repr(value) in str(error.value)


def test_rounding_above_zero_is_taken_off():
    assert scores_of_prompt_logprobs([{3: 1e-6}], [3], None).logps.tolist() == [0.0]


def test_the_row_of_an_error_is_told(fake, url):
    def refuse(body, complete=fake.complete):
        known = max(body["prompt"]) < 60
        return complete(body) if known else (400, {"error": {"message": "Token id 61 is out of vocabulary"}})

    fake.complete = refuse
    with pytest.raises(RowError, match="HTTP 400: Token id 61 is out of vocabulary") as error:
        score(url, ([[5]] * 3, [[6], [7], [61]]))
    assert error.value.row == 2


def test_padding_rows_have_no_part_in_a_distribution():
    row = {3: math.log(0.5), 5: math.log(0.2), 70: math.log(0.2), 4: math.log(0.1)}
    scores = scores_of_prompt_logprobs([row], [3], 2, vocab_size=64)
    np.testing.assert_allclose(scores.logps, [math.log(0.625)], rtol=1e-6)
    assert scores.topk_ids.tolist() == [[3, 5]]
    np.testing.assert_allclose(scores.topk_logps, [[math.log(0.625), math.log(0.25)]], rtol=1e-6)
    np.testing.assert_allclose(scores.tail_logmass, [math.log(0.125)], rtol=1e-5)
    with pytest.raises(EngineError, match="3 log-probabilities where `top_k=4`.*padding rows"):
        scores_of_prompt_logprobs([row], [3], 4, vocab_size=64)


# -------------------- rollouts


EOS_IDS = [EOS_ID, *range(20, 30)]
SAMPLING = SamplingSettings(0.7, 0.9, 20, 0.02, 6, 1, 0, EOS_IDS)


def drawing(url):
    engine = engine_at(url)
    engine.load(None, SAMPLING)
    return engine


def test_rollouts_and_their_log_probabilities(model, fake, url):
    prompts = [[5, 6], [7], [8, 9, 10], [11]]
    engine = drawing(url)
    seen = []
    rollouts = engine.sample(prompts, [1, 2, 3, 4], seen.append)
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        assert_logps(model, prompt, *rollout[:3], temperature=0.7, top_p=0.9, top_k=20, min_p=0.02)
        assert ends_well(rollout.completion_ids, rollout.truncated, 6, EOS_IDS)
    assert seen == [1] * 4
    assert engine.sample(prompts, [1, 2, 3, 4]) == rollouts
    assert engine.sample(prompts, [5, 6, 7, 8]) != rollouts
    # What is not in the request the server would take from the checkpoint
    request = next(request for request in fake.requests if request["max_tokens"] == 6)
    assert {"repetition_penalty": 1.0, "temperature": 0.7, "top_k": 20, "min_p": 0.02}.items() <= request.items()


def test_log_probabilities_of_another_distribution_are_refused(fake, url):
    fake.logprobs_mode = "raw_logprobs"
    with pytest.raises(ConfigError, match="Start it with `--logprobs-mode processed_logprobs`"):
        drawing(url)
    assert len(fake.requests) == 1  # a probe, nothing was sampled


def test_a_certain_model_does_not_hide_the_mode(url, fake):
    fake.model = tiny_model("llama")
    with torch.no_grad():
        fake.model.lm_head.weight.mul_(30)
    # The token that is sampled has log-prob 0 in either mode
    assert max(log_softmax(forced_logits(fake.model, [EOS_ID], [0])[0])) > -1e-4
    drawing(url)
    fake.logprobs_mode = "raw_logprobs"
    with pytest.raises(ConfigError, match="--logprobs-mode"):
        drawing(url)


def test_a_completion_without_log_probabilities(fake, url):
    engine = drawing(url)

    def change(answer):
        answer["choices"][0]["logprobs"] = None
        return answer

    fake.change = change
    with pytest.raises(EngineError, match="without the log-probability of every token"):
        engine.sample([[5]], [0])


@pytest.mark.parametrize("value", [-9999.0, None, "NaN", 0.5])
def test_a_drawn_token_without_a_log_probability(fake, url, value):
    engine = drawing(url)

    def change(answer):
        logprobs = answer["choices"][0]["logprobs"]
        if logprobs is not None and answer["choices"][0]["prompt_token_ids"] == [6]:
            logprobs["token_logprobs"][0] = value
        return answer

    fake.change = change
    with pytest.raises(RowError, match=f"gave {value!r} as the log-probability of token .* at position 0") as error:
        engine.sample([[5], [6]], [0, 1])
    assert error.value.row == 1


def test_ids_that_are_no_tokens_are_not_drawn(fake, url):
    few = replace(SAMPLING, vocab_size=3)
    engine = engine_at(url)
    engine.load(None, few)
    with pytest.raises(RowError, match=r"drew id \d+ at position \d+, which is no token of the tokenizer .ids 0 to 2"):
        engine.sample([[5, 6]], [0])
    assert request_settings(few, rows=5)["logit_bias"] == {"3": -100.0, "4": -100.0}
    for sampling, rows in ((few, None), (few, 3), (SAMPLING, 64)):
        assert "logit_bias" not in request_settings(sampling, rows)


def test_the_padding_rows_of_a_model_that_can_be_read(tmp_path, fake, url):
    folder = save_model(tmp_path / "model", vocab_size=66)
    fake.name = folder
    engine = engine_at(url, folder)
    engine.load(None, replace(SAMPLING, vocab_size=64))
    engine.sample([[5]], [0])
    request = next(request for request in fake.requests if request["max_tokens"] == 6)
    assert request["logit_bias"] == {"64": -100.0, "65": -100.0}

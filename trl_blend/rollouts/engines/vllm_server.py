"""Rollouts and scores from a running vLLM server, through `/v1/completions` with token ids: no text in between."""

import contextlib
import http.client
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import numpy as np

from trl_blend.errors import ConfigError, EngineError
from trl_blend.rollouts.engines.base import OnRows, Rollout, SamplingSettings, cut_at_eos
from trl_blend.rollouts.engines.local import TokenScores


_COMPLETIONS = "/v1/completions"
# What the server writes for -inf
_EXCLUDED = -1000.0
_SMALLEST_TAIL = 2.0**-24


class VllmServer:
    """
    One model of a running vLLM server.

    Args:
        url (`str`):
            Root URL of the server.
        model (`str`):
            The model that it has to serve, under this name or loaded from it.
        argument (`str`):
            Name of the argument that holds the model, for the error messages.
        concurrency (`int`, *optional*, defaults to `64`):
            Requests at once.
        client (`dict[str, Any]`, *optional*):
            Further arguments of [`~trl_blend.rollouts.engines.vllm_server.VllmClient`].

    Attributes:
        engine (`dict[str, Any]`): What the manifest says about the engine.
        max_model_len (`int`, *optional*): Context of the served model.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If `url` is no URL, or the server serves another model.
        [`~trl_blend.errors.EngineError`]: If the server cannot be reached.
    """

    def __init__(
        self, url: str, model: Any, *, argument: str, concurrency: int = 64, client: dict[str, Any] | None = None
    ) -> None:
        if not isinstance(model, str):
            raise ConfigError(
                f"`vllm_server_url={url!r}` needs the name of the served model, but `{argument}` is a loaded "
                f"{type(model).__name__}. Pass its folder or Hub id."
            )
        self.client = VllmClient(url, concurrency=concurrency, **(client or {}))
        served = self._served()
        found = [entry for entry in served if model in (entry.get("id"), entry.get("root"))]
        found = found or [entry for entry in served if _same_folder(model, entry.get("root"))]
        if not found:
            raise ConfigError(
                f"`{argument}={model!r}` is not what the vLLM server at {self.client.url} serves: "
                f"{[entry.get('id') for entry in served]}. Pass the name of the served model, or start the server "
                f"with `--served-model-name {model}` if it is the same one."
            )
        self.model_id = found[0]["id"]
        self.max_model_len: int | None = found[0].get("max_model_len")
        self.engine = {"name": "vllm-server", "vllm": self._version()}

    def rollout_engine(self, sampling: SamplingSettings, eos_token_ids: Sequence[int]) -> "VllmServerRolloutEngine":
        """Draws completions; checks first that the server returns what is needed."""
        return VllmServerRolloutEngine(self, sampling, list(eos_token_ids))

    def scoring_engine(self) -> "VllmServerScoringEngine":
        """Scores completions."""
        return VllmServerScoringEngine(self)

    def complete(self, prompt_ids: Sequence[int], **settings: Any) -> dict[str, Any]:
        """
        One completion of one prompt of token ids, with the token ids of both.

        Raises:
            [`~trl_blend.errors.EngineError`]: If the server read other ids than it was sent.
        """
        ids = list(prompt_ids)
        body = {"model": self.model_id, "prompt": ids, "return_token_ids": True, **settings}
        try:
            choice: dict[str, Any] = self.client.post(_COMPLETIONS, body)["choices"][0]
        except (KeyError, IndexError, TypeError):
            raise EngineError(
                f"The vLLM server at {self.client.url} answered without `choices`. Check that it is one of vLLM."
            ) from None
        if choice.get("prompt_token_ids") != ids:
            raise EngineError(
                f"The vLLM server at {self.client.url} read other token ids than it was sent "
                f"({str(choice.get('prompt_token_ids'))[:60]} instead of {str(ids)[:60]}). It must take token ids as "
                "they are and return them (`return_token_ids`, vLLM 0.10.2 or newer)."
            )
        return choice

    def prompt_scores(
        self, prompt_ids: Sequence[int], completion_ids: Sequence[int], top_k: int | None
    ) -> TokenScores:
        """Scores of one completion: a prefill of prompt and completion, at temperature 1."""
        limit, ids = self.max_model_len, [*prompt_ids, *completion_ids]
        if limit is not None and len(ids) + 1 > limit:
            raise ConfigError(
                f"A row has {len(prompt_ids)} prompt and {len(completion_ids)} completion tokens; the vLLM server at "
                f"{self.client.url} takes {limit - 1} (`max_model_len={limit}`, one token is generated). Start it "
                f"with `--max-model-len {len(ids) + 1}` or more, or drop the row."
            )
        answer = self.complete(ids, max_tokens=1, temperature=1.0, prompt_logprobs=top_k or 0)
        entries = answer.get("prompt_logprobs")
        if not entries or len(entries) != len(ids) or None in entries[1:]:
            state = "without" if not entries else "with incomplete"
            raise EngineError(
                f"The vLLM server at {self.client.url} answered {state} `prompt_logprobs`. It must be one of vLLM, "
                "started with `--no-enable-prefix-caching`."
            )
        rows = [
            {int(token): float(entry["logprob"]) for token, entry in row.items()} for row in entries[len(prompt_ids) :]
        ]
        return scores_of_prompt_logprobs(rows, completion_ids, top_k)

    def _served(self) -> list[dict[str, Any]]:
        answer = self.client.get("/v1/models")
        served = answer.get("data") if isinstance(answer, dict) else None
        if not served:
            raise EngineError(f"{self.client.url}/v1/models lists no model. Check that it is a vLLM server.")
        return list(served)

    def _version(self) -> str:
        try:
            return str(self.client.get("/version")["version"])
        except (EngineError, KeyError, TypeError):  # some proxies do not pass it on
            return "unknown"


@dataclass
class VllmServerScoringEngine:
    """
    Scores with a server, a row per request.

    Args:
        server ([`VllmServer`]):
            The server.
    """

    server: VllmServer

    def score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        top_k: int | None,
        on_rows: OnRows,
    ) -> list[TokenScores]:
        """Scores of the rows, in order."""
        return self.server.client.map(
            lambda row: self.server.prompt_scores(*row, top_k),
            list(zip(prompt_ids, completion_ids, strict=True)),
            lambda scores: on_rows(1, len(scores.logps)),
        )


@dataclass
class VllmServerRolloutEngine:
    """
    Samples with a server: one request draws the completion, a second one, a prefill, gives `student_logps`.

    Args:
        server ([`VllmServer`]):
            The server, started with `--logprobs-mode processed_logprobs`.
        sampling ([`~trl_blend.rollouts.engines.base.SamplingSettings`]):
            What is sampled.
        eos_token_ids (`list[int]`):
            Tokens that end a completion.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the server's log-probs are not those of the distribution that it samples
            from.
    """

    server: VllmServer
    sampling: SamplingSettings
    eos_token_ids: list[int]
    max_batch: int | None = None

    def __post_init__(self) -> None:
        self._check_processed_logprobs()

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int], on_rows: OnRows | None = None
    ) -> list[Rollout]:
        """One rollout per prompt, in order, each with its own seed."""
        return self.server.client.map(
            lambda row: self._sample_one(*row),
            list(zip(prompt_ids, seeds, strict=True)),
            lambda rollout: on_rows(1, len(rollout.completion_ids)) if on_rows is not None else None,
        )

    def _sample_one(self, prompt_ids: Sequence[int], seed: int) -> Rollout:
        choice = self.server.complete(
            prompt_ids,
            seed=seed,
            logprobs=0,
            return_tokens_as_token_ids=True,
            skip_special_tokens=False,
            stop_token_ids=self.eos_token_ids,
            **request_settings(self.sampling),
        )
        tokens, logps = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not tokens or not logps or len(tokens) != len(logps) or None in logps:
            raise EngineError(
                f"The vLLM server at {self.server.client.url} answered without the log-probability of every token. It "
                "must be one of vLLM, started with `--logprobs-mode processed_logprobs`."
            )
        end, ended = cut_at_eos(tokens, self.eos_token_ids)
        own = self.server.prompt_scores(prompt_ids, tokens[:end], None).logps
        return Rollout(tokens[:end], [min(float(z), 0.0) for z in logps[:end]], own.tolist(), truncated=not ended)

    def _check_processed_logprobs(self) -> None:
        # With a nucleus of one token, the distribution sampled from gives it 1, and 0 to the one after it
        choice = self.server.complete(
            self.eos_token_ids[:1],
            max_tokens=1,
            temperature=1.0,
            top_p=1e-6,
            logprobs=2,
            return_tokens_as_token_ids=True,
        )
        logprobs = choice.get("logprobs") or {}
        sampled, top = (logprobs.get("token_logprobs") or [None])[0], (logprobs.get("top_logprobs") or [None])[0]
        if sampled is None or not top or abs(sampled) > 1e-3 or min(top.values()) > _EXCLUDED:
            raise ConfigError(
                f"The vLLM server at {self.server.client.url} returns log-probabilities of another distribution than "
                "the one it samples from. Start it with `--logprobs-mode processed_logprobs`."
            )


def request_settings(sampling: SamplingSettings) -> dict[str, Any]:
    """Every sampling parameter: what is left out, the server takes from the checkpoint's generation_config.json."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p or 0.0,
        "max_tokens": sampling.max_new_tokens,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
    }


def scores_of_prompt_logprobs(
    rows: Sequence[Mapping[int, float]], completion_ids: Sequence[int], top_k: int | None
) -> TokenScores:
    """
    Scores from vLLM's `prompt_logprobs`: per token, the log-probs of the `top_k` most probable ids and of the token.

    The mass outside the kept ids is `1 - Σ p`, because vLLM returns nothing else: below about 1e-6 it is rounding, and
    it is never given as less than 2^-24.

    Args:
        rows (`Sequence[Mapping[int, float]]`):
            Log-probs by id, one entry per completion token.
        completion_ids (`Sequence[int]`):
            The completion.
        top_k (`int`, *optional*):
            Number of ids to keep.

    Raises:
        [`~trl_blend.errors.EngineError`]: If a token is not among its ids, or there are fewer than `top_k`.
    """
    ids, values, tails = [], [], []
    for position, (row, token) in enumerate(zip(rows, completion_ids, strict=True)):
        if token not in row:
            raise EngineError(
                f"vLLM gave no log-probability for token {token} at position {position}, only for {sorted(row)[:5]}: "
                "it scored other token ids than it was sent."
            )
        if top_k is None:
            continue
        others = sorted((entry for entry in row if entry != token), key=lambda entry: -row[entry])[: top_k - 1]
        if len(others) < top_k - 1:
            raise EngineError(
                f"vLLM returned {len(row)} log-probabilities where `top_k={top_k}` were asked for. Start the server "
                f"with `--max-logprobs {top_k}` or more."
            )
        # A stable sort: the token itself comes last among equals
        kept = sorted([*others, token], key=lambda entry: -row[entry])
        ids.append(kept)
        values.append([min(row[entry], 0.0) for entry in kept])
        tails.append(math.log(max(1.0 - math.fsum(math.exp(z) for z in values[-1]), _SMALLEST_TAIL)))
    logps = np.array([min(row[token], 0.0) for row, token in zip(rows, completion_ids, strict=True)], np.float32)
    if top_k is None:
        return TokenScores(logps)
    return TokenScores(logps, np.array(ids), np.array(values, np.float32), np.array(tails, np.float32))


def _same_folder(model: str, root: str | None) -> bool:
    return root is not None and os.path.isdir(model) and os.path.isdir(root) and os.path.samefile(model, root)


Item = TypeVar("Item")
Result = TypeVar("Result")

_RETRIED = {408, 409, 425, 429}  # and every 5xx


class VllmClient:
    """
    Talks to one server. A connection that fails, a 429 and a 5xx are tried again; any other answer is final.

    The key in the environment variable `VLLM_API_KEY`, if there is one, is sent along.

    Args:
        url (`str`):
            Root URL, `http://host:8000`; a trailing `/v1` is taken off.
        concurrency (`int`, *optional*, defaults to `64`):
            Requests at once.
        timeout (`float`, *optional*, defaults to `900.0`):
            Seconds that a request may take.
        max_attempts (`int`, *optional*, defaults to `7`):
            How often a request is sent before giving up.
        backoff (`float`, *optional*, defaults to `0.5`):
            Seconds before the second attempt; every further one waits twice as long.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If `url` is no URL.
    """

    def __init__(
        self,
        url: str,
        *,
        concurrency: int = 64,
        timeout: float = 900.0,
        max_attempts: int = 7,
        backoff: float = 0.5,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"`vllm_server_url={url!r}` is no URL. Give the root of the server, `http://host:8000`.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.concurrency = concurrency
        self._secure, self._host = parts.scheme == "https", parts.netloc.rpartition("@")[2]
        self._prefix = urlsplit(self.url).path
        self._timeout, self._max_attempts, self._backoff = timeout, max_attempts, backoff
        self._open: set[http.client.HTTPConnection] = set()
        self._stop = threading.Event()

    def get(self, path: str) -> Any:
        """JSON of a GET request. It asks what the server is, so a server that is not there is found out soon."""
        return self._request("GET", path, None, min(self._max_attempts, 3))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """JSON of a POST request."""
        return self._request("POST", path, json.dumps(body).encode(), self._max_attempts)

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        on_result: Callable[[Result], object] | None = None,
    ) -> list[Result]:
        """
        `[function(item) for item in items]` with up to `concurrency` calls at once.

        After the first error, or Ctrl-C, what is running is broken off.
        """
        results: dict[int, Result] = {}
        pool = ThreadPoolExecutor(min(self.concurrency, max(len(items), 1)), "vllm")
        futures = {pool.submit(function, item): index for index, item in enumerate(items)}
        try:
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                if on_result is not None:
                    on_result(results[futures[future]])
        except BaseException:
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for connection in list(self._open):
                _break_off(connection)
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self._stop.clear()
        return [results[index] for index in range(len(items))]

    def _request(self, method: str, path: str, body: bytes | None, max_attempts: int) -> Any:
        problem = ""
        for attempt in range(max_attempts):
            if attempt and self._stop.wait(self._backoff * 2 ** (attempt - 1)):
                break
            try:
                status, text = self._send(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                try:
                    return json.loads(text)
                except ValueError as error:
                    raise EngineError(
                        f"{self.url}{path} answered with something that is not JSON ({error})."
                    ) from error
            problem = f"HTTP {status}: {_message(text)}"
            if status not in _RETRIED and status < 500:
                self._refuse(status, path, problem)
        raise EngineError(
            f"The vLLM server at {self.url} does not answer ({max_attempts} attempts; the last: {problem}). "
            "Check that it runs and can be reached from here, then run the same command again: what is written is "
            "kept."
        )

    def _refuse(self, status: int, path: str, problem: str) -> NoReturn:
        remedy = "The request is wrong, so it is not repeated."
        if status in (401, 403):
            remedy = "Set the server's key in the environment variable VLLM_API_KEY."
        elif status == 404:
            remedy = "Check the URL, and that the server is one of vLLM."
        raise EngineError(f"The vLLM server at {self.url} refused {path} ({problem}). {remedy}")

    def _send(self, method: str, path: str, body: bytes | None) -> tuple[int, str]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, timeout=self._timeout)
        self._open.add(connection)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.request(method, self._prefix + path, body, headers)
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8", "replace")
        finally:
            self._open.discard(connection)
            connection.close()


def _break_off(connection: http.client.HTTPConnection) -> None:
    import socket

    if connection.sock is not None:
        with contextlib.suppress(OSError):  # it may have ended by itself
            connection.sock.shutdown(socket.SHUT_RDWR)


def _message(text: str) -> str:
    """What an answer says about the error, in one line."""
    try:
        value = json.loads(text)
        value = value.get("error", value)
        value = value.get("message", value) if isinstance(value, dict) else value
    except (ValueError, AttributeError):
        value = text
    return " ".join(str(value).split())[:300] or "no message"

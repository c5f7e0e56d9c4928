"""Rollouts and scores from a running vLLM server, through `/v1/completions` with token ids: no text in between."""

import math
import os
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import anyio
import httpx2
import numpy as np
import torch
from anyio.from_thread import start_blocking_portal

from trl_blend.errors import ConfigError, EngineError, TrlBlendError
from trl_blend.models.limits import vocabulary_rows
from trl_blend.models.loading import LoadOptions, find_config
from trl_blend.rollouts.config import RolloutConfig, ScoringConfig
from trl_blend.rollouts.engines.base import (
    OnRows,
    Rollout,
    RowError,
    SamplingSettings,
    TokenScores,
    about_row,
    as_logp,
    drawn_completion,
    load_options,
)


Result = TypeVar("Result")

_COMPLETIONS = "/v1/completions"
# What the server writes for -inf
_EXCLUDED = -1000.0
_SMALLEST_TAIL = 2.0**-24

# Seconds of a request, how often it is sent, and seconds before the second time; each wait is twice the last
_TIMEOUT, _ATTEMPTS, _BACKOFF = 900.0, 7, 0.5
_RETRIED = {408, 409, 425, 429}  # and every 5xx
_ABOUT_A_ROW = {400, 413, 422}
_KEY = "Set the server's key in the environment variable VLLM_API_KEY."
_REMEDIES = {401: _KEY, 403: _KEY, 404: "Check the URL, and that the server is one of vLLM."}


class VllmServerEngine:
    """
    One model of a running vLLM server: a request per row scores a completion, two draw one (the second, a prefill,
    gives `student_logps`). See [`~trl_blend.rollouts.engines.base.Engine`] for the arguments.

    Attributes:
        model_id (`str`): Name under which the server has the model.
        max_length (`int`, *optional*): Most tokens of a prompt and its completion there.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the URL is none, the server has another model, or the model is loaded or
            to be quantized.
        [`~trl_blend.errors.EngineError`]: If the server cannot be reached.
    """

    max_batch: int | None = None
    vocab_size: int | None = None

    def __init__(self, model: str, argument: str, args: RolloutConfig | ScoringConfig) -> None:
        self._model, self._argument = model, argument
        self._options = options = load_options(args)
        check_by_name(model, argument, options)
        self.client = VllmClient(args.vllm_server_base_url, concurrency=args.vllm_concurrency)
        served = self._served()
        found = [entry for entry in served if model in (entry.get("id"), entry.get("root"))]
        found = found or [entry for entry in served if _same_folder(model, entry.get("root"))]
        if not found:
            raise ConfigError(
                f"`{argument}={model!r}` is not what the vLLM server at {self.client.url} serves: "
                f"{[entry.get('id') for entry in served]}. Pass the name of the served model, or start the server "
                f"with `--served-model-name {model}` if it is the same one."
            )
        self.model_id: str = found[0]["id"]
        context = found[0].get("max_model_len")
        # The prefill that scores a completion generates a token
        self.max_length = None if context is None else context - 1
        self.description = {"name": "vllm-server", "vllm": self._version()}
        self.settings: dict[str, Any] = {}
        self.dtype = options.weights

    def load(self, device: torch.device | None, sampling: SamplingSettings | None = None) -> None:
        """
        Nothing is loaded; for drawing, the server's log-probs have to be those of what it samples from.

        Raises:
            [`~trl_blend.errors.ConfigError`]: If they are not.
        """
        if sampling is not None:
            self.sampling = sampling
            self._rows = self._vocabulary_rows()
            self._check_processed_logprobs(sampling.eos_token_ids[:1])

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int], on_rows: OnRows | None = None
    ) -> list[Rollout]:
        """One rollout per prompt, in order, each with its own seed."""
        rows = list(zip(range(len(prompt_ids)), prompt_ids, seeds, strict=True))
        return self.client.map(partial(_named, self._sample_one), rows, on_rows)

    def score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        top_k: int | None,
        on_rows: OnRows | None = None,
        vocab_size: int | None = None,
    ) -> list[TokenScores]:
        """Scores of the rows, in order. Of padding rows, only those that the server returns can be left out."""
        pairs = zip(prompt_ids, completion_ids, strict=True)
        rows = [(index, *pair, top_k, vocab_size) for index, pair in enumerate(pairs)]
        return self.client.map(partial(_named, self._score_one), rows, on_rows)

    async def _sample_one(self, prompt_ids: Sequence[int], seed: int) -> Rollout:
        choice = await self._complete(
            prompt_ids,
            seed=seed,
            logprobs=0,
            return_tokens_as_token_ids=True,
            skip_special_tokens=False,
            **request_settings(self.sampling, self._rows),
        )
        tokens, logps = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not tokens or not logps or len(tokens) != len(logps):
            raise RowError(
                f"The vLLM server at {self.client.url} answered without the log-probability of every token. It must "
                "be one of vLLM, started with `--logprobs-mode processed_logprobs`."
            )
        tokens, logps, ended = drawn_completion(tokens, logps, self.sampling)
        own = (await self._score_one(prompt_ids, tokens, None, self.sampling.vocab_size)).logps
        return Rollout(tokens, logps, own.tolist(), truncated=not ended)

    async def _score_one(
        self, prompt_ids: Sequence[int], completion_ids: Sequence[int], top_k: int | None, vocab_size: int | None
    ) -> TokenScores:
        """A prefill of prompt and completion, at temperature 1."""
        ids = [*prompt_ids, *completion_ids]
        answer = await self._complete(ids, max_tokens=1, temperature=1.0, prompt_logprobs=top_k or 0)
        entries = answer.get("prompt_logprobs")
        try:
            if len(entries) != len(ids) or None in entries[1:]:
                raise ValueError
            rows = [
                {int(token): entry["logprob"] for token, entry in row.items()} for row in entries[len(prompt_ids) :]
            ]
        except (TypeError, ValueError, KeyError, AttributeError):  # of another form
            state = "without" if not entries else "with incomplete"
            raise RowError(
                f"The vLLM server at {self.client.url} answered {state} `prompt_logprobs`. It must be one of vLLM, "
                "started with `--no-enable-prefix-caching`."
            ) from None
        return scores_of_prompt_logprobs(rows, completion_ids, top_k, vocab_size)

    async def _complete(self, prompt_ids: Sequence[int], **settings: Any) -> dict[str, Any]:
        """One completion of one prompt of token ids, with the token ids of both."""
        ids = list(prompt_ids)
        body = {"model": self.model_id, "prompt": ids, "return_token_ids": True, **settings}
        try:
            choice: dict[str, Any] = (await self.client.post(_COMPLETIONS, body))["choices"][0]
        except (KeyError, IndexError, TypeError):
            raise RowError(
                f"The vLLM server at {self.client.url} answered without `choices`. Check that it is one of vLLM."
            ) from None
        if choice.get("prompt_token_ids") != ids:
            raise RowError(
                f"The vLLM server at {self.client.url} read other token ids than it was sent "
                f"({str(choice.get('prompt_token_ids'))[:60]} instead of {str(ids)[:60]}). It must take token ids as "
                "they are and return them (`return_token_ids`, vLLM 0.10.2 or newer)."
            )
        return choice

    def _check_processed_logprobs(self, prompt_ids: Sequence[int]) -> None:
        # With a nucleus of one token, the distribution sampled from gives it 1, and 0 to the one after it
        settings = {"max_tokens": 1, "temperature": 1.0, "top_p": 1e-6, "logprobs": 2}
        probe = partial(self._complete, return_tokens_as_token_ids=True, **settings)
        (choice,) = self.client.map(probe, [(prompt_ids,)])
        logprobs = choice.get("logprobs") or {}
        sampled, top = (logprobs.get("token_logprobs") or [None])[0], (logprobs.get("top_logprobs") or [None])[0]
        if sampled is None or not top or abs(sampled) > 1e-3 or min(top.values()) > _EXCLUDED:
            raise ConfigError(
                f"The vLLM server at {self.client.url} returns log-probabilities of another distribution than the one "
                "it samples from. Start it with `--logprobs-mode processed_logprobs`."
            )

    def _vocabulary_rows(self) -> int | None:
        """Rows of the model, where its configuration can be read from here; the server does not say."""
        try:
            return vocabulary_rows(find_config(self._model, self._argument, **self._options.hub))
        except TrlBlendError:
            return None

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


def check_by_name(model: Any, argument: str, options: LoadOptions) -> None:
    """
    Refuse what vLLM cannot load by name.

    Raises:
        [`~trl_blend.errors.ConfigError`]: For a loaded model, or weights to be quantized.
    """
    if not isinstance(model, str):
        raise ConfigError(
            f"vLLM has models by name, but `{argument}` is a loaded {type(model).__name__}. Pass its folder or Hub id."
        )
    if options.load_in_4bit:
        raise ConfigError("`load_in_4bit=True` is for transformers. Give vLLM a quantized checkpoint instead.")


async def _named(function: Callable[..., Awaitable[Result]], row: int, *arguments: Any) -> Result:
    with about_row(row):
        return await function(*arguments)


def request_settings(sampling: SamplingSettings, rows: int | None = None) -> dict[str, Any]:
    """
    Every sampling parameter: what is left out, the server takes from the checkpoint's generation_config.json. Where
    the `rows` of the model's vocabulary are known, those that are no tokens get the smallest bias that vLLM takes,
    -100 nats.
    """
    padding = range(sampling.vocab_size or 0, rows or 0) if sampling.vocab_size is not None else ()
    return {
        **({"logit_bias": {str(token): -100.0 for token in padding}} if padding else {}),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p or 0.0,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": sampling.eos_token_ids,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
    }


def scores_of_prompt_logprobs(
    rows: Sequence[Mapping[int, Any]],
    completion_ids: Sequence[int],
    top_k: int | None,
    vocab_size: int | None = None,
) -> TokenScores:
    """
    Scores from vLLM's `prompt_logprobs`: per token, the log-probs of the `top_k` most probable ids and of the token.

    The mass outside the kept ids is `1 - Σ p`, because vLLM returns nothing else: below about 1e-6 it is rounding, and
    it is never given as less than 2^-24. Ids from `vocab_size` on are no tokens: those among the ids are taken out of
    the distribution.

    Raises:
        [`~trl_blend.rollouts.engines.base.RowError`]: If a token is not among its ids, a value is no log-probability,
            or there are fewer tokens than `top_k`.
    """
    ids, values, tails, logps = [], [], [], []
    for position, (given, token) in enumerate(zip(rows, completion_ids, strict=True)):
        if token not in given:
            raise RowError(
                f"vLLM gave no log-probability for token {token} at position {position}, only for "
                f"{sorted(given)[:5]}: it scored other token ids than it was sent."
            )
        row = _over_tokens({entry: as_logp(value, entry, position) for entry, value in given.items()}, vocab_size)
        logps.append(row[token])
        if top_k is None:
            continue
        others = sorted((entry for entry in row if entry != token), key=lambda entry: -row[entry])[: top_k - 1]
        if len(others) < top_k - 1:
            raise RowError(
                f"vLLM returned {len(row)} log-probabilities where `top_k={top_k}` were asked for, at position "
                f"{position} and without those of padding rows. Start the server with `--max-logprobs {top_k}` or "
                "more, or set a smaller `top_k` (0 for the sampled token alone)."
            )
        # A stable sort: the token itself comes last among equals
        kept = sorted([*others, token], key=lambda entry: -row[entry])
        ids.append(kept)
        values.append([row[entry] for entry in kept])
        tails.append(math.log(max(1.0 - math.fsum(math.exp(z) for z in values[-1]), _SMALLEST_TAIL)))
    if top_k is None:
        return TokenScores(np.array(logps, np.float32))
    return TokenScores(
        np.array(logps, np.float32), np.array(ids), np.array(values, np.float32), np.array(tails, np.float32)
    )


def _over_tokens(row: Mapping[int, float], vocab_size: int | None) -> dict[int, float]:
    """The log-probabilities without those ids that are no tokens, whose mass goes to the others."""
    padding = [value for entry, value in row.items() if vocab_size is not None and entry >= vocab_size]
    if not padding:
        return dict(row)
    kept = math.log(max(1.0 - math.fsum(map(math.exp, padding)), _SMALLEST_TAIL))
    return {entry: min(value - kept, 0.0) for entry, value in row.items() if entry < vocab_size}


def _same_folder(model: str, root: str | None) -> bool:
    return root is not None and os.path.isdir(model) and os.path.isdir(root) and os.path.samefile(model, root)


class VllmClient:
    """
    Talks to one server, `http://host:8000` (a trailing `/v1` is taken off), with up to `concurrency` requests at once.
    A connection that fails, a 429 and a 5xx are tried again; any other answer is final.

    The key in the environment variable `VLLM_API_KEY`, if there is one, is sent along. `http_backoff` of
    huggingface_hub is for the Hub: with `HF_HUB_OFFLINE=1` it talks to no server, and it cannot be interrupted.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If `url` is no URL.
    """

    def __init__(self, url: str, concurrency: int = 64) -> None:
        try:
            parts = httpx2.URL(url)
        except httpx2.InvalidURL:
            parts = httpx2.URL()
        if parts.scheme not in ("http", "https") or not parts.host:
            raise ConfigError(
                f"`vllm_server_base_url={url!r}` is no URL. Give the root of the server, `http://host:8000`."
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self.concurrency = concurrency

    def get(self, path: str) -> Any:
        """JSON of a GET request. It asks what the server is, so a server that is not there is found out soon."""
        return self.map(self._request, [("GET", path, None, 3)])[0]

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """JSON of a POST request, inside of [`VllmClient.map`]."""
        return await self._request("POST", path, body, _ATTEMPTS)

    def map(
        self,
        function: Callable[..., Awaitable[Result]],
        items: Sequence[tuple[Any, ...]],
        on_rows: OnRows | None = None,
    ) -> list[Result]:
        """
        `[function(*item) for item in items]` with up to `concurrency` calls at once.

        After the first error, or Ctrl-C, what is running is broken off.
        """
        results: dict[int, Result] = {}
        limiter = anyio.CapacityLimiter(self.concurrency)

        async def one(index: int) -> None:
            async with limiter:
                results[index] = await function(*items[index])
            if on_rows is not None:
                on_rows(1)

        async def run() -> None:
            key = os.environ.get("VLLM_API_KEY")
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            limits = httpx2.Limits(max_connections=self.concurrency)
            # A proxy is for the world outside, not for a node beside this one
            client = httpx2.AsyncClient(
                headers=headers,
                timeout=_TIMEOUT,
                limits=limits,
                trust_env=False,
                verify=ssl.create_default_context(),  # with `SSL_CERT_FILE`, which `trust_env` would leave out too
            )
            async with client as self._http, anyio.create_task_group() as group:
                for index in range(len(items)):
                    group.start_soon(one, index)

        try:
            # In a thread of its own: a notebook has a loop already, and Ctrl-C ends the wait for it
            with start_blocking_portal() as portal:
                portal.call(run)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return [results[index] for index in range(len(items))]

    async def _request(self, method: str, path: str, body: dict[str, Any] | None, attempts: int) -> Any:
        problem = ""
        for attempt in range(attempts):
            if attempt:
                await anyio.sleep(_BACKOFF * 2 ** (attempt - 1))
            try:
                response = await self._http.request(method, self.url + path, json=body)
            except httpx2.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            status = response.status_code
            if status == 200:
                try:
                    return response.json()
                except ValueError as error:
                    where = f"{self.url}{path}"
                    raise EngineError(f"{where} answered with something that is not JSON ({error}).") from error
            problem = f"HTTP {status}: {_message(response)}"
            if status not in _RETRIED and status < 500:
                remedy = _REMEDIES.get(status, "The request is wrong, so it is not repeated.")
                kind = RowError if status in _ABOUT_A_ROW else EngineError
                raise kind(f"The vLLM server at {self.url} refused {path} ({problem}). {remedy}")
        raise EngineError(
            f"The vLLM server at {self.url} does not answer ({attempts} attempts; the last: {problem}). Check that it "
            "runs and can be reached from here, then run the same command again: what is written is kept."
        )


def _message(response: httpx2.Response) -> str:
    """What an answer says about the error, in one line."""
    try:
        value = response.json()
        value = value.get("error", value)
        value = value.get("message", value) if isinstance(value, dict) else value
    except (ValueError, AttributeError):
        value = response.text
    return " ".join(str(value).split())[:300] or "no message"

"""A client of a vLLM server: many requests at once, retries with back-off, and one clear error for each failure."""

import contextlib
import http.client
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from trl_blend.errors import ConfigError, EngineError


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

"""
A stand-in for the Hub on a local port, for the real `huggingface_hub` client: repositories of models and datasets,
commits, LFS uploads, downloads, tokens, and switches that let requests fail.

The answers to requests are in `requests.py`. Left out: Xet. Where `hf_xet` is installed, the client uploads with
it, without asking the Hub, in a protocol of its own and to another server; `HF_HUB_DISABLE_XET` makes it use LFS.
"""

import json
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.hub.repositories import Account, Refused, Repository
from tests.hub.requests import SIGNED, WRITES, Answers, route


# Tokens, and whom they stand for; `environment` and `hub_endpoint` log in with the first one
WRITER, READER, OTHER = "hf_tokenOfMeWhoWrites", "hf_tokenOfMeWhoReads", "hf_tokenOfSomebodyElse"


class Request(NamedTuple):
    """A request, its name in [`tests.hub.requests.ROUTES`], and its answer: no status where it was dropped."""

    kind: str
    path: str
    user_agent: str
    status: int | None


class Hub:
    """
    Attributes:
        accounts (`dict[str, Account]`):
            Account of each token.
        repositories (`dict[tuple[str, str], Repository]`):
            By kind (`"model"`, `"dataset"`) and name.
        requests (`list[Request]`):
            What was answered, in order.
        before (`dict[str, Callable[[int], None]]`):
            Called with the number of earlier requests of a kind before the next of that kind is answered. It may wait,
            or raise [`tests.hub.repositories.Refused`].
    """

    def __init__(self) -> None:
        self.url = ""
        self.accounts = {WRITER: Account("me", True), READER: Account("me", False), OTHER: Account("other", True)}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[Request] = []
        self.before: dict[str, Callable[[int], None]] = {}
        self.seen: Counter[str] = Counter()
        self.lock = threading.Lock()

    def create(self, name: str, kind: str = "model", private: bool = False) -> Repository:
        return self.repositories.setdefault((kind, name), Repository(kind, name, private))

    def model(self, name: str) -> Repository:
        return self.repositories["model", name]

    def dataset(self, name: str) -> Repository:
        return self.repositories["dataset", name]

    def fail(self, kind: str, status: int | None, after: int = 0, times: int = 1, **headers: str) -> None:
        """
        Answer requests of a kind with an error, or with `status=None` drop the connection.

        Args:
            after (`int`, *optional*, defaults to `0`):
                Requests of the kind, counted from now, that still succeed.
            times (`int`, *optional*, defaults to `1`):
                Requests that fail; after them the next ones succeed again.
        """
        first = self.seen[kind] + after

        def refuse(index: int) -> None:
            if first <= index < first + times:
                raise Refused(status, "set to fail", headers)

        self.before[kind] = refuse

    def arrived(self) -> list[str]:
        """SHA-256 of every LFS file in the order of its arrival, as often as it was sent."""
        sent = [one.path for one in self.requests if one.kind == "lfs_upload" and one.status == 200]
        return [path.split("/")[-1] for path in sent]

    def environment(self, home: Path, token: str | None = WRITER, **variables: str) -> dict[str, str]:
        """Environment of a process whose Hub this is, logged in with `token`, with its caches in `home`."""
        inherited = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_CACHE")}
        online = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        return {**inherited, **online, **({} if token is None else {"HF_TOKEN": token}), **variables}


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    """Class that reads requests, finds the method of [`Answers`] for each, and writes what it returns."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            method = "GET" if self.command == "HEAD" else self.command
            address = urlsplit(self.path)
            body, kind, status = self._body(), "unknown", None
            try:
                kind, groups = route(method, address.path)
                with hub.lock:
                    index = hub.seen[kind]
                    hub.seen[kind] += 1
                hub.before.get(kind, lambda index: None)(index)
                status, data, headers = 200, *self._answer(kind, groups, body, address.query)
            except Refused as refused:
                if refused.status is None:
                    hub.requests.append(self._record(kind, None))
                    self.close_connection = True
                    return
                status, headers = refused.status, refused.headers
                text = str(refused)
                answer = {"error": text, **({"url": headers["url"]} if "url" in headers else {})}
                data = text.encode() if text.startswith("{") else json.dumps(answer).encode()
            hub.requests.append(self._record(kind, status))
            self._reply(status, data, headers)

        do_HEAD = do_POST = do_PUT = do_GET

        def _record(self, kind: str, status: int | None) -> Any:
            return Request(kind, urlsplit(self.path).path, self.headers.get("User-Agent", ""), status)

        def _answer(self, kind: str, groups: dict[str, Any], body: bytes, query: str) -> tuple[bytes, dict[str, str]]:
            answers = Answers(hub, self.headers)
            if kind not in SIGNED:
                answers.authenticate()
            if "name" in groups:
                name, write = groups.pop("name"), kind in WRITES or bool(groups.pop("write", None))
                repository_kind = groups.pop("kind", "dataset" if groups.pop("prefix", None) else "model")
                signed = kind in SIGNED
                key = (repository_kind, name)
                groups["repository"] = hub.repositories[key] if signed else answers.repository(*key, write)
            parsed = {name: values[-1] for name, values in parse_qs(query).items()}
            with hub.lock:
                result = getattr(answers, kind)(body=body, query=parsed, **groups)
            return result if isinstance(result, tuple) else (json.dumps(result).encode(), {})

        def _reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if wanted and status == 200:
                first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
                headers = {**headers, "Content-Range": f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"}
                status, data = 206, data[first : last + 1]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value.replace("\n", " "))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            data = b""
            while size := int(self.rfile.readline() or b"0", 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


@contextmanager
def running_hub() -> Iterator[tuple[Hub, str]]:
    """A hub and its address."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub, hub.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub_endpoint(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client in this process talks to, logged in as `me`, with empty caches of its own."""
    home = tmp_path_factory.mktemp("hub_home")
    with running_hub() as (hub, url):
        point_client_at(url, home, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield hub


def point_client_at(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what `huggingface_hub`, transformers and datasets read from the environment when they are imported."""
    import datasets
    import huggingface_hub
    import transformers
    from huggingface_hub import constants, repocard

    settings = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    # Older clients have cards validated at an address of their own
    session = repocard.get_session
    post = lambda address, **rest: session().post(address.replace("https://huggingface.co", url), **rest)  # noqa: E731
    monkeypatch.setattr(repocard, "get_session", lambda: SimpleNamespace(post=post))
    # Clients made at import, or kept: they hold the address that they were made with
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    for module in (transformers.utils.hub, transformers.dynamic_module_utils):
        monkeypatch.setattr(module, "HF_MODULES_CACHE", str(home / "modules"))
    settings = {
        "HF_ENDPOINT": url,
        "HUB_DATASETS_URL": url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_OFFLINE": False,
        "HF_DATASETS_CACHE": home / "datasets",
        "HF_MODULES_CACHE": home / "modules",
    }
    for name, value in settings.items():
        monkeypatch.setattr(datasets.config, name, value)

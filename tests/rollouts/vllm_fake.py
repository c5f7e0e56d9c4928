"""A small HTTP server that speaks vLLM's part of `/v1/completions` from a tiny model, with failures on request."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from tests.rollouts.collecting import forced_logits, log_softmax, warped_logprobs


class FakeVllm:
    """
    What the server does, and what it saw.

    Args:
        model: The model it serves.
        name (`str`): Its id.
        logprobs_mode (`str`): `"processed_logprobs"` or `"raw_logprobs"`, as vLLM's `--logprobs-mode`.
        max_model_len (`int`): Context.
        failures (`list`): What the next completions get instead of an answer: a status, `"drop"` or `"hang"`.
        change: Called with every answer before it is sent.
        awaited (`int`): No completion is answered before as many have been at the server at once.
    """

    def __init__(self, model, name="teacher", logprobs_mode="processed_logprobs", max_model_len=256):
        self.model, self.name, self.logprobs_mode, self.max_model_len = model, name, logprobs_mode, max_model_len
        self.failures, self.change = [], lambda answer: answer
        self.released = threading.Event()
        self.requests, self.headers = [], []
        self.lock = threading.Lock()
        self.arrival = threading.Condition()
        self.running = self.most_at_once = self.awaited = 0

    @property
    def scoring_requests(self):
        return [request for request in self.requests if "prompt_logprobs" in request]

    def complete(self, body):
        ids = body["prompt"]
        if len(ids) + body["max_tokens"] > self.max_model_len:
            return 400, {"error": {"message": f"maximum context length is {self.max_model_len} tokens"}}
        with self.lock:  # one torch thread is plenty
            choice = {"prompt_token_ids": ids, "text": "", "prompt_logprobs": None, "logprobs": None}
            if body.get("prompt_logprobs") is not None:
                choice["prompt_logprobs"] = self._prompt_logprobs(ids, body["prompt_logprobs"])
            choice.update(self._sample(body))
        return 200, self.change({"choices": [choice]})

    def _prompt_logprobs(self, ids, count):
        entries = [None]
        for token, logits in zip(ids[1:], forced_logits(self.model, ids[:1], ids[1:]), strict=True):
            logps = log_softmax(logits)
            order = sorted(range(len(logps)), key=lambda v: -logps[v])
            entries.append(
                {str(v): {"logprob": logps[v], "rank": order.index(v) + 1} for v in {*order[:count], token}}
            )
        return entries

    def _sample(self, body):
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        settings = {"temperature": body["temperature"], "top_p": body.get("top_p", 1.0)}
        settings["top_k"] = max(body.get("top_k", 0), 0)
        settings["min_p"] = body.get("min_p") or None
        tokens, logps, tops = [], [], []
        for _ in range(body["max_tokens"]):
            logits = forced_logits(self.model, body["prompt"], [*tokens, 0])[-1]
            warped = warped_logprobs(logits, **settings)
            token = int(torch.multinomial(torch.tensor(warped).exp(), 1, generator=generator))
            given = warped if self.logprobs_mode == "processed_logprobs" else log_softmax(logits)
            tokens.append(token)
            logps.append(max(given[token], -9999.0))
            order = sorted(range(len(given)), key=lambda v: -given[v])[: body.get("logprobs") or 0]
            tops.append({f"token_id:{v}": max(given[v], -9999.0) for v in {*order, token}})
            if token in (body.get("stop_token_ids") or []):
                break
        logprobs = {"token_logprobs": logps, "top_logprobs": tops} if body.get("logprobs") is not None else None
        return {"token_ids": tokens, "logprobs": logprobs}


@contextmanager
def serving(fake):
    """Runs the server; gives its root URL."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            fake.headers.append(dict(self.headers))
            if self.path == "/version":
                return self.answer(200, {"version": "0.fake"})
            if self.path == "/v1/models":
                entry = {"id": fake.name, "root": f"/weights/{fake.name}", "max_model_len": fake.max_model_len}
                return self.answer(200, {"data": [entry]})
            return self.answer(404, {"detail": "Not Found"})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.requests.append(body)
            failure = fake.failures.pop(0) if fake.failures else None
            if failure == "drop":
                return self.connection.close()
            if failure == "hang":
                fake.released.wait(60)
                return None
            if failure is not None:
                return self.answer(failure, {"error": {"message": f"injected {failure}"}})
            with fake.arrival:
                fake.running += 1
                fake.most_at_once = max(fake.most_at_once, fake.running)
                fake.arrival.notify_all()
                fake.arrival.wait_for(lambda: fake.most_at_once >= fake.awaited, timeout=30)
            try:
                return self.answer(*fake.complete(body))
            finally:
                with fake.arrival:
                    fake.running -= 1

        def answer(self, status, value):
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # a client that breaks off is expected
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        fake.released.set()
        server.shutdown()
        server.server_close()

"""A stand-in for the Hub on a local port: what creating, uploading and downloading the dataset `me/store` needs."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class Hub:
    """Files of one repository per branch, and the requests that changed something."""

    def __init__(self):
        self.branches = {"main": {".gitattributes": b""}}
        self.created = []
        self.commits = []

    def commit(self, branch, lines):
        files, message = dict(self.branches[branch]), None
        for line in map(json.loads, lines):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise ValueError(line["key"])
        self.branches[branch] = files
        self.commits.append((branch, message))

    def sha(self, branch):
        content = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in self.branches[branch].items())
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()

    def files_at(self, revision):
        return next(files for name, files in self.branches.items() if revision in (name, self.sha(name)))


def oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def handler(hub):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def reply(self, content, status=200, headers=()):
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def body(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                data = b""
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self):
            body, parts = self.body(), unquote(urlparse(self.path).path).strip("/").split("/")
            match parts:
                case ["api", "repos", "create"]:
                    values = json.loads(body)
                    name = f"{values['organization']}/{values['name']}"
                    private = values.get("private", values.get("visibility") == "private")  # older and newer clients
                    hub.created.append((name, values["type"], private))
                    self.reply({"url": f"/datasets/{values['organization']}/{values['name']}"})
                case ["api", "validate-yaml"]:
                    self.reply({"errors": [], "warnings": []})
                case ["api", "datasets", "me", "store", "branch", name]:
                    hub.branches.setdefault(name, dict(hub.branches["main"]))
                    self.reply({})
                case ["api", "datasets", "me", "store", "preupload", branch]:
                    self.reply({"files": [self.mode(branch, file["path"]) for file in json.loads(body)["files"]]})
                case ["api", "datasets", "me", "store", "commit", branch]:
                    hub.commit(branch, body.splitlines())
                    url = f"http://{self.headers['Host']}/datasets/me/store/commit/{hub.sha(branch)}"
                    self.reply({"commitUrl": url, "commitOid": hub.sha(branch), "success": True})
                case _:
                    self.reply({"error": self.path}, 404, headers=[("X-Error-Code", "RepoNotFound")])

        def mode(self, branch, path):
            present = hub.branches[branch].get(path)
            return {
                "path": path,
                "uploadMode": "regular",
                "shouldIgnore": False,
                "oid": None if present is None else oid(present),
            }

        def do_GET(self):
            parts = unquote(urlparse(self.path).path).strip("/").split("/")
            match parts:
                case ["api", "datasets", "me", "store", ("revision" | "tree") as what, revision]:
                    files = hub.files_at(revision)
                    if what == "tree":
                        entries = [(path, len(data), oid(data)) for path, data in files.items()]
                        self.reply([{"type": "file", "path": p, "size": s, "oid": o} for p, s, o in entries])
                        return
                    branch = next(n for n in hub.branches if revision in (n, hub.sha(n)))
                    siblings = [{"rfilename": path} for path in files]
                    self.reply({"id": "me/store", "sha": hub.sha(branch), "siblings": siblings})
                case ["datasets", "me", "store", "resolve", revision, *path]:
                    data = hub.files_at(revision)["/".join(path)]
                    branch = next(n for n in hub.branches if revision in (n, hub.sha(n)))
                    headers = [("ETag", f'"{oid(data)}"'), ("X-Repo-Commit", hub.sha(branch))]
                    self.reply(data, headers=headers)
                case _:
                    self.reply({"error": self.path}, 404, headers=[("X-Error-Code", "RepoNotFound")])

        do_HEAD = do_GET

    return Handler


@contextmanager
def running_hub():
    """A hub and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

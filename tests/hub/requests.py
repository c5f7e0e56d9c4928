"""What the stand-in for the Hub of `server.py` answers to each request of the `huggingface_hub` client."""

import base64
import hashlib
import json
import re
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml

from tests.hub.repositories import File, Refused, not_found


_API = r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)"
_GIT = r"/(?P<prefix>datasets/)?(?P<name>[^/]+/[^/]+)"
# Kind of request -> method and path
ROUTES = {
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "validate_yaml": ("POST", r"/api/validate-yaml"),
    "auth_check": ("GET", _API + r"/auth-check(?P<write>/write)?"),
    "info": ("GET", _API + r"(/revision/(?P<revision>[^/]+))?"),
    "tree": ("GET", _API + r"/tree/(?P<revision>[^/]+)(/(?P<path>.+))?"),
    "paths_info": ("POST", _API + r"/paths-info/(?P<revision>[^/]+)"),
    "refs": ("GET", _API + r"/refs"),
    "branch": ("POST", _API + r"/branch/(?P<revision>[^/]+)"),
    "preupload": ("POST", _API + r"/preupload/(?P<revision>[^/]+)"),
    "commit": ("POST", _API + r"/commit/(?P<revision>[^/]+)"),
    "lfs_batch": ("POST", _GIT + r"\.git/info/lfs/objects/batch"),
    "lfs_upload": ("PUT", r"/lfs/(?P<kind>model|dataset)/(?P<name>[^/]+/[^/]+)/(?P<oid>\w+)"),
    "lfs_verify": ("POST", r"/lfs/(?P<kind>model|dataset)/(?P<name>[^/]+/[^/]+)/(?P<oid>\w+)/verify"),
    "resolve": ("GET", _GIT + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
}
# Those to addresses that carry their own signature: the client sends them no token
SIGNED = ("lfs_upload",)
WRITES = ("branch", "preupload", "commit", "lfs_batch")
_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".arrow", ".gz", ".zip")
_LFS_SIZE = 10_000_000


class Answers:
    """One method per kind of request: groups of its path, body and query in, JSON or bytes with headers out."""

    def __init__(self, hub: Any, headers: Any) -> None:
        self.hub = hub
        self.headers = headers
        self.account: Any = None

    def authenticate(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.account = self.hub.accounts.get(token)
        if token and self.account is None:
            message = "Invalid credentials in Authorization header"
            raise Refused(401, message, {"X-Error-Message": message})

    def repository(self, kind: str, name: str, write: bool = False) -> Any:
        found = self.hub.repositories.get((kind, name))
        own = self.account is not None and found is not None and self.account.name == found.owner
        if found is None or (found.private and not own):
            if self.account is None:  # the Hub does not tell a missing repository from a private one
                raise Refused(401, "Invalid username or password.", {"X-Error-Code": "RepoNotFound"})
            raise not_found("Repo", name)
        if write and not (own and self.account.can_write):
            if self.account is None:
                raise Refused(401, "Invalid username or password.")
            message = f"You don't have write permission on {name}"
            raise Refused(403, message, {"X-Error-Message": message})
        return found

    # Accounts and repositories

    def whoami(self, **_: Any) -> Any:
        if self.account is None:
            raise Refused(401, "Invalid username or password.")
        role = "write" if self.account.can_write else "read"
        token = {"displayName": "test", "role": role}
        return {"type": "user", "name": self.account.name, "orgs": [], "auth": {"accessToken": token}}

    def create(self, body: bytes, **_: Any) -> Any:
        values = json.loads(body)
        if self.account is None:
            raise Refused(401, "Invalid username or password.")
        kind, owner = values.get("type") or "model", values["organization"] or self.account.name
        name = f"{owner}/{values['name']}"
        if not self.account.can_write or owner != self.account.name:
            message = f'You don\'t have the rights to create a {kind} under the namespace "{owner}"'
            raise Refused(403, message, {"X-Error-Message": message})
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.hub.repositories:
            raise Refused(409, f"You already created this {kind} repo: {name}", {"url": url})
        private = values.get("private", values.get("visibility") == "private")  # older and newer clients
        self.hub.create(name, kind, private)
        return {"url": url, "name": name}

    def auth_check(self, repository: Any, **_: Any) -> Any:
        return {}

    def info(self, repository: Any, revision: str | None = None, **_: Any) -> Any:
        sha = self._sha(repository, revision or "main")
        files = repository.snapshots[sha]
        siblings = [{"rfilename": path} for path in sorted(files)]
        card = files.get("README.md")
        metadata = _metadata(card.data.decode()) if card else None
        common = {"id": repository.name, "sha": sha, "private": repository.private, "siblings": siblings}
        return {**common, "tags": [], "downloads": 0, "likes": 0, "cardData": metadata}

    def refs(self, repository: Any, **_: Any) -> Any:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in repository.branches.items()
        ]
        return {"branches": branches, "converts": [], "tags": []}

    def branch(self, repository: Any, revision: str, body: bytes, **_: Any) -> Any:
        if revision in repository.branches:
            raise Refused(409, f"Reference {revision} already exists")
        start = json.loads(body).get("startingPoint", "main") if body else "main"
        repository.branches[revision] = self._sha(repository, start)
        return {}

    def validate_yaml(self, body: bytes, **_: Any) -> Any:
        errors = []
        try:
            metadata = _metadata(json.loads(body)["content"]) or {}
            types = {"license": str, "library_name": str, "pipeline_tag": str, "tags": list, "model_name": str}
            errors = [
                {"message": f'"{name}" must be a {kind.__name__}'}
                for name, kind in types.items()
                if not isinstance(metadata.get(name, kind()), kind)
            ]
        except (yaml.YAMLError, AttributeError) as error:
            errors = [{"message": f"no metadata: {error}"}]
        if errors:
            raise Refused(400, json.dumps({"errors": errors, "warnings": []}))
        return {"errors": [], "warnings": []}

    # Reading

    def _sha(self, repository: Any, revision: str) -> str:
        sha = repository.sha(revision)
        if sha is None:
            raise not_found("Revision", revision)
        return sha

    def tree(self, repository: Any, revision: str, path: str | None, query: dict[str, str], **_: Any) -> Any:
        files = repository.snapshots[self._sha(repository, revision)]
        below = f"{path}/" if path else ""
        inside = {name: file for name, file in files.items() if name.startswith(below)}
        if path and not inside:
            raise not_found("Entry", path)
        recursive = query.get("recursive", "").lower() in ("true", "1")
        folders = {str(parent) for name in inside for parent in PurePosixPath(name).parents if str(parent) != "."}
        entries = [_entry(name, file) for name, file in inside.items()]
        entries += [_folder(name) for name in folders if name.startswith(below)]
        return [entry for entry in entries if recursive or "/" not in entry["path"].removeprefix(below)]

    def paths_info(self, repository: Any, revision: str, body: bytes, **_: Any) -> Any:
        files = repository.snapshots[self._sha(repository, revision)]
        paths = parse_qs(body.decode()).get("paths", [])
        found = [_entry(path, files[path]) for path in paths if path in files]
        folders = [path for path in paths if any(name.startswith(f"{path}/") for name in files)]
        return found + [_folder(path) for path in folders]

    def resolve(self, repository: Any, revision: str, path: str, **_: Any) -> Any:
        sha = self._sha(repository, revision)
        file = repository.snapshots[sha].get(path)
        if file is None:
            raise Refused(404, "Entry not found", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        headers = {"ETag": f'"{file.oid}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
        return file.data, headers

    # Writing

    def preupload(self, repository: Any, revision: str, body: bytes, **_: Any) -> Any:
        files = repository.snapshots[self._sha(repository, revision)]
        modes = []
        for asked in json.loads(body)["files"]:
            path, present = asked["path"], files.get(asked["path"])
            is_lfs = path.endswith(_LFS_SUFFIXES) or asked["size"] > _LFS_SIZE
            same_mode = present is not None and present.is_lfs == is_lfs
            modes.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if is_lfs else "regular",
                    "shouldIgnore": False,
                    "oid": present.oid if same_mode else None,
                }
            )
        return {"files": modes}

    def lfs_batch(self, repository: Any, body: bytes, **_: Any) -> Any:
        asked = json.loads(body)
        assert asked["operation"] == "upload" and "basic" in asked["transfers"], asked
        objects = []
        for one in asked["objects"]:
            oid, size = one["oid"], one["size"]
            objects.append({"oid": oid, "size": size})
            if oid in repository.lfs:
                continue
            address = f"{self.hub.url}/lfs/{repository.kind}/{repository.name}/{oid}"
            objects[-1]["actions"] = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, repository: Any, oid: str, body: bytes, **_: Any) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the content does not have this hash")
        repository.lfs[oid] = body
        return {}

    def lfs_verify(self, repository: Any, oid: str, body: bytes, **_: Any) -> Any:
        if len(repository.lfs.get(oid, b"")) != json.loads(body)["size"]:
            raise Refused(404, "the object has not arrived")
        return {}

    def commit(self, repository: Any, revision: str, body: bytes, **_: Any) -> Any:
        files, message = dict(repository.snapshots[self._sha(repository, revision)]), ""
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in repository.lfs:
                    raise Refused(400, f"LFS pointer points to a file that does not exist: {value['path']}")
                files[value["path"]] = File(repository.lfs[value["oid"]], True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise not_found("Entry", value["path"])
            else:
                raise Refused(400, f"unknown operation {key}")
        sha = repository.put(revision, files, message)
        repository.commits.append((revision, message))
        prefix = "datasets/" if repository.kind == "dataset" else ""
        url = f"{self.hub.url}/{prefix}{repository.name}/commit/{sha}"
        return {"success": True, "commitUrl": url, "commitOid": sha}


def _entry(path: str, file: Any) -> dict[str, Any]:
    size, oid = len(file.data), hashlib.sha1(b"blob %d\0" % len(file.data) + file.data).hexdigest()
    lfs = {"lfs": {"oid": file.oid, "size": size, "pointerSize": 130}} if file.is_lfs else {}
    return {"type": "file", "path": path, "size": size, "oid": oid, **lfs}


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}


def _metadata(card: str) -> dict[str, Any] | None:
    block = re.match(r"\s*---\n(.*?)\n---", card, flags=re.DOTALL)
    return yaml.safe_load(block.group(1)) if block else None


def route(method: str, path: str) -> tuple[str, dict[str, Any]]:
    for kind, (wanted, pattern) in ROUTES.items():
        found = re.fullmatch(pattern, path) if wanted == method else None
        if found:
            return kind, {name: value and unquote(value) for name, value in found.groupdict().items()}
    raise not_found("Entry", path)

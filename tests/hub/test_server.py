"""The stand-in for the Hub itself: what the real client says of its answers."""

import hashlib
import os
from types import SimpleNamespace

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import http_backoff

from tests.hub.server import OTHER, READER, hub_endpoint  # noqa: F401


@pytest.fixture
def hub(hub_endpoint):  # noqa: F811
    return hub_endpoint


@pytest.fixture
def impatient(monkeypatch):
    """The client's retries do not wait."""
    waits = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=waits.append))
    return waits


def test_a_commit_adds_copies_and_deletes(hub):
    api = HfApi()
    api.create_repo("me/files")
    big, small = os.urandom(1000), b"small"
    adds = [CommitOperationAdd("a/big.bin", big), CommitOperationAdd("a/small.txt", small)]
    api.create_commit("me/files", [*adds, CommitOperationAdd("b/gone.txt", b"x")], commit_message="first")
    copies = [CommitOperationCopy("a/big.bin", "c.bin"), CommitOperationCopy("a/small.txt", "c.txt")]
    api.create_commit("me/files", [*copies, CommitOperationDelete("b/gone.txt")], commit_message="second")
    repository = hub.model("me/files")
    assert repository.commits == [("main", "first"), ("main", "second")]
    expected = {"a/big.bin": big, "a/small.txt": small, "c.bin": big, "c.txt": small}
    assert {path: data for path, data in repository.files().items() if path != ".gitattributes"} == expected
    assert hub.arrived() == [hashlib.sha256(big).hexdigest()]


def test_branches_revisions_and_reading(hub):
    api = HfApi()
    api.create_repo("me/files")
    api.create_branch("me/files", branch="v2")
    first = api.upload_file(path_or_fileobj=b"one", path_in_repo="data/x.txt", repo_id="me/files").oid
    api.upload_file(path_or_fileobj=b"two", path_in_repo="data/x.txt", repo_id="me/files")
    assert open(hf_hub_download("me/files", "data/x.txt")).read() == "two"
    assert open(hf_hub_download("me/files", "data/x.txt", revision=first)).read() == "one"
    folder = snapshot_download("me/files", revision="main")
    assert sorted(os.listdir(folder)) == [".gitattributes", "data"]
    assert {branch.name for branch in api.list_repo_refs("me/files").branches} == {"main", "v2"}
    assert [entry.path for entry in api.list_repo_tree("me/files")] == [".gitattributes", "data"]
    address = f"{hub.url}/me/files/resolve/main/data/x.txt"
    part = http_backoff("GET", address, headers={"Range": "bytes=1-1"})
    assert (part.status_code, part.content) == (206, b"w")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/files", "y.txt")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("me/files", "data/x.txt", revision="v3")


def test_who_may_do_what(hub):
    hub.create("other/public"), hub.create("other/private", private=True), hub.create("me/mine")
    assert HfApi().whoami()["name"] == "me"
    assert HfApi().model_info("other/public").id == "other/public"
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("other/private")
    assert HfApi(token=OTHER).model_info("other/private").private
    HfApi().auth_check("me/mine", write=True)
    for token, name in ((None, "other/public"), (READER, "me/mine")):
        with pytest.raises(HfHubHTTPError, match="403"):
            HfApi(token=token).auth_check(name, write=True)
        with pytest.raises(HfHubHTTPError, match="403"):
            HfApi(token=token).upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id=name)
    for token, status in ((READER, 403), ("hf_nobody", 401), (False, 401)):
        with pytest.raises(HfHubHTTPError, match=str(status)):
            HfApi(token=token).create_repo("me/new")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi().create_repo("other/new")
    with pytest.raises(HfHubHTTPError, match="409"):
        HfApi().create_repo("me/mine")
    assert HfApi().create_repo("me/mine", exist_ok=True).repo_id == "me/mine"


def test_failures_once_and_until_the_client_gives_up(hub, impatient):
    api = HfApi()
    api.create_repo("me/files")
    hub.fail("lfs_upload", 503)
    hub.fail("preupload", 429, retry_after="3")
    api.upload_file(path_or_fileobj=b"a", path_in_repo="a.bin", repo_id="me/files")
    assert [request.status for request in hub.requests if request.kind == "lfs_upload"] == [503, 200]
    assert impatient in ([4.0, 1], [1, 1])  # an older client does not read how long to wait
    hub.fail("lfs_upload", None, times=99)
    with pytest.raises(RuntimeError, match="Error while uploading 'b.bin'"):
        api.upload_file(path_or_fileobj=b"b", path_in_repo="b.bin", repo_id="me/files")
    assert set(hub.model("me/files").files()) == {".gitattributes", "a.bin"}


def test_an_invalid_card_is_refused(hub):
    with pytest.raises(ValueError, match="license"):
        ModelCard("---\nlicense: [a, b]\n---\n").validate()

"""Pushing a store and opening it again, through the client of the Hub and over HTTP to a stand-in of the Hub."""

import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from tests.hub.server import hub_endpoint, running_hub  # noqa: F401
from tests.rollouts.stores import contents, write_store
from trl_blend.errors import StoreError
from trl_blend.rollouts.store import RolloutStore, load_rollouts


ROOT = Path(__file__).resolve().parents[2]
PUSH = """
import sys
from trl_blend.rollouts.store import RolloutStore
four, three = map(RolloutStore.open, sys.argv[1:])
print(four.push_to_hub("me/store", private=True))
print(three.push_to_hub("me/store"))
print(four.push_to_hub("me/store", revision="v2", commit_message="said so"))
store = RolloutStore.open("me/store", verify=True)
print(store.digest, store.name, store.folder)
print(RolloutStore.open("me/store", revision="v2").digest)
try:
    RolloutStore.open("me/other")
except Exception as error:
    print(repr(error))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A store of four shards is pushed, then one of three over it, then the first again to another branch."""
    folder = tmp_path_factory.mktemp("push")
    write_store(folder / "four", 4, settings={"seed": 1}, seed=1)
    store = write_store(folder / "three", 3)
    (store.folder / "notes.txt").write_text("mine")
    (store.folder / "data" / ".part-00007.parquet.1.tmp").write_text("left over")
    with running_hub() as (hub, _):
        environment = hub.environment(folder / "home")
        command = [sys.executable, "-c", PUSH, str(folder / "four"), str(store.folder)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return store, hub.dataset("me/store"), done.stdout.splitlines()


def test_what_is_uploaded(pushed):
    store, repository, printed = pushed
    assert repository.private  # what the first push said; the later ones find it created
    for branch, num_shards in (("main", 3), ("v2", 4)):  # the fourth of the first push is gone from main
        assert set(repository.files(branch)) == {
            ".gitattributes",
            "README.md",
            "manifest.json",
            *(f"data/part-0000{index}.parquet" for index in range(num_shards)),
        }
    assert repository.files()["manifest.json"] == (store.folder / "manifest.json").read_bytes()
    assert repository.commits == [("main", "Upload 20 rollouts"), ("main", "Upload 15 rollouts"), ("v2", "said so")]
    assert "/commit/" in printed[0]


def test_a_reader_gets_the_same_store_from_the_hub(pushed):
    store, _, printed = pushed
    digest, name, folder = printed[3].split()
    assert (digest, name) == (store.digest, "me/store")
    assert sorted(path.name for path in Path(folder).iterdir()) == ["README.md", "data", "manifest.json"]
    assert printed[4] == RolloutStore.open(store.folder.parent / "four").digest != digest
    assert "StoreError" in printed[5]
    assert "'me/other' is not a folder here, and no dataset of that name" in printed[5]
    assert "RepositoryNotFoundError" in printed[5]


def test_the_files_of_the_repository_open_with_load_dataset(pushed, tmp_path, monkeypatch):
    store, pushed_files, _ = pushed
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    repository = tmp_path / "repository"
    for path, data in pushed_files.files().items():
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_bytes(data)
    rows = datasets.load_dataset(str(repository))
    assert list(rows) == ["train"]
    assert rows["train"].to_list() == store.dataset().to_list()
    found = load_rollouts(repository, verify=True)
    assert found.manifest == store.manifest
    assert contents(repository) == {n: d for n, d in contents(store.folder).items() if not n.startswith(".")}
    assert RolloutStore.open(str(repository)).digest == store.digest


def test_a_store_whose_connection_breaks_off(hub_endpoint):  # noqa: F811
    hub_endpoint.fail("info", None, times=1000)
    with pytest.raises(StoreError, match="no dataset of that name could be fetched from the Hub .RemoteProtocolError"):
        RolloutStore.open("me/store")

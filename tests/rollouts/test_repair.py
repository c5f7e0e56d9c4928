"""Shards and manifests that are damaged on disk: what is said, and what `repair` redoes."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.rollouts.stores import contents, make_manifest, random_rows, write_shards, write_store
from trl_blend.errors import StoreError
from trl_blend.rollouts.format import Manifest
from trl_blend.rollouts.store import RolloutStore
from trl_blend.rollouts.writer import ShardWriter


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[70] ^= 1  # of the first page
    path.write_bytes(content)


def overwrite(path):
    path.write_bytes(b"not parquet")


def replace_by_foreign(path):
    size = path.stat().st_size
    pq.write_table(pa.table({"text": ["x"]}), path)
    assert path.stat().st_size != size


def swap(path):
    shutil.copy(path.with_name("part-00002.parquet"), path)


DAMAGES = [cut, flip, overwrite, replace_by_foreign, swap, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_shard_is_named_and_repair_redoes_that_one_only(tmp_path, damage):
    write_store(tmp_path, 4)
    before = contents(tmp_path)
    path = tmp_path / "data" / "part-00001.parquet"
    damage(path)
    times = {other: other.stat().st_mtime_ns for other in path.parent.iterdir() if other != path}
    with pytest.raises(StoreError, match=r"part-00001\.parquet is broken.*--repair"):
        RolloutStore.open(tmp_path, verify=True)
    if damage is not flip:  # the start looks at sizes and footers, a reader at every byte
        with pytest.raises(StoreError, match=r"part-00001\.parquet is broken.*--repair"):
            ShardWriter(tmp_path, make_manifest(num_shards=4))
    writer = ShardWriter(tmp_path, make_manifest(num_shards=4), repair=True)
    assert not Manifest.load(tmp_path).complete
    with pytest.raises(StoreError, match="half-written: 3 of 4 shards"):
        RolloutStore.open(tmp_path)
    assert write_shards(writer, 4) == [1]
    assert contents(tmp_path) == before
    assert {other: other.stat().st_mtime_ns for other in times} == times
    RolloutStore.open(tmp_path, verify=True)


@pytest.mark.parametrize("damage", [cut, overwrite, replace_by_foreign, swap])
def test_a_broken_shard_that_no_manifest_knows_is_found_too(tmp_path, damage):
    writer = ShardWriter(tmp_path, make_manifest(num_shards=3))
    for index in range(3):
        writer.write(index, random_rows(index), f"input {index}")
    assert Manifest.load(tmp_path).shards == []
    before = contents(tmp_path)
    damage(tmp_path / "data" / "part-00001.parquet")
    with pytest.raises(StoreError, match=r"part-00001\.parquet is broken"):
        ShardWriter(tmp_path, make_manifest(num_shards=3))
    assert write_shards(ShardWriter(tmp_path, make_manifest(num_shards=3), repair=True), 3) == [1]
    assert contents(tmp_path) == before


def test_repair_of_a_whole_store_changes_nothing(tmp_path):
    store = write_store(tmp_path)
    before, times = contents(tmp_path), {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    again = write_store(tmp_path, repair=True)
    assert again.manifest == store.manifest
    assert contents(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 1}', None])
def test_a_broken_manifest_is_written_anew_from_the_shards(tmp_path, text):
    store = write_store(tmp_path)
    path = tmp_path / "manifest.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
        with pytest.raises(StoreError, match="manifest.json"):
            ShardWriter(tmp_path, make_manifest(num_shards=3))
    writer = ShardWriter(tmp_path, make_manifest(num_shards=3), repair=text is not None)
    assert write_shards(writer, 3) == []
    again = RolloutStore.open(tmp_path, verify=True)
    assert again.manifest.shards == store.manifest.shards
    assert again.manifest.num_completion_tokens == store.manifest.num_completion_tokens


def test_a_footer_with_fields_of_another_version_is_read(tmp_path):
    store = write_store(tmp_path)
    path = tmp_path / "data" / "part-00001.parquet"
    table = pq.read_table(path)
    footer = json.loads(table.schema.metadata[b"trl_blend"]) | {"seal": "ab" * 32}  # of the first versions
    pq.write_table(table.replace_schema_metadata({b"trl_blend": json.dumps(footer)}), path)
    (tmp_path / "manifest.json").unlink()
    assert write_shards(ShardWriter(tmp_path, make_manifest(num_shards=3)), 3) == []
    assert RolloutStore.open(tmp_path, verify=True).manifest.num_rows == store.manifest.num_rows


def test_a_newer_store_is_not_touched(tmp_path):
    write_store(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))
    before = path.read_bytes(), contents(tmp_path)
    for repair in (False, True):
        with pytest.raises(StoreError, match="schema_version=2"):
            ShardWriter(tmp_path, make_manifest(num_shards=3), repair=repair)
    assert (path.read_bytes(), contents(tmp_path)) == before

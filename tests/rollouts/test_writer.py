import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.rollouts.stores import contents, make_manifest, random_rows, write_shards, write_store
from trl_blend.errors import ConfigError, StoreError
from trl_blend.rollouts import writer as writing
from trl_blend.rollouts.format import Manifest
from trl_blend.rollouts.store import RolloutStore
from trl_blend.rollouts.writer import ShardWriter


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_shard_holds_the_rows_in_the_types_of_the_schema(tmp_path, dtype):
    store = write_store(tmp_path, 1, scored=True, top_k=True, rows=40, fields={"logps_dtype": dtype})
    rows = random_rows(0, 40, scored=True, top_k=True)
    table = pq.read_table(tmp_path / "data" / "part-00000.parquet")
    logps, ids = pa.list_(getattr(pa, dtype)()), pa.list_(pa.int32())
    expected_types = {
        "key": pa.string(),
        "prompt_ids": ids,
        "completion_ids": ids,
        "rollout_logps": logps,
        "student_logps": logps,
        "truncated": pa.bool_(),
        "teacher_logps": logps,
        "teacher_topk_ids": pa.list_(ids),
        "teacher_topk_logps": pa.list_(logps),
        "teacher_tail_logmass": logps,
    }
    assert {field.name: str(field.type).replace("element", "item") for field in table.schema} == {
        name: str(arrow_type) for name, arrow_type in expected_types.items()
    }
    for name in expected_types:
        for found, row in zip(table[name].to_pylist(), rows[name], strict=True):
            if name.endswith(("logps", "logmass")):
                assert np.array_equal(np.array(found), np.asarray(row).astype(dtype))
            else:
                assert found == (row.tolist() if isinstance(row, np.ndarray) else row)
    assert store.manifest.num_rows == 40
    assert store.manifest.num_completion_tokens == sum(map(len, rows["completion_ids"]))
    assert store.manifest.num_prompt_tokens == sum(map(len, rows["prompt_ids"]))
    assert store.manifest.num_truncated == sum(rows["truncated"]) > 0


def test_large_shards_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_blend.rollouts.shard._GROUP_VALUES", 200)
    write_store(tmp_path, 1, rows=50)
    metadata = pq.read_metadata(tmp_path / "data" / "part-00000.parquet")
    assert metadata.num_row_groups > 5
    RolloutStore.open(tmp_path, verify=True)


def test_other_readers_can_verify_the_pages(tmp_path):
    write_store(tmp_path, 1)
    path = tmp_path / "data" / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[70] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="CRC checksum"):
        pq.ParquetFile(path, page_checksum_verification=True).read()


def test_the_same_rows_give_the_same_bytes_in_any_order(tmp_path):
    store = write_store(tmp_path / "a")
    writer = ShardWriter(tmp_path / "b", make_manifest(num_shards=3))
    for index in (2, 0, 1):
        writer.write(index, random_rows(index), f"input {index}")
    writer.update_manifest(complete=True)
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    again = RolloutStore.open(tmp_path / "b")
    assert again.digest == store.digest
    assert again.manifest.shards == store.manifest.shards
    assert write_store(tmp_path / "c", seed=1).digest != store.digest


def test_other_settings_are_refused_with_every_difference(tmp_path):
    writer = ShardWriter(tmp_path, make_manifest(settings={"top_p": 0.9, "model": "a"}))
    writer.write(0, random_rows(), "input 0")
    before = contents(tmp_path)
    for repair in (False, True):
        with pytest.raises(ConfigError) as raised:
            ShardWriter(
                tmp_path,
                make_manifest(settings={"top_p": 0.8, "model": "a", "seed": 1}, logps_dtype="float32"),
                repair=repair,
            )
        message = str(raised.value)
        for difference in ("top_p: 0.9 -> 0.8", "seed: 0 -> 1", "logps_dtype: 'float16' -> 'float32'"):
            assert difference in message
        assert str(tmp_path) in message
        assert "model" not in message
        assert "another output_dir" in message
    assert contents(tmp_path) == before
    # Also where the manifest is lost: the shard itself says that it is another's
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="part-00000.parquet belongs to a store with other settings"):
        ShardWriter(tmp_path, make_manifest(), repair=True)
    assert contents(tmp_path) == before


def test_identities_of_the_first_start_are_kept(tmp_path):
    ShardWriter(tmp_path, make_manifest(student={"name": "first"}, created_at="2020-01-01T00:00:00+00:00"))
    writer = ShardWriter(tmp_path, make_manifest(student={"name": "second"}))
    assert writer.manifest.student == {"name": "first"}
    assert writer.manifest.created_at == "2020-01-01T00:00:00+00:00"


@pytest.mark.parametrize("is_main_process", [True, False])
def test_another_input_is_refused(tmp_path, is_main_process):
    writer = ShardWriter(tmp_path, make_manifest())
    writer.write(0, random_rows(), "input 0")
    writer.update_manifest()
    writer = ShardWriter(tmp_path, make_manifest(), is_main_process=is_main_process)
    assert writer.done(0, "input 0")
    assert not writer.done(1, "input 1")
    with pytest.raises(ConfigError, match=r"part-00000.parquet was made from another input .*Restore"):
        writer.done(0, "input 7")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_named_and_the_job_continues_when_there_is_room(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MANIFEST_INTERVAL", 0.0)
    expected = contents(write_store(tmp_path / "whole").folder)
    folder = tmp_path / "full"
    writer = ShardWriter(folder, make_manifest(num_shards=3))
    writer.write(0, random_rows(0), "input 0")
    former = (folder / "manifest.json").read_bytes()
    os.symlink("/dev/full", folder / f"_manifest.json.{os.getpid()}.tmp")
    with pytest.raises(StoreError, match="No space left for .*is kept"):
        writer.update_manifest()
    assert (folder / "manifest.json").read_bytes() == former and not list(folder.glob("*.tmp"))
    os.symlink("/dev/full", folder / "data" / f"_part-00001.parquet.{os.getpid()}.tmp")
    with pytest.raises(StoreError, match=r"No space left for .*part-00001\.parquet .*is kept.*same command"):
        writer.write(1, random_rows(1), "input 1")
    assert sorted(path.name for path in (folder / "data").iterdir()) == ["part-00000.parquet"]
    assert write_shards(ShardWriter(folder, make_manifest(num_shards=3)), 3) == [1, 2]
    assert contents(folder) == expected


def test_only_whole_stores_are_called_complete(tmp_path):
    writer = ShardWriter(tmp_path, make_manifest(num_shards=3))
    for index in (0, 2):
        writer.write(index, random_rows(index), f"input {index}")
    with pytest.raises(StoreError, match=r"1 shards are missing \(the first: \[1\]\)"):
        writer.update_manifest(complete=True)
    assert not Manifest.load(tmp_path).complete
    for index in (1, 3):
        writer.write(index, random_rows(index), f"input {index}")
    with pytest.raises(StoreError, match=r"1 are too many \(the first: \[3\]\)"):
        writer.update_manifest(complete=True)
    # Without a plan, a gap is all that can be seen
    unplanned = ShardWriter(tmp_path / "unplanned", make_manifest())
    for index in (0, 2):
        unplanned.write(index, random_rows(index), f"input {index}")
    with pytest.raises(StoreError, match=r"1 shards are missing \(the first: \[1\]\)"):
        unplanned.update_manifest(complete=True)


def test_one_process_writes_the_manifest_and_seldom(tmp_path, monkeypatch):
    writer = ShardWriter(tmp_path, make_manifest())
    other = ShardWriter(tmp_path, make_manifest(), is_main_process=False)
    other.write(0, random_rows(0), "input 0")
    before = (tmp_path / "manifest.json").stat().st_mtime_ns
    other.update_manifest(complete=True)
    writer.update_manifest()
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == before
    hashed, sha256_of = [], writing.sha256_of
    monkeypatch.setattr(writing, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
    monkeypatch.setattr(writing, "MANIFEST_INTERVAL", 0.0)
    for index in (1, 2):
        writer.update_manifest()
        assert [record["file"] for record in Manifest.load(tmp_path).shards] == [
            f"data/part-{known:05d}.parquet" for known in range(index)
        ]
        other.write(index, random_rows(index), f"input {index}")
    writer.write(3, random_rows(3), "input 3")
    writer.update_manifest(complete=True)
    # Those of the other process once each, its own never: it had the bytes in hand
    assert hashed == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert RolloutStore.open(tmp_path, verify=True).manifest.num_rows == 20


def test_wrong_rows_are_not_written(tmp_path):
    writer = ShardWriter(tmp_path, make_manifest())
    rows = random_rows()
    for change, message in [
        (
            {"rollout_logps": [np.full(len(ids), 0.5) for ids in rows["completion_ids"]]},
            "'rollout_logps' has log-prob 0.5",
        ),
        ({"teacher_logp": rows["rollout_logps"]}, r"Unknown columns \['teacher_logp'\]"),
        ({"truncated": [False]}, "differ in their number of rows"),
        (
            {"completion_ids": [ids[:-1] + [2**40] for ids in rows["completion_ids"]]},
            "'completion_ids' .*beyond int32",
        ),
        ({"completion_ids": [[0.5] * len(ids) for ids in rows["completion_ids"]]}, "'completion_ids' .*integers"),
        ({"prompt_ids": [[ids] for ids in rows["prompt_ids"]]}, "'prompt_ids' .*one-dimensional"),
        ({"rollout_logps": [["a"] * len(ids) for ids in rows["completion_ids"]]}, "'rollout_logps' does not hold"),
        ({"rollout_logps": [ids * -1e6 for ids in map(np.ones, map(len, rows["completion_ids"]))]}, "log-prob -inf"),
        ({name: [] for name in rows}, "has no rows"),
    ]:
        with pytest.raises(StoreError, match=f"(?s)shard data/part-00000.parquet.*{message}"):
            writer.write(0, {**rows, **change}, "input 0")
    with pytest.raises(StoreError, match=r"lacks the columns \['rollout_logps'\]"):
        writer.write(0, {name: rows[name] for name in rows if name != "rollout_logps"}, "input 0")
    assert list((tmp_path / "data").iterdir()) == []


def test_ones_own_card_is_kept(tmp_path):
    write_store(tmp_path)
    card = tmp_path / "README.md"
    generated = card.read_text()
    assert "data/*.parquet" in generated
    assert "| Rows | 15 |" in generated
    card.write_text("---\n---\nMy text.")
    write_store(tmp_path)
    assert card.read_text() == "---\n---\nMy text."


def test_a_card_tells_no_folder_of_this_machine(tmp_path):
    identity = {"name": str(tmp_path / "models" / "mine")}
    write_store(tmp_path, fields={"student": identity, "teacher": {"name": "org/model"}}, scored=True)
    card = (tmp_path / "README.md").read_text()
    assert "| Student | `mine` |" in card
    assert "| Teacher | `org/model` |" in card
    assert str(tmp_path) not in card

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.rollouts.stores import VOCAB_SIZE, make_manifest, random_rows, write_store
from trl_blend.errors import StoreError
from trl_blend.rollouts.checks import check_rows
from trl_blend.rollouts.format import Manifest
from trl_blend.rollouts.shard import shards_on_disk
from trl_blend.rollouts.store import RolloutStore, load_rollouts, load_scored_rollouts
from trl_blend.rollouts.summary import summarize
from trl_blend.rollouts.writer import ShardWriter


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def own_rows(store):
    return [row for _, table in store.iter_shards() for row in table.to_pylist()]


def plain(rows):
    """As JSON, so that a float of one width is not a float of another unnoticed."""
    return json.loads(json.dumps(list(rows)))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("top_k", [False, True])
def test_plain_datasets_open_it_and_agree(tmp_path, dtype, top_k):
    folder = tmp_path / "store"
    store = write_store(folder, 11, scored=True, top_k=top_k, fields={"logps_dtype": dtype})
    rows = plain(own_rows(store))
    assert [row["key"] for row in rows] == [key for index in range(11) for key in random_rows(index)["key"]]
    files = str(folder / "data" / "*.parquet")
    by_file = datasets.load_dataset("parquet", data_files=files, split="train")
    by_folder = datasets.load_dataset(str(folder))
    assert list(by_folder) == ["train"]
    streamed = datasets.load_dataset(str(folder), split="train", streaming=True)
    for opened in (by_file, by_folder["train"], store.dataset(), streamed, store.dataset(streaming=True)):
        assert plain(opened) == rows
        assert opened.features["teacher_logps"].feature.dtype == dtype
        assert opened.features["completion_ids"].feature.dtype == "int32"
    check_rows(by_folder["train"].data.table, vocab_size=VOCAB_SIZE)
    assert len(store) == len(by_file) == 55


def test_shards_beyond_five_digits_stay_in_order(tmp_path):
    writer = ShardWriter(tmp_path, make_manifest(), is_main_process=False)
    for index in (100000, 99999):
        writer.write(index, random_rows(index), f"input {index}")
    ShardWriter(tmp_path, make_manifest())
    names = [record["file"] for record in Manifest.load(tmp_path).shards]
    assert names == ["data/part-99999.parquet", "data/part-100000.parquet"]
    assert list(shards_on_disk(tmp_path)) == [99999, 100000]
    assert ShardWriter(tmp_path, make_manifest()).done(100000, "input 100000")


def test_what_open_says(tmp_path):
    store = write_store(tmp_path / "store", scored=True)
    opened = RolloutStore.open(str(tmp_path / "store"), verify=True)
    assert (opened.name, opened.folder, opened.kind) == (
        str(tmp_path / "store"),
        tmp_path / "store",
        "scored_rollouts",
    )
    assert opened.manifest == store.manifest
    assert "rows=15, shards=3" in repr(opened)
    assert opened.files == [str(tmp_path / "store" / "data" / f"part-0000{index}.parquet") for index in range(3)]
    assert load_scored_rollouts(tmp_path / "store", verify=True).digest == opened.digest


def test_kinds_are_told_apart(tmp_path):
    write_store(tmp_path / "rollouts")
    write_store(tmp_path / "scored", scored=True)
    assert load_rollouts(tmp_path / "rollouts").kind == "rollouts"
    assert load_scored_rollouts(tmp_path / "scored").kind == "scored_rollouts"
    with pytest.raises(StoreError, match=r"is a store of rollouts without teacher log-prob.*trl-blend score"):
        load_scored_rollouts(tmp_path / "rollouts")
    with pytest.raises(StoreError, match=r"is a store of scored rollouts. Pass the output of .trl-blend rollouts"):
        load_rollouts(tmp_path / "scored")


@pytest.mark.parametrize(("scored", "command"), [(False, "trl-blend rollouts"), (True, "trl-blend score")])
def test_a_half_written_store_is_refused(tmp_path, scored, command):
    writer = ShardWriter(tmp_path, make_manifest(num_shards=5, scored=scored))
    for index in range(2):
        writer.write(index, random_rows(index, scored=scored), f"input {index}")
    with pytest.raises(StoreError, match=rf"half-written: 2 of 5 shards are there.*same `{command}` command"):
        RolloutStore.open(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StoreError, match="has shards but no manifest.json.*again"):
        RolloutStore.open(tmp_path)


def test_what_is_no_store_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="has no manifest.json"):
        RolloutStore.open(tmp_path / "empty")
    with pytest.raises(StoreError, match="nowhere' is not a folder here, and no dataset"):
        RolloutStore.open(str(tmp_path / "nowhere"))
    with pytest.raises(StoreError, match="someone/rollouts' is not a folder .* at revision 'v1'"):
        RolloutStore.open("someone/rollouts", revision="v1")


def test_open_sees_missing_and_longer_files_without_reading_them(tmp_path):
    write_store(tmp_path)
    path = tmp_path / "data" / "part-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content + b"x")
    with pytest.raises(StoreError, match=rf"part-00001.*has {len(content) + 1} bytes instead of {len(content)}"):
        RolloutStore.open(tmp_path)
    path.unlink()
    with pytest.raises(StoreError, match="part-00001.*it is missing"):
        RolloutStore.open(tmp_path)


def test_every_flipped_bit_is_found_by_the_reader(tmp_path):
    store = write_store(tmp_path, 2)
    path = tmp_path / "data" / "part-00001.parquet"
    content = path.read_bytes()
    for position in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"part-00001\.parquet is broken: its checksum is"):
            list(store.iter_shards())
        with pytest.raises(StoreError, match="checksum"):
            summarize(store)
    path.unlink()
    with pytest.raises(StoreError, match=r"part-00001\.parquet is broken: it is missing"):
        list(store.iter_shards())


def test_verify_looks_at_the_rows_too(tmp_path):
    # Written by something else, with checksums that are right
    store = write_store(tmp_path, 2)
    path = tmp_path / "data" / "part-00001.parquet"

    def publish(table):
        pq.write_table(table, path)
        manifest = Manifest.load(tmp_path)
        record = dict(store.manifest.shards[1], bytes=path.stat().st_size)
        record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest.shards[1] = record
        manifest.save(tmp_path)

    table = pq.read_table(path)
    publish(
        table.set_column(3, "rollout_logps", table["rollout_logps"].combine_chunks().cast(table.schema.field(3).type))
    )
    RolloutStore.open(tmp_path, verify=True)
    publish(table.slice(1))
    with pytest.raises(StoreError, match="has 4 rows, the manifest says 5"):
        RolloutStore.open(tmp_path, verify=True)
    publish(table.drop_columns("student_logps"))
    with pytest.raises(StoreError, match="has the columns key: string.*same columns"):
        RolloutStore.open(tmp_path, verify=True)
    publish(table.set_column(3, table.schema.field(3), table["student_logps"].take([1, 0, 2, 3, 4])))
    with pytest.raises(StoreError, match=r"part-00001.parquet: column 'rollout_logps' has \d+ values for"):
        RolloutStore.open(tmp_path, verify=True)
    RolloutStore.open(tmp_path)  # what only a full reading can see


def test_summary_counts_what_is_there(tmp_path):
    sampling, teacher = {"temperature": 0.7}, {"name": "t"}
    fields = {"sampling": sampling, "teacher": teacher, "logps_dtype": "float32"}
    store = write_store(tmp_path, 3, rows=8, scored=True, top_k=True, length=4, fields=fields)
    summary = summarize(store)
    rows = {name: [] for name in random_rows(scored=True, top_k=True)}
    for index in range(3):
        for name, values in random_rows(index, 8, scored=True, top_k=True, length=4).items():
            rows[name] += list(values)
    lengths = [len(ids) for ids in rows["completion_ids"]]
    tokens, size = sum(lengths), sum(path.stat().st_size for path in (tmp_path / "data").iterdir())
    teacher_logps = np.concatenate(rows["teacher_logps"])
    assert summary["num_completion_tokens"] == tokens
    assert (summary["num_rows"], summary["num_shards"], summary["num_bytes"]) == (24, 3, size)
    assert summary["bytes_per_token"] == store.bytes_per_token == size / tokens
    assert (summary["completion_length_min"], summary["completion_length_max"]) == (min(lengths), max(lengths))
    assert summary["completion_length_mean"] == pytest.approx(tokens / 24)
    assert summary["prompt_length_mean"] == pytest.approx(sum(map(len, rows["prompt_ids"])) / 24)
    assert summary["truncated_share"] == pytest.approx(np.mean(rows["truncated"]))
    assert 0 < summary["truncated_share"] < 1
    for name in ("rollout", "student", "teacher"):
        assert summary[f"{name}_logp_mean"] == pytest.approx(np.concatenate(rows[f"{name}_logps"]).mean())
    assert summary["tail_mass_mean"] == pytest.approx(np.exp(np.concatenate(rows["teacher_tail_logmass"])).mean())
    assert summary["unlikely_share"] == pytest.approx((teacher_logps < -10).mean())
    assert summary["top_k"] == 4
    assert (summary["sampling"], summary["teacher"], summary["student"]) == (sampling, teacher, None)
    assert summary["columns"] == list(rows)
    json.dumps(summary)


def test_summary_of_unlikely_tokens_and_of_absent_columns(tmp_path):
    rows = random_rows(scored=True)
    del rows["student_logps"], rows["rollout_logps"]
    rows["teacher_logps"] = [np.full(len(ids), -9.9) for ids in rows["completion_ids"]]
    rows["teacher_logps"][2][:] = -10.5
    writer = ShardWriter(tmp_path, make_manifest(scored=True))
    writer.write(0, rows, "input")
    writer.update_manifest(complete=True)
    summary = summarize(load_scored_rollouts(tmp_path))
    lengths = [len(ids) for ids in rows["completion_ids"]]
    assert summary["unlikely_share"] == pytest.approx(lengths[2] / sum(lengths))
    assert (summary["student_logp_mean"], summary["rollout_logp_mean"]) == (None, None)
    assert (summary["top_k"], summary["tail_mass_mean"]) == (None, None)


def test_memory_does_not_grow_with_the_rows(tmp_path):
    sizes = ("1000", "4000")  # both beyond the warm-up
    command = [sys.executable, "-m", "tests.rollouts.memory_probe", str(tmp_path), *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    small, large = map(json.loads, done.stdout.splitlines())
    assert large["num_completion_tokens"] > 600_000
    # Kept, they would take 7 MB as arrays and more than 60 MB as lists
    assert large["peak_mb"] - small["peak_mb"] < 4
    # Ids, prompts, keys and three columns of float16, compressed: the bar is 12
    assert 6 < large["bytes_per_token"] < 9

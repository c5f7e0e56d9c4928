import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing

from tests.rollouts.stores import contents
from tests.tiny import tiny_tokenizer
from trl_blend.errors import ConfigError, StoreError
from trl_blend.models.fingerprint import fingerprint_tokenizer
from trl_blend.rollouts.format import row_key
from trl_blend.rollouts.lightning import import_lightning_opd
from trl_blend.rollouts.store import load_scored_rollouts
from trl_blend.rollouts.summary import summarize


MAX_LENGTH = 8


@pytest.fixture(scope="module")
def tokenizer():
    """It puts a token before every text unless told otherwise; the prompts of the format have theirs already."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<system> $A", special_tokens=[("<system>", tokenizer.convert_tokens_to_ids("<system>"))]
    )
    assert tokenizer("<user>1")["input_ids"] != tokenizer("<user>1", add_special_tokens=False)["input_ids"]
    return tokenizer


def lightning_rows(count, seed=0):
    """Rows as `prepare_lightning_opd.py` writes them: float64 log-probs, no end of sequence, cut at the limit."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length = int(rng.integers(1, MAX_LENGTH + 1))
        metadata = {
            "is_lightning_opd": True,
            "response_tokens": rng.integers(6, 60, length).tolist(),
            "loss_mask": [1] * length,
            "response": "...",
            "teacher_log_probs": (-rng.exponential(1.0, length)).tolist(),
        }
        rows.append({"prompt": f"<user>{number}+{number}?<assistant>", "label": "0", "metadata": metadata})
    return rows


def write(path, rows, *, as_json=False, **options):
    if as_json:
        rows = [{**row, "metadata": json.dumps(row["metadata"])} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def run(files, folder, tokenizer, **options):
    return import_lightning_opd(files, folder, tokenizer=tokenizer, max_response_len=MAX_LENGTH, **options)


@pytest.mark.parametrize("as_json", [False, True])
def test_rows_are_imported_as_they_are(tmp_path, tokenizer, as_json):
    rows = lightning_rows(23)
    path = write(tmp_path / "data.parquet", rows, as_json=as_json)
    store = run(path, tmp_path / "store", tokenizer, rows_per_shard=10, logps_dtype="float32")
    found = [row for _, table in store.iter_shards() for row in table.to_pylist()]
    assert len(found) == 23
    for number, (row, source) in enumerate(zip(found, rows)):
        prompt_ids = tokenizer(source["prompt"], add_special_tokens=False)["input_ids"]
        metadata = source["metadata"]
        assert row == {
            "key": row_key(prompt_ids, number),
            "prompt_ids": prompt_ids,
            "completion_ids": metadata["response_tokens"],
            "truncated": len(metadata["response_tokens"]) == MAX_LENGTH,
            "teacher_logps": np.array(metadata["teacher_log_probs"], dtype=np.float32).tolist(),
        }
    assert 0 < store.manifest.num_truncated < 23
    load_scored_rollouts(store.folder, verify=True)


def test_it_is_marked_as_having_no_identity(tmp_path, tokenizer):
    path = write(tmp_path / "data.parquet", lightning_rows(3))
    manifest = run(path, tmp_path / "store", tokenizer).manifest
    assert manifest.kind == "scored_rollouts"
    assert (manifest.teacher, manifest.student, manifest.sampling, manifest.scoring) == (None, None, None, None)
    assert manifest.source["format"] == "lightning-opd"
    assert manifest.source["teacher_identity"].startswith("none")
    assert manifest.source["tokenizer"] == fingerprint_tokenizer(tokenizer).to_dict()
    assert [entry["file"] for entry in manifest.source["files"]] == ["data.parquet"]
    summary = summarize(load_scored_rollouts(tmp_path / "store"))
    assert (summary["rollout_logp_mean"], summary["student_logp_mean"]) == (None, None)
    assert "Teacher | not recorded" in (tmp_path / "store" / "README.md").read_text()


def test_several_files_and_row_groups_of_any_size(tmp_path, tokenizer):
    folder = tmp_path / "files"
    folder.mkdir()
    rows = lightning_rows(17)
    paths = [write(folder / "a.parquet", rows[:11], row_group_size=3), write(folder / "b.parquet", rows[11:])]
    store = run(folder, tmp_path / "store", tokenizer, rows_per_shard=5)
    assert [record["rows"] for record in store.manifest.shards] == [5, 5, 1, 5, 1]
    found = [row for _, table in store.iter_shards() for row in table.to_pylist()]
    assert [row["completion_ids"] for row in found] == [row["metadata"]["response_tokens"] for row in rows]
    assert [row["key"] for row in found] == [row_key(row["prompt_ids"], number) for number, row in enumerate(found)]
    # The list of them gives the same, other row groups too
    write(folder / "a.parquet", rows[:11])
    again = run(paths, tmp_path / "again", tokenizer, rows_per_shard=5)
    rows_of = [[table.to_pylist() for _, table in opened.iter_shards()] for opened in (store, again)]
    assert rows_of[0] == rows_of[1]


def test_interrupted_it_continues(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "data.parquet", lightning_rows(20))
    expected = contents(run(path, tmp_path / "whole", tokenizer, rows_per_shard=5).folder)
    calls = []

    class Interrupted:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, prompts, **options):
            calls.append(len(prompts))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return tokenizer(prompts, **options)

    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "store", Interrupted(), rows_per_shard=5)
    run(path, tmp_path / "store", Interrupted(), rows_per_shard=5)
    assert calls == [5] * 5  # two shards, the interruption, and the two that were left
    assert contents(tmp_path / "store") == expected
    with pytest.raises(ConfigError, match="rows_per_shard: 5 -> 6"):
        run(path, tmp_path / "store", tokenizer, rows_per_shard=6)
    write(path, lightning_rows(20, seed=1))
    with pytest.raises(ConfigError, match="files: "):
        run(path, tmp_path / "store", tokenizer, rows_per_shard=5)


def test_prompts_of_token_ids_need_no_tokenizer(tmp_path, tokenizer):
    rows = [{**row, "prompt": [7, 8, number]} for number, row in enumerate(lightning_rows(4))]
    store = run(write(tmp_path / "data.parquet", rows), tmp_path / "store", None)
    assert [row["prompt_ids"] for _, table in store.iter_shards() for row in table.to_pylist()] == [
        [7, 8, number] for number in range(4)
    ]
    assert store.manifest.source["tokenizer"] is None


def edited(rows, **metadata):
    rows[1]["metadata"] = {**rows[1]["metadata"], **metadata}
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (edited(lightning_rows(3), teacher_log_probs=None), r"row 1 lacks \['teacher_log_probs'\].*--compute-teacher"),
        (edited(lightning_rows(3), teacher_log_probs=[-1.0] * 20), "'teacher_logps' has 20 values for .*row 1"),
        (edited(lightning_rows(3), response_tokens=[], teacher_log_probs=[], loss_mask=[]), "is empty"),
        (edited(lightning_rows(3), loss_mask=[1, 0]), "row 1 masks 1 of its tokens"),
        ([{"text": "a"}], r"lacks the columns \['prompt', 'metadata'\].*no Lightning-OPD"),
        ([{"prompt": "a", "metadata": {"response_tokens": [1]}}], r"row 0 lacks \['teacher_log_probs'\]"),
        ([{"prompt": [{"role": "user"}], "metadata": {"response_tokens": [1]}}], "neither text"),
    ],
)
def test_files_that_are_something_else(tmp_path, tokenizer, rows, message):
    path = write(tmp_path / "data.parquet", rows)
    with pytest.raises(StoreError, match=message) as raised:
        run(path, tmp_path / "store", tokenizer)
    assert "data.parquet" in str(raised.value) or "part-00000.parquet" in str(raised.value)


def test_arguments(tmp_path, tokenizer):
    path = write(tmp_path / "data.parquet", lightning_rows(2))
    with pytest.raises(ConfigError, match="prompts as text, and `tokenizer=None`"):
        run(path, tmp_path / "store", None)
    with pytest.raises(ConfigError, match="names no parquet files"):
        run(tmp_path / "nowhere.parquet", tmp_path / "store", tokenizer)
    with pytest.raises(ConfigError, match="names no parquet files"):
        run([], tmp_path / "store", tokenizer)
    (tmp_path / "data.parquet").write_bytes(b"text")
    with pytest.raises(StoreError, match="data.parquet is no readable parquet file"):
        run(path, tmp_path / "store", tokenizer)


def test_a_tokenizer_may_be_given_by_name(tmp_path, tokenizer):
    path = write(tmp_path / "data.parquet", lightning_rows(2))
    tokenizer.save_pretrained(tmp_path / "student")
    by_name = run(path, tmp_path / "by_name", str(tmp_path / "student"))
    assert by_name.digest == run(path, tmp_path / "by_object", tokenizer).digest

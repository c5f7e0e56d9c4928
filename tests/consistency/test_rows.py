import numpy as np
import pytest
from datasets import Dataset

from tests.rollouts.stores import random_rows, write_store
from trl_blend.consistency.rows import MAX_SHARDS, sample_rows
from trl_blend.errors import StoreError


def expected_rows(num_shards):
    """Key to the row's content, over all shards."""
    rows = {}
    for index in range(num_shards):
        columns = random_rows(index, scored=True)
        for position, key in enumerate(columns["key"]):
            rows[key] = {name: values[position] for name, values in columns.items()}
    return rows


def assert_rows(sample, rows):
    assert len(set(sample.names)) == len(sample)
    for index, key in enumerate(sample.names):
        assert sample.prompt_ids[index] == rows[key]["prompt_ids"]
        assert sample.completion_ids[index] == rows[key]["completion_ids"]
        for name in ("teacher_logps", "student_logps", "rollout_logps"):
            np.testing.assert_allclose(getattr(sample, name)[index], rows[key][name], rtol=1e-3)
        assert sample.truncated[index] == rows[key]["truncated"]


def test_rows_of_a_store_stay_together(tmp_path):
    store, rows = write_store(tmp_path, 4, scored=True), expected_rows(4)
    everything = sample_rows(store, 100)
    assert set(everything.names) == set(rows)
    assert_rows(everything, rows)
    some = sample_rows(store, 7)
    assert len(some) == 7
    assert_rows(some, rows)
    assert sample_rows(store, 7).names == some.names
    assert sample_rows(store, 7, seed=1).names != some.names


def test_the_first_rows_are_a_sample_of_all_shards(tmp_path):
    store = write_store(tmp_path, 4, scored=True)
    shard_of = {key: index for index in range(4) for key in random_rows(index, scored=True)["key"]}
    sample = sample_rows(store, 20)
    assert len({shard_of[key] for key in sample.first(8).names}) >= 3
    assert len({shard_of[key] for key in sample_rows(store, 8).names}) >= 3
    assert_rows(sample.first(8), expected_rows(4))
    assert sample.first(8).names == sample.names[:8]


def test_every_row_is_drawn_as_often(tmp_path):
    store = write_store(tmp_path, 3, scored=True)
    counts = dict.fromkeys(expected_rows(3), 0)
    for seed in range(200):
        for key in sample_rows(store, 5, seed=seed).names:
            counts[key] += 1
    # 15 rows, 5 of them drawn 200 times: 66.7 each, standard deviation 6.7
    assert all(40 < count < 94 for count in counts.values())


def test_few_shards_of_a_large_store_are_read(tmp_path):
    store = write_store(tmp_path, 12, rows=2, scored=True)
    shard_of = {key: index for index in range(12) for key in random_rows(index, 2, scored=True)["key"]}
    sample = sample_rows(store, 100)
    assert len(sample) == 2 * MAX_SHARDS
    assert len({shard_of[key] for key in sample.names}) == MAX_SHARDS
    seen = {shard_of[key] for seed in range(8) for key in sample_rows(store, 100, seed=seed).names}
    assert seen == set(range(12))


def test_datasets():
    rows = expected_rows(2)
    columns = {name: [row[name] for row in rows.values()] for name in next(iter(rows.values()))}
    dataset = Dataset.from_dict({**columns, "other": list(range(10))})
    for source in (dataset, dataset.with_format("torch"), dataset.to_iterable_dataset()):
        assert_rows(sample_rows(source, 6), rows)
        assert len(sample_rows(source, 6)) == 6
        assert len(sample_rows(source, 60)) == 10
    assert sorted(sample_rows(dataset.to_iterable_dataset(), 4).names) == sorted(columns["key"][:4])
    assert sorted(sample_rows(dataset, 4).names) != sorted(columns["key"][:4])
    bare = dataset.select_columns(["prompt_ids", "completion_ids", "teacher_logps"])
    sample = sample_rows(bare, 60)
    assert sorted(sample.names) == sorted(f"row {index}" for index in range(10))
    index = int(sample.names[0].removeprefix("row "))
    assert sample.completion_ids[0] == columns["completion_ids"][index]
    assert sample.student_logps is sample.truncated is None


def test_bad_rows_are_refused():
    columns = {"prompt_ids": [[1]], "completion_ids": [[1, 2]], "teacher_logps": [[-1.0]]}
    with pytest.raises(StoreError, match="teacher_logps"):
        sample_rows(Dataset.from_dict(columns), 1)
    with pytest.raises(StoreError, match="teacher_logps"):
        sample_rows(Dataset.from_dict({**columns, "teacher_logps": [[-1.0, float("nan")]]}), 1)

import numpy as np
import pyarrow as pa
import pytest

from trl_blend.rollouts.ragged import flatten, from_rows, is_list, num_values, to_lists, to_rows


PLAIN = [[1, 2], [], [3], [4, 5, 6]]
NESTED = [[[1, 2]], [], [[3, 4], [5, 6]]]


def forms(rows):
    """The same column in one array, in chunks, as a slice, with offsets of 64 bits, and in no chunk."""
    plain = pa.array(rows, pa.list_(pa.int32()) if rows is not NESTED else pa.list_(pa.list_(pa.int32())))
    kind = pa.large_list(plain.type.value_type)
    yield plain
    yield pa.chunked_array([plain.slice(0, 1), plain.slice(1, 0), plain.slice(1)], plain.type)
    yield pa.concat_arrays([plain.slice(0, 1), plain]).slice(1)
    yield plain.cast(kind)
    if not rows:
        yield pa.chunked_array([], plain.type)


@pytest.mark.parametrize("rows", [PLAIN, NESTED, []])
def test_columns_come_apart_and_together(rows):
    for column in forms(rows):
        lengths, values = flatten(column)
        assert lengths.tolist() == [len(row) for row in rows]
        assert values.tolist() == [entry for row in rows for entry in row]
        assert [row.tolist() for row in to_rows(column)] == rows
        assert num_values(column) == values.size
        assert to_lists(values, lengths).to_pylist() == rows == from_rows(rows, "int32", rows is NESTED).to_pylist()


def test_lists_of_one_size_and_missing_rows():
    lengths, values = flatten(pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)))
    assert (lengths.tolist(), values.tolist()) == ([2, 2], [1, 2, 3, 4])
    lengths, values = flatten(pa.array([[1.5], None]))
    assert (lengths.tolist(), values.tolist()) == ([1, 0], [1.5])
    with pytest.raises(ValueError, match="reshape"):
        flatten(pa.array([[[1, 2], [3]]]))


def test_a_column_without_lists_is_left_alone():
    column = pa.array(["a", "b"])
    assert not is_list(column)
    assert to_rows(column) == ["a", "b"]
    assert num_values(column) == 2


def test_more_values_than_offsets_can_count():
    with pytest.raises(OverflowError, match="fewer rows"):
        to_lists(np.empty(0), [2**30, 2**30])

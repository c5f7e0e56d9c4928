import numpy as np
import pyarrow as pa
import pytest

from tests.rollouts.stores import TOP_K, VOCAB_SIZE, random_rows
from trl_blend.errors import StoreError
from trl_blend.rollouts.checks import check_rows
from trl_blend.rollouts.format import REQUIRED, build_table, row_key


BAD_ROW = 3


@pytest.fixture
def rows():
    return random_rows(rows=6, scored=True, top_k=True)


def as_table(columns):
    return build_table(columns, "float32")


def as_half(columns):
    return build_table(columns, "float16")


def in_chunks(columns):
    """What `datasets` gives: several chunks, one of them empty, and a slice that does not start at the beginning."""
    table = build_table(columns, "float16")
    return pa.concat_tables([table.slice(0, 2), table.slice(2, 0), table.slice(2)])


def large_lists(columns):
    table = build_table(columns, "float32")
    fields = []
    for field in table.schema:
        inner = getattr(field.type, "value_type", None)
        deep = getattr(inner, "value_type", None)
        kind = field.type if inner is None else pa.large_list(inner if deep is None else pa.large_list(deep))
        fields.append(pa.field(field.name, kind))
    return table.cast(pa.schema(fields))


FORMS = [dict, as_table, as_half, in_chunks, large_lists]


@pytest.mark.parametrize("form", FORMS)
def test_good_rows_pass(rows, form):
    for required in (*REQUIRED.values(), ()):
        check_rows(form(rows), vocab_size=VOCAB_SIZE, required=required)


def changed(rows, column, position, value):
    """`rows` with one number of one row replaced."""
    values = [np.array(row) for row in rows[column]]
    values[BAD_ROW].flat[position] = value
    return {**rows, column: values}


LOGPS = ["rollout_logps", "student_logps", "teacher_logps", "teacher_topk_logps", "teacher_tail_logmass"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("column", LOGPS)
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (np.nan, "log-prob nan, not a finite"),
        (0.25, "log-prob 0.25, above 0"),
        (np.inf, "log-prob inf"),
        (-np.inf, "-inf"),
    ],
)
def test_log_probs(rows, form, column, value, problem):
    bad = form(changed(rows, column, -1, value))
    if value == -np.inf and column == "teacher_tail_logmass":
        check_rows(bad)  # the k tokens are the whole vocabulary
        return
    with pytest.raises(StoreError) as raised:
        check_rows(bad, where="here")
    message = str(raised.value)
    assert message.startswith(f"here: column {column!r} has")
    assert problem in message
    assert f"in row {BAD_ROW} (key {rows['key'][BAD_ROW]})" in message
    assert ("Collect" if column in LOGPS[:2] else "Score") in message


def test_rounding_above_zero_is_none(rows):
    check_rows(changed(rows, "teacher_logps", 0, 5e-5))
    with pytest.raises(StoreError, match="above 0"):
        check_rows(changed(rows, "teacher_logps", 0, 2e-4))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("column", ["prompt_ids", "completion_ids", "teacher_topk_ids"])
@pytest.mark.parametrize(("value", "problem"), [(VOCAB_SIZE, f"of {VOCAB_SIZE} tokens"), (-1, "negative")])
def test_ids_out_of_range(rows, form, column, value, problem):
    bad = form(changed(rows, column, 0, value))
    with pytest.raises(StoreError, match=f"{column!r} has id {value}, .*{problem}.*row {BAD_ROW} .*tokenizer"):
        check_rows(bad, vocab_size=VOCAB_SIZE)
    if value > 0 and column != "completion_ids":
        check_rows(bad)  # without the vocabulary it cannot be known
        check_rows(bad, vocab_size=VOCAB_SIZE + 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("column", ["prompt_ids", "completion_ids"])
def test_empty_prompts_and_completions(rows, form, column):
    values = list(rows[column])
    values[BAD_ROW] = []
    with pytest.raises(StoreError, match=f"{column!r} is empty .1 such rows. in row {BAD_ROW} .*drop the row"):
        check_rows(form({**rows, column: values}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("column", [*LOGPS, "teacher_topk_ids"])
@pytest.mark.parametrize("change", ["shorter", "longer"])
def test_lengths_that_differ(rows, form, column, change):
    values = list(rows[column])
    row = np.asarray(values[BAD_ROW])
    values[BAD_ROW] = row[:-1] if change == "shorter" else np.concatenate([row, row[-1:]])
    expected = f"{column!r} has {len(values[BAD_ROW])} values for {len(row)} tokens .*in row {BAD_ROW} "
    with pytest.raises(StoreError, match=expected):
        check_rows(form({**rows, column: values}))


def test_lengths_are_compared_row_by_row(rows):
    # The sums agree: only the rows do not
    values = list(rows["teacher_logps"])
    values[0], values[1] = np.concatenate([values[0], values[1][:1]]), values[1][1:]
    with pytest.raises(StoreError, match="2 such rows.*row 0"):
        check_rows({**rows, "teacher_logps": values})


@pytest.mark.parametrize("form", FORMS)
def test_columns_that_are_missing(rows, form):
    for column in ("prompt_ids", "completion_ids", "teacher_logps"):
        with pytest.raises(StoreError, match=rf"data lacks the columns \['{column}'\]; it has .*'key'"):
            check_rows(form({name: rows[name] for name in rows if name != column}), where="data")
    sampled = {name: rows[name] for name in rows if "topk" not in name and "tail" not in name}
    check_rows(form(sampled))


@pytest.mark.parametrize("form", FORMS)
def test_top_k_without_the_sampled_token(rows, form):
    sampled = rows["completion_ids"][BAD_ROW][-1]
    ids = [row.copy() for row in rows["teacher_topk_ids"]]
    other = next(token for token in range(VOCAB_SIZE) if token not in ids[BAD_ROW][-1])
    ids[BAD_ROW][-1][ids[BAD_ROW][-1] == sampled] = other
    with pytest.raises(StoreError, match=f"lacks the sampled token {sampled} .1 such.*row {BAD_ROW} "):
        check_rows(form({**rows, "teacher_topk_ids": ids}))


@pytest.mark.parametrize("form", FORMS)
def test_top_k_with_a_token_twice(rows, form):
    ids = [row.copy() for row in rows["teacher_topk_ids"]]
    sampled = rows["completion_ids"][BAD_ROW][-1]
    ids[BAD_ROW][-1][:2] = sampled
    with pytest.raises(StoreError, match=f"holds a token twice .1 such.*row {BAD_ROW} "):
        check_rows(form({**rows, "teacher_topk_ids": ids}))


@pytest.mark.parametrize("column", ["teacher_topk_ids", "teacher_topk_logps"])
def test_ragged_top_k(rows, column):
    values = [row.tolist() for row in rows[column]]
    values[BAD_ROW][-1] = values[BAD_ROW][-1][:-1]
    with pytest.raises(
        StoreError, match=f"{column!r} has {TOP_K - 1} entries at a token, {TOP_K} elsewhere.*{BAD_ROW} "
    ):
        check_rows({**rows, column: values})
    values = [row[:, :2] for row in rows[column]]
    with pytest.raises(StoreError, match="another number of entries|lacks the sampled"):
        check_rows({**rows, column: values})
    values = [row[:, :0] for row in rows[column]]
    with pytest.raises(StoreError, match=f"{column!r} has 0 entries"):
        check_rows({**rows, column: values})


def test_missing_values(rows):
    table = build_table(rows, "float32")
    holes = {
        "teacher_logps": [None if row == BAD_ROW else logps for row, logps in enumerate(rows["teacher_logps"])],
        "completion_ids": [[None, *ids[1:]] for ids in rows["completion_ids"]],
        "key": [None, *rows["key"][1:]],
        "teacher_topk_logps": [
            [[None] * TOP_K if row == BAD_ROW else logps.tolist() for logps in values]
            for row, values in enumerate(rows["teacher_topk_logps"])
        ],
    }
    for column, values in holes.items():
        kind = table.schema.field(column).type
        bad = table.set_column(table.column_names.index(column), column, pa.array(values, kind))
        with pytest.raises(
            StoreError,
            match=f"{column!r} has missing values in row {0 if column in ('key', 'completion_ids') else BAD_ROW}",
        ):
            check_rows(bad)


def test_columns_of_the_wrong_type(rows):
    table = build_table(rows, "float32")
    for column, values, problem in [
        ("completion_ids", pa.array([1.5] * 6), "is double, not a list"),
        ("prompt_ids", pa.array([[0.5]] * 6), "is of float64, not of integers"),
        ("teacher_logps", pa.array([[1] * len(ids) for ids in rows["completion_ids"]]), "is of int64, not of floats"),
        ("teacher_topk_ids", table["completion_ids"], "is a number per token"),
    ]:
        with pytest.raises(StoreError, match=f"{column!r} {problem}"):
            check_rows(table.set_column(table.column_names.index(column), column, values))


def test_other_columns_are_not_looked_at(rows):
    check_rows({**rows, "text": ["x"] * 6})
    check_rows(build_table(rows).append_column("text", pa.array(["x"] * 6)))
    with pytest.raises(StoreError, match="here: .*number of rows"):
        check_rows({**rows, "key": ["x"]}, where="here")


def test_no_rows_are_no_error():
    check_rows(build_table({name: [] for name in random_rows(scored=True, top_k=True)}))


def test_row_keys_tell_prompts_and_samples_apart():
    keys = {row_key(*row) for row in [([1, 2], 3), ([1, 2, 3], 3), ([1, 2], 4), ([2, 1], 3), ([12], 3), ([], 3)]}
    assert len(keys) == 6
    assert all(len(key) == 32 and int(key, 16) >= 0 for key in keys)
    assert row_key(np.array([1, 2], dtype=np.int32), 3) == row_key((1, 2), 3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("column", LOGPS)
@pytest.mark.parametrize("value", [-9999.0, -1e4, -1000.5, -65504.0])
def test_values_that_stand_for_no_number(rows, form, column, value):
    token = rows["completion_ids"][BAD_ROW][0]
    key = rows["key"][BAD_ROW]
    expected = rf"{column!r} has log-prob .*, which is none .1 such.*row {BAD_ROW} \(key {key}\) at position 0 "
    with pytest.raises(StoreError, match=expected + rf"\(token {token}\)\. (Score|Collect).*If it is there again"):
        check_rows(form(changed(rows, column, 0, value)))
    check_rows(form(changed(rows, column, 0, -500.0)))


def test_the_smallest_number_of_a_dtype(rows):
    for value in (np.finfo(np.float32).min, -1e30):
        with pytest.raises(StoreError, match="'teacher_logps' has log-prob -.*, which is none"):
            check_rows(changed(rows, "teacher_logps", 0, value))
        with pytest.raises(StoreError, match="'teacher_logps' has log-prob -inf, not a finite number"):
            check_rows(build_table(changed(rows, "teacher_logps", 0, value), "float16"))


@pytest.mark.parametrize("value", [None, "none", "NaN"])
def test_values_that_are_no_floats(rows, value):
    values = [list(row) for row in rows["teacher_logps"]]
    values[BAD_ROW][0] = value
    with pytest.raises(
        StoreError, match=f"'teacher_logps' (does not hold what it has to in|.*not a fin.*) row {BAD_ROW}"
    ):
        check_rows({**rows, "teacher_logps": values})


def test_missing_values_inside_of_a_row(rows):
    values = [row.tolist() for row in rows["teacher_logps"]]
    values[BAD_ROW][-1] = None
    position = len(values[BAD_ROW]) - 1
    table = build_table(rows, "float32")
    column = pa.array(values, table.schema.field("teacher_logps").type)
    with pytest.raises(StoreError, match=f"missing values in row {BAD_ROW} .* at position {position} "):
        check_rows(table.set_column(table.column_names.index("teacher_logps"), "teacher_logps", column))

"""From rows of a store to batches: alignment, truncation, packing, streaming, and every row that is refused."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests.tiny import VOCAB_SIZE
from trl_blend.errors import ConfigError, StoreError
from trl_blend.trainers.offline_opd import data


def prepare(rows, **settings):
    defaults = {
        "uses_top_k": True,
        "vocab_size": VOCAB_SIZE,
        "max_length": None,
        "packing": False,
        "shuffle_seed": None,
    }
    return data.prepare(rows, **{**defaults, **settings})


def expected_row(row, max_length=None):
    """The training row, written out."""
    pad = len(row["prompt_ids"])
    zeros = [0] * data_width(row)
    result = {
        "input_ids": row["prompt_ids"] + row["completion_ids"],
        "labels": [-100] * pad + row["completion_ids"],
        **{name: [0.0] * pad + row[name] for name in (*data.LOG_PROBS, "teacher_tail_logmass")},
        **{name: [zeros] * pad + row[name] for name in data.TOP_K[:2]},
    }
    return {name: values[:max_length] for name, values in result.items()}


def data_width(row):
    return len(row["teacher_topk_ids"][0])


def assert_rows(actual, expected):
    actual = list(actual)
    assert len(actual) == len(expected)
    for row, target in zip(actual, expected, strict=True):
        assert row.keys() == target.keys()
        for name, values in target.items():
            np.testing.assert_allclose(np.array(row[name]), np.array(values), rtol=1e-6, err_msg=name)


def test_rows(rows):
    assert_rows(prepare(rows), [expected_row(row) for row in rows])


def test_only_what_the_loss_reads(rows):
    assert set(prepare(rows, uses_top_k=False).column_names) == {"input_ids", "labels", *data.LOG_PROBS}
    fewer = rows.remove_columns(["student_logps", "rollout_logps", "key", "truncated"])
    assert set(prepare(fewer, uses_top_k=False).column_names) == {"input_ids", "labels", "teacher_logps"}


@pytest.mark.parametrize("max_length", [6, 8, 12])
def test_rows_are_cut_at_their_end_and_dropped_where_no_completion_remains(rows, max_length):
    expected = [expected_row(row, max_length) for row in rows if len(row["prompt_ids"]) < max_length]
    assert_rows(prepare(rows, max_length=max_length), expected)
    assert max_length == 6 or len(expected) == len(rows)


def test_prompts_as_long_as_max_length_are_dropped(rows):
    kept = prepare(rows, max_length=5)
    assert 0 < len(kept) < len(rows)
    with pytest.raises(ConfigError, match="max_length=3"):
        prepare(rows, max_length=3)


def test_slices_and_float16_columns(rows):
    features = rows.features.copy()
    for name in (*data.LOG_PROBS, "teacher_tail_logmass"):
        features[name] = List(Value("float16"))
    features["teacher_topk_logps"] = List(List(Value("float16")))
    half = rows.cast(Features(features)).select(range(2, 7))
    exact = [expected_row(row) for row in half]
    assert exact[0]["teacher_logps"] != expected_row(rows[2])["teacher_logps"]
    assert_rows(prepare(half), exact)


def test_streaming_gives_the_same_rows(rows):
    stream = prepare(rows.to_iterable_dataset(num_shards=2))
    assert_rows(stream, [expected_row(row) for row in rows])
    packed, other = (list(prepare(x, packing=True, max_length=30)) for x in (rows, rows.to_iterable_dataset()))
    assert packed == other and "seq_lengths" in packed[0]


def test_packs_carry_every_column(rows):
    alone = {tuple(row["input_ids"]): row for row in prepare(rows)}
    packed = prepare(rows, packing=True, max_length=30)
    found = []
    for pack in packed:
        start = 0
        for length in pack["seq_lengths"]:
            part = {name: values[start : start + length] for name, values in pack.items() if name != "seq_lengths"}
            assert part == alone[tuple(part["input_ids"])]
            found.append(tuple(part["input_ids"]))
            start += length
    assert sorted(found) == sorted(alone)


@pytest.mark.parametrize("weights", [[2, 0, 1, 1, 1, 1, 1, 3], [0.5, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0]])
def test_a_row_has_its_weight_at_every_token(rows, weights):
    data_rows = rows.add_column("row_weight", weights)
    expected = [
        expected_row(row) | {"row_weight": [0] * len(row["prompt_ids"]) + [weight] * len(row["completion_ids"])}
        for row, weight in zip(rows, weights, strict=True)
    ]
    assert_rows(prepare(data_rows), expected)
    assert_rows(prepare(data_rows.to_iterable_dataset()), expected)
    batch = data.ScoredRolloutCollator(pad_token_id=0)(list(prepare(data_rows, packing=True, max_length=64)))
    counts = batch["labels"] != -100
    assert batch["row_weight"][~counts].abs().max() == 0
    by_row = {tuple(row["completion_ids"]): weight for row, weight in zip(rows, weights, strict=True)}
    assert sorted(batch["row_weight"][counts].tolist()) == sorted(
        weight for ids, weight in by_row.items() for _ in ids
    )


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), None, "a lot"])
def test_wrong_weights(rows, value):
    weights = [1.0] * 8 if value is None or isinstance(value, float) else ["1"] * 8
    weights[3] = value
    with pytest.raises(StoreError, match="'row_weight' is .*in row 3" if value != "a lot" else "is string, not a num"):
        prepare(rows.add_column("row_weight", weights))
    if isinstance(value, float):
        prepared = list(prepare(rows.add_column("row_weight", [1.0] * 8)))
        prepared[3]["row_weight"][-1] = value
        with pytest.raises(StoreError, match="'row_weight' is .*in row 3"):
            prepare(Dataset.from_list(prepared))


def test_prepared_rows_are_left_alone(rows):
    once = prepare(rows)
    assert prepare(once) is once
    without = prepare(rows, uses_top_k=False)
    with pytest.raises(StoreError, match="teacher_topk_ids"):
        prepare(without)


def test_shuffling(rows):
    first, again, other = (prepare(rows, shuffle_seed=seed)["input_ids"] for seed in (0, 0, 1))
    assert first == again and first != other and sorted(first) == sorted(prepare(rows)["input_ids"])
    packing = {"packing": True, "max_length": 20}
    shuffled, plain = (prepare(rows, shuffle_seed=seed, **packing)["input_ids"] for seed in (0, None))
    assert shuffled != plain  # rows that were shuffled before are packed in another way


# Batches


def batch_of(rows, layout, aggregation="sequence"):
    packing = layout == "packed"
    prepared = prepare(rows, packing=packing, max_length=64 if packing else None)
    collator = data.ScoredRolloutCollator(
        pad_token_id=0, padding_free=layout != "padded", loss_aggregation=aggregation
    )
    parent = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=layout != "padded")
    examples = list(prepared)
    return collator(examples), parent(examples)


@pytest.mark.parametrize("layout", ["padded", "padding-free", "packed"])
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_batches(rows, layout, aggregation):
    batch, parent = batch_of(rows, layout, aggregation)
    for name, value in parent.items():
        assert torch.equal(batch[name], value) if torch.is_tensor(value) else batch[name] == value
    counts = batch["labels"] != -100
    by_tokens = {
        tuple(row["completion_ids"]): expected_row(row) | {"length": len(row["completion_ids"])} for row in rows
    }
    # Walk over the batch in the order of its rows
    flat = {name: batch[name][counts] for name in (*data.LOG_PROBS, *data.TOP_K, data.WEIGHTS)}
    labels, start = batch["labels"][counts].tolist(), 0
    while start < len(labels):
        row = next(r for key, r in by_tokens.items() if tuple(labels[start : start + len(key)]) == key)
        part = slice(start, start + row["length"])
        for name in (*data.LOG_PROBS, *data.TOP_K):
            torch.testing.assert_close(flat[name][part], torch.tensor(row[name][-row["length"] :]))
        weight = 1 / row["length"] if aggregation == "sequence" else 1.0
        torch.testing.assert_close(flat[data.WEIGHTS][part], torch.full((row["length"],), weight))
        start += row["length"]
    assert batch[data.WEIGHTS][~counts].abs().max() == 0
    total = len(rows) if aggregation == "sequence" else int(counts.sum())
    assert batch[data.WEIGHTS].sum().item() == pytest.approx(total, rel=1e-6)


def test_batches_padded_to_a_multiple(rows):
    collator = data.ScoredRolloutCollator(pad_token_id=0, pad_to_multiple_of=32)
    batch = collator(list(prepare(rows)))
    assert batch["teacher_logps"].shape == batch["input_ids"].shape == (len(rows), 32)
    assert batch["teacher_topk_ids"].shape == (len(rows), 32, 5)


# Errors


def edited(rows, index, **columns):
    content = list(rows)
    content[index] = content[index] | columns
    return Dataset.from_list(content, features=rows.features)


BAD = {
    "student_logps.*2 values for 4 tokens": lambda r: {"student_logps": r["student_logps"][:2]},
    "teacher_logps.*nan": lambda r: {"teacher_logps": [float("nan"), *r["teacher_logps"][1:]]},
    "teacher_logps.*0.5": lambda r: {"teacher_logps": [0.5, *r["teacher_logps"][1:]]},
    "teacher_logps.*-inf": lambda r: {"teacher_logps": [-float("inf"), *r["teacher_logps"][1:]]},
    "completion_ids.*empty": lambda r: {name: [] for name in r if isinstance(r[name], list) and name != "prompt_ids"},
    "prompt_ids.*empty": lambda r: {"prompt_ids": []},
    "completion_ids.*64, outside the vocabulary of 64": lambda r: {
        "completion_ids": [VOCAB_SIZE, *r["completion_ids"][1:]]
    },
}


@pytest.mark.parametrize(("match", "edit"), BAD.items(), ids=BAD)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_named(rows, match, edit, streaming):
    row = rows[0]
    assert len(row["completion_ids"]) == 4
    bad = edited(rows, 0, **edit(row))
    with pytest.raises(StoreError, match=match):
        list(prepare(bad.to_iterable_dataset() if streaming else bad, uses_top_k=False))


def test_missing_columns(rows):
    with pytest.raises(StoreError, match="lacks the column.*teacher_logps.*trl-blend score"):
        prepare(rows.remove_columns("teacher_logps"))
    with pytest.raises(StoreError, match="teacher_tail_logmass.*top_k"):
        prepare(rows.remove_columns("teacher_tail_logmass"))
    with pytest.raises(StoreError, match="prompt_ids, completion_ids, teacher_logps; it has text"):
        prepare(Dataset.from_dict({"text": ["a"]}))


NO_NUMBERS = [-9999.0, -1e4, float("nan"), float("-inf"), 3.0]


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_the_row_is_that_of_the_data_as_given(rows, value):
    many = Dataset.from_list([{**row, "key": str(n)} for n, row in enumerate(list(rows) * 200)])
    bad = edited(many, 1234, teacher_logps=[value, *many[1234]["teacher_logps"][1:]])
    with pytest.raises(StoreError, match=r"'teacher_logps' has log-prob .* in row 1234 \(key 1234\) at position 0"):
        prepare(bad, uses_top_k=False, shuffle_seed=3)


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("column", ["teacher_logps", "rollout_logps", "teacher_topk_logps"])
def test_prepared_rows_are_checked_too(rows, column, value):
    prepared = prepare(rows, uses_top_k=True)
    assert prepare(prepared, uses_top_k=True) is prepared
    values = prepared[3][column]
    values[-1] = [value] * len(values[-1]) if isinstance(values[-1], list) else value
    with pytest.raises(StoreError, match=f"{column!r} has log-prob .*, which is none, in row 3"):
        prepare(edited(prepared, 3, **{column: values}), uses_top_k=True)
    values[0], values[-1] = values[-1], values[0]  # on the prompt nothing is read
    prepare(edited(prepared, 3, **{column: values}), uses_top_k=True)

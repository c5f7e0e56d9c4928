"""`score_rollouts`: the numbers, the rows they belong to, resuming, and what is refused."""

import shutil

import numpy as np
import pytest
import torch

from tests import reference
from tests.rollouts.collecting import collect, rows_of, save_model, save_prompts, score
from tests.rollouts.engines.test_local_scores import forced_logprobs
from tests.rollouts.vllm_fake import FakeVllm, serving
from tests.tiny import tiny_lora, tiny_model, tiny_tokenizer
from trl_blend.errors import ConfigError, EngineError, StoreError, TokenizerMismatchError, UnsupportedError
from trl_blend.rollouts.checks import check_rows
from trl_blend.rollouts.engines import base
from trl_blend.rollouts.engines import local as local_engine
from trl_blend.rollouts.format import Manifest
from trl_blend.rollouts.writer import ShardWriter


COLLECT = {"max_completion_length": 8, "rows_per_shard": 4, "logps_dtype": "float32"}
SCORE = {"tokens_per_batch": 64}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher"), seed=1, arch="llama")


@pytest.fixture(scope="module")
def rollouts(student, tmp_path_factory):
    prompts = save_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", count=10)
    return collect(student, prompts, tmp_path_factory.mktemp("rollouts") / "store", **COLLECT)


@pytest.fixture(scope="module")
def finished(rollouts, teacher, tmp_path_factory):
    return score(rollouts, teacher, tmp_path_factory.mktemp("scored") / "store", top_k=5, **SCORE)


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(local_engine, "load_model", lambda *args: pytest.fail("a model was loaded"))


def test_the_scores_are_the_teachers(rollouts, finished):
    model = tiny_model("llama", seed=1)
    for row in rows_of(finished):
        expected = forced_logprobs(model, row["prompt_ids"], row["completion_ids"])
        for t, (token, logprobs) in enumerate(zip(row["completion_ids"], expected, strict=True)):
            assert row["teacher_logps"][t] == pytest.approx(logprobs[token].item(), abs=2e-5)
            kept = row["teacher_topk_ids"][t]
            assert token in kept and len(set(kept)) == 5
            np.testing.assert_allclose(row["teacher_topk_logps"][t], logprobs[kept], rtol=0, atol=2e-5)
            rest = [logprobs[v] for v in range(64) if v not in kept]
            log_rest = reference.log_sum_exp(rest).item()
            assert row["teacher_tail_logmass"][t] == pytest.approx(log_rest, abs=2e-5)
    for _, table in finished.iter_shards():
        check_rows(table, vocab_size=64)


def test_the_rows_and_shards_are_those_of_the_rollouts(rollouts, finished):
    own = {"teacher_logps", "teacher_topk_ids", "teacher_topk_logps", "teacher_tail_logmass"}
    kept = [{name: value for name, value in row.items() if name not in own} for row in rows_of(finished)]
    assert kept == rows_of(rollouts)
    assert [record["rows"] for record in finished.manifest.shards] == [4, 4, 2]
    inputs = [record["input_digest"] for record in finished.manifest.shards]
    assert inputs == [record["sha256"] for record in rollouts.manifest.shards]


def test_the_manifest_says_who_did_what(rollouts, finished, teacher, student):
    manifest = finished.manifest
    assert manifest.kind == "scored_rollouts" and manifest.logps_dtype == "float32"
    assert manifest.scoring == {"temperature": 1.0, "top_k": 5, "dtype": "float32", "vocab_size": 64}
    assert manifest.sampling == rollouts.manifest.sampling and manifest.student == rollouts.manifest.student
    assert (manifest.teacher["name"], manifest.student["name"]) == (teacher, student)
    assert manifest.source["rollouts_digest"] == rollouts.digest


def test_sampled_tokens_only_in_float16(rollouts, teacher, finished, tmp_path):
    store = score(rollouts, teacher, tmp_path / "store", logps_dtype="float16", top_k=0, **SCORE)
    assert store.manifest.scoring["top_k"] is None
    for row, exact in zip(rows_of(store), rows_of(finished), strict=True):
        assert "teacher_topk_ids" not in row
        np.testing.assert_allclose(row["teacher_logps"], exact["teacher_logps"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("given", ["model", "adapter"])
def test_a_teacher_in_memory(rollouts, finished, tmp_path, given):
    model = tiny_model("llama", seed=1)
    model = tiny_lora(model, target_modules=["q_proj"]) if given == "adapter" else model
    store = score(rollouts, model, tmp_path / "store", top_k=5, **SCORE)
    same = [row["teacher_logps"] for row in rows_of(store)] == [row["teacher_logps"] for row in rows_of(finished)]
    assert same == (given == "model")
    assert store.manifest.teacher["weights"]["sha256"] == finished.manifest.teacher["weights"]["sha256"]


def test_bfloat16(rollouts, teacher, finished, tmp_path):
    store = score(rollouts, teacher, tmp_path / "store", dtype="bfloat16", **SCORE)
    difference = [
        abs(a - b)
        for one, other in zip(rows_of(store), rows_of(finished), strict=True)
        for a, b in zip(one["teacher_logps"], other["teacher_logps"], strict=True)
    ]
    assert 1e-4 < np.mean(difference) < 0.1
    assert store.manifest.scoring["dtype"] == "bfloat16"


def test_the_budget_changes_rounding_only(rollouts, teacher, finished, tmp_path):
    store = score(rollouts, teacher, tmp_path / "store", top_k=5, tokens_per_batch=1)
    for one, other in zip(rows_of(store), rows_of(finished), strict=True):
        np.testing.assert_allclose(one["teacher_logps"], other["teacher_logps"], rtol=0, atol=1e-5)


# -------------------- resuming


def test_interrupted_and_continued(rollouts, teacher, finished, tmp_path, monkeypatch):
    calls, score_batch = [], local_engine._score_batch

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score_batch(*args)

    monkeypatch.setattr(local_engine, "_score_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(rollouts, teacher, tmp_path / "store", top_k=5, **SCORE)
    monkeypatch.undo()
    assert 0 < len(list((tmp_path / "store" / "data").glob("*.parquet"))) < 3
    # The budget is no setting: after running out of memory one goes on with a smaller one
    store = score(rollouts, teacher, tmp_path / "store", top_k=5, **SCORE)
    assert store.digest == finished.digest


def test_a_finished_store_is_left_alone(rollouts, teacher, finished, no_model):
    assert score(rollouts, teacher, finished.folder, top_k=5, **SCORE).digest == finished.digest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"top_k": None}, "top_k: 5 -> None"),
        ({"top_k": 5, "dtype": "bfloat16"}, "dtype: 'auto' -> 'bfloat16'"),
        ({"top_k": 5, "logps_dtype": "float16"}, "logps_dtype"),
    ],
)
def test_other_settings_do_not_continue(rollouts, teacher, finished, no_model, change, named):
    with pytest.raises(ConfigError, match=named):
        score(rollouts, teacher, finished.folder, **change, **SCORE)


def test_another_teacher_or_other_rollouts_do_not_continue(student, rollouts, teacher, finished, tmp_path):
    with pytest.raises(ConfigError, match="teacher_weights"):
        score(rollouts, student, finished.folder, top_k=5, **SCORE)
    other = collect(student, ["a", "b"], tmp_path / "other", **COLLECT)
    with pytest.raises(ConfigError, match="rollouts: '"):
        score(other, teacher, finished.folder, top_k=5, **SCORE)


class EngineOfA(local_engine.LocalEngine):
    settings = {"table": "a"}


class EngineOfB(local_engine.LocalEngine):
    settings = {"table": "b"}


def test_what_an_engine_decides_the_scores_by_is_a_setting(rollouts, teacher, tmp_path, monkeypatch):
    monkeypatch.setitem(base.ENGINES, "transformers", f"{__name__}:EngineOfA")
    score(rollouts, teacher, tmp_path / "store", **SCORE)
    monkeypatch.setitem(base.ENGINES, "transformers", f"{__name__}:EngineOfB")
    with pytest.raises(ConfigError, match="table: 'a' -> 'b'"):
        score(rollouts, teacher, tmp_path / "store", **SCORE)


def test_broken_rollouts_are_named(rollouts, teacher, tmp_path):
    folder = shutil.copytree(rollouts.folder, tmp_path / "rollouts")
    broken = folder / "data" / "part-00001.parquet"
    content = bytearray(broken.read_bytes())
    content[100] ^= 0xFF
    broken.write_bytes(content)
    with pytest.raises(StoreError, match="part-00001.parquet is broken"):
        score(str(folder), teacher, tmp_path / "store", **SCORE)


# -------------------- refused before anything is loaded


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": -1}, "`top_k=-1` must be at least 0"),
        ({"top_k": 64}, "`top_k=64` must be less than the teacher's vocabulary size 64"),
        ({"tokens_per_batch": 0}, "`tokens_per_batch=0` must be at least 1"),
        ({"logps_dtype": "int8"}, "`logps_dtype='int8'`"),
        ({"dtype": "int8"}, "`dtype='int8'`"),
        ({"load_in_4bit": True}, "needs bitsandbytes"),
        ({"vllm_concurrency": 0}, "`vllm_concurrency=0`"),
    ],
)
def test_settings(rollouts, teacher, tmp_path, no_model, settings, message):
    with pytest.raises(ConfigError, match=message):
        score(rollouts, teacher, tmp_path / "store", **{**settings})
    assert not (tmp_path / "store").exists()


def test_where_scores_may_not_go(rollouts, teacher, no_model):
    for folder in (rollouts.folder, rollouts.folder / "scored"):
        with pytest.raises(ConfigError, match="is the store that is read, or in it"):
            score(rollouts, teacher, folder, **SCORE)


def test_what_may_be_scored(finished, teacher, tmp_path, no_model):
    with pytest.raises(StoreError, match="is a store of scored rollouts. Pass the output of `trl-blend rollouts`"):
        score(str(finished.folder), teacher, tmp_path / "store", **SCORE)


def test_a_teacher_with_other_tokens(rollouts, tmp_path, no_model):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    other = save_model(tmp_path / "other", seed=1, tokenizer=tokenizer, vocab_size=65)
    with pytest.raises(TokenizerMismatchError, match="map other tokens to the same ids"):
        score(rollouts, other, tmp_path / "store", **SCORE)


def test_a_vocabulary_that_is_too_small(rollouts, tmp_path):
    other = save_model(tmp_path / "other", seed=1, vocab_size=40)
    with pytest.raises(TokenizerMismatchError, match="Row 0 .key .* holds id .* are 0 to 39"):
        score(rollouts, other, tmp_path / "store", **SCORE)


def test_an_unreadable_teacher(rollouts, tmp_path):
    with pytest.raises(ConfigError, match="`teacher='nowhere/at-all'` is neither a folder"):
        score(rollouts, "nowhere/at-all", tmp_path / "store", **SCORE)


def test_rows_beyond_the_tokenizer_have_no_part(rollouts, tmp_path):
    """As in a larger model of a family: its most probable rows are no tokens."""
    model = tiny_model("llama", seed=1, vocab_size=72, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[64:] = model.lm_head.weight[:8] * 1.5
    folder = tmp_path / "teacher"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    store = score(rollouts, str(folder), tmp_path / "store", **SCORE)
    assert store.manifest.scoring["vocab_size"] == 64 and store.manifest.scoring["top_k"] == 16
    model.resize_token_embeddings(64)  # the reference: a model without those rows
    for row in rows_of(store):
        expected = forced_logprobs(model, row["prompt_ids"], row["completion_ids"])
        for t, (token, logprobs) in enumerate(zip(row["completion_ids"], expected, strict=True)):
            assert row["teacher_logps"][t] == pytest.approx(logprobs[token].item(), abs=2e-5)
            kept = row["teacher_topk_ids"][t]
            np.testing.assert_allclose(row["teacher_topk_logps"][t], logprobs[kept], rtol=0, atol=2e-5)
            assert len(kept) == 16 and max(kept) < 64
    # In memory, without a tokenizer, the rollouts say which ids are tokens
    model = tiny_model("llama", seed=1, vocab_size=72)
    assert score(rollouts, model, tmp_path / "memory", **SCORE).manifest.scoring["vocab_size"] == 64


def test_an_id_that_is_no_token_is_named(student, teacher, rollouts, tmp_path, no_model):
    columns = {name: [row[name] for row in rows_of(rollouts)] for name in rows_of(rollouts)[0]}
    columns["completion_ids"][7][0] = 66
    manifest = Manifest(kind="rollouts", settings={"by": "hand"}, logps_dtype="float32", planned_shards=2)
    writer = ShardWriter(tmp_path / "rollouts", manifest)
    for index, part in enumerate((slice(0, 5), slice(5, 10))):
        writer.write(index, {name: values[part] for name, values in columns.items()}, str(index))
    writer.update_manifest(complete=True)
    with pytest.raises(
        TokenizerMismatchError, match=f"Row 7 .key {columns['key'][7]}.* holds id 66 in `completion_ids`"
    ):
        score(str(tmp_path / "rollouts"), teacher, tmp_path / "store", **SCORE)


def test_a_row_that_the_teacher_cannot_hold(rollouts, teacher, tmp_path, no_model):
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows_of(rollouts)]
    short = save_model(tmp_path / "short", max_position_embeddings=max(lengths) - 1)
    with pytest.raises(ConfigError, match=f"Row {np.argmax(lengths)} .* has {max(lengths)} tokens, and `teacher`"):
        score(rollouts, short, tmp_path / "store", **SCORE)


# Routes


@pytest.fixture(scope="module")
def routed(student, tmp_path_factory):
    """Ten rows in shards of three: two of "a" first, then "b", and one "a" at the end."""
    prompts = [{"prompt": f"{n}+1", "route": "a" if n in (0, 2, 9) else "b"} for n in range(10)]
    folder = tmp_path_factory.mktemp("routed") / "store"
    return collect(student, prompts, folder, **{**COLLECT, "rows_per_shard": 3})


def test_each_teacher_scores_its_rows(student, teacher, routed, tmp_path):
    every = {row["key"]: row for row in rows_of(score(routed, teacher, tmp_path / "all", top_k=5, **SCORE))}
    stores = {route: score(routed, teacher, tmp_path / route, top_k=5, route=route, **SCORE) for route in "ab"}
    for route, store in stores.items():
        expected = [row["key"] for row in rows_of(routed) if row["route"] == route]
        rows = rows_of(store)
        assert [row["key"] for row in rows] == expected and len(store) == len(expected)
        for row in rows:
            assert row["route"] == route
            np.testing.assert_allclose(row["teacher_logps"], every[row["key"]]["teacher_logps"], atol=2e-5)
        assert store.manifest.scoring["route"] == route and store.manifest.planned_shards == len(store.files)
    # The shards without a row of it are left out
    assert [record["rows"] for record in stores["a"].manifest.shards] == [2, 1]
    assert [record["rows"] for record in stores["b"].manifest.shards] == [1, 3, 3]
    assert len(list(stores["a"].dataset())) == 3


def test_another_route_does_not_continue(teacher, routed, tmp_path):
    first = score(routed, teacher, tmp_path / "store", top_k=5, route="a", **SCORE)
    (first.folder / first.manifest.shards[1]["file"]).unlink()
    with pytest.raises(ConfigError, match="route: 'a' -> 'b'"):
        score(routed, teacher, tmp_path / "store", top_k=5, route="b", **SCORE)
    again = score(routed, teacher, tmp_path / "store", top_k=5, route="a", repair=True, **SCORE)
    assert again.digest == first.digest


def test_routes_that_there_are_not(teacher, rollouts, routed, tmp_path, no_model):
    with pytest.raises(ConfigError, match=r"`route='c'` is the route of no row of .*, which has \['a', 'b'\]"):
        score(routed, teacher, tmp_path / "store", route="c")
    with pytest.raises(ConfigError, match="`route='a'` chooses rows by their column `route`, which .* does not have"):
        score(rollouts, teacher, tmp_path / "store", route="a")


def test_a_row_of_a_route_is_named_by_its_place_in_the_rollouts(routed, teacher, tmp_path, no_model):
    limited = save_model(tmp_path / "short", seed=1, arch="llama", max_position_embeddings=4)
    first = next(n for n, row in enumerate(rows_of(routed)) if row["route"] == "b")
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows_of(routed)[:3]]
    with pytest.raises(ConfigError, match=rf"Row {first} .* has {lengths[first]} tokens"):
        score(routed, limited, tmp_path / "store", route="b")


def test_a_teacher_without_numbers_is_said(rollouts, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(UnsupportedError, match="logits are not numbers .*checkpoint is whole"):
        score(rollouts, model, tmp_path / "store", identify=False, **SCORE)


# -------------------- with a server


def test_a_row_that_the_server_cannot_score_is_named(rollouts, teacher, tmp_path):
    fake = FakeVllm(tiny_model("llama", seed=1), name=teacher)
    bad = rows_of(rollouts)[6]

    def change(answer):
        choice = answer["choices"][0]
        if choice["prompt_token_ids"] == [*bad["prompt_ids"], *bad["completion_ids"]]:
            choice["prompt_logprobs"][-1] = {str(bad["completion_ids"][-1]): {"logprob": -9999.0}}
        return answer

    fake.change = change
    with serving(fake) as url, pytest.raises(EngineError, match=f"Row 6 .key {bad['key']}.: The engine gave -9999.0"):
        score(rollouts, teacher, tmp_path / "store", vllm_server_base_url=url, top_k=0, **SCORE)


def test_a_server_gives_the_same_store(rollouts, teacher, finished, tmp_path, no_model):
    fake = FakeVllm(tiny_model("llama", seed=1), name=teacher)
    fake.failures = [503]
    with serving(fake) as url:
        store = score(rollouts, teacher, tmp_path / "store", top_k=5, vllm_server_base_url=url, **SCORE)
    assert store.manifest.engine == {"name": "vllm-server", "vllm": "0.fake"}
    assert store.manifest.teacher == finished.manifest.teacher
    for remote, local in zip(rows_of(store), rows_of(finished), strict=True):
        assert remote["teacher_topk_ids"] == local["teacher_topk_ids"]
        for name in ("teacher_logps", "teacher_tail_logmass"):
            np.testing.assert_allclose(remote[name], local[name], rtol=0, atol=1e-4)


def test_a_server_that_fails_and_comes_back(rollouts, teacher, tmp_path):
    fake = FakeVllm(tiny_model("llama", seed=1), name=teacher)
    options = {"vllm_concurrency": 1, "identify": False, **SCORE}
    with serving(fake) as url:
        fake.failures = [None] * 6 + [400]
        with pytest.raises(EngineError, match="injected 400"):
            score(rollouts, teacher, tmp_path / "store", vllm_server_base_url=url, **options)
        seen = len(fake.requests)
        store = score(rollouts, teacher, tmp_path / "store", vllm_server_base_url=url, **options)
    assert len(fake.requests) - seen == 6  # the four rows of the first shard were not asked for again
    assert len(rows_of(store)) == 10


def test_an_identity_that_cannot_be_had(rollouts, tmp_path):
    with serving(FakeVllm(tiny_model("llama", seed=1), name="org/only-there")) as url:
        options = {"vllm_server_base_url": url, **SCORE}
        with pytest.raises(ConfigError, match="identity of `teacher='org/only-there'`.*--no_identify"):
            score(rollouts, "org/only-there", tmp_path / "store", **options)
        store = score(rollouts, "org/only-there", tmp_path / "store", identify=False, **options)
    assert store.manifest.teacher is None

"""`collect_rollouts` with transformers: rows, resuming, and everything that is refused before a model is loaded."""

import importlib.util
import json
import shutil
from functools import partial
from importlib.metadata import version

import pytest
import torch
from datasets import Dataset

from tests.rollouts.collecting import assert_logps, collect, ends_well, rows_of, save_model, save_prompts
from tests.tiny import EOS_ID, tiny_lora, tiny_model, tiny_tokenizer
from trl_blend import RolloutConfig, collect_rollouts, score_rollouts
from trl_blend.errors import ConfigError, EngineError, StoreError, UnsupportedError
from trl_blend.rollouts import identities
from trl_blend.rollouts.config import StoreConfig
from trl_blend.rollouts.engines import local
from trl_blend.rollouts.format import row_key


SETTINGS = {
    "max_completion_length": 8,
    "num_rollouts_per_prompt": 2,
    "rows_per_shard": 6,
    "batch_size": 4,
    "logps_dtype": "float32",
}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return save_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", count=11)


@pytest.fixture(scope="module")
def finished(student, prompts, tmp_path_factory):
    return collect(student, prompts, tmp_path_factory.mktemp("finished") / "store", **SETTINGS)


@pytest.fixture
def no_model(monkeypatch):
    """Nothing is loaded, and no weights are read."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(local, "load_model", refuse)
    monkeypatch.setattr(identities, "identify_model", refuse)


# -------------------- rows


def test_rows(student, prompts, finished):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    texts = [json.loads(line)["prompt"] for line in open(prompts)]
    rows = rows_of(finished)
    assert [row["prompt_ids"] for row in rows] == [tokenizer(text)["input_ids"] for text in texts for _ in range(2)]
    assert [row["key"] for row in rows] == [row_key(row["prompt_ids"], i % 2) for i, row in enumerate(rows)]
    assert len({row["key"] for row in rows}) == 22
    for row in rows:
        ids = row["prompt_ids"], row["completion_ids"]
        assert_logps(model, *ids, row["rollout_logps"], row["student_logps"], temperature=0.7, top_p=0.9)
        assert ends_well(row["completion_ids"], row["truncated"], 8)
    assert len({tuple(row["completion_ids"]) for row in rows}) > 18


def test_the_manifest_says_what_was_sampled(student, prompts, finished):
    manifest = finished.manifest
    assert [record["rows"] for record in manifest.shards] == [6, 6, 6, 4]
    assert manifest.num_rows == 22 and manifest.complete and manifest.kind == "rollouts"
    assert manifest.sampling == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": None,
        "max_new_tokens": 8,
        "num_rollouts_per_prompt": 2,
        "seed": 0,
        "eos_token_ids": [EOS_ID],
        "vocab_size": 64,
    }
    assert manifest.engine["name"] == "transformers" and manifest.engine["torch"] == version("torch")
    assert manifest.student["name"] == student and manifest.student["weights"]["sha256"]
    assert manifest.source["prompts"] == prompts and manifest.source["num_prompts"] == 11


def test_the_options_of_the_chat_template_are_kept(student, tmp_path):
    """The table of `examples/offline_opd.py` asks with them too."""
    options = {"enable_thinking": False}
    messages = [{"role": "user", "content": "1+1"}]
    store = collect(student, [messages], tmp_path / "store", chat_template_kwargs=options, **SETTINGS)
    assert store.manifest.source["chat_template_kwargs"] == options


@pytest.mark.parametrize("given", ["model", "adapter"])
def test_a_model_in_memory(given, prompts, finished, tmp_path):
    model = tiny_model() if given == "model" else tiny_lora(tiny_model())
    store = collect(model, prompts, tmp_path / "store", processing_class=tiny_tokenizer(), **SETTINGS)
    same = [row["completion_ids"] for row in rows_of(store)] == [row["completion_ids"] for row in rows_of(finished)]
    assert same == (given == "model")
    assert (store.manifest.student["adapter"] is not None) == (given == "adapter")


def test_an_adapter_by_name(student, prompts, tmp_path):
    from transformers import AutoModelForCausalLM

    adapted = tiny_lora(AutoModelForCausalLM.from_pretrained(student))
    adapted.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    store = collect(str(tmp_path / "adapter"), prompts, tmp_path / "store", **SETTINGS)
    merged = adapted.merge_and_unload()
    for row in rows_of(store)[:4]:
        ids = row["prompt_ids"], row["completion_ids"]
        settings = {"atol": 1e-4, "temperature": 0.7, "top_p": 0.9}
        assert_logps(merged, *ids, row["rollout_logps"], row["student_logps"], **settings)
    assert store.manifest.student["adapter"] is not None


def test_other_seeds_give_other_rows(student, prompts, finished, tmp_path):
    store = collect(student, prompts, tmp_path / "store", seed=1, **SETTINGS)
    assert rows_of(store) != rows_of(finished)


def test_the_same_prompt_is_drawn_anew_everywhere(student, tmp_path):
    store = collect(student, ["what?"] * 8, tmp_path / "store", **{**SETTINGS, "rows_per_shard": 4})
    drawn = [tuple(row["completion_ids"]) for row in rows_of(store)]
    assert len(drawn) == 16 and len({tuple(drawn[first : first + 4]) for first in range(0, 16, 4)}) == 4


def test_route_and_weight_of_a_prompt_are_kept(student, tmp_path):
    prompts = [{"prompt": f"{n}+1", "route": "ab"[n % 2], "row_weight": n, "other": n} for n in range(5)]
    store = collect(student, prompts, tmp_path / "store", **SETTINGS)
    rows = rows_of(store)
    assert [row["route"] for row in rows] == [*"aabbaabbaa"] and "other" not in rows[0]
    assert [row["row_weight"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    plain = collect(student, [{"prompt": row["prompt"]} for row in prompts], tmp_path / "plain", **SETTINGS)
    assert "route" not in rows_of(plain)[0]
    prompts[0]["row_weight"] = 7  # the same tokens: the shard would be taken for done
    with pytest.raises(ConfigError, match="made from another input"):
        collect(student, prompts, tmp_path / "store", **SETTINGS)


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [("route", 3, "3, not the name"), ("route", "", "'', not"), ("row_weight", -1.0, "-1.0, not a fin")]
    + [("row_weight", float("nan"), "nan"), ("row_weight", None, "None"), ("row_weight", "1", "'1'")],
)
def test_routes_and_weights_that_are_none(student, tmp_path, no_model, column, value, shown):
    rows = [{"prompt": "a", column: "x" if isinstance(value, str) else 1.0 if column == "row_weight" else 1}]
    rows.append({"prompt": "b", column: value})
    if column == "row_weight" and value == "1" or value == 3:
        rows = rows[1:]
    number = len(rows) - 1
    with pytest.raises(ConfigError, match=f"Row {number} of the prompts: column `{column}` is {shown}"):
        collect(student, rows, tmp_path / "store", **SETTINGS)


def test_without_an_identity(student, prompts, tmp_path):
    store = collect(student, prompts, tmp_path / "store", identify=False, **SETTINGS)
    assert store.manifest.student is None and store.manifest.settings["student_name"] == student


# -------------------- resuming


def test_a_finished_store_is_left_alone(student, prompts, finished, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*.parquet")}
    monkeypatch.setattr(local, "load_model", lambda *args: pytest.fail("loaded"))
    again = collect(student, prompts, finished.folder, **SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in again.folder.rglob("*.parquet")} == before


def test_missing_shards_are_made_again_and_are_the_same(student, prompts, finished, tmp_path, monkeypatch):
    sampled, sample = [], local.LocalEngine.sample

    def interrupted(self, prompt_ids, *args):
        sampled.append(len(prompt_ids))
        if len(sampled) == 4:
            raise KeyboardInterrupt
        return sample(self, prompt_ids, *args)

    monkeypatch.setattr(local.LocalEngine, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(student, prompts, tmp_path / "store", **SETTINGS)
    with pytest.raises(StoreError, match="half-written: 1 of 4 shards"):
        from trl_blend.rollouts.store import RolloutStore

        RolloutStore.open(tmp_path / "store")
    store = collect(student, prompts, tmp_path / "store", **SETTINGS)
    assert rows_of(store) == rows_of(finished) and store.digest == finished.digest
    assert sampled == [4, 2, 4, 2, 4, 2, 4, 2, 4]  # of the second shard, half was lost


def test_a_broken_shard_is_made_again_on_request(student, prompts, finished, tmp_path):
    store = collect(student, prompts, tmp_path / "store", **SETTINGS)
    broken = store.folder / "data" / "part-00001.parquet"
    content = bytearray(broken.read_bytes())
    content[200] ^= 0xFF
    broken.write_bytes(content)
    others = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*.parquet") if path != broken}
    store = collect(student, prompts, tmp_path / "store", repair=True, **SETTINGS)
    assert store.digest == finished.digest
    assert {path: path.stat().st_mtime_ns for path in others} == others


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": 0.8}, "temperature: 0.7 -> 0.8"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"batch_size": 8}, "batch_size: 4 -> 8"),
        ({"max_completion_length": 9, "top_p": 1.0}, r"max_new_tokens: 8 -> 9; top_p: 0.9 -> 1"),
        ({"dtype": "bfloat16"}, "dtype: 'auto' -> 'bfloat16'"),
        ({"logps_dtype": "float16"}, "logps_dtype: 'float32' -> 'float16'"),
        ({"rows_per_shard": 12}, "rows_per_shard: 6 -> 12"),
    ],
)
def test_other_settings_do_not_continue(student, prompts, finished, monkeypatch, change, named):
    monkeypatch.setattr(local, "load_model", lambda *args: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=rf"started with other settings[^$]*{named}"):
        collect(student, prompts, finished.folder, **{**SETTINGS, **change})


def test_another_student_or_other_prompts_do_not_continue(student, prompts, finished, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="student_weights"):
        collect(other, prompts, finished.folder, **SETTINGS)
    with pytest.raises(ConfigError, match="prompts: "):
        collect(student, save_prompts(tmp_path / "p.jsonl", count=12), finished.folder, **SETTINGS)


# -------------------- refused before anything is loaded


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "`temperature=0.0` must be more than 0"),
        ({"temperature": -1.0}, "`temperature=-1.0`"),
        ({"temperature": float("nan")}, "`temperature=nan`"),
        ({"top_p": 0.0}, r"`top_p=0.0` must be in \(0, 1\]"),
        ({"top_p": 1.5}, "`top_p=1.5`"),
        ({"top_k": -1}, "`top_k=-1` must be at least 0"),
        ({"min_p": 2.0}, "`min_p=2.0`"),
        ({"num_rollouts_per_prompt": 0}, "`num_rollouts_per_prompt=0` must be at least 1"),
        ({"max_completion_length": 0}, "`max_completion_length=0`"),
        ({"batch_size": 0}, "`batch_size=0`"),
        ({"rows_per_shard": 0}, "`rows_per_shard=0`"),
        ({"logps_dtype": "int8"}, "`logps_dtype='int8'` is unknown"),
        ({"dtype": "float8"}, "`dtype='float8'` is unknown"),
        ({"load_in_4bit": True}, "needs bitsandbytes"),
        ({"prompt_column": "question"}, r"no column `question` in the prompts, only \['prompt'\]"),
        ({"max_completion_length": 250}, "Row 1 .* has 15 tokens.*256 tokens.*`max_completion_length=241` or less"),
        ({"use_vllm": True, "vllm_server_base_url": "http://x"}, "Set one"),
        ({"vllm_kwargs": {"max_model_len": 9}}, "Set `use_vllm=True`"),
        ({"use_vllm": True, "vllm_kwargs": {"dtype": "float32"}}, r"`vllm_kwargs` holds \['dtype'\]"),
        ({"use_vllm": True, "vllm_kwargs": {"logprobs_mode": "raw_logprobs"}}, r"holds \['logprobs_mode'\]"),
        ({"vllm_server_base_url": "http://x", "load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_settings(student, prompts, tmp_path, no_model, settings, message):
    with pytest.raises(ConfigError, match=message):
        collect(student, prompts, tmp_path / "store", **{**SETTINGS, **settings})
    assert not (tmp_path / "store").exists()


def test_model_and_prompts_are_passed_or_named(student, prompts, finished, tmp_path):
    named = {**SETTINGS, "model_name_or_path": student, "dataset_name": prompts}
    assert collect(None, None, finished.folder, **named).digest == finished.digest
    with pytest.raises(ConfigError, match="`prompts` was passed, and `dataset_name='.*'` names another. Drop one"):
        collect(None, ["a"], tmp_path / "store", **named)
    with pytest.raises(ConfigError, match="`model_name_or_path` is missing. Set it, or pass `model`"):
        collect(None, prompts, tmp_path / "store", **SETTINGS)
    with pytest.raises(ConfigError, match="`args` is missing"):
        collect_rollouts(student, prompts)


def test_settings_as_keyword_arguments(student, prompts, finished):
    repeated = collect_rollouts(student, prompts, str(finished.folder), disable_tqdm=True, **SETTINGS)
    assert repeated.digest == finished.digest
    repeated = collect_rollouts(student, prompts, output_dir=finished.folder, disable_tqdm=True, **SETTINGS)
    assert repeated.digest == finished.digest


@pytest.mark.parametrize(
    "call", [partial(collect_rollouts, "model", ["1"]), partial(score_rollouts, "store", "model")]
)
@pytest.mark.parametrize(
    ("args", "settings", "message"),
    [
        ("store", {"logp_dtype": "float32"}, "`logp_dtype='float32'` is no setting; did you mean `logps_dtype`"),
        ("store", {"zzz": 1}, "`zzz=1` is no setting. `.*Config` lists them all"),
        ("store", {"output_dir": "other"}, "`output_dir` is given twice, the second time as `output_dir='other'`"),
        ("store", {"logps_dtype": "int8"}, "`logps_dtype='int8'` is unknown"),
        (StoreConfig("store"), {}, "`args` is a StoreConfig. Pass a `.*Config`, or the folder"),
        (None, {"repair": True}, "`args` is missing. Pass the folder of the store, or"),
    ],
)
def test_keyword_arguments_that_are_refused(call, args, settings, message):
    with pytest.raises(ConfigError, match=message):
        call(args, **settings)


def test_a_configuration_is_whole():
    with pytest.raises(ConfigError, match=r"\['seed'\] and a whole `RolloutConfig` were passed"):
        collect_rollouts("model", ["1"], RolloutConfig("store"), seed=1)


def test_vllm_has_to_be_installed(student, prompts, tmp_path, no_model, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs vLLM, which is not installed"):
        collect(student, prompts, tmp_path / "store", use_vllm=True, **SETTINGS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("empty.jsonl", "is empty"),
        ("missing.jsonl", "`prompts='missing.jsonl'`: there is no such file"),
        (Dataset.from_dict({"prompt": []}), "`prompts` is empty"),
        (["1", ""], "Row 1 of the prompts has no prompt: column `prompt` is ''. Drop the row"),
        (["a", "a" * 250], "Row 1 .* has 250 tokens.*Set `max_completion_length=6` or less, or drop"),
        (["a" * 300], "the 256 tokens that the model takes. Drop the longest prompts"),
        (Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset(), "is a IterableDataset.*Pass one split"),
        (7, "is a int"),
    ],
)
def test_prompts(student, tmp_path, no_model, given, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ConfigError, match=message):
        collect(student, given, tmp_path / "store", **SETTINGS)


def test_a_template_that_cannot_render(student, tmp_path, no_model):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    rows = [[{"role": "user", "content": "x"}]]
    with pytest.raises(ConfigError, match="cannot render row 0 of the prompts: no system turns"):
        collect(student, rows, tmp_path / "store", processing_class=tokenizer, **SETTINGS)


def test_the_folder_has_to_be_a_store_or_empty(student, prompts, tmp_path, no_model):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and no store of rollouts, but a folder .*notes.txt"):
        collect(student, prompts, tmp_path, **SETTINGS)
    with pytest.raises(ConfigError, match="is a file. Choose a folder"):
        collect(student, prompts, tmp_path / "notes.txt", **SETTINGS)
    (tmp_path / "x" / "data").mkdir(parents=True)
    (tmp_path / "x" / "data" / "mine.csv").write_text("mine")
    with pytest.raises(ConfigError, match=r"\(with data/mine.csv\)"):
        collect(student, prompts, tmp_path / "x", **SETTINGS)


def test_a_folder_that_a_killed_process_left(student, prompts, finished, tmp_path):
    data = tmp_path / "store" / "data"
    data.mkdir(parents=True)
    (data / ".part-00000.parquet.7.tmp").write_text("half")
    (tmp_path / "store" / ".lock").write_text("pid 7\n")
    store = collect(student, prompts, tmp_path / "store", **SETTINGS)
    assert store.digest == finished.digest and not list(data.glob(".*"))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("nowhere/at-all", ConfigError, "`model='nowhere/at-all'` is neither a folder with a model nor"),
        (torch.nn.Linear(2, 2), UnsupportedError, "`model` is a Linear"),
    ],
)
def test_models(prompts, tmp_path, model, error, message):
    with pytest.raises(error, match=message):
        collect(model, prompts, tmp_path / "store", **SETTINGS)


def test_options_of_loading_and_a_loaded_model(prompts, tmp_path):
    with pytest.raises(ConfigError, match="`dtype='bfloat16'` says how to load `model` by name"):
        collect(tiny_model(), prompts, tmp_path / "store", dtype="bfloat16", **SETTINGS)
    with pytest.raises(ConfigError, match="vLLM has models by name"):
        collect(tiny_model(), prompts, tmp_path / "store", vllm_server_base_url="http://x", **SETTINGS)
    with pytest.raises(ConfigError, match="was built in memory and has no tokenizer"):
        collect(tiny_model(), prompts, tmp_path / "store", **SETTINGS)


def test_no_end_of_sequence_token(tmp_path, prompts):
    model, tokenizer = tiny_model(), tiny_tokenizer(eos_token=None)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with pytest.raises(ConfigError, match="names an end-of-sequence token"):
        collect(model, prompts, tmp_path / "store", processing_class=tokenizer, **SETTINGS)


def test_a_store_without_its_manifest_is_taken_up(student, prompts, finished, tmp_path):
    store = shutil.copytree(finished.folder, tmp_path / "store")
    (store / "manifest.json").unlink()
    assert collect(student, prompts, store, **SETTINGS).digest == finished.digest


# -------------------- rows that are no tokens, numbers that are none


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A student whose most probable rows are no tokens."""
    folder = tmp_path_factory.mktemp("padded")
    tiny_tokenizer().save_pretrained(folder)
    model = tiny_model(vocab_size=72, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[64:] = model.lm_head.weight[:8] * 1.5
    model.save_pretrained(folder)
    return str(folder)


def test_rows_beyond_the_tokenizer_are_not_drawn(padded, prompts, tmp_path):
    store = collect(padded, prompts, tmp_path / "store", **SETTINGS)
    assert store.manifest.sampling["vocab_size"] == 64
    model = tiny_model(vocab_size=72, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[64:] = model.lm_head.weight[:8] * 1.5
    model.resize_token_embeddings(64)  # the reference: a model without those rows
    for row in rows_of(store):
        ids = row["prompt_ids"], row["completion_ids"]
        assert max(row["completion_ids"]) < 64
        assert_logps(model, *ids, row["rollout_logps"], row["student_logps"], temperature=0.7, top_p=0.9)


def test_end_tokens_that_the_tokenizer_lacks_are_drawn(tmp_path, padded, prompts):
    folder = shutil.copytree(padded, tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [EOS_ID, 66]}))
    store = collect(str(folder), prompts, tmp_path / "store", **SETTINGS)
    assert store.manifest.sampling["vocab_size"] == 67
    assert {max(row["completion_ids"]) for row in rows_of(store)} <= set(range(67))


def test_a_padding_token_without_a_row_of_the_model(student, prompts, tmp_path):
    tokenizer = tiny_tokenizer()
    plain = collect(tiny_model(), ["1", "1+1="], tmp_path / "plain", tokenizer, **SETTINGS)
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    assert tokenizer.pad_token_id == tiny_model().config.vocab_size
    added = collect(tiny_model(), ["1", "1+1="], tmp_path / "added", tokenizer, **SETTINGS)
    assert [row["completion_ids"] for row in rows_of(added)] == [row["completion_ids"] for row in rows_of(plain)]


def test_a_model_without_numbers_is_said(student, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(EngineError, match="Row 0 of the prompts: The student's logits are not numbers .nan."):
        collect(model, ["1+1"], tmp_path / "store", tiny_tokenizer(), **SETTINGS)
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():  # only some prompts meet it
        model.model.embed_tokens.weight[tiny_tokenizer().convert_tokens_to_ids("z")] = float("nan")
    with pytest.raises(EngineError, match="Row 1 of the prompts: The student's logits are not numbers"):
        collect(
            model,
            ["12", "z1", "2"],
            tmp_path / "other",
            tiny_tokenizer(),
            **{**SETTINGS, "num_rollouts_per_prompt": 1},
        )

"""A store where prompts are meant, prompts where a store is meant, any other folder: what it is, what is needed."""

import pytest
from datasets import Dataset

from tests.rollouts.collecting import save_prompts
from tests.rollouts.stores import write_store
from tests.rollouts.vllm_fake import FakeVllm, serving
from tests.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.trainers.scored import build_offline
from trl_blend import collect_rollouts, export_mixed_policy, load_rollouts, load_scored_rollouts, score_rollouts
from trl_blend.errors import ConfigError, StoreError, UnsupportedError
from trl_blend.rollouts.engines import local
from trl_blend.rollouts.folders import describe, store_kind
from trl_blend.rollouts.store import RolloutStore


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """One folder or file of each kind."""
    root = tmp_path_factory.mktemp("paths")
    write_store(root / "rollouts", 1)
    write_store(root / "scored", 1, scored=True)
    model = tiny_model()
    model.save_pretrained(root / "model")
    tiny_lora(tiny_model()).save_pretrained(root / "adapter")
    tiny_tokenizer().save_pretrained(root / "tokenizer")
    Dataset.from_dict({"prompt": ["a"]}).save_to_disk(root / "saved")
    (root / "run" / "checkpoint-10").mkdir(parents=True)
    (root / "data").mkdir()
    save_prompts(root / "data" / "prompts.jsonl")
    save_prompts(root / "prompts.jsonl")
    (root / "empty").mkdir()
    (root / "other").mkdir()
    (root / "other" / "notes.md").touch()
    return root


KINDS = {
    "rollouts": "a store of rollouts without teacher log-probabilities",
    "scored": "a store of scored rollouts",
    "model": "a model",
    "adapter": "a PEFT adapter",
    "tokenizer": "a tokenizer",
    "saved": "a dataset saved with `save_to_disk`",
    "run": "the output of a training",
    "data": "a folder with files of data",
    "prompts.jsonl": "a file of data (.jsonl)",
    "empty": "an empty folder",
    "other": "a folder of something else",
    "missing": "neither a file nor a folder",
}


@pytest.mark.parametrize(("name", "words"), KINDS.items())
def test_what_a_path_is(paths, name, words):
    assert describe(paths / name) == words
    assert store_kind(paths / name) == {"rollouts": "rollouts", "scored": "scored_rollouts"}.get(name)


NO_STORES = [name for name in KINDS if name not in ("rollouts", "scored", "missing")]


def opens(path):
    return RolloutStore.open(path)


def trains(path):
    return build_offline(path.parent, path.parent / "out", student=str(path.parent / "model"), train_dataset=str(path))


def scores(path):
    return score_rollouts(str(path), str(path.parent / "model"), path.parent / "new")


@pytest.mark.parametrize("name", NO_STORES)
@pytest.mark.parametrize("use", [opens, trains, scores, load_rollouts, load_scored_rollouts])
def test_what_is_no_store(paths, name, use):
    with pytest.raises(StoreError) as raised:
        use(paths / name)
    message = str(raised.value)
    assert f"{name} is {KINDS[name]}" in message and "Pass the output_dir of `trl-blend rollouts`" in message


@pytest.mark.parametrize("name", ["rollouts", "scored", "model", "adapter", "tokenizer", "run"])
def test_what_is_no_dataset_of_prompts(paths, name, tmp_path):
    with pytest.raises(ConfigError) as raised:
        collect_rollouts(
            str(paths / "model"), str(paths / name), tmp_path / "store", processing_class=tiny_tokenizer()
        )
    assert f"{name}'` is {KINDS[name]}" in str(raised.value)


def test_stores_of_the_other_kind(paths, tmp_path):
    with pytest.raises(StoreError, match="is a store of scored rollouts. Pass the output of `trl-blend rollouts`"):
        scores(paths / "scored")
    with pytest.raises(ConfigError, match="is a store of rollouts without teacher log-prob.*Score them first"):
        trains(paths / "rollouts")
    store = load_rollouts(paths / "rollouts")
    with pytest.raises(ConfigError, match="`prompts=.*is a store of rollouts without.*pass the prompts that it was"):
        collect_rollouts(str(paths / "model"), store, tmp_path / "store", processing_class=tiny_tokenizer())
    with pytest.raises(ConfigError, match="`rollouts` is a Dataset, not a store of rollouts.*`load_rollouts` opens"):
        score_rollouts(Dataset.from_dict({"prompt": ["a"]}), str(paths / "model"), tmp_path / "store")
    scored = load_scored_rollouts(paths / "scored")
    with pytest.raises(StoreError, match="is a store of scored rollouts"):
        score_rollouts(scored, str(paths / "model"), tmp_path / "store")


@pytest.mark.parametrize("engine", ["transformers", "vllm", "server"])
def test_a_mixture_is_neither_student_nor_teacher(paths, tmp_path, monkeypatch, engine):
    """Whoever would draw from it or score with it: by the name, before anything is loaded or asked."""
    folder = str(tmp_path / "mixed")
    export_mixed_policy(tiny_model(), tiny_model(seed=1), 0.3, folder, processing_class=tiny_tokenizer())
    monkeypatch.setattr(local, "load_model", None)
    fake = FakeVllm(tiny_model(), name=folder)
    with serving(fake) as url:
        settings = {"vllm": {"use_vllm": True}, "server": {"vllm_server_base_url": url}}.get(engine, {})
        with pytest.raises(UnsupportedError, match="`model=.*mixed'` is a mixed policy of several models"):
            collect_rollouts(folder, ["1+1="], tmp_path / "store", processing_class=tiny_tokenizer(), **settings)
        if engine != "vllm":  # which only draws
            with pytest.raises(UnsupportedError, match="`teacher=.*mixed'` is a mixed policy of several models"):
                score_rollouts(str(paths / "rollouts"), folder, tmp_path / "store", **settings)
    assert not fake.requests and not (tmp_path / "store").exists()

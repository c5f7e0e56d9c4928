from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from tests.hub.server import hub_endpoint  # noqa: F401
from tests.models.checkpoints import hub_snapshot, save_model
from tests.tiny import tiny_lora, tiny_model, tiny_tokenizer
from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.models.checkpoints import find_checkpoint
from trl_blend.models.fingerprint import identify_model
from trl_blend.models.loading import (
    LoadOptions,
    find_adapter,
    find_config,
    find_eos_token_ids,
    find_generation_config,
    find_tokenizer,
    load_frozen,
    load_model,
    load_trainable_adapter,
)


IDS = torch.arange(6, 20)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache with two revisions of a base, and two revisions of an adapter on the older one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    old, new = hub_snapshot(tmp_path, "org/base", "1" * 40, "v1"), hub_snapshot(tmp_path, "org/base", "2" * 40)
    model = tiny_model("llama", seed=1)
    model.generation_config.eos_token_id = [1, 40]
    save_model(model, old)
    save_model(tiny_model("llama", seed=2), new)
    adapted = {}
    for branch, commit in (("main", "3" * 40), ("v9", "4" * 40)):
        adapted[branch] = tiny_lora(AutoModelForCausalLM.from_pretrained(old), seed=int(commit[0]))
        settings = adapted[branch].peft_config["default"]
        settings.base_model_name_or_path, settings.revision = "org/base", "v1"
        adapted[branch].save_pretrained(hub_snapshot(tmp_path, "org/adapter", commit, branch))
    return adapted


def test_an_adapter_is_put_on_the_revision_of_its_base_that_it_names(hub):
    for revision, branch in ((None, "main"), ("v9", "v9")):
        loaded = load_frozen("org/adapter", "teacher", dtype=None, device_map=None, revision=revision)
        torch.testing.assert_close(logits(loaded), logits(hub[branch].eval()))
        assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
        by_options = load_model("org/adapter", "teacher", LoadOptions(revision, "float32"))
        assert torch.equal(logits(by_options), logits(loaded))
        found = identify_model("org/adapter", revision=revision)
        assert found.adapter.weights == identify_model(loaded, tokenizer=tiny_tokenizer()).adapter.weights
        assert (found.eos_token_ids, found.tokenizer.vocab_size) == ([1, 40], 64)


def test_what_an_adapter_lacks_is_that_of_its_base(hub):
    assert find_config("org/adapter", "model", revision="v9", trust_remote_code=False).model_type == "llama"
    assert find_generation_config("org/adapter", "model").eos_token_id == [1, 40]
    tokenizer = find_tokenizer("org/adapter", "model")
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert find_eos_token_ids("org/adapter", tokenizer) == [1, 40]


def test_an_adapter_with_a_tokenizer_and_end_of_its_own(tmp_path):
    base = save_model(tiny_model(), tmp_path / "base")
    adapter = tiny_lora(AutoModelForCausalLM.from_pretrained(base))
    folder = save_model(adapter, tmp_path / "adapter", tokenizer=tiny_tokenizer(eos_token="<unk>"))
    adapter.generation_config.eos_token_id = 7
    adapter.generation_config.save_pretrained(folder)
    tokenizer = find_tokenizer(folder, "model")
    assert tokenizer.eos_token == "<unk>"
    assert find_eos_token_ids(folder, tokenizer) == [2, 7]


def resized(base, how, rows=66):
    """An adapter that was trained after its base had got more vocabulary rows."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows)
    settings = {
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        "saved without being trained": {"target_modules": ["q_proj"]},
        "targeted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 64, rows - 1]},
    }[how]
    return tiny_lora(model, **settings)


HOW = ("saved", "saved without being trained", "targeted", "tokens")


@pytest.mark.parametrize(
    ("arch", "how"), [*((arch, how) for arch in ("llama", "qwen3") for how in HOW), ("gpt2", HOW[1])]
)
@pytest.mark.parametrize("rows", [66, 80])
def test_an_adapter_with_more_vocabulary_rows_than_its_base(tmp_path, arch, how, rows):
    base = save_model(tiny_model(arch), tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    adapter = resized(base, how, rows) if arch != "gpt2" else tiny_lora_on_gpt2(base, rows)
    folder = save_model(adapter, tmp_path / "adapter", tokenizer=tokenizer)
    loaded = load_frozen(folder, "teacher", dtype=None, device_map=None)
    torch.testing.assert_close(logits(loaded), logits(adapter.eval()))
    assert logits(loaded).shape[-1] == find_config(folder, "teacher").vocab_size == rows
    assert len(find_tokenizer(folder, "teacher")) == 66
    if rows == 66:  # what PEFT itself can load: it goes by the tokenizer
        torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), logits(loaded))


def tiny_lora_on_gpt2(base, rows):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows)
    return tiny_lora(model, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["wte", "lm_head"])


def test_an_adapter_is_trained_further(tmp_path):
    base = save_model(tiny_model(), tmp_path / "base")
    folder = save_model(tiny_lora(AutoModelForCausalLM.from_pretrained(base)), tmp_path / "adapter")
    expected = AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True)
    found = load_trainable_adapter(folder, "model", device_map=None)
    assert found.training == expected.training
    for (name, one), (other_name, other) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other_name and one.requires_grad == other.requires_grad == ("lora_" in name)
        assert torch.equal(one, other)


def test_the_class_of_a_teacher_is_that_of_its_revision(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for branch, commit, arch in (("main", "1" * 40, "gpt2"), ("v2", "2" * 40, "llama")):
        save_model(tiny_model(arch), hub_snapshot(tmp_path, "org/moved", commit, branch))
    loaded = load_frozen("org/moved", "teacher", revision="v2", dtype=None, device_map=None)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(loaded), logits(tiny_model("llama").eval()))


def test_a_model_in_memory_has_the_tokenizer_that_it_was_loaded_beside(tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(save_model(tiny_model(), tmp_path))
    assert find_config(loaded, "model") is loaded.config
    assert find_generation_config(loaded, "model") is loaded.generation_config
    assert load_model(loaded, "model", LoadOptions()) is loaded and loaded.lm_head.weight.requires_grad
    assert find_tokenizer(loaded, "model").get_vocab() == tiny_tokenizer().get_vocab()
    loaded.config._name_or_path = "/of/another/machine"
    for model in (loaded, tiny_model()):
        assert find_tokenizer(model, "model") is None
        with pytest.raises(ConfigError, match="`model` was built in memory and has no tokenizer of its own. Pass"):
            find_tokenizer(model, "model", required=True)


def test_a_folder_without_a_tokenizer(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert find_tokenizer(str(tmp_path), "model") is None
    with pytest.raises(ConfigError, match="has no tokenizer of its own"):
        find_tokenizer(str(tmp_path), "model", required=True)


def test_a_missing_model_has_one_message(tmp_path):
    for name in (str(tmp_path / "nowhere"), "no/such-model"):
        message = f"`teacher='{name}'`.* is neither a folder with a model nor one that can be had from the Hub"
        for find in (find_config, load_frozen):
            with pytest.raises(ConfigError, match=message):
                find(name, "teacher")
        with pytest.raises(ConfigError, match=f"^'{name}' is neither a folder with a model nor one that"):
            identify_model(name)
    with pytest.raises(ConfigError, match="'no/such-model'` at revision 'v2' is neither"):
        find_config("no/such-model", "teacher", revision="v2")


@pytest.mark.parametrize("status", [429, 503, None])
def test_a_hub_that_fails_is_not_taken_for_a_missing_file(hub_endpoint, tmp_path, monkeypatch, status):  # noqa: F811
    """Or an adapter would be loaded as a whole model. What the cache has or knows not to exist needs no Hub."""
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    hub_endpoint.create("me/model")
    HfApi().upload_folder(repo_id="me/model", folder_path=save_model(tiny_model(), tmp_path / "model"))
    hub_endpoint.fail("resolve", status, times=1000)
    for find in (find_adapter, find_config, find_tokenizer, find_generation_config):
        with pytest.raises(ConfigError, match=f"`model='me/model'` is neither a folder.*{status or 'disconnected'}"):
            find("me/model", "model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_adapter("me/model", "model") is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub_endpoint.before.clear()
    assert find_adapter("me/model", "model") is None
    expected = find_config("me/model", "model").to_dict()
    hub_endpoint.fail("resolve", 503, times=1000)
    assert find_adapter("me/model", "model") is None and find_config("me/model", "model").to_dict() == expected


def test_a_repository_without_access_or_of_no_model(hub_endpoint):  # noqa: F811
    hub_endpoint.create("me/empty")
    assert find_adapter("me/empty", "model") is None and find_tokenizer("me/empty", "model") is None
    with pytest.raises(ConfigError, match="`model='me/other'` is neither a folder with a model nor one that can be"):
        find_adapter("me/other", "model")


def test_a_snapshot_whose_connection_breaks_off(hub_endpoint):  # noqa: F811
    hub_endpoint.fail("info", None, times=1000)
    with pytest.raises(ConfigError, match="'me/model' is neither a folder .* disconnected"):
        find_checkpoint("me/model")


def test_an_adapter_that_does_not_name_its_base(tmp_path):
    tiny_lora(tiny_model()).save_pretrained(tmp_path)
    for find in (find_config, find_tokenizer, load_frozen):
        with pytest.raises(ConfigError, match="is a PEFT adapter that does not name its base"):
            find(str(tmp_path), "teacher")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert find_tokenizer(str(tmp_path), "teacher").get_vocab() == tiny_tokenizer().get_vocab()
    assert (
        identify_model(str(tmp_path)).tokenizer == identify_model(tiny_model(), tokenizer=tiny_tokenizer()).tokenizer
    )


def test_an_encoder_decoder_is_refused_by_name_and_in_memory(tmp_path):
    config = T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    for given in (model, str(tmp_path)):
        with pytest.raises(UnsupportedError, match="`teacher` is an encoder-decoder model \\(model_type='t5'\\)"):
            find_config(given, "teacher")

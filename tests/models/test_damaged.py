"""Models that are cut short, incomplete or something else: one error that names the argument and the file."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaModel

from tests.models.checkpoints import save_model
from tests.tiny import tiny_lora, tiny_model
from trl_blend.errors import ConfigError
from trl_blend.models.fingerprint import identify_model
from trl_blend.models.loading import find_config, find_generation_config, find_tokenizer, load_frozen


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n"


def cut(content):
    return content[: len(content) // 2]


def load_all(folder):
    """Everything that is read of a model which scores or teaches."""
    find_config(folder, "teacher")
    find_generation_config(folder, "teacher")
    find_tokenizer(folder, "teacher", required=True)
    return load_frozen(folder, "teacher", dtype=None, device_map=None)


@pytest.fixture
def whole(tmp_path):
    return save_model(tiny_model("llama"), tmp_path / "whole")


@pytest.fixture
def sharded(tmp_path):
    return save_model(tiny_model("llama"), tmp_path / "sharded", max_shard_size="10KB")


@pytest.fixture
def adapter(tmp_path, whole):
    return save_model(tiny_lora(AutoModelForCausalLM.from_pretrained(whole)), tmp_path / "adapter")


SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")
DAMAGE = {
    "cut": cut,
    "empty": lambda content: b"",
    "pointer": lambda content: POINTER,
    "another kind": lambda content: b"<html>404</html>",
    "a list": lambda content: b"[]",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", SETTINGS)
def test_a_damaged_file_is_named(whole, file, damage):
    load_all(whole)
    path = f"{whole}/{file}"
    content = open(path, "rb").read()
    open(path, "wb").write(DAMAGE[damage](content))
    with pytest.raises(ConfigError, match=f"^`teacher='{whole}'` cannot be read: '{re.escape(path)}' is ") as raised:
        load_all(whole)
    assert ("is a Git LFS pointer, not the file itself. Run `git lfs pull`" in str(raised.value)) == (
        damage == "pointer"
    )
    assert ("it is empty" in str(raised.value)) == (damage == "empty")


@pytest.mark.parametrize("damage", ["cut", "empty", "pointer"])
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"])
def test_a_damaged_adapter_is_named(adapter, file, damage):
    load_all(adapter)
    path = f"{adapter}/{file}"
    content = open(path, "rb").read()
    open(path, "wb").write(DAMAGE[damage](content))
    with pytest.raises(ConfigError, match=f"'{re.escape(path)}' is (damaged|a Git LFS pointer)"):
        load_all(adapter)


@pytest.mark.parametrize("content", ["", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[]"])
def test_a_damaged_index_is_named(sharded, content):
    load_all(sharded)
    path = f"{sharded}/model.safetensors.index.json"
    open(path, "w").write(content)
    for read in (load_all, identify_model):
        with pytest.raises(ConfigError, match=f"'{re.escape(path)}' is damaged"):
            read(sharded)


def test_a_missing_shard_and_a_damaged_one_are_named(sharded, tmp_path):
    shard = sorted((tmp_path / "sharded").glob("model-*.safetensors"))[1]
    shard.write_bytes(cut(shard.read_bytes()))
    for read in (load_all, identify_model):
        with pytest.raises(ConfigError, match=f"{shard.name}' is damaged: .* Save or fetch it again"):
            read(sharded)
    shard.unlink()
    for read in (load_all, identify_model):
        with pytest.raises(ConfigError, match=f"sharded.*{shard.name}|{shard.name}.*sharded"):
            read(sharded)


def test_pytorch_weights_of_another_kind(whole, tmp_path):
    (tmp_path / "whole" / "model.safetensors").unlink()
    path = tmp_path / "whole" / "pytorch_model.bin"
    for content in (b"", POINTER, b"PK\x03\x04"):
        path.write_bytes(content)
        for read in (load_all, identify_model):
            with pytest.raises(ConfigError, match=f"'{re.escape(str(path))}' is (damaged|a Git LFS pointer)"):
                read(whole)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ConfigError, match="is damaged: a list instead of tensors by name"):
        load_all(whole)


def test_a_folder_without_weights(whole, tmp_path):
    (tmp_path / "whole" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=f"`teacher='{whole}'`.*model.safetensors"):
        load_all(whole)
    with pytest.raises(ConfigError, match=f"'{whole}' has no weights"):
        identify_model(whole)


def test_an_adapter_without_weights(adapter, tmp_path):
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=f"'{adapter}' has no weights: neither adapter_model.safetensors"):
        load_all(adapter)


def test_weights_that_are_not_there_are_not_made_up(whole, tmp_path):
    path = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(path)
    left_out = "model.layers.1.mlp.up_proj.weight"
    save_file({name: value for name, value in tensors.items() if name != left_out}, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=f"lacks 1 weights of a LlamaForCausalLM, such as '{left_out}'"):
        load_all(whole)


def test_a_backbone_without_its_head_is_not_given_one(tmp_path):
    folder = save_model(LlamaModel(tiny_model("llama").config), tmp_path)
    with pytest.raises(ConfigError, match="lacks 1 weights of a LlamaForCausalLM, such as 'lm_head.weight'"):
        load_all(folder)


def test_weights_of_another_shape_than_the_configuration_says(whole, tmp_path):
    path = tmp_path / "whole" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 96}))
    with pytest.raises(ConfigError, match=f"`teacher='{whole}'` cannot be loaded: RuntimeError"):
        load_all(whole)


def test_weights_of_an_adapter_that_are_not_there_are_not_made_up(adapter, tmp_path):
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensors[name] for name in sorted(tensors)[1:]}, path)
    with pytest.raises(ConfigError, match=f"`teacher='{adapter}'` cannot be loaded: .*missing adapter keys"):
        load_all(adapter)

"""An adapter's mixed policy: one copy of the base where that is the reference, and no way around the mixture."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.export import mixed_policies as mixed
from tests.generation.teacher_forced import left_padded_prompts
from tests.tiny import PAD_ID, tiny_lora, tiny_model, tiny_tokenizer
from trl_blend import export_mixed_policy
from trl_blend.errors import UnsupportedError
from trl_blend.export import model_files


INPUTS = left_padded_prompts(PAD_ID)
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
SETTINGS = {"max_new_tokens": 8, "pad_token_id": PAD_ID, "do_sample": True, "top_k": 0}


@pytest.fixture
def models(tmp_path):
    for seed, name in enumerate(("base", "other")):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    tiny_lora(load(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    return tmp_path


@pytest.fixture
def loads(monkeypatch):
    """Number of parameters of every model that is loaded."""
    numbers, original = [], PreTrainedModel.from_pretrained.__func__

    def counting(cls, *args, **kwargs):
        model = original(cls, *args, **kwargs)
        numbers.append(sum(parameter.numel() for parameter in model.parameters()))
        return model

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counting))
    return numbers


def load(folder):
    return AutoModelForCausalLM.from_pretrained(str(folder))


def trusted(folder):
    return AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True)


def decoded(model, seed=0, **kwargs):
    torch.manual_seed(seed)
    output = model.generate(**INPUTS, **SETTINGS, **mixed.DETAILS, **kwargs)
    return {"sequences": output.sequences, "scores": torch.stack(output.scores)}


@pytest.mark.parametrize(
    ("reference", "in_memory", "space"),
    [
        (None, False, "logits"),
        (None, False, "probs"),
        (None, True, "logits"),
        ("base", False, "logits"),
        ("base", True, "logits"),
    ],
)
def test_one_copy_of_the_base(models, modules_cache, loads, reference, in_memory, space):
    student = tiny_lora(load(models / "base"))
    expected = mixed.blended(student, None, 0.4, space, INPUTS, SETTINGS)
    policy = export_mixed_policy(
        student if in_memory else models / "adapter",
        reference and models / reference,
        0.4,
        models / "policy",
        mixing_space=space,
    )
    assert sorted(p.name for p in policy.rglob("*.safetensors")) == ["adapter_model.safetensors", "model.safetensors"]
    del loads[:]
    model = trusted(policy)
    mixed.assert_same_decoding(decoded(model), expected)
    mixed.assert_same_decoding(decoded(model, custom_generate=str(policy), trust_remote_code=True), expected)
    assert len(loads) == 1
    base = [parameter for name, parameter in model.named_parameters() if "lora_" not in name]
    assert sum(parameter.numel() for parameter in base) == loads[0]
    assert not torch.equal(expected.sequences[:, :9], student.generate(**INPUTS, **SETTINGS)[:, :9])


def test_a_base_that_no_folder_holds(models, modules_cache):
    """Its weights are saved from memory, without the adapter."""
    student = tiny_lora(tiny_model(seed=3))
    expected = mixed.blended(student, None, 0.4, "logits", INPUTS, SETTINGS)
    policy = export_mixed_policy(student, None, 0.4, models / "policy", processing_class=tiny_tokenizer())
    mixed.assert_same_decoding(decoded(trusted(policy)), expected)


def test_an_adapter_of_another_name(models, modules_cache):
    student = get_peft_model(load(models / "base"), LORA, adapter_name="mine")
    expected = mixed.blended(student, None, 0.4, "logits", INPUTS, SETTINGS)
    policy = export_mixed_policy(student, None, 0.4, models / "policy")
    assert {path.name for path in (policy / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    mixed.assert_same_decoding(decoded(trusted(policy)), expected)


def test_the_base_is_what_is_in_memory(models, modules_cache, loads):
    """Its folder has changed since it was loaded."""
    student = tiny_lora(load(models / "base"))
    expected = mixed.blended(student, None, 0.4, "logits", INPUTS, SETTINGS)
    load(models / "other").save_pretrained(models / "base")
    policy = export_mixed_policy(student, None, 0.4, models / "policy")
    mixed.assert_same_decoding(decoded(trusted(policy)), expected)


@pytest.mark.parametrize(("dtype", "is_base"), [("float32", True), ("bfloat16", True), ("float16", False)])
def test_a_base_in_another_dtype(models, dtype, is_base):
    student = get_peft_model(AutoModelForCausalLM.from_pretrained(models / "base", dtype=dtype), LORA)
    assert (model_files.base_checkpoint(student) is not None) == is_base
    load(models / "base").bfloat16().save_pretrained(models / "base")  # a rounded copy is not what is in memory
    assert (model_files.base_checkpoint(student) is not None) == (dtype == "bfloat16")


def test_no_silent_way_to_the_student(models, modules_cache):
    policy = export_mixed_policy(models / "adapter", None, 0.4, models / "policy")
    # At the top of a Hub repository it would lead transformers to the base's repository, past this code
    assert not (policy / "adapter_config.json").exists()
    with pytest.raises(ValueError, match="Please pass the argument `trust_remote_code=True`"):
        load(policy)
    from peft import PeftModel

    by_hand = PeftModel.from_pretrained(load(models / "other"), policy / "adapter")
    with pytest.raises(RuntimeError, match="not known to be that base"):
        decoded(by_hand, custom_generate=str(policy), trust_remote_code=True)
    model = trusted(policy)
    for layer in model.modules():
        if hasattr(layer, "merge") and hasattr(layer, "_disable_adapters"):
            layer.merge()
    with pytest.raises(RuntimeError, match="unmerged"):
        decoded(model)


def test_changed_base(models, modules_cache):
    policy = export_mixed_policy(models / "adapter", None, 0.4, models / "policy")
    load(models / "other").save_pretrained(policy / "reference")
    with pytest.raises(RuntimeError, match="reference was changed"):
        trusted(policy)


@pytest.mark.parametrize(
    ("settings", "is_refused"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, True),
        ({"init_lora_weights": "of_a_later_peft"}, True),
        ({"bias": "lora_only"}, True),
        ({"init_lora_weights": "gaussian"}, False),
        ({"init_lora_weights": False}, False),
    ],
)
def test_an_adapter_that_changed_its_base_is_refused(models, settings, is_refused):
    """As a checkpoint and in memory alike."""
    path = models / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    student = tiny_lora(load(models / "base"))
    for name, value in settings.items():
        setattr(student.peft_config["default"], name, value)
    for one in (models / "adapter", student):
        with pytest.raises(UnsupportedError, match="|".join(settings)) if is_refused else nullcontext():
            export_mixed_policy(one, None, 0.4, models / "policy")
        assert (models / "policy").exists() != is_refused
        shutil.rmtree(models / "policy", ignore_errors=True)

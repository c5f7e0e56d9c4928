"""An adapter's mixed policy: one copy of the base where that is the reference, and no way around the mixture."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.generation.teacher_forced import left_padded_prompts
from tests.hub import mixed_policies as mixed
from tests.tiny import PAD_ID, tiny_lora, tiny_model, tiny_tokenizer
from trl_blend import export_mixed_policy
from trl_blend.errors import UnsupportedError


INPUTS = left_padded_prompts(PAD_ID)
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


@pytest.mark.parametrize("space", mixed.RULES)
@pytest.mark.parametrize("reference", [None, "base"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_one_copy_of_the_base(models, modules_cache, loads, space, reference, in_memory):
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


def test_another_reference(models, modules_cache, loads):
    student, other = tiny_lora(load(models / "base")), load(models / "other")
    expected = mixed.blended(student, other, 0.4, "logits", INPUTS, SETTINGS)
    policy = export_mixed_policy(models / "adapter", models / "other", 0.4, models / "policy")
    del loads[:]
    mixed.assert_same_decoding(decoded(trusted(policy)), expected)
    assert len(loads) == 2


def test_no_silent_way_to_the_student(models, modules_cache):
    policy = export_mixed_policy(models / "adapter", None, 0.4, models / "policy")
    # At the top of a Hub repository it would lead transformers to the base's repository, past this code
    assert not (policy / "adapter_config.json").exists()
    with pytest.raises(OSError, match="no file named model.safetensors"):
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


def test_an_adapter_that_changed_its_base_is_refused(models):
    path = models / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))
    with pytest.raises(UnsupportedError, match="pissa"):
        export_mixed_policy(models / "adapter", None, 0.4, models / "policy")
    assert not (models / "policy").exists()

"""A student given as the folder of an adapter: its base with the adapter, trained further, in all trainers."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM

from tests.models.checkpoints import hub_snapshot, save_model
from tests.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.trainers import runs
from tests.trainers.card_reading import metadata_of, run_of, write_card
from trl_blend import export_mixed_policy
from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.trainers import _partners


KINDS = ["grpo", "opd", "offline"]


@pytest.fixture
def adapter(models, tmp_path):
    """Folder of an adapter on `student` with two more tokens than its base, in the order of `tests.tiny`."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    base = AutoModelForCausalLM.from_pretrained(models / "student")
    base.resize_token_embeddings(66)
    return save_model(tiny_lora(base, modules_to_save=["embed_tokens"]), tmp_path / "adapter", tokenizer)


@pytest.fixture
def plain_adapter(models, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(models / "student")
    return save_model(tiny_lora(base), tmp_path / "plain", tiny_tokenizer())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_run_of_the_model_that_peft_loads(make, plain_adapter, kind):
    in_memory = AutoPeftModelForCausalLM.from_pretrained(plain_adapter, is_trainable=True)
    recorded, parameters = {}, {}
    for name, student in (("folder", plain_adapter), ("memory", in_memory)):
        trainer = make(kind, student=student, max_steps=2)
        recorded[name] = runs.train(trainer).losses
        parameters[name] = runs.snapshot(trainer.model)
    assert recorded["folder"] == recorded["memory"]
    for name, value in parameters["memory"].items():
        assert torch.equal(parameters["folder"][name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_trained_on_its_own_tokens(make, adapter, kind, caplog):
    teacher = {} if kind == "offline" else {"teacher": None}  # its own base, with the adapter disabled
    trainer = make(kind, student=adapter, model_init_kwargs={"dtype": "float32"}, **teacher)
    assert len(trainer.processing_class) == 66
    assert trainer.model.config.vocab_size == 66
    before = runs.snapshot(trainer.model)
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name or "modules_to_save" in name for name in changed)
    assert trainer.args.model_init_kwargs == {"dtype": "float32"}
    assert "model_init_kwargs" not in caplog.text


def test_its_mixture_is_on_a_base_with_its_own_tokens(make, adapter, tmp_path):
    trainer = make("grpo", student=adapter, teacher=None, teacher_weight=0.3)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir, trust_remote_code=True)
    assert loaded.get_input_embeddings().weight.shape[0] == 66
    with pytest.raises(UnsupportedError, match="an adapter with 66 vocabulary rows, its base has 64.*Merge it"):
        export_mixed_policy(adapter, None, 0.3, tmp_path / "export")


@pytest.mark.parametrize("kind", KINDS)
def test_another_adapter_on_top_is_refused_before_a_model_is_loaded(make, plain_adapter, kind, monkeypatch):
    monkeypatch.setattr(_partners, "load_trainable_adapter", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="is an adapter already, and `peft_config` would put another one on it"):
        make(kind, student=plain_adapter, trainer_kwargs={"peft_config": LoraConfig(task_type="CAUSAL_LM")})


def test_what_it_says_of_itself(build, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = hub_snapshot(tmp_path, "org/base", "1" * 40, "v1")
    save_model(tiny_model(seed=3), base)
    save_model(tiny_model(seed=4), hub_snapshot(tmp_path, "org/base", "2" * 40))
    adapted = tiny_lora(AutoModelForCausalLM.from_pretrained(base))
    adapted.peft_config["default"].base_model_name_or_path = "org/base"
    adapted.peft_config["default"].revision = "v1"
    adapted.save_pretrained(hub_snapshot(tmp_path, "org/adapter", "3" * 40, "v9"))

    trainer = build(student="org/adapter", teacher=None, model_init_kwargs={"revision": "v9"})
    assert torch.equal(
        trainer.model.get_input_embeddings().weight, tiny_model(seed=3).get_input_embeddings().weight
    )  # the base of the adapter's revision
    card = write_card(trainer)
    started = run_of(card)["started from"]
    assert "org/adapter](https://huggingface.co/org/adapter) at revision `v9`" in started
    assert "org/base](https://huggingface.co/org/base) at commit `111111111111`" in started
    assert metadata_of(card)["base_model"] == "org/base"
    teacher = run_of(card)["teacher"]
    assert "org/base" in teacher and "111111111111" in teacher
    trainer.save_model(str(tmp_path / "mixed"))
    spec = json.loads((tmp_path / "mixed" / "mixing.json").read_text())
    assert (spec["base"]["repo_id"], spec["base"]["commit"]) == ("org/base", "1" * 40)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_student_is_named(make, models, tmp_path, kind):
    folder = save_model(tiny_model(), tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=f"^`model='{folder}'` cannot be read: '{weights}' is damaged"):
        make(kind, student=folder)

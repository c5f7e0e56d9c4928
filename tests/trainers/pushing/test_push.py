"""Runs of all three trainers are pushed to a Hub on loopback, and what it then holds is loaded back and compared."""

import json
import os
import shutil

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import ModelCard, snapshot_download
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Trainer

from tests.hub.server import hub_endpoint  # noqa: F401
from tests.rollouts.stores import write_store
from tests.tiny import tiny_tokenizer
from tests.trainers.pushing.pushing import KINDS, PUSHING, TAGS, assert_same_weights, build, models  # noqa: F401
from trl_blend import LogitMixing, RolloutStore, blended_generation, load_scored_rollouts
from trl_blend.consistency.provenance import PROVENANCE_FILE, record_teacher
from trl_blend.trainers._record import RECORD_FILE


# Those whose checkpoints are looked into
STATES = ("logit_mix", "trust_region")


@pytest.fixture
def hub(hub_endpoint):  # noqa: F811
    return hub_endpoint


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_pushed_while_it_goes_on_and_at_its_end(hub, models, tmp_path, kind):  # noqa: F811
    trainer = build(kind, models, tmp_path / "out", **PUSHING, hub_private_repo=True)
    trainer.train()
    repository = hub.model("me/run")
    assert repository.private
    steps = [("main", "Training in progress, step 1"), ("main", "Training in progress, step 2")]
    assert repository.commits == steps
    assert not [path for path in repository.files() if "checkpoint" in path or "optimizer" in path]
    assert_same_weights(AutoModelForCausalLM.from_pretrained("me/run", dtype=torch.float32), trainer.model)

    commit = trainer.push_to_hub(dataset_name="me/prompts")
    assert repository.commits == [*steps, ("main", "End of training")]
    assert commit.oid == repository.sha()
    assert_same_weights(AutoModelForCausalLM.from_pretrained("me/run", dtype=torch.float32), trainer.model)
    assert AutoTokenizer.from_pretrained("me/run")("7*8=")["input_ids"] == tiny_tokenizer()("7*8=")["input_ids"]
    assert GenerationConfig.from_pretrained("me/run").eos_token_id == trainer.model.generation_config.eos_token_id
    card = ModelCard.load("me/run")
    card.validate()
    assert {"trl", "trl-blend", TAGS[kind]} <= set(card.data.tags)
    assert card.data.datasets in ("me/prompts", ["me/prompts"]) and card.data.library_name == "transformers"


@pytest.mark.parametrize("peft", [False, True])
def test_a_mixed_policy_is_decoded_from_the_hub(hub, models, tmp_path, peft):  # noqa: F811
    settings = {**PUSHING, "objective": "mixed", "teacher_weight": 0.6, "learning_rate": 0.1}
    trainer = build("logit_mix", models, tmp_path / "out", lora=peft, **settings)
    trainer.train()
    repository = hub.model("me/run")
    prompts = torch.randint(6, 60, (12, 4), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompts)}
    student = trainer.model.eval()
    with blended_generation(student, trainer.partners or None, LogitMixing(trainer.current_weights())):
        expected = student.generate(prompts, **how)
    assert not torch.equal(expected, student.generate(prompts, **how))
    for push in (lambda: None, trainer.push_to_hub):  # as the last checkpoint left it, and the final push
        push()
        assert {"mixing.json", "custom_generate/generate.py"} <= set(repository.files())
        assert any(path.startswith("reference/") and path.endswith(".safetensors") for path in repository.files())
        policy = AutoModelForCausalLM.from_pretrained("me/run", trust_remote_code=True, dtype=torch.float32)
        assert torch.equal(policy.generate(prompts, **how), expected)


def test_an_adapter_is_pushed_and_loaded_back(hub, models, tmp_path):  # noqa: F811
    trainer = build("offline", models, tmp_path / "out", lora=True, max_steps=2, learning_rate=0.1)
    trainer.train()
    assert hub.repositories == {}  # nothing is created before it is asked for
    trainer.push_to_hub(private=True)
    repository = hub.model("me/out")  # named by `output_dir`
    assert repository.private and "adapter_model.safetensors" in repository.files()
    assert "model.safetensors" not in repository.files()
    loaded = AutoPeftModelForCausalLM.from_pretrained("me/out", dtype=torch.float32)
    expected = {name: value for name, value in trainer.model.state_dict().items() if "lora_" in name}
    assert any(value.abs().max() > 0 for name, value in expected.items() if "lora_B" in name)
    for name, value in expected.items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_run_resumes_from_the_checkpoint_on_the_hub(hub, models, tmp_path):  # noqa: F811
    kind, steps = "trust_region", {"max_steps": 3, "per_device_train_batch_size": 2}  # of one epoch
    settings = {**steps, **PUSHING, "hub_strategy": "checkpoint"}
    build(kind, models, tmp_path / "first", **settings).train()
    files = hub.model("me/run").files()
    assert json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == 2
    assert f"last-checkpoint/{RECORD_FILE}" in files
    folder = snapshot_download("me/run", allow_patterns="last-checkpoint/*")
    resumed = build(kind, models, tmp_path / "second", **steps)
    resumed.train(resume_from_checkpoint=f"{folder}/last-checkpoint")
    whole = build(kind, models, tmp_path / "whole", **steps)
    whole.train()
    assert_same_weights(resumed.model, whole.model)


@pytest.mark.parametrize("kind", STATES)
def test_a_checkpoint_is_whole_when_its_upload_starts(hub, models, tmp_path, monkeypatch, kind):  # noqa: F811
    found = []
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda trainer, folder: found.append(os.listdir(folder)))
    build(kind, models, tmp_path / "out", **PUSHING).train()
    assert len(found) == 2 and all({RECORD_FILE, "optimizer.pt", "trainer_state.json"} <= set(one) for one in found)


def test_the_record_of_the_sft_teacher_goes_along(hub, models, tmp_path):  # noqa: F811
    student = shutil.copytree(models / "student", tmp_path / "student")
    record_teacher(student, models / "teacher")
    build("offline", models, tmp_path / "out", student=str(student), **PUSHING, teacher_consistency="warn").train()
    assert hub.model("me/run").commits[-1] == ("main", "Training in progress, step 2")
    assert hub.model("me/run").files()[PROVENANCE_FILE] == (student / PROVENANCE_FILE).read_bytes()


def test_scored_rollouts_are_pushed_and_loaded_back(hub, tmp_path):
    store = write_store(tmp_path / "scored", 3, scored=True, top_k=True)
    address = store.push_to_hub("me/scored", private=True)
    repository = hub.dataset("me/scored")
    assert repository.private and address.endswith(repository.sha())
    assert repository.files()["manifest.json"] == (store.folder / "manifest.json").read_bytes()
    found = load_scored_rollouts("me/scored", verify=True)
    assert (found.digest, found.manifest) == (store.digest, store.manifest)
    expected = store.dataset().to_list()
    assert len(expected) == 15 and found.dataset().to_list() == expected
    assert load_dataset("me/scored", split="train").to_list() == expected
    assert list(load_dataset("me/scored", split="train", streaming=True)) == expected
    assert RolloutStore.open("me/scored", revision=repository.sha()).digest == store.digest

"""What `objective="mixed"` saves and pushes decodes as the trainer does; every other run saves an ordinary model."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.export.conftest import modules_cache  # noqa: F401
from tests.hub.server import hub_endpoint  # noqa: F401
from tests.tiny import tiny_tokenizer
from tests.trainers import runs
from trl_blend import export_mixed_policy
from trl_blend.errors import ConfigError


MIX = {"objective": "mixed", "teacher_weight": 0.4, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
STUDENTS = {
    "full": {},
    "lora on its base": {"teacher": None, "trainer_kwargs": {"peft_config": LORA}},
    "lora and a teacher": {"trainer_kwargs": {"peft_config": LORA}},
    "two teachers": {"teacher": ["teacher", "second"], "teacher_weight": [0.3, 0.2], "mixing_space": "probs"},
    "expert and anti-expert": {
        "teacher": ["teacher", "second"],
        "teacher_weight": [1.0, -0.7],
        "mixing_space": "arithmetic",
    },
}


def trainers_greedy(trainer):
    """Completions of the trainer's own greedy decoding, the one that adaptive weights and evaluations use."""
    with trainer._decoding_greedily(), trainer.policy(trainer.current_weights(), recording=False):
        return trainer._generate(list(runs.PROMPTS))[1]


def exported_greedy(folder, **kwargs):
    """The same of a folder or Hub id, with transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True, **kwargs)
    inputs = tiny_tokenizer()(list(runs.PROMPTS), return_tensors="pt", padding=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=runs.MAX_LENGTH)
    rows = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in runs.EOS_IDS), len(row))
        rows.append(row[: end + 1])
    return rows


def spec(folder):
    return json.loads(Path(folder, "mixing.json").read_text())


@pytest.mark.usefixtures("modules_cache")
@pytest.mark.parametrize("kind", STUDENTS)
def test_what_is_saved_and_exported_decodes_as_the_trainer(build, tmp_path, kind):
    settings = {**MIX, **STUDENTS[kind]}
    trainer = runs.train(build(**settings)).trainer
    trainer.save_model()
    output = Path(trainer.args.output_dir)
    expected = trainers_greedy(trainer)
    assert exported_greedy(output) == expected
    for step in (1, 2):
        checkpoint, policy = output / f"checkpoint-{step}", tmp_path / f"exported-{step}"
        assert not {path.name for path in checkpoint.rglob("*")} & {"custom_generate", "reference", "base", "adapter"}
        export_mixed_policy(checkpoint, None, None, policy)
        same = ("weights", "space", "tokenizer_sha256", "step")
        assert [spec(policy)[name] for name in same] == [spec(checkpoint)[name] for name in same]
        assert spec(policy)["step"] == step and (exported_greedy(policy) == expected) == (step == 2)
    with trainer.policy((0.0,) * len(trainer.current_weights())), trainer._decoding_greedily():
        assert trainer._generate(list(runs.PROMPTS))[1] != expected, "the student decodes the same alone"
    # One copy of each reference
    weights = [path for path in output.rglob("model.safetensors") if path.parent.name.startswith(("ref", "base"))]
    assert len(weights) == {"full": 1, "lora on its base": 1}.get(kind, 2)
    if "lora" in kind:
        assert not (output / "adapter_config.json").exists()
    resumed = runs.train(build(**{**settings, "max_steps": 3}), resume_from_checkpoint=str(output / "checkpoint-2"))
    assert resumed.trainer.state.global_step == 3


@pytest.mark.parametrize("where", ["in memory", "loaded with a setting", "gone"])
def test_a_checkpoint_whose_teacher_cannot_be_found(build, models, tmp_path, where):
    folder = shutil.copytree(models / "teacher", tmp_path / "teacher")
    settings = {**MIX, "max_steps": 1}
    if where == "loaded with a setting":
        settings["teacher_model_init_kwargs"] = {"rms_norm_eps": 0.1}
    teacher = AutoModelForCausalLM.from_pretrained(folder) if where == "in memory" else str(folder)
    checkpoint = Path(runs.train(build(teacher=teacher, **settings)).trainer.args.output_dir, "checkpoint-1")
    shutil.rmtree(folder)
    with pytest.raises(
        ConfigError, match=f"{re.escape(str(folder))} is not there" if where == "gone" else "in memory"
    ):
        export_mixed_policy(checkpoint, None, None, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()
    export_mixed_policy(checkpoint, models / "teacher", None, tmp_path / "policy")
    assert spec(tmp_path / "policy")["weights"] == [0.4]


def test_the_weight_is_that_of_the_moment(build):
    settings = {**MIX, "teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 4}
    trainer = runs.train(build(**settings)).trainer
    trainer.save_model()
    output = Path(trainer.args.output_dir)
    found = [spec(folder)["weights"] for folder in (output / "checkpoint-1", output / "checkpoint-2", output)]
    assert found == [pytest.approx([weight]) for weight in (0.3, 0.2, 0.2)]
    trainer.args.teacher_weight_schedule, trainer.adaptive_weights = "adaptive", (0.7,)
    trainer.save_model()
    assert spec(output)["weights"] == [0.7]


def test_at_weight_zero_the_student_is_saved_alone(build):
    """What the decay has reached is what is deployed: no reference, no code, a card without them."""
    settings = {**MIX, "teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 2}
    trainer = runs.train(build(**settings)).trainer
    trainer.save_model()
    trainer.create_model_card()
    output = Path(trainer.args.output_dir)
    assert spec(output / "checkpoint-1")["weights"] == [0.2]
    for folder in (output / "checkpoint-2", output):
        assert (folder / "model.safetensors").is_file()
        assert not {"mixing.json", "custom_generate", "reference"} & {path.name for path in folder.iterdir()}
    card = (output / "README.md").read_text()
    assert "weight has reached 0" in card and "trust_remote_code" not in card and "custom_generate" not in card


def test_an_interrupted_save_is_not_complete(build, monkeypatch):
    trainer = build(**MIX)
    trainer.save_model()
    output = Path(trainer.args.output_dir)
    assert (output / "mixing.json").is_file()
    monkeypatch.setattr(type(trainer), "_save", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.save_model()
    assert not (output / "mixing.json").exists() and (output / "custom_generate").is_dir()


def test_only_the_process_that_saves_writes(build, monkeypatch):
    trainer = build(**MIX)
    trainer.save_model()
    output = Path(trainer.args.output_dir)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    monkeypatch.setattr(type(trainer.args), "should_save", property(lambda self: False))
    trainer.save_model()
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.usefixtures("modules_cache")
@pytest.mark.parametrize("kind", ["full", "lora on its base"])
def test_every_pushed_commit_decodes_the_mixture_of_its_step(build, hub_endpoint, tmp_path, kind):  # noqa: F811
    settings = {**MIX, **STUDENTS[kind], "teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 4}
    pushed, expected = [], []
    trainer = build(
        push_to_hub=True, hub_strategy="every_save", hub_always_push=True, hub_model_id="me/mixed", **settings
    )
    original = trainer._push_from_checkpoint

    def push(checkpoint):
        original(checkpoint)
        trainer.push_in_progress.wait_until_done()
        expected.append(trainers_greedy(trainer))
        pushed.append(trainer.push_in_progress.jobs[-1].result().oid)

    trainer._push_from_checkpoint = push
    trainer.train()
    assert len(pushed) == 2
    for step, (commit, tokens) in enumerate(zip(pushed, expected, strict=True), start=1):
        folder = snapshot_download("me/mixed", revision=commit)
        assert spec(folder)["weights"] == pytest.approx([0.4 - step / 10]) and spec(folder)["step"] == step
        assert exported_greedy("me/mixed", revision=commit) == tokens
        if kind == "full":  # a student that is loaded already, the mixture named in the call
            inputs = tiny_tokenizer()(list(runs.PROMPTS), return_tensors="pt", padding=True)
            greedy = {**inputs, "do_sample": False, "max_new_tokens": runs.MAX_LENGTH}
            trusted = AutoModelForCausalLM.from_pretrained("me/mixed", revision=commit, trust_remote_code=True)
            trusted.save_pretrained(tmp_path / f"alone_{step}")
            student = AutoModelForCausalLM.from_pretrained(tmp_path / f"alone_{step}")
            named = {"custom_generate": "me/mixed", "revision": commit, "trust_remote_code": True}
            assert torch.equal(student.generate(**greedy, **named), trusted.generate(**greedy))
    assert expected[0] != expected[1]
    trainer.save_model()  # pushes
    assert exported_greedy("me/mixed") == exported_greedy(trainer.args.output_dir) == trainers_greedy(trainer)
    assert exported_greedy("me/mixed", cache_dir=tmp_path / "another_cache") == trainers_greedy(trainer)


@pytest.mark.usefixtures("modules_cache")
def test_a_teacher_from_the_hub_is_pinned(build, models, hub_endpoint, tmp_path):  # noqa: F811
    for name in ("teacher", "second"):
        AutoModelForCausalLM.from_pretrained(models / name).push_to_hub(f"me/{name}")
        tiny_tokenizer().push_to_hub(f"me/{name}")
    trainer = runs.train(build(teacher="me/teacher", **{**MIX, "max_steps": 1})).trainer
    second = AutoModelForCausalLM.from_pretrained(models / "second")
    second.push_to_hub("me/teacher")  # changed after it was loaded
    trainer.save_model()
    output = Path(trainer.args.output_dir)
    source = spec(output)["references"][0]
    assert source["repo_id"] == "me/teacher" and len(source["commit"]) == 40 and not (output / "reference").exists()
    assert exported_greedy(output) == trainers_greedy(trainer)
    policy = export_mixed_policy(output / "checkpoint-1", None, None, tmp_path / "policy")
    assert spec(policy)["references"] == spec(output)["references"]
    content = spec(output)
    content["references"][0]["commit"] = "0" * 40
    (output / "mixing.json").write_text(json.dumps(content))
    with pytest.raises(RuntimeError, match="me/teacher.*cannot be had"):
        exported_greedy(output)
    assert torch.is_tensor(next(second.parameters()))

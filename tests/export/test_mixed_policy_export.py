"""What `export_mixed_policy` refuses before it writes anything, and what it writes."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.export import mixed_policies as mixed
from tests.tiny import tiny_lora, tiny_model, tiny_tokenizer
from trl_blend import export_mixed_policy
from trl_blend.errors import ConfigError, TokenizerMismatchError, UnsupportedError
from trl_blend.export.spec import MixingSpec, ModelSource


@pytest.fixture
def models(tmp_path):
    for seed, name in enumerate(("student", "teacher", "foreign", "small")):
        tiny_model(seed=seed, vocab_size=32 if name == "small" else 64).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "foreign")
    tiny_lora(tiny_model()).save_pretrained(tmp_path / "lora")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher_weight": 1.2}, ConfigError, "teacher_weight.*1.2"),
        ({"teacher_weight": float("nan")}, ConfigError, "teacher_weight.*nan"),
        ({"teacher_weight": [0.2, 0.2]}, ConfigError, "2 value.* for 1 reference"),
        ({"mixing_space": "odds"}, ConfigError, "odds.*logits, probs"),
        ({"reference": "foreign"}, TokenizerMismatchError, "<more>"),
        ({"reference": "small"}, TokenizerMismatchError, "32"),
        ({"reference": None}, UnsupportedError, "has none"),
        ({"reference": "lora"}, UnsupportedError, "Merge it"),
        ({"reference": "nowhere"}, ConfigError, "nowhere"),
        ({"student": "nowhere"}, ConfigError, "nowhere"),
        ({"output_dir": "student"}, ConfigError, "student'` is not empty"),
        ({"output_dir": "teacher"}, ConfigError, "teacher'` is not empty"),
        ({"output_dir": "."}, ConfigError, "not empty"),
        ({"copy_reference": False}, ConfigError, "no Hub id"),
    ],
)
def test_refused_before_anything_is_loaded_or_written(models, monkeypatch, changes, error, message):
    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", fail)
    arguments = {
        "student": "student",
        "reference": "teacher",
        "teacher_weight": 0.4,
        "output_dir": "policy",
        **changes,
    }
    for name in ("student", "reference", "output_dir"):
        arguments[name] = arguments[name] and models / arguments[name]
    before = sorted(models.rglob("*"))
    with pytest.raises(error, match=message):
        export_mixed_policy(**arguments)
    assert sorted(models.rglob("*")) == before


def test_a_mixed_policy_is_no_reference(models):
    policy = export_mixed_policy(models / "student", models / "teacher", 0.4, models / "policy")
    with pytest.raises(ConfigError, match="mixed policy itself"):
        export_mixed_policy(models / "student", policy, 0.4, models / "another")
    again = export_mixed_policy(policy, models / "teacher", 0.7, models / "again")  # its student, another weight
    assert MixingSpec.read(again).weights == (0.7,)


def test_interrupted_export_is_not_complete(models, monkeypatch):
    monkeypatch.setattr(MixingSpec, "write", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export_mixed_policy(models / "student", models / "teacher", 0.4, models / "policy")
    assert (models / "policy" / "custom_generate" / "generate.py").is_file()
    with pytest.raises(ConfigError, match="interrupted"):
        MixingSpec.read(models / "policy")
    with pytest.raises(ConfigError, match="not empty"):
        export_mixed_policy(models / "student", models / "teacher", 0.4, models / "policy")


def test_models_in_memory_and_the_dtype_of_the_reference(models, modules_cache):
    student = AutoModelForCausalLM.from_pretrained(models / "student")
    reference = AutoModelForCausalLM.from_pretrained(models / "teacher", dtype=torch.bfloat16)
    policy = export_mixed_policy(student, reference, 0.4, models / "policy")
    assert MixingSpec.read(policy).references[0].dtype == "bfloat16"
    inputs = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    settings = {"do_sample": False, "max_new_tokens": 5}
    expected = mixed.blended(student, reference, 0.4, "logits", inputs, settings)
    model = AutoModelForCausalLM.from_pretrained(str(policy), trust_remote_code=True)
    output = model.generate(**inputs, **settings, **mixed.DETAILS)
    mixed.assert_same_decoding({"sequences": output.sequences, "scores": torch.stack(output.scores)}, expected)


def test_nothing_of_a_training_run_is_copied(models):
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "trl_blend_run.json"):
        (models / "student" / name).write_text("{}")
    policy = export_mixed_policy(models / "student", models / "teacher", 0.4, models / "policy")
    names = {path.relative_to(policy).as_posix() for path in policy.rglob("*") if path.is_file()}
    model = {"config.json", "generation_config.json", "model.safetensors"}
    model |= {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    code = {"mixing.json", "custom_generate/generate.py", "README.md"}
    assert names == model | code | {f"reference/{name}" for name in model}


def test_sharded_checkpoints(models, modules_cache):
    student = AutoModelForCausalLM.from_pretrained(models / "student")
    shutil.rmtree(models / "student")
    student.save_pretrained(models / "student", max_shard_size="10KB")
    tiny_tokenizer().save_pretrained(models / "student")
    (models / "student" / "model-00099-of-00099.safetensors").write_bytes(b"left over from another save")
    policy = export_mixed_policy(models / "student", models / "teacher", 0.0, models / "policy")
    assert len(list(policy.glob("model-*.safetensors"))) > 1
    assert not (policy / "model-00099-of-00099.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(str(policy), trust_remote_code=True)
    assert all(map(torch.equal, loaded.parameters(), student.parameters()))


def test_the_file_is_read_back(tmp_path):
    sources = (ModelSource(repo_id="a/b", commit="c" * 40, dtype="float16"), ModelSource(base=True))
    base = ModelSource(path="base", files={"x": "y"})
    spec = MixingSpec((0.25, 0.5), sources, "probs", "f" * 64, adapter="adapter", base=base, step=7)
    spec.write(tmp_path)
    assert MixingSpec.read(tmp_path) == spec
    (tmp_path / "mixing.json").write_text(json.dumps({"schema_version": 9}))
    with pytest.raises(ConfigError, match="schema_version=9"):
        MixingSpec.read(tmp_path)


@pytest.mark.parametrize("fields", [{"base": True, "path": "x"}, {"repo_id": "a/b"}])
def test_a_source_says_one_thing(fields):
    with pytest.raises(ConfigError):
        ModelSource(**fields)

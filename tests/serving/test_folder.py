"""An exported mixed policy is read as the blend that it is."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_lora, tiny_model, tiny_tokenizer
from trl_blend import LogitMixing, ProbabilityMixing, export_mixed_policy
from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.generation import LogitArithmetic
from trl_blend.serving.blend import Blend, Partner
from trl_blend.serving.folder import blend_of_folder, config_of_folder, student_of_folder


def export(folder, student, weight, **settings):
    export_mixed_policy(student, tiny_model(seed=1), weight, folder, processing_class=tiny_tokenizer(), **settings)
    return str(folder)


def test_a_copied_reference(tmp_path):
    folder = export(tmp_path / "mixed", tiny_model(), 0.3)
    partner = Partner(str((tmp_path / "mixed" / "reference").resolve()))
    assert blend_of_folder(folder) == ([partner], Blend(LogitMixing((0.3,)), vocab_size=64))
    folder = export(tmp_path / "probs", tiny_model(), 0.4, mixing_space="probs")
    assert blend_of_folder(folder)[1] == Blend(ProbabilityMixing((0.4,)), vocab_size=64)
    folder = export(tmp_path / "added", tiny_model(), -0.4, mixing_space="arithmetic")
    assert blend_of_folder(folder)[1] == Blend(LogitArithmetic(1.0, (-0.4,)), vocab_size=64)
    assert blend_of_folder(export(tmp_path / "plain", tiny_model(), 0.0))[1] == Blend()


@pytest.mark.parametrize("declared, ends, expected", [(True, [1], 64), (True, [1, 70], 71), (False, [1, 70], 64)])
def test_rows_that_only_pad_are_no_tokens(tmp_path, declared, ends, expected):
    """Those of both models, up to an end-of-sequence token that the tokenizer does not know; as in `generate.py`."""
    student, teacher = tiny_model(vocab_size=80, eos_token_id=ends), tiny_model(seed=1, vocab_size=80)
    export_mixed_policy(student, teacher, 0.3, tmp_path / "mixed", processing_class=tiny_tokenizer())
    if not declared:
        (tmp_path / "mixed" / "generation_config.json").unlink()
    assert blend_of_folder(str(tmp_path / "mixed"))[1].vocab_size == expected
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed", trust_remote_code=True)
    model.generate(torch.tensor([[7, 8]]), max_new_tokens=2, attention_mask=torch.ones(1, 2))
    mixtures = sys.modules[model.generate.func.__module__]._MIXTURES[model]
    assert [mixture.num_tokens for mixture in mixtures.values()] == [expected]


def test_the_student_of_a_folder(tmp_path):
    folder = export(tmp_path / "mixed", tiny_model(), 0.3)
    found, expected = student_of_folder(folder), tiny_model().config
    assert (type(found), found.hidden_size, found.vocab_size) == (type(expected), expected.hidden_size, 64)
    assert found.architectures == ["Qwen3ForCausalLM"]
    expected.update({"architectures": ["TrlBlendForCausalLM"]})
    assert config_of_folder(folder).to_dict() == {**expected.to_dict(), "dtype": "float32"}


def test_experts_of_a_reference_are_announced(tmp_path):
    teacher = tiny_model("qwen3_moe", num_experts=6)
    export_mixed_policy(tiny_model(), teacher, 0.3, tmp_path / "mixed", processing_class=tiny_tokenizer())
    assert config_of_folder(str(tmp_path / "mixed")).num_experts == 6


def test_refusals(tmp_path):
    student = tmp_path / "student"
    tiny_model().save_pretrained(student)
    tiny_tokenizer().save_pretrained(student)
    with pytest.raises(ConfigError, match="holds no mixed policy: it has no mixing.json"):
        blend_of_folder(str(student))
    adapted = tiny_lora(AutoModelForCausalLM.from_pretrained(student))
    with pytest.raises(UnsupportedError, match="is an adapter, and an engine loads whole models. Merge it"):
        blend_of_folder(export(tmp_path / "mixed", adapted, 0.3))

"""An exported mixed policy is read as the blend that it is."""

import pytest

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
    assert blend_of_folder(folder) == ([partner], Blend(LogitMixing((0.3,))))
    folder = export(tmp_path / "probs", tiny_model(), 0.4, mixing_space="probs")
    assert blend_of_folder(folder)[1] == Blend(ProbabilityMixing((0.4,)))
    folder = export(tmp_path / "added", tiny_model(), -0.4, mixing_space="arithmetic")
    assert blend_of_folder(folder)[1] == Blend(LogitArithmetic(1.0, (-0.4,)))
    assert blend_of_folder(export(tmp_path / "plain", tiny_model(), 0.0))[1] == Blend()


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
    from transformers import AutoModelForCausalLM

    adapted = tiny_lora(AutoModelForCausalLM.from_pretrained(student))
    with pytest.raises(UnsupportedError, match="is an adapter, and an engine loads whole models. Merge it"):
        blend_of_folder(export(tmp_path / "mixed", adapted, 0.3))

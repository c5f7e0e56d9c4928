"""The card of an exported policy: what it is made of, and code that decodes it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.export.conftest import modules_cache  # noqa: F401
from tests.trainers.card_reading import assert_sound, code_of, metadata_of, tables_of
from trl_blend import LogitMixing, blended_generation, export_mixed_policy
from trl_blend.export.card import Part, write_policy_card


CHECKPOINTS = Path(__file__).resolve().parents[2] / "examples" / "testbed" / "checkpoints"


def test_card_of_an_export(tmp_path, monkeypatch, modules_cache):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    names = [str(CHECKPOINTS / name) for name in ("student", "teacher", "base")]
    export_mixed_policy(names[0], names[1:], [0.3, 0.2], "mixed")
    card = Path("mixed/README.md").read_text(encoding="utf-8")
    assert_sound(card, *names, tmp_path, headings=("Quick start",))
    assert metadata_of(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["custom_generate", "trl-blend"],
    }
    (rows,) = tables_of(card).values()
    assert "serves the mixture where `trl_blend` is installed, with `vllm serve`" in card
    assert [row[1] for row in rows[-3:]] == ["0.5", "0.3", "0.2"] and "Mixed are the next-token logits." in card
    assert [row[0].split("`")[1] for row in rows[-3:]] == ["student", "teacher", "base"]

    found = {}
    exec(compile(code_of(card)[0], "card", "exec"), found)
    models = [AutoModelForCausalLM.from_pretrained(name) for name in names]
    with blended_generation(models[0], models[1:], LogitMixing((0.3, 0.2))):
        expected = models[0].generate(**found["inputs"], max_new_tokens=256)
    assert torch.equal(found["output"], expected)
    assert not torch.equal(expected, models[0].generate(**found["inputs"], max_new_tokens=256))


def test_card_of_a_sum_of_logits(tmp_path):
    parts = Part("me/student"), [Part("me/expert"), Part("me/anti")]
    write_policy_card(tmp_path, *parts, [1.0, -0.7], "arithmetic", is_adapter=False, has_chat_template=False)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    (rows,) = tables_of(card).values()
    assert [row[1] for row in rows[-3:]] == ["1", "1", "-0.7"]
    assert "\n\nNext-token logits are added, each times its weight.\n\n" in card and "Mixed are" not in card


@pytest.mark.parametrize("chat", [True, False])
def test_card_of_an_adapter_on_the_hub(tmp_path, chat):
    parts = [Part("me/lora", "a" * 40), [Part("me/lora", is_base=True), Part("google/gemma-2-2b")]]
    write_policy_card(tmp_path, *parts, [0.25, 0.25], "probs", is_adapter=True, has_chat_template=chat)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "license" not in metadata_of(card)
    assert metadata_of(card)["base_model"] == ["me/lora", "google/gemma-2-2b"]
    assert "| the base of that adapter | 0.25 |" in card and "`aaaaaaaaaaaa`" in card
    assert "vllm" not in card  # which loads whole models
    assert "`peft` has to be installed" in card and "Mixed are the next-token probabilities." in card
    assert ("apply_chat_template" in card) == chat


def test_the_license_of_the_student_is_passed_on(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "README.md").write_text("---\nlicense: mit\n---\n")
    student = Part(str(tmp_path / "student"))
    write_policy_card(
        tmp_path, student, [Part("me/teacher")], [0.5], "logits", is_adapter=False, has_chat_template=False
    )
    assert metadata_of((tmp_path / "README.md").read_text(encoding="utf-8"))["license"] == "mit"

"""How a policy is loaded and kept: never with other code, from another folder than it says, or with a token in it."""

import io
import os
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.generation.teacher_forced import left_padded_prompts
from tests.hub.server import WRITER, hub_endpoint  # noqa: F401
from tests.tiny import PAD_ID, tiny_model, tiny_tokenizer
from trl_blend import export_mixed_policy
from trl_blend.errors import UnsupportedError
from trl_blend.serving.folder import blend_of_folder


INPUTS = left_padded_prompts(PAD_ID)
GREEDY = {"max_new_tokens": 5, "pad_token_id": PAD_ID, "do_sample": False}


@pytest.fixture
def policy(tmp_path, modules_cache):
    student, teacher = tiny_model(seed=0), tiny_model(seed=1)
    return export_mixed_policy(student, teacher, 0.4, tmp_path / "policy", processing_class=tiny_tokenizer())


def load(name, **kwargs):
    return AutoModelForCausalLM.from_pretrained(str(name), trust_remote_code=True, **kwargs)


def test_a_subfolder_is_refused(policy):
    inner = export_mixed_policy(
        tiny_model(seed=2), tiny_model(seed=3), 0.0, policy / "inner", processing_class=tiny_tokenizer()
    )
    with pytest.raises(RuntimeError, match="`subfolder='inner'`.*by its own path"):
        load(policy, subfolder="inner")
    expected = tiny_model(seed=2).generate(**INPUTS, **GREEDY)
    assert torch.equal(load(inner).generate(**INPUTS, **GREEDY), expected)


def test_nothing_else_is_trusted(policy, monkeypatch):
    trusted = []
    for one in (AutoModelForCausalLM, AutoTokenizer):

        def recorded(name, *args, original=one.from_pretrained, **kwargs):
            trusted.append(kwargs.get("trust_remote_code"))
            return original(name, *args, **kwargs)

        monkeypatch.setattr(one, "from_pretrained", recorded)
    load(policy).generate(**INPUTS, **GREEDY)
    assert trusted == [True, False, False]  # the call above; student, tokenizer. The reference is of a known class


def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path):
    class Own(PreTrainedTokenizerFast):
        pass

    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    own = Own.from_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UnsupportedError, match="tokenizer of `student` \\(Own\\).*processing_class"):
        export_mixed_policy(tiny_model(), tiny_model(seed=1), 0.4, tmp_path / "policy", processing_class=own)
    assert not (tmp_path / "policy").exists()


def test_links_to_the_folder_are_the_folder(policy, tmp_path):
    os.symlink(policy, tmp_path / "link")
    model = load(policy)
    expected = model.generate(**INPUTS, **GREEDY)
    named = {"custom_generate": str(tmp_path / "link"), "trust_remote_code": True}
    assert torch.equal(model.generate(**INPUTS, **GREEDY, **named), expected)


def test_an_older_transformers_is_named(policy):
    code = policy / "custom_generate" / "generate.py"
    code.write_text(code.read_text().replace("TRANSFORMERS = (5, 10)", "TRANSFORMERS = (99, 1)"))
    with pytest.raises(RuntimeError, match=f"needs transformers 99.1, and {transformers.__version__} is installed"):
        load(policy)


def test_a_saved_model_holds_no_token(policy, hub_endpoint, monkeypatch):  # noqa: F811
    api = HfApi(token=WRITER)
    api.create_repo("me/mixed", private=True)
    api.upload_folder(repo_id="me/mixed", folder_path=policy)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    model = load("me/mixed", token=WRITER)
    saved = io.BytesIO()
    torch.save(model, saved)
    assert WRITER.encode() not in saved.getvalue()
    copied = torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
    expected = load(policy).generate(**INPUTS, **GREEDY)
    assert torch.equal(model.generate(**INPUTS, **GREEDY), expected)
    assert torch.equal(copied.generate(**INPUTS, **GREEDY, token=WRITER), expected)


def test_a_reference_inside_of_a_repository_is_fetched_with_its_weights(hub_endpoint, tmp_path):  # noqa: F811
    for seed, name in enumerate(("student", "teacher")):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    policy = export_mixed_policy(tmp_path / "student", tmp_path / "teacher", 0.4, tmp_path / "policy")
    api = HfApi(token=WRITER)
    api.create_repo("me/mixed")
    api.upload_folder(repo_id="me/mixed", folder_path=policy)
    again = export_mixed_policy("me/mixed", None, 0.2, tmp_path / "again")
    expected = load(export_mixed_policy(policy, None, 0.2, tmp_path / "expected")).generate(**INPUTS, **GREEDY)
    assert torch.equal(load(again).generate(**INPUTS, **GREEDY), expected)
    (partner,), _ = blend_of_folder("me/mixed")
    assert (Path(partner.model) / "model.safetensors").is_file()

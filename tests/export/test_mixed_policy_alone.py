"""What loads an export as its student alone fails or warns; whatever it is mixed with, it decodes or is refused."""

import json
import warnings

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GptOssConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2VLConfig,
    pipeline,
)

from tests.generation.teacher_forced import left_padded_prompts
from tests.models.checkpoints import save_model
from tests.tiny import PAD_ID, tiny_lora, tiny_model, tiny_tokenizer
from trl_blend import _compat, export_mixed_policy
from trl_blend.errors import TrlBlendError, UnsupportedError
from trl_blend.export import former_export, model_files
from trl_blend.models.fingerprint import identify_model
from trl_blend.models.loading import find_config, find_tokenizer, load_frozen


PROMPTS = left_padded_prompts(PAD_ID)
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD_ID, "eos_token_id": 63}


@pytest.fixture
def student(tmp_path):
    return save_model(tiny_model("llama"), tmp_path / "student")


@pytest.fixture
def policy(student, tmp_path, modules_cache):
    teacher = save_model(tiny_model("llama", seed=1), tmp_path / "teacher")
    return str(export_mixed_policy(student, teacher, 0.4, tmp_path / "policy"))


def trusted(policy, **kwargs):
    return AutoModelForCausalLM.from_pretrained(policy, trust_remote_code=True, **kwargs)


# Never the student alone


@pytest.mark.parametrize("trust", [None, False])
@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModel, AutoModelForCausalLM])
def test_nothing_loads_without_trust(policy, auto_class, trust):
    with pytest.raises(ValueError, match="Please pass the argument `trust_remote_code=True`"):
        auto_class.from_pretrained(policy, trust_remote_code=trust)


def test_nor_does_the_class_of_the_student(policy):
    with pytest.raises(
        Exception, match="a mixed policy is loaded with AutoModelForCausalLM and trust_remote_code=True"
    ):
        LlamaForCausalLM.from_pretrained(policy)


def test_trl_and_pipelines_need_trust_too(policy):
    for load in (
        _compat.create_model_from_path,
        lambda name: pipeline("text-generation", model=name),
    ):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load(policy)
    told = pipeline("text-generation", model=policy, trust_remote_code=True)
    ids = told.model.generate(**PROMPTS, **GREEDY)
    assert torch.equal(ids, trusted(policy).generate(**PROMPTS, **GREEDY))
    by_trl = _compat.create_model_from_path(policy, trust_remote_code=True, dtype="float32", device_map=None)
    assert torch.equal(ids, by_trl.generate(**PROMPTS, **GREEDY))


def test_a_server_finds_no_architecture_that_it_knows(policy):
    config = AutoConfig.from_pretrained(policy, trust_remote_code=True)
    assert config.architectures == ["MixedPolicy"] and not hasattr(transformers, "MixedPolicy")
    assert config.model_type == "llama" and config.vocab_size == 64


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}])
def test_the_tokenizer_loads_either_way(policy, options):
    tokenizer = AutoTokenizer.from_pretrained(policy, **options)
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert tokenizer("12+3=").input_ids == tiny_tokenizer()("12+3=").input_ids


def test_its_forward_pass_says_whose_it_is(policy, student):
    model, ids = trusted(policy), torch.tensor([[7, 8, 9]])
    with pytest.warns(UserWarning, match="are those of its student alone: only `generate` mixes"):
        logits = model(ids).logits
    assert torch.equal(logits, AutoModelForCausalLM.from_pretrained(student)(ids).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**PROMPTS, **GREEDY)


def test_the_student_alone_is_what_it_saves(policy, student, tmp_path):
    trusted(policy).save_pretrained(tmp_path / "alone")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "alone")
    assert alone.config.architectures == ["LlamaForCausalLM"]
    assert identify_model(alone).weights == identify_model(student).weights


def test_it_is_refused_where_log_probabilities_are_wanted(policy):
    for find in (find_config, find_tokenizer, load_frozen):
        with pytest.raises(UnsupportedError, match=f"`teacher='{policy}'` is a mixed policy of several models"):
            find(policy, "teacher", trust_remote_code=True)
    with pytest.raises(UnsupportedError, match="`teacher` is a mixed policy .* whose forward pass is that of its"):
        find_config(trusted(policy), "teacher")


@pytest.mark.parametrize("prefix, is_one", [("", True), ("me/mixed--", True), ("other_", False)])
def test_code_of_another_repository_is_that_of_a_mixed_policy_too(policy, tmp_path, prefix, is_one):
    """A name with `--` in front is what transformers writes where a configuration came from elsewhere."""
    content = json.loads((tmp_path / "policy" / "config.json").read_text())
    content["auto_map"] = {name: f"{prefix}{code}" for name, code in content["auto_map"].items()}
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.json").write_text(json.dumps(content))
    assert model_files.holds_policy(tmp_path / "copy") == is_one
    expected = "is a mixed policy of several models" if is_one else "cannot be loaded"
    with pytest.raises(TrlBlendError, match=expected):
        find_config(str(tmp_path / "copy"), "teacher")


def test_the_configuration_is_that_of_the_student_again(policy, student, tmp_path):
    own = json.loads((tmp_path / "student" / "config.json").read_text())
    before = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert model_files.student_config(tmp_path / "policy").to_diff_dict() == find_config(student, "m").to_diff_dict()
    model_files.wrap_config(tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / "config.json").read_text()) == before
    former_export.clear(tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / "config.json").read_text()) == own


def test_an_adapter_is_as_loud(tmp_path, student, modules_cache):
    adapter = save_model(tiny_lora(AutoModelForCausalLM.from_pretrained(student)), tmp_path / "adapter")
    policy = str(export_mixed_policy(adapter, None, 0.4, tmp_path / "policy"))
    for load in (AutoModelForCausalLM.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load(policy)
    assert trusted(policy).generate(**PROMPTS, **GREEDY).shape[1] == PROMPTS["input_ids"].shape[1] + 5


# Decoded, or refused


SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "max_position_embeddings": 64,
}


def vision_language():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    tower = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 1}
    config = Qwen2VLConfig(text_config={**SHAPE, "rope_parameters": rope}, vision_config=tower)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def eager_only():
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4, "head_dim": 8}
    return AutoModelForCausalLM.from_config(GptOssConfig(**SHAPE, **experts), dtype=torch.float32)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("make", [vision_language, eager_only])
def test_a_reference_of_another_kind(make, in_memory, student, tmp_path, modules_cache):
    torch.manual_seed(0)
    reference = make().eval()
    given = reference if in_memory else save_model(reference, tmp_path / "reference")
    model = trusted(str(export_mixed_policy(student, given, 0.3, tmp_path / "policy")))
    found = model.generate(**PROMPTS, **GREEDY, return_dict_in_generate=True, output_scores=True)
    own, width = tiny_model("llama").eval(), PROMPTS["input_ids"].shape[1]
    for row, mask in enumerate(PROMPTS["attention_mask"]):
        for step, scores in enumerate(found.scores):
            ids = found.sequences[row : row + 1, width - int(mask.sum()) : width + step]
            with torch.no_grad():
                models = [one(ids).logits[0, -1].double() for one in (own, reference)]
            expected = (0.7 * models[0] + 0.3 * models[1]).log_softmax(-1)
            torch.testing.assert_close(scores[row].double().log_softmax(-1), expected, atol=1e-4, rtol=0)
            if found.sequences[row, width + step] == 63:
                break


def test_a_student_that_the_auto_class_does_not_load_is_refused(student, tmp_path):
    model = save_model(vision_language(), tmp_path / "vision")
    with pytest.raises(UnsupportedError, match="`student` is a Qwen2VL model, which `AutoModelForCausalLM` does not"):
        export_mixed_policy(model, student, 0.3, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("argument", ["student", "reference"])
def test_a_model_without_a_head_is_refused(argument, student, tmp_path):
    headless = save_model(LlamaModel(tiny_model("llama").config), tmp_path / "headless")
    models = {"student": student, "reference": student, argument: headless}
    with pytest.raises(
        UnsupportedError, match=f"`{argument}` was saved from a LlamaModel, which has no language-model"
    ):
        export_mixed_policy(models["student"], models["reference"], 0.3, tmp_path / "policy")


def test_a_reference_that_lacks_weights_is_not_decoded(student, tmp_path, modules_cache):
    from safetensors.torch import load_file, save_file

    reference = save_model(tiny_model("llama", seed=1), tmp_path / "reference")
    weights = tmp_path / "reference" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    policy = export_mixed_policy(student, reference, 0.3, tmp_path / "policy")
    with pytest.raises(RuntimeError, match="lacks weights, such as 'model.layers.0.mlp.up_proj.weight'"):
        trusted(str(policy)).generate(**PROMPTS, **GREEDY)

import datetime
import hashlib
import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Idefics3Config,
    LlavaConfig,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.models.checkpoints import changed, hub_snapshot, save_model
from tests.tiny import ARCHITECTURES, tiny_lora, tiny_model, tiny_tokenizer
from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.models.fingerprint import chat_rendering_sha256, identify_model
from trl_blend.models.identity import ModelIdentity, compare_identities, compare_weights
from trl_blend.models.weights import CHUNK_ELEMENTS, Layout, fingerprint_tensors


def fingerprint(tensors, **settings):
    return fingerprint_tensors({name: lambda value=value: value for name, value in tensors.items()}, **settings)


def bfloat16_bits(value):
    """The 16 bits of a float rounded to the nearest bfloat16, ties to even."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


def reference_fingerprint(tensors):
    """The definition in plain loops: tensors of fewer elements than one piece."""
    exact, rounded = hashlib.sha256(), hashlib.sha256()
    for name in sorted(tensors):
        values = [float(value) for value in tensors[name].flatten()]
        bits = [bfloat16_bits(value) for value in values]
        short = b"bfloat16" + b"".join(struct.pack("<H", b) for b in bits)
        full = b"float32" + b"".join(struct.pack("<f", value) for value in values)
        kept = all(struct.unpack("<f", struct.pack("<I", b << 16))[0] == v for b, v in zip(bits, values, strict=True))
        header = f"{name}\0{list(tensors[name].shape)}\0".encode()
        exact.update(header + hashlib.sha256(hashlib.sha256(short if kept else full).digest()).digest())
        rounded.update(header + hashlib.sha256(hashlib.sha256(short).digest()).digest())
    return exact.hexdigest(), rounded.hexdigest()


def test_definition():
    tensors = {"b.weight": torch.randn(3, 5), "a": torch.tensor([1.0, -0.5, 0.0]), "c": torch.randn(4).bfloat16()}
    found = fingerprint(tensors)
    assert (found.sha256, found.sha256_bfloat16) == reference_fingerprint(tensors)
    assert found.dtypes == {"float32": 18, "bfloat16": 4}
    assert found.num_parameters == 22


def test_names_shapes_and_values_count_and_order_does_not():
    first, second = torch.randn(2, 6), torch.randn(2, 6)
    found = fingerprint({"a": first, "b": second})
    assert fingerprint({"b": second, "a": first}) == found
    others = [
        {"a": second, "b": first},
        {"a": first, "c": second},
        {"a": first.reshape(3, 4), "b": second},
        {"a": first, "b": -second},
        {"a": first},
    ]
    assert len({found.sha256, *(fingerprint(tensors).sha256 for tensors in others)}) == len(others) + 1


def test_zero_and_minus_zero_differ_and_nan_has_a_fingerprint():
    assert fingerprint({"a": torch.tensor([0.0])}).sha256 != fingerprint({"a": torch.tensor([-0.0])}).sha256
    broken = torch.tensor([float("nan"), 1.0]).bfloat16()
    assert fingerprint({"a": broken}).sha256 == fingerprint({"a": broken.float()}).sha256


def test_the_same_values_in_another_dtype_are_the_same_weights():
    values = torch.randn(40).bfloat16()
    expected = fingerprint({"a": values})
    for dtype in (torch.float32, torch.float64):
        found = fingerprint({"a": values.to(dtype)})
        assert found.sha256 == expected.sha256
        assert found.dtypes != expected.dtypes
    halves = torch.randn(40).half()
    assert fingerprint({"a": halves}).sha256 == fingerprint({"a": halves.float()}).sha256


def test_integers_are_taken_as_they_are():
    counts = torch.tensor([1, 2, 2**31 + 5])
    assert fingerprint({"a": counts}).sha256 != fingerprint({"a": torch.tensor([1, 2, 2**31 + 6])}).sha256
    assert fingerprint({"a": counts[:2]}).sha256 != fingerprint({"a": counts[:2].float()}).sha256


def test_every_piece_of_a_large_tensor_counts():
    large = torch.zeros(2 * CHUNK_ELEMENTS + 3, dtype=torch.bfloat16)
    seen = {fingerprint({"a": large}).sha256}
    for position in (0, CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS, 2 * CHUNK_ELEMENTS + 2):
        other = large.clone()
        other[position] = 1.0
        seen.add(fingerprint({"a": other}).sha256)
    assert len(seen) == 5


def test_a_single_value_late_in_a_tensor_is_not_rounded_away():
    values = torch.zeros(5000)
    values[4000] = 1.0
    expected = fingerprint({"a": values})
    values[4000] += 2**-20
    found = fingerprint({"a": values})
    assert compare_weights(found, expected) == "bfloat16_copy"
    assert not found.is_bfloat16


def test_a_bias_of_a_linear_layer_is_no_mask_of_an_old_release():
    layer = {"h.attn.weight": torch.randn(2, 2), "h.attn.bias": torch.zeros(2)}
    assert fingerprint(layer) != fingerprint({**layer, "h.attn.bias": torch.ones(2)})
    mask = {"h.attn.c.weight": torch.randn(2, 2), "h.attn.bias": torch.zeros(2)}
    assert fingerprint(mask) == fingerprint({**mask, "h.attn.bias": torch.ones(2)})


def test_a_non_contiguous_tensor_is_hashed_by_its_values():
    values = torch.randn(4, 6)
    assert fingerprint({"a": values.T.contiguous()}) == fingerprint({"a": values.T})
    assert fingerprint({"a": values.bfloat16().T.contiguous()}) == fingerprint({"a": values.bfloat16().T})


def test_comparison():
    weights = torch.randn(50)
    original, copy = fingerprint({"a": weights}), fingerprint({"a": weights.bfloat16()})
    nudged = weights.clone()
    nudged[0] = weights[0] * (1 + 1e-6)
    assert compare_weights(original, original) == "same"
    assert compare_weights(original, copy) == compare_weights(copy, original) == "bfloat16_copy"
    assert compare_weights(original, fingerprint({"a": nudged})) == "equal_in_bfloat16"
    assert compare_weights(original, fingerprint({"a": -weights})) == "different"
    assert copy.is_bfloat16
    assert not original.is_bfloat16


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_folder_memory_and_other_shards_are_one_model(arch, tmp_path):
    model = tiny_model(arch)
    whole = save_model(model, tmp_path / "whole")
    sharded = save_model(model, tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    expected = identify_model(whole)
    in_memory = identify_model(model, tokenizer=tiny_tokenizer())
    for other in (identify_model(sharded), in_memory):
        assert other.weights == expected.weights
        assert (other.tokenizer, other.eos_token_ids, other.config) == (
            expected.tokenizer,
            expected.eos_token_ids,
            expected.config,
        )
        assert other.chat_template_sha256 == expected.chat_template_sha256 is not None
    assert expected.weights.num_parameters == sum(p.numel() for p in model.parameters())
    assert identify_model(changed(model, 1e-3)).weights.sha256 != expected.weights.sha256
    loaded = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16)
    assert compare_weights(identify_model(loaded).weights, expected.weights) == "bfloat16_copy"
    assert identify_model(loaded).name == whole
    assert identify_model(loaded).tokenizer == expected.tokenizer


@pytest.mark.parametrize("arch", ["qwen3", "gpt2"])
def test_every_parameter_counts(arch):
    model = tiny_model(arch)
    expected = identify_model(model).weights
    for name, _ in model.named_parameters():
        found = identify_model(changed(model, 1e-3, name)).weights
        assert compare_weights(found, expected) in ("different", "equal_in_bfloat16"), name


def test_a_tied_output_layer_may_be_in_the_file_or_not_or_alone(tmp_path):
    folder = save_model(tiny_model("qwen3"), tmp_path / "a")
    expected = identify_model(folder).weights
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, tmp_path / "a" / "model.safetensors")
    assert identify_model(folder).weights == expected
    alone = {name: value for name, value in tensors.items() if name != "model.embed_tokens.weight"}
    save_file({**alone, "lm_head.weight": embedding}, tmp_path / "a" / "model.safetensors")
    assert identify_model(folder).weights == expected
    save_file({**tensors, "lm_head.weight": -embedding}, tmp_path / "a" / "model.safetensors")
    assert identify_model(folder).weights != expected


def vision_language(text, tied):
    """A tiny vision-language model; its text is only a part of the configuration, and of the names of the weights."""
    torch.manual_seed(0)
    shape = {name: getattr(tiny_model("qwen3").config, name) for name in ("hidden_size", "intermediate_size")}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower |= {"image_size": 28, "patch_size": 14}
    config = text(shape | {"tie_word_embeddings": tied}, tower)
    config.tie_word_embeddings = tied
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


VISION_LANGUAGE = {
    "gemma3": lambda text, tower: Gemma3Config(
        text_config={**text, "model_type": "gemma3_text", "head_dim": 16},
        vision_config={**tower, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
    ),
    "llava": lambda text, tower: LlavaConfig(
        text_config={**text, "model_type": "llama"}, vision_config={**tower, "model_type": "clip_vision_model"}
    ),
    "idefics3": lambda text, tower: Idefics3Config(text_config={**text, "model_type": "llama"}, vision_config=tower),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", VISION_LANGUAGE)
def test_a_vision_language_model_read_and_loaded_is_one(kind, tied, tmp_path):
    model = vision_language(VISION_LANGUAGE[kind], tied)
    folder = save_model(model, tmp_path)
    expected = identify_model(folder)
    loaded = type(model).from_pretrained(folder, dtype=torch.float32)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    for other in (identify_model(loaded), identify_model(model)):
        assert compare_identities(expected, other).relation == "same"
    assert expected.weights.num_parameters == sum(p.numel() for p in model.parameters())
    head = next(name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    assert compare_identities(expected, identify_model(changed(model, 1.0, head))).relation == "different"


def test_a_mixture_of_experts_read_and_loaded_is_one(tmp_path):
    model = AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            tie_word_embeddings=True,
        )
    )
    folder = save_model(model, tmp_path)
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(folder)  # which has the experts in one tensor
    assert identify_model(folder).weights == identify_model(loaded).weights == identify_model(model).weights


def test_a_backbone_without_prefix_and_the_masks_of_old_releases(tmp_path):
    folder = save_model(tiny_model("gpt2"), tmp_path / "a")
    expected = identify_model(folder).weights
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    old = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    old["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(old, tmp_path / "a" / "model.safetensors")
    assert identify_model(folder).weights == expected
    old["h.0.attn.c_attn.bias"] += 1e-3
    save_file(old, tmp_path / "a" / "model.safetensors")
    assert identify_model(folder).weights != expected


def test_both_spellings_of_one_tensor_are_refused():
    tensors = {"model.a": torch.zeros(1), "a": torch.zeros(1)}
    with pytest.raises(UnsupportedError, match="both `model.x` and `x` for 1 tensors"):
        fingerprint(tensors, layout=Layout())


def test_pytorch_files_and_left_over_shards(tmp_path):
    model = tiny_model("llama")
    folder = save_model(model, tmp_path / "a", max_shard_size="10KB")
    expected = identify_model(folder).weights
    save_file({"model.extra": torch.zeros(3)}, tmp_path / "a" / "model-00099-of-00099.safetensors")
    assert identify_model(folder).weights == expected
    for file in (tmp_path / "a").glob("*.safetensors*"):
        file.unlink()
    torch.save(model.state_dict(), tmp_path / "a" / "pytorch_model.bin")
    assert identify_model(folder).weights == expected


def test_missing_files_are_named(tmp_path):
    folder = save_model(tiny_model("llama"), tmp_path / "a", max_shard_size="10KB")
    (tmp_path / "a" / "model-00002-of-00012.safetensors").unlink()
    with pytest.raises(ConfigError, match="lacks \\['model-00002-of-00012.safetensors'\\] of its weights"):
        identify_model(folder)
    (tmp_path / "a" / "model.safetensors.index.json").unlink()
    with pytest.raises(ConfigError, match="neither model.safetensors nor pytorch_model.bin"):
        identify_model(folder)
    assert identify_model(folder, hash_weights=False).weights is None
    with pytest.raises(ConfigError, match="'no/such-model' is neither a folder with a model"):
        identify_model("no/such-model")
    with pytest.raises(ConfigError, match="is neither a folder"):
        identify_model("/no/such/folder/at/all")


def test_hub_id_and_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    first, second = tiny_model(seed=1), tiny_model(seed=2)
    save_model(first, hub_snapshot(tmp_path, "org/model", "1" * 40, "main"))
    save_model(second, hub_snapshot(tmp_path, "org/model", "2" * 40, "v2"), max_shard_size="10KB")
    main, branch = identify_model("org/model"), identify_model("org/model", revision="v2")
    assert (main.name, main.commit) == ("org/model", "1" * 40)
    assert (branch.name, branch.commit) == ("org/model", "2" * 40)
    assert main.weights == identify_model(first).weights
    assert branch.weights == identify_model(second).weights
    assert identify_model("org/model", revision="2" * 40) == branch
    with pytest.raises(ConfigError, match="'org/model' at revision 'v3'"):
        identify_model("org/model", revision="v3")
    loaded = identify_model(str(tmp_path / "models--org--model" / "snapshots" / ("1" * 40)))
    assert loaded.commit == "1" * 40


def test_lora(tmp_path, monkeypatch):
    base = save_model(tiny_model(), tmp_path / "base")
    model = tiny_lora(AutoModelForCausalLM.from_pretrained(base))
    model.save_pretrained(tmp_path / "adapter")
    plain, in_memory, folder = identify_model(base), identify_model(model), identify_model(str(tmp_path / "adapter"))
    through_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    # The methods of such a model want a newer PEFT than may be there
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "900")
    through_transformers = identify_model(through_transformers)
    for found in (in_memory, folder, through_transformers):
        assert found.weights == plain.weights
        assert found.adapter.weights == in_memory.adapter.weights
        assert found.adapter.config_sha256 == in_memory.adapter.config_sha256
        assert found.tokenizer == plain.tokenizer
        assert found.eos_token_ids == plain.eos_token_ids
        assert found.config == plain.config
        assert found.adapter.base_name == base
        assert not found.adapter.is_neutral
    other = identify_model(tiny_lora(AutoModelForCausalLM.from_pretrained(base), seed=1))
    assert other.weights == plain.weights
    assert other.adapter.weights != in_memory.adapter.weights
    assert identify_model(model.unload()).weights == plain.weights


def test_adapter_settings_and_saved_modules():
    base = identify_model(tiny_model("llama")).weights
    found = [
        identify_model(tiny_lora(tiny_model("llama"), **settings))
        for settings in ({}, {"lora_alpha": 16}, {"lora_dropout": 0.1}, {"modules_to_save": ["lm_head"]})
    ]
    assert all(identity.weights == base for identity in found)
    first, scaled, dropout, saved = (identity.adapter for identity in found)
    assert first.weights == scaled.weights
    assert first.config_sha256 != scaled.config_sha256
    assert first.config_sha256 == dropout.config_sha256
    assert saved.weights.num_parameters == first.weights.num_parameters + 64 * 32


def test_a_fresh_adapter_is_neutral():
    assert identify_model(tiny_lora(tiny_model(), init_lora_weights=True)).adapter.is_neutral
    assert not identify_model(tiny_lora(tiny_model())).adapter.is_neutral
    assert not identify_model(tiny_lora(tiny_model(), init_lora_weights=True, use_dora=True)).adapter.is_neutral


def test_an_adapter_without_its_base(tmp_path):
    tiny_lora(tiny_model()).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": "no/base"}))
    found = identify_model(str(tmp_path))
    assert found.weights is None
    assert "the adapter's base model cannot be read: 'no/base'" in found.unhashed
    assert found.adapter.weights.num_parameters > 0


def test_what_cannot_be_hashed_in_memory():
    model = tiny_lora(tiny_model())
    model.merge_adapter()
    found = identify_model(model)
    assert found.weights is None
    assert "unmerge_adapter" in found.unhashed
    model.unmerge_adapter()
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedError, match="2 active adapters"):
        identify_model(model)

    quantized = tiny_model()
    next(quantized.parameters()).quant_state = object()
    assert "quantised in memory" in identify_model(quantized).unhashed
    sharded = tiny_model()
    next(sharded.parameters()).ds_status = object()
    assert "ZeRO-3" in identify_model(sharded).unhashed
    split = tiny_model()
    next(split.parameters()).placements = ()
    assert "FSDP" in identify_model(split).unhashed
    assert "meta device" in identify_model(tiny_model().to("meta")).unhashed
    assert identify_model(tiny_model()).unhashed is None


def test_tokenizer():
    def parts(change=lambda tokenizer: None, **settings):
        tokenizer = tiny_tokenizer(**settings)
        change(tokenizer)
        return identify_model(tiny_model(), tokenizer=tokenizer).tokenizer

    expected = parts()
    assert (expected.vocab_size, expected.eos_token_id, expected.pad_token_id) == (64, 1, 0)
    assert parts(lambda tokenizer: tokenizer("abc", truncation=True, max_length=2, padding=True)) == expected
    assert parts(padding_side="right") == expected
    for change, settings, differ in (
        (lambda t: t.add_tokens(["<tool>"]), {}, {"vocabulary", "added_tokens"}),
        (lambda t: None, {"pad_token": "<eos>"}, {"special_tokens"}),
    ):
        found = parts(change, **settings)
        assert {part for part, value in found.parts.items() if value != expected.parts[part]} == differ
        assert found.sha256 != expected.sha256


def test_merges_count():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    found = []
    for merges in ([("a", "b"), ("b", "c"), ("ab", "c")], [("b", "c"), ("a", "b"), ("ab", "c")]):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, merges)))
        found.append(identify_model(tiny_model(), tokenizer=tokenizer).tokenizer.parts)
    assert {part for part in found[0] if found[0][part] != found[1][part]} == {"merges"}


def test_chat_template():
    def found(template):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        identity = identify_model(tiny_model(), tokenizer=tokenizer)
        return identity.chat_template_sha256, identity.chat_rendering_sha256

    template = tiny_tokenizer().chat_template
    expected = found(template)
    unmarked = found(template.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    assert unmarked[0] != expected[0]
    assert unmarked[1] == expected[1]
    assert (
        found(template.replace("<user>", "<system>").replace("'<' + message['role']", "'<u' + message['role']"))[1]
        != (expected[1])
    )
    assert found(None) == (None, None)
    raising = found("{{ raise_exception('no system role') }}")
    assert raising[1] is not None


@pytest.mark.parametrize("date", ["strftime_now('%d %B %Y')", "date_string", "(strftime_now or date_string)('%x %X')"])
def test_a_chat_template_that_prints_the_date_renders_the_same_on_any_day(date, monkeypatch):
    class Clock(datetime.datetime):
        day = 1

        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2026, 3, cls.day)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = f"{{{{ {date} }}}}" + tokenizer.chat_template
    printed, found = set(), set()
    for Clock.day in (1, 2):
        printed.add(tokenizer.apply_chat_template([{"role": "user", "content": "1"}], tokenize=False))
        found.add(chat_rendering_sha256(tokenizer))
    assert len(printed) == (1 if date == "date_string" else 2)  # which is undefined for whoever passes none
    assert len(found) == 1
    tokenizer.chat_template += "."
    assert chat_rendering_sha256(tokenizer) not in found


def test_end_of_sequence_ids(tmp_path):
    model = tiny_model()
    model.generation_config.eos_token_id = [40, 1]
    folder = save_model(model, tmp_path)
    assert identify_model(model).eos_token_ids == identify_model(folder).eos_token_ids == [1, 40]
    (tmp_path / "generation_config.json").unlink()
    assert identify_model(folder).eos_token_ids == [1]
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "eos_token_id": None}))
    tiny_tokenizer(eos_token="<unk>").save_pretrained(tmp_path)
    assert identify_model(folder).eos_token_ids == [2]


def test_json_round_trip(tmp_path):
    model = tiny_lora(AutoModelForCausalLM.from_pretrained(save_model(tiny_model(), tmp_path / "base")))
    found = identify_model(model)
    fields = json.loads(json.dumps(found.to_dict()))
    assert ModelIdentity.from_dict(fields) == found
    assert ModelIdentity.from_dict({**fields, "of_a_newer_release": 1}) == found
    for part in (fields["weights"], fields["adapter"], fields["adapter"]["weights"], fields["tokenizer"]):
        part["of_a_newer_release"] = 1
    assert ModelIdentity.from_dict(fields) == found
    assert ModelIdentity.from_dict(ModelIdentity().to_dict()) == ModelIdentity()
    assert found.describe().startswith(f"{tmp_path / 'base'} (weights {found.weights.sha256[:12]}, adapter ")


def test_reading_leaves_the_checkpoint_alone(tmp_path):
    save_model(tiny_model(), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    identify_model(str(tmp_path / "a"))
    for file in sorted((tmp_path / "b").iterdir()):
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()
    assert len(list((tmp_path / "a").iterdir())) == len(list((tmp_path / "b").iterdir()))


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ConfigError, match="neither config.json nor adapter_config.json"):
        identify_model(tmp_path)
    with pytest.raises(ConfigError, match="a model without a name"):
        identify_model("")


def test_code_of_the_checkpoint_is_not_run(tmp_path):
    expected = identify_model(save_model(tiny_model("llama"), tmp_path))
    for file in ("config.json", "tokenizer_config.json"):
        fields = json.loads((tmp_path / file).read_text())
        fields |= {"auto_map": {"AutoConfig": "own.Config", "AutoTokenizer": ["own.T", None]}, "model_type": "own"}
        (tmp_path / file).write_text(json.dumps({**fields, "tokenizer_class": "OwnTokenizer"}))
    found = identify_model(str(tmp_path))
    assert found.weights == expected.weights
    assert found.config["hidden_size"] == expected.config["hidden_size"]
    assert found.tokenizer is None


def test_a_teacher_may_be_an_encoder_decoder(tmp_path):
    """The samples of a fine-tuning may be of one, though it cannot be blended."""
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    model.save_pretrained(tmp_path)
    found = identify_model(tmp_path)
    assert found.config["model_type"] == "t5" and found.weights is not None

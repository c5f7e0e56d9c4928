"""An exported policy decodes as the trainer does, in a process without this package; what it cannot do it refuses."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from tests.export import mixed_policies as mixed
from tests.generation.teacher_forced import CACHE, left_padded_prompts
from tests.tiny import PAD_ID, tiny_model, tiny_tokenizer
from trl_blend import export_mixed_policy


SIZES = {"student": 70, "teacher": 64, "second": 80}  # rows of the output layers; the tokenizer has 64 tokens
INPUTS = left_padded_prompts(PAD_ID)
TINY = {"max_new_tokens": 8, "pad_token_id": PAD_ID, "do_sample": True, "top_k": 0, "temperature": 0.8}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, rows) in enumerate(SIZES.items()):
        tiny_model("llama" if name == "teacher" else "qwen3", seed=seed, vocab_size=rows).save_pretrained(
            folder / name
        )
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def policy(models, tmp_path):
    return export_mixed_policy(models / "student", models / "teacher", 0.4, tmp_path / "policy")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(str(folder))


def tiny(folder, *args, **settings):
    return load(folder).generate(**INPUTS, **{**TINY, **settings})


# Decoding alone


@pytest.fixture(scope="module")
def testbed(tmp_path_factory):
    """Exports of the test bed's models, decoded alone: 200 prompts greedily, 40 by sampling, both ways of use."""
    folder = tmp_path_factory.mktemp("testbed")
    many, few = mixed.testbed_inputs(200), mixed.testbed_inputs(40)
    jobs = {}
    for space in mixed.SPACES:
        repository = export_mixed_policy(
            mixed.CHECKPOINTS / "student", mixed.CHECKPOINTS / "teacher", 0.4, folder / space, mixing_space=space
        )
        jobs[space, "greedy"] = mixed.job(folder, repository, many, mixed.GREEDY)
        jobs[space, "sampled"] = mixed.job(folder, repository, few, mixed.SAMPLED)
    jobs["logits", "custom"] = jobs["logits", "sampled"] | {
        "how": "custom",
        "student": str(mixed.CHECKPOINTS / "student"),
    }
    results = dict(zip(jobs, mixed.decode_alone(folder, list(jobs.values())), strict=True))
    return {"results": results, "many": many, "few": few}


@pytest.fixture(scope="module")
def pair():
    return load(mixed.CHECKPOINTS / "student"), load(mixed.CHECKPOINTS / "teacher")


@pytest.mark.parametrize("space", mixed.SPACES)
def test_greedy_tokens_on_200_prompts(testbed, pair, space):
    expected = mixed.blended(*pair, 0.4, space, testbed["many"], mixed.GREEDY)
    assert len(expected.sequences) == 200
    mixed.assert_same_decoding(testbed["results"][space, "greedy"], expected)
    alone = pair[0].generate(**testbed["many"], **mixed.GREEDY)
    width = min(alone.shape[1], expected.sequences.shape[1])
    assert not torch.equal(alone[:, :width], expected.sequences[:, :width]), "the student decodes the same alone"


@pytest.mark.parametrize("job", [("logits", "sampled"), ("probs", "sampled"), ("logits", "custom")])
def test_sampled_log_probs(testbed, pair, job):
    expected = mixed.blended(*pair, 0.4, job[0], testbed["few"], mixed.SAMPLED)
    mixed.assert_same_decoding(testbed["results"][job], expected)


@pytest.mark.parametrize(
    ("space", "weights"), [("logits", (0.3, 0.25)), ("probs", (0.3, 0.25)), ("arithmetic", (-0.6, 1.2))]
)
def test_two_references_padded_vocabularies_and_several_sequences(models, tmp_path, space, weights):
    names, settings = ["teacher", "second"], {**TINY, "num_return_sequences": 2, "suppress_tokens": [7, 8]}
    references = [models / name for name in names]
    repository = export_mixed_policy(models / "student", references, weights, tmp_path / "p", mixing_space=space)
    assert {"reference_0", "reference_1"} <= {path.name for path in repository.iterdir()}
    config = {**{k: v for k, v in settings.items() if k != "max_new_tokens"}, "max_length": 15}
    jobs = [
        mixed.job(tmp_path, repository, INPUTS, settings),
        mixed.job(tmp_path, repository, INPUTS, {"generation_config": config}),
        mixed.job(tmp_path, repository, {name: value[:1] for name, value in INPUTS.items()}, TINY, stream=True),
        mixed.job(tmp_path, repository, INPUTS, {**TINY, "num_beams": 2}),
    ]
    several, configured, streamed, beams = mixed.decode_alone(tmp_path, jobs)
    # As the trainer does, ids that are padding of one model are not drawn: the other could not read them back
    settings["suppress_tokens"] = [7, 8, *range(64, 70)]
    partners = [load(folder) for folder in references]
    expected = mixed.blended(load(models / "student"), partners, weights, space, INPUTS, settings)
    mixed.assert_same_decoding(several, expected)
    mixed.assert_same_decoding(configured, expected)
    assert len(expected.sequences) == 6
    prompt = {name: value[:1] for name, value in INPUTS.items()}
    one = mixed.blended(
        load(models / "student"), partners, weights, space, prompt, {**TINY, "suppress_tokens": list(range(64, 70))}
    )
    mixed.assert_same_decoding(streamed, one)
    assert streamed["streamed"] == (one.sequences[0].tolist(), True)
    assert "MixedPolicyError" in beams["error"] and "num_beams=1" in beams["error"]


def test_rows_that_are_no_tokens_are_not_drawn(models, tmp_path):
    """Both models have more rows than the tokenizer has tokens."""
    repository = export_mixed_policy(models / "student", models / "second", 0.4, tmp_path / "p")
    (result,) = mixed.decode_alone(tmp_path, [mixed.job(tmp_path, repository, INPUTS, TINY)])
    assert result["scores"].shape[-1] == 70
    assert result["scores"][..., :64].isfinite().all() and result["scores"][..., 64:].isneginf().all()


@pytest.mark.parametrize(("weight", "model"), [(0.0, "student"), (1.0, "second")])
def test_the_ends_of_the_scale(models, tmp_path, weight, model):
    repository = export_mixed_policy(models / "student", models / "second", weight, tmp_path / "p")
    shutil.copytree(repository, tmp_path / "alone", ignore=shutil.ignore_patterns("reference"))
    greedy = {"max_new_tokens": 6, "pad_token_id": PAD_ID, "do_sample": False}
    jobs = [mixed.job(tmp_path, tmp_path / name, INPUTS, greedy) for name in ("p", "alone")]
    result, alone = mixed.decode_alone(tmp_path, jobs)
    tokens = {"suppress_tokens": list(range(64, SIZES[model]))} if weight else {}
    expected = load(models / model).generate(**INPUTS, **greedy, **tokens, **mixed.DETAILS)
    assert torch.equal(result["sequences"], expected.sequences)
    if weight == 0:  # the reference is not even looked at
        assert torch.equal(alone["sequences"], expected.sequences) and len(alone["loaded"]) == 1
    else:
        assert "'reference/" in alone["error"] and len(result["loaded"]) == 2


# In this process: everything `generate` takes


@pytest.fixture
def trusted(modules_cache):
    return lambda folder, **kwargs: AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True, **kwargs)


def test_own_processors_stop_criteria_and_penalties(trusted, policy, models):
    from transformers import LogitsProcessor, MaxLengthCriteria

    class Steep(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores * 3

    settings = {
        **TINY,
        "repetition_penalty": 1.7,
        "min_new_tokens": 3,
        "suppress_tokens": [7, 8, *range(64, 70)],
        "logits_processor": [Steep()],
        "stopping_criteria": [MaxLengthCriteria(11)],
    }
    expected = mixed.blended(load(models / "student"), load(models / "teacher"), 0.4, "logits", INPUTS, settings)
    torch.manual_seed(0)
    output = trusted(policy).generate(
        INPUTS["input_ids"], attention_mask=INPUTS["attention_mask"], **settings, **mixed.DETAILS
    )
    mixed.assert_same_decoding({"sequences": output.sequences, "scores": torch.stack(output.scores)}, expected)
    assert output.sequences.shape[1] == 11


def test_missing_mask_is_the_one_that_generate_infers(trusted, policy, models):
    ids = {"input_ids": INPUTS["input_ids"]}
    expected = mixed.blended(load(models / "student"), load(models / "teacher"), 0.4, "logits", ids, TINY)
    torch.manual_seed(0)
    assert torch.equal(trusted(policy).generate(**ids, **TINY), expected.sequences)


def test_the_reference_is_loaded_once_and_let_go_with_the_model(trusted, policy, monkeypatch):
    import gc
    import weakref

    from transformers import PreTrainedModel

    loads, original = [], PreTrainedModel.from_pretrained.__func__

    def counting(cls, name, *args, **kwargs):
        loaded = original(cls, name, *args, **kwargs)
        loads.append(weakref.ref(loaded[0] if isinstance(loaded, tuple) else loaded))
        return loaded

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counting))
    model = trusted(policy)
    for _ in range(2):
        model.generate(**INPUTS, **TINY)
    assert len(loads) == 2
    del model
    gc.collect()
    assert [load() for load in loads] == [None, None]


def test_the_dtype_of_the_student_is_the_references(trusted, policy, monkeypatch):
    dtypes = []
    original = torch.nn.Module.requires_grad_
    monkeypatch.setattr(
        torch.nn.Module, "requires_grad_", lambda self, *args: dtypes.append(self.dtype) or original(self, *args)
    )
    trusted(policy, dtype=torch.bfloat16).generate(**INPUTS, **TINY)
    assert dtypes == [torch.bfloat16]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2, "do_sample": False}, "beam search"),
        ({"num_beams": 2}, "beam sample"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation"),
        ({"penalty_alpha": 0.5, "top_k": 4, "do_sample": False}, "contrastive search"),
        ({"inputs_embeds": torch.zeros(3, 7, 32)}, "inputs_embeds"),
        ({"token_type_ids": torch.zeros(3, 7)}, "token_type_ids"),
        ({"custom_generate": "elsewhere/else"}, "elsewhere/else|not there"),
    ],
)
def test_other_ways_of_decoding_are_refused(trusted, policy, settings, message):
    with pytest.raises(RuntimeError, match=message):
        trusted(policy).generate(**INPUTS, **{**TINY, **settings})


def test_a_prompt_continued_from_a_cache_is_refused(trusted, policy):
    model = trusted(policy)
    filled = {CACHE: DynamicCache(config=model.config)}
    model(**INPUTS, **filled, use_cache=True)
    with pytest.raises(RuntimeError, match=f"'{CACHE}'.* would reach the student and not the reference"):
        model.generate(**INPUTS, **filled, **TINY)
    model.generate(**INPUTS, **{CACHE: DynamicCache(config=model.config)}, **TINY)  # an empty one is fine


# Where the policy is


def test_moved_and_relative_folders(trusted, policy, models, tmp_path, monkeypatch):
    torch.manual_seed(0)
    expected = trusted(policy).generate(**INPUTS, **TINY)
    moved = tmp_path / "else" / "where.v2"
    moved.parent.mkdir()
    shutil.move(policy, moved)
    monkeypatch.chdir(tmp_path / "else")
    relative, student = trusted("where.v2"), load(models / "student")
    torch.manual_seed(0)
    assert torch.equal(
        student.generate(**INPUTS, **TINY, custom_generate="./where.v2", trust_remote_code=True), expected
    )
    monkeypatch.chdir(tmp_path)  # the folder was found when the model was loaded
    torch.manual_seed(0)
    assert torch.equal(relative.generate(**INPUTS, **TINY), expected)


def test_a_folder_that_is_gone_is_said(trusted, policy):
    model = trusted(policy)
    shutil.rmtree(policy)
    with pytest.raises(RuntimeError, match="mixing.json"):
        model.generate(**INPUTS, **TINY)


def test_a_generation_config_given_at_loading_does_not_turn_the_mixture_off(trusted, policy):
    from transformers import GenerationConfig

    model = trusted(policy, generation_config=GenerationConfig(pad_token_id=PAD_ID, max_new_tokens=4))
    torch.manual_seed(0)
    expected = trusted(policy).generate(**INPUTS, **TINY)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**INPUTS, **TINY), expected)


# Missing and changed


def refused(trusted, models, policy, message):
    for use in ("auto", "custom"):
        with pytest.raises(RuntimeError, match=message):
            if use == "auto":
                trusted(policy).generate(**INPUTS, **TINY)
            else:
                load(models / "student").generate(
                    **INPUTS, **TINY, custom_generate=str(policy), trust_remote_code=True
                )


def test_missing_reference(trusted, models, policy):
    shutil.rmtree(policy / "reference")
    refused(trusted, models, policy, "missing .* export or download")


def test_interrupted_export(trusted, models, policy):
    (policy / "mixing.json").unlink()
    refused(trusted, models, policy, "'mixing.json' is missing")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_changed_reference(trusted, models, policy, name):
    path = policy / "reference" / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    refused(trusted, models, policy, f"reference was changed: .*{name}.*Restore")


def test_changed_tokenizer(trusted, models, policy):
    path = policy / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    refused(trusted, models, policy, "tokenizer .* was changed")


def test_resaved_tokenizer_is_the_same(trusted, policy):
    tokenizer = tiny_tokenizer(padding_side="right")
    tokenizer.chat_template = "other"
    tokenizer.save_pretrained(policy)
    assert len(trusted(policy).generate(**INPUTS, **TINY)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [1.2]}, "weights"),
        ({"weights": [0.2, 0.2]}, "weights"),
        ({"space": "odds"}, "'odds'"),
        ({"schema_version": 2}, "schema_version 2"),
    ],
)
def test_broken_mixing_json(trusted, models, policy, change, message):
    path = policy / "mixing.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(trusted, models, policy, message)

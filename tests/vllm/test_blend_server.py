"""A server of an exported mixed policy: what it draws from is set over HTTP; new weights reach the student only."""

import json
import os
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_model, tiny_tokenizer
from tests.vllm.engines import SHAPE, generate, prompts, running, saved, worst_error
from tests.vllm.test_offline_rollouts import serving
from trl_blend import LogitMixing, ProbabilityMixing, TrustRegion, export_mixed_policy
from trl_blend.serving.blend import Blend
from trl_blend.serving.plugin import ARCHITECTURE, CONFIG_FORMAT
from trl_blend.serving.worker import EXTENSION


pytestmark = pytest.mark.vllm

TOLERANCE = 5e-5
OVERRIDES = {"architectures": [ARCHITECTURE]}
EXPORTED = {"hf_overrides": OVERRIDES, "config_format": CONFIG_FORMAT, "worker_extension_cls": EXTENSION}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """An exported policy, and the models that it is mixed from."""
    student = tiny_model(**SHAPE)
    teacher = tiny_model("llama", seed=1, **SHAPE)
    folder = tmp_path_factory.mktemp("export") / "mixed"
    export_mixed_policy(student, teacher, 0.3, folder, mixing_space="probs", processing_class=tiny_tokenizer())
    return str(folder), [student, teacher]


def post(url, path, **content):
    request = urllib.request.Request(
        f"{url}{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def call(url, method, *args):
    return post(url, "/collective_rpc", method=method, args=list(args))["results"]


def draw(url, model, temperature=1.0):
    rows = []
    settings = {"max_tokens": 16, "temperature": temperature, "logprobs": 0, "return_tokens_as_token_ids": True}
    for prompt in prompts(6):
        (choice,) = post(url, "/v1/completions", model=model, prompt=prompt, **settings)["choices"]
        ids = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
        rows.append((prompt, ids, choice["logprobs"]["token_logprobs"]))
    return rows


def test_a_server_of_an_exported_policy(mixed, monkeypatch):
    folder, models = mixed
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    options = [
        "--config-format",
        CONFIG_FORMAT,
        "--hf-overrides",
        json.dumps(OVERRIDES),
        "--worker-extension-cls",
        EXTENSION,
    ]
    with serving("--logprobs-mode", "processed_logprobs", *options, model=folder) as url:
        (found,) = call(url, "describe_blend")
        blend = Blend.from_dict(found["blend"])
        assert blend == Blend(ProbabilityMixing((0.3,))) and found["partners"] == [os.path.join(folder, "reference")]
        assert worst_error(models, blend, draw(url, folder)) < TOLERANCE
        blend = Blend(TrustRegion(0.05), temperature=0.7, records=True)
        call(url, "set_blend", blend.to_dict())
        rows = draw(url, folder, 0.7)
        assert worst_error(models, blend, rows) < TOLERANCE
        (sums,) = call(url, "take_blend_statistics")
        # A step ahead of the end-of-sequence token is counted where nobody said which token that is
        assert 0 <= sums["kl_behavior_student"][1] - sum(len(ids) for _, ids, _ in rows) <= len(rows)


def reload(model, weights, config):
    """What a server does with the weights that a trainer transfers, without the transfer."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    model.load_weights(weights)
    finalize_layerwise_reload(model, config)


def test_weights_that_a_server_takes_reach_the_student_only(mixed, cpu_engine, tmp_path):
    folder, models = mixed
    trained = tiny_model(seed=5, **SHAPE)
    with running(folder, **EXPORTED) as llm:
        (tower,) = llm.apply_model(lambda model: model.partner_0)
        before = {name: tensor.clone() for name, tensor in tower.named_parameters()}
        config, weights = llm.llm_engine.model_config, list(trained.named_parameters())
        llm.apply_model(lambda model: reload(model, [(name, tensor.data) for name, tensor in weights], config))
        (tower,) = llm.apply_model(lambda model: model.partner_0)
        after = dict(tower.named_parameters())
        assert all(torch.equal(before[name], after[name]) for name in before)
        rows = generate(llm, prompts())
        assert worst_error([trained, models[1]], Blend(ProbabilityMixing((0.3,))), rows) < TOLERANCE


def test_wrong_folders(tmp_path):
    student = saved(tmp_path / "student")
    with (
        pytest.raises(Exception, match="holds no mixed policy: it has no mixing.json"),
        running(student, hf_overrides=OVERRIDES),
    ):
        pass
    with (
        pytest.raises(Exception, match="teacher_model='/nowhere'"),
        running(student, ["/nowhere"], Blend(LogitMixing(0.3))),
    ):
        pass


def test_the_policy_is_decoded_as_by_transformers(mixed):
    """The same folder, greedily, by the code in it."""
    folder, _ = mixed
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", trust_remote_code=True).eval()
    with running(folder, **EXPORTED) as llm:
        for prompt, ids, _ in generate(llm, prompts(4), temperature=0.0, max_tokens=8):
            output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)
            assert output[0, len(prompt) :].tolist() == ids

"""A server of an exported mixed policy: what it draws from is set over HTTP; new weights reach the student only."""

import json
import os
import subprocess
import sys
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.vllm.conftest import expand_on_the_cpu
from tests.vllm.engines import SHAPE, generate, prompts, running, saved, set_blend, worst_error
from tests.vllm.test_offline_rollouts import serving
from trl_blend import LogitMixing, ProbabilityMixing, TrustRegion, export_mixed_policy
from trl_blend.errors import UnsupportedError
from trl_blend.serving import ARCHITECTURE
from trl_blend.serving.blend import Blend
from trl_blend.serving.worker import EXTENSION


pytestmark = pytest.mark.vllm

TOLERANCE = 5e-5
PADDED = {**SHAPE, "vocab_size": 80}  # the tokenizer has 64 tokens
MIXTURE = Blend(ProbabilityMixing((0.3,)), vocab_size=64)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """An exported policy, and the models that it is mixed from."""
    student = tiny_model(**PADDED)
    teacher = tiny_model("llama", seed=1, **PADDED)
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


@pytest.fixture(scope="module")
def server(mixed):
    """Nothing but the folder says what is served; the other options are for what the tests ask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        options = ["--logprobs-mode", "processed_logprobs", "--worker-extension-cls", EXTENSION]
        with serving(*options, model=mixed[0]) as url:
            yield url


def test_an_exported_policy_is_served_as_the_mixture(server, mixed):
    folder, models = mixed
    (found,) = call(server, "describe_blend")
    assert found["partners"] == [os.path.join(folder, "reference")] and Blend.from_dict(found["blend"]) == MIXTURE
    assert worst_error(models, MIXTURE, draw(server, folder)) < TOLERANCE
    assert worst_error(models, Blend(ProbabilityMixing((0.0,)), vocab_size=64), draw(server, folder)) > 20 * TOLERANCE


@pytest.fixture
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=f"{server}/v1", api_key="none")


AS_IDS = {"return_tokens_as_token_ids": True}


def ids_of(tokens):
    return [int(token.removeprefix("token_id:")) for token in tokens]


def test_greedy_completions_are_those_of_transformers(client, mixed):
    """Of 200 prompts, by the code in the folder; in one batch, and streamed."""
    folder, _ = mixed
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(6, 60, (200, 7), generator=generator)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", trust_remote_code=True).eval()
    expected = model.generate(batch, do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(batch))[:, 7:]
    expected = [ids[: ids.index(1) + 1] if 1 in ids else ids for ids in expected.tolist()]
    settings = {"model": folder, "max_tokens": 12, "temperature": 0.0, "logprobs": 0, "extra_body": AS_IDS}
    choices = client.completions.create(prompt=batch.tolist(), **settings).choices
    assert [ids_of(choice.logprobs.tokens) for choice in choices] == expected
    for prompt, ids in zip(batch.tolist()[:5], expected):
        parts = client.completions.create(prompt=prompt, stream=True, **settings)
        assert sum((ids_of(part.choices[0].logprobs.tokens) for part in parts), []) == ids


def test_chat(client, mixed):
    folder, models = mixed
    chat = [{"role": "user", "content": "a b c"}]
    prompt = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    settings = {"model": folder, "messages": chat, "max_tokens": 12, "logprobs": True, "extra_body": AS_IDS}
    choices = client.chat.completions.create(n=3, temperature=1.0, seed=0, **settings).choices
    drawn = [choice.logprobs.content for choice in choices]
    rows = [(prompt, ids_of([one.token for one in row]), [one.logprob for one in row]) for row in drawn]
    assert len({tuple(ids) for _, ids, _ in rows}) > 1 and worst_error(models, MIXTURE, rows) < TOLERANCE
    parts = client.chat.completions.create(temperature=0.0, stream=True, **settings)
    streamed = [one.token for part in parts if part.choices[0].logprobs for one in part.choices[0].logprobs.content]
    whole = client.chat.completions.create(temperature=0.0, **settings).choices[0].logprobs.content
    assert streamed == [one.token for one in whole]


def test_what_a_server_draws_from_is_changed(server, mixed):
    """The last test of this server."""
    folder, models = mixed
    blend = Blend(TrustRegion(0.05), temperature=0.7, vocab_size=64, records=True)
    call(server, "set_blend", blend.to_dict())
    rows = draw(server, folder, 0.7)
    assert worst_error(models, blend, rows) < TOLERANCE
    (sums,) = call(server, "take_blend_statistics")
    # A step ahead of the end-of-sequence token is counted where nobody said which token that is
    assert 0 <= sums["kl_behavior_student"][1] - sum(len(ids) for _, ids, _ in rows) <= len(rows)


def ended(*options, **env):
    """What a server says that does not begin."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | env)
    assert done.returncode != 0
    return done.stdout + done.stderr


@pytest.mark.parametrize("options", [[], ["--trust-remote-code"]])
def test_without_this_package_nothing_is_served(mixed, options):
    """vLLM loads no plugins then, which is all that it has of this package."""
    expected = "vLLM decodes this mixed policy where `trl_blend` is installed" if options else "trust_remote_code"
    assert expected in ended(mixed[0], *options, VLLM_PLUGINS="none")


def test_drafts_on_a_cpu_are_refused_before_a_process_starts(mixed):
    drafts = {"method": "draft_model", "model": mixed[0], "num_speculative_tokens": 4}
    said = ended(mixed[0], "--max-model-len", "128", "--speculative-config", json.dumps(drafts))
    assert "This vLLM draws wrong tokens from drafts on a CPU. Leave" in said.splitlines()[-1]
    assert "EngineCore" not in said


def test_an_adapter_is_merged_before_the_export(tmp_path):
    """With the base and another model as references: what is served then is the mixture."""
    base, other = saved(tmp_path / "base"), saved(tmp_path / "other", "llama", seed=1)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval() for folder in (base, other)]
    adapted = tiny_lora(AutoModelForCausalLM.from_pretrained(base, dtype="float32"))
    export_mixed_policy(adapted, [base, other], (0.3, 0.2), tmp_path / "adapter")
    refusal = r"is an adapter, and an engine loads whole models. Merge it into its base \(`merge_and_unload\(\)`\)"
    with pytest.raises(UnsupportedError, match=refusal), running(str(tmp_path / "adapter")):
        pass
    merged = adapted.merge_and_unload()
    export_mixed_policy(merged, [base, other], (0.3, 0.2), tmp_path / "merged", processing_class=tiny_tokenizer())
    blend = Blend(LogitMixing((0.3, 0.2)))
    with running(str(tmp_path / "merged")) as llm:
        rows = generate(llm, prompts())
    assert worst_error([merged, *models], blend, rows) < TOLERANCE
    for mistaken in (models[0], *models), (merged, models[1], models[0]):
        assert worst_error(mistaken, blend, rows) > 20 * TOLERANCE


def reload(model, weights, config):
    """What a server does with the weights that a trainer transfers, without the transfer."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    model.load_weights(weights)
    finalize_layerwise_reload(model, config)


@pytest.mark.parametrize("drafts", [0, 3])
def test_weights_that_a_server_takes_reach_the_student_only(mixed, cpu_engine, monkeypatch, drafts):
    expand_on_the_cpu(monkeypatch)
    folder, models = mixed
    trained = tiny_model(seed=5, **PADDED)
    speculation = {"method": "draft_model", "model": folder, "num_speculative_tokens": drafts}
    speculation["draft_sample_method"] = "probabilistic"
    with running(folder, worker_extension_cls=EXTENSION, speculative_config=speculation if drafts else None) as llm:
        assert llm.collective_rpc("lead_drafts") == [bool(drafts)]
        assert worst_error(models, MIXTURE, generate(llm, prompts())) < TOLERANCE
        (tower,) = llm.apply_model(lambda model: model.partner_0)
        before = {name: tensor.clone() for name, tensor in tower.named_parameters()}
        config, weights = llm.llm_engine.model_config, list(trained.named_parameters())
        llm.apply_model(lambda model: reload(model, [(name, tensor.data) for name, tensor in weights], config))
        (tower,) = llm.apply_model(lambda model: model.partner_0)
        after = dict(tower.named_parameters())
        assert all(torch.equal(before[name], after[name]) for name in before)
        rows = generate(llm, prompts())
        assert worst_error([trained, models[1]], MIXTURE, rows) < TOLERANCE
        if drafts:  # which are the new student's own, so that it accepts them all
            set_blend(llm, Blend(LogitMixing(0.0), records=True))
            generate(llm, prompts())
            (sums,) = llm.collective_rpc("take_blend_statistics")
            accepted, tested, _ = sums["draft_acceptance"]
            assert accepted > 0.99 * tested > 10


def test_wrong_folders(tmp_path):
    student = saved(tmp_path / "student")
    with (
        pytest.raises(Exception, match="holds no mixed policy: it has no mixing.json"),
        running(student, hf_overrides={"architectures": [ARCHITECTURE]}),
    ):
        pass
    with (
        pytest.raises(Exception, match="teacher_model='/nowhere'"),
        running(student, ["/nowhere"], Blend(LogitMixing(0.3))),
    ):
        pass

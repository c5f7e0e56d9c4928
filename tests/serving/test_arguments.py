"""What an engine is started with, and what is refused before it starts."""

import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedConfig

from tests.tiny import tiny_model
from trl_blend import LogitMixing
from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.serving import arguments, worker
from trl_blend.serving.arguments import engine_arguments
from trl_blend.serving.blend import Blend, Partner


@pytest.fixture
def vllm_is(monkeypatch):
    def install(version):
        monkeypatch.setattr(arguments, "version", lambda name: version)

    install("0.31.0")
    return install


@pytest.fixture
def dense(tmp_path):
    tiny_model().save_pretrained(tmp_path / "dense")
    return str(tmp_path / "dense")


def test_arguments_without_drafts_fit_into_json(vllm_is, dense):
    partners, blend = (
        [Partner(dense, revision="main"), Partner(dense, dtype="bfloat16")],
        Blend(LogitMixing((0.1, 0.2))),
    )
    given = json.loads(json.dumps(engine_arguments(partners, blend)))
    overrides = given["hf_overrides"]
    assert overrides["architectures"] == ["TrlBlendForCausalLM"] and "num_experts" not in overrides
    assert [Partner(**one) for one in overrides["trl_blend"]["partners"]] == partners
    assert Blend.from_dict(overrides["trl_blend"]["blend"]) == blend
    assert given["sleep_preserve_parameter_names"] == ["partner_0.*", "partner_1.*"]
    module, _, name = given["worker_extension_cls"].rpartition(".")
    assert module == worker.__name__ and hasattr(worker, name)


def test_experts_are_announced(vllm_is, dense, tmp_path):
    tiny_model("qwen3_moe", num_experts=6).save_pretrained(tmp_path / "experts")
    given = engine_arguments([Partner(dense), Partner(str(tmp_path / "experts"))], Blend())
    assert given["hf_overrides"]["num_experts"] == 6


def test_refusals(vllm_is, dense, monkeypatch):
    with pytest.raises(ConfigError, match="`partners` is empty"):
        engine_arguments([], Blend())
    with pytest.raises(ConfigError, match="teacher_model"):
        engine_arguments([Partner("/nowhere")], Blend())
    vllm_is("0.30.1")
    with pytest.raises(UnsupportedError, match="needs vLLM 0.31.0 or newer, and 0.30.1 is installed"):
        engine_arguments([Partner(dense)], Blend())
    vllm_is("0.31.0+cpu")
    assert engine_arguments([Partner(dense)], Blend())


def test_without_vllm(monkeypatch, dense):
    def missing(name):
        raise arguments.PackageNotFoundError

    monkeypatch.setattr(arguments, "version", missing)
    with pytest.raises(ConfigError, match="vLLM.*is not installed"):
        engine_arguments([Partner(dense)], Blend())


def test_an_engine_that_blends_nothing_is_refused():
    class Worker(worker.BlendWorkerExtension):
        def get_model(self):
            return object()

    with pytest.raises(ConfigError, match="The engine serves a object, which blends nothing"):
        Worker().set_blend(Blend().to_dict())


def test_drafts_are_the_students_own_samples(vllm_is, dense):
    given = engine_arguments([Partner(dense)], Blend(), draft_model="student", draft_tokens=(4,))
    assert given.pop("speculative_config") == {
        "method": "draft_model",
        "model": "student",
        "num_speculative_tokens": 4,
        "draft_sample_method": "probabilistic",
    }
    plain = engine_arguments([Partner(dense)], Blend(), draft_model="student")
    config = pickle.loads(pickle.dumps(given.pop("hf_overrides")))(PreTrainedConfig())  # it travels to workers
    expected = plain.pop("hf_overrides")
    assert given == plain and {name: getattr(config, name) for name in expected} == expected
    given = engine_arguments([Partner(dense)], Blend(), draft_model="s", draft_tokens=(0, 4))["speculative_config"]
    assert given["num_speculative_tokens"] == 4
    # Of vLLM: inclusive ranges of the number of requests; the last one holds for more
    assert given["num_speculative_tokens_per_batch_size"] == [(1, 1, 0), (2, 2, 4)]


class Sums:
    def __init__(self):
        self.told = []

    def settle(self, ends, drawn):
        self.told.append((ends.tolist(), drawn.tolist()))


@pytest.mark.parametrize("runner", ["first", "second"])
def test_the_model_is_told_how_many_tokens_were_drawn(runner):
    """Both of vLLM's samplers of drafts, of two requests with two drafts and none."""
    tokens = torch.tensor([[5, 6, -1], [7, -1, -1]])
    if runner == "first":
        given, output = (SimpleNamespace(cu_num_sampled_tokens=torch.tensor([3, 4])),), {}
    else:
        given, output = (None, SimpleNamespace(cu_num_logits=torch.tensor([0, 3, 4]))), {"num_sampled": [2, 1]}
        output = {name: torch.tensor(value) for name, value in output.items()}
    output = SimpleNamespace(sampled_token_ids=tokens, **output)

    def sampler(*args, **kwargs):
        return output

    sampler.parse_output = "of the sampler"
    model = SimpleNamespace(sums=Sums(), set_blend=None, drafts=[])
    model.lead = model.drafts.append

    class Worker(worker.BlendWorkerExtension):
        model_runner = SimpleNamespace(rejection_sampler=sampler)

        def get_model(self):
            return model

        def get_draft_model(self):
            return "draft model"

    engine = Worker()
    assert engine.lead_drafts() and engine.lead_drafts()  # a trainer may come back to a server
    observed = engine.model_runner.rejection_sampler
    assert observed(*given) is output and observed.parse_output == "of the sampler"
    assert model.sums.told == [([3, 4], [2, 1])] and model.drafts == ["draft model"] * 2


@pytest.mark.parametrize("runner", ["first", "second"])
def test_what_drafts_is_limited(runner):
    model = SimpleNamespace(set_blend=lambda blend: None)
    drafts = []

    class Draft(torch.nn.Linear):
        def forward(self, input_ids, positions):
            drafts.append(len(input_ids))
            return super().forward(torch.ones(len(input_ids), 4))

    drafter = SimpleNamespace(model=Draft(4, 3), hidden_size=3, dtype=torch.float32)
    if runner == "second":
        drafter.num_speculative_steps = 8

    class Worker(worker.BlendWorkerExtension):
        model_runner = SimpleNamespace(**{{"first": "drafter", "second": "speculator"}[runner]: drafter})

        def get_model(self):
            return model

    ids = {"input_ids": torch.tensor([5, 6]), "positions": torch.tensor([0, 1])}
    for number, steps in ((4, 4), (0, 1), (0, 1), (1, 1)):
        Worker().set_blend(Blend(draft_tokens=number).to_dict())
        assert drafter.model(**ids).shape == (2, 3)
        assert drafts == ([2] if number else []) and drafter.model.weight.shape == (3, 4)
        assert runner == "first" or drafter.num_speculative_steps == steps
        drafts.clear()


def test_an_engine_without_drafts_leads_none():
    class Worker(worker.BlendWorkerExtension):
        def get_draft_model(self):
            return None

    assert not Worker().lead_drafts()

"""TRL's engine holding the teachers: what it is started with, and what it is told and sent, in which order."""

import copy
from types import SimpleNamespace

import pytest
import torch
import trl.generation.vllm_generation as trl_vllm
from accelerate import Accelerator
from trl.generation import vllm_client

from tests.distributed.conftest import free_port
from tests.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.trainers import engines
from trl_blend import LogitMixing, TrustRegion
from trl_blend.errors import ConfigError, EngineError, UnsupportedError
from trl_blend.serving.blend import Blend, Partner
from trl_blend.serving.drafts import DraftChoice
from trl_blend.trainers import _engine


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def vllm(monkeypatch):
    accelerator = Accelerator(cpu=True)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # TRL sets them: they go after the test
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setattr(trl_vllm, "is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(trl_vllm, "ensure_master_addr_port", lambda: None)
    monkeypatch.setattr(trl_vllm, "empty_cache", lambda: None)
    monkeypatch.setattr(trl_vllm, "LLM", engines.LLM, raising=False)
    monkeypatch.setattr(trl_vllm, "SamplingParams", lambda **settings: settings, raising=False)
    monkeypatch.setattr("trl_blend.serving.arguments.version", lambda name: "0.31.0")
    return accelerator


def start(folder, model=None, **given):
    model = tiny_model() if model is None else model
    model.name_or_path = folder
    settings = {"partners": [Partner(folder)], "blend": Blend(LogitMixing(0.3)), "partners_stop": False, **given}
    engine = _engine.BlendedVLLMGeneration(
        model=model, accelerator=Accelerator(cpu=True), processing_class=tiny_tokenizer(), **settings
    )
    if engine.mode == "colocate":
        engine.llm.events.remove(("check_takes_weights", "student"))
    return engine


def draw(engine):
    engine.generate(prompts=[[5, 6], [7]], images=None, num_generations=1)
    events, engine.llm.events = engine.llm.events, []
    return [event for event in events if event[0] != "student"]


def test_what_an_engine_is_started_with(vllm, folder):
    given = start(folder).llm.started_with
    assert given["model"] == folder and given["logprobs_mode"] == "processed_logprobs"
    content = given["hf_overrides"]["trl_blend"]
    assert content["partners"][0]["model"] == folder
    assert Blend.from_dict(content["blend"]) == Blend(LogitMixing(0.3))
    assert "sleep_preserve_parameter_names" not in given and "compilation_config" not in given
    assert trl_vllm.LLM is engines.LLM  # put back
    given = start(folder, partners=[None], partners_stop=True, enable_sleep_mode=True).llm.started_with
    assert given["hf_overrides"]["trl_blend"]["partners"][0]["model"] == folder  # the student's own base
    assert given["sleep_preserve_parameter_names"] == ["partner_0.*"]
    assert given["compilation_config"] == {"cudagraph_mode": "PIECEWISE"} and "speculative_config" not in given


def test_an_engine_that_drafts(vllm, folder):
    engine = start(folder, draft_tokens=4)
    drafts = engine.llm.started_with["speculative_config"]
    assert drafts["model"] == folder and drafts["num_speculative_tokens"] == 4
    assert engine.llm.events == [("lead_drafts",), ("student_share",)]  # before it is sent any weights
    engine.llm.events = []
    for rule, number, expected in (
        (LogitMixing(0.3), 4, ["set_blend", "generate"]),
        (None, 0, ["set_blend", "generate"]),
        (LogitMixing(0.2), 4, ["reset", "set_blend", "generate"]),
    ):
        engine.set_rule(rule, [1])
        assert [event if event == "reset" else event[0] for event in draw(engine)] == expected
        assert engine.blend.draft_tokens == number and engine.llm.dynamic_sd_lookup == [number] * 4


def test_the_number_of_drafts_follows_what_is_accepted(vllm, folder):
    engine = start(folder, draft_tokens="auto")
    assert engine.llm.started_with["speculative_config"]["num_speculative_tokens"] == 8
    numbers = []
    for accepted, rule in ((95, TrustRegion(0.05)), (5, TrustRegion(0.05)), (0, TrustRegion(0.0002)), (0, None)):
        engine.set_rule(rule, [1])
        draw(engine)
        numbers.append(engine.llm.dynamic_sd_lookup[-1])
        engine.llm.answers["take_blend_statistics"] = {"draft_acceptance": [accepted, 100, 1.0]}
        engine.take_statistics()
    bound = DraftChoice("auto")
    bound.student_share = 0.15
    assert numbers[0] == bound(TrustRegion(0.05)) > 0
    assert numbers[1] > numbers[0] and numbers[2] > 0 and numbers[3] == 0
    engine.set_rule(TrustRegion(0.05), [1])  # nothing was accepted at a much smaller budget
    assert engine.blend.draft_tokens == 0
    draw(engine)
    engine.set_rule(TrustRegion(1e-8), [1])  # the draft model has not seen what was drawn without it
    assert engine.blend.draft_tokens > 0 and draw(engine)[0] == "reset"


def test_an_engine_without_memory(vllm, folder, monkeypatch):
    def no_room(**settings):
        raise ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.")

    monkeypatch.setattr(trl_vllm, "LLM", no_room)
    with pytest.raises(EngineError, match="caches of 2 models: No available memory.*`vllm_gpu_memory_utilization`"):
        start(folder)
    monkeypatch.setattr(trl_vllm, "LLM", lambda **settings: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        start(folder)


@pytest.mark.parametrize(
    "error", [ConnectionError("Connection refused."), type("EngineDeadError", (Exception,), {})()]
)
def test_an_engine_that_is_gone(vllm, folder, monkeypatch, error):
    engine = start(folder)

    def gone(*args, **kwargs):
        raise error

    monkeypatch.setattr(engine.llm, "generate", gone)
    with pytest.raises(EngineError, match="draws no more rollouts.*`resume_from_checkpoint=True`"):
        engine.generate(prompts=[[5, 6]], images=None, num_generations=1)


def test_an_engine_is_told_what_changes(vllm, folder):
    engine = start(folder, temperature=0.7)
    engine.set_rule(LogitMixing(0.3), [1], records=True)
    told = Blend(LogitMixing(0.3), 0.7, stop_token_ids=(1,), records=True)
    assert draw(engine) == [("set_blend", told.to_dict()), ("generate", 0.7)]
    assert draw(engine) == [("generate", 0.7)]  # nothing new
    engine.set_rule(None, [1])
    assert [event[0] for event in draw(engine)] == ["set_blend", "generate"]
    engine.set_rule(TrustRegion(0.1), [1])
    # The teachers have not seen the prefixes of the last call
    assert [event if event == "reset" else event[0] for event in draw(engine)] == ["reset", "set_blend", "generate"]
    assert engine.take_statistics() == {"kl_behavior_student": (2.0, 4, 1.0)}


def test_greedy_decoding_blends_at_temperature_one(vllm, folder):
    engine = start(folder, temperature=0.7, top_p=0.9, generation_kwargs={"top_k": 5, "seed": 3, "temperature": 0.6})
    engine.set_rule(LogitMixing(0.3), [1])
    assert engine.blend.temperature == 0.6
    with _engine.greedy(engine):
        assert engine.generation_kwargs == {"seed": 3} and engine.top_p == 1.0
        engine.set_rule(LogitMixing(0.3), [1])
        assert engine.blend.temperature == 1.0 and draw(engine)[-1] == ("generate", 0.0)
    assert (engine.temperature, engine.top_p, engine.generation_kwargs["top_k"]) == (0.7, 0.9, 5)


def test_a_sleeping_engine_is_woken_before_it_is_told(vllm, folder):
    engine = start(folder, enable_sleep_mode=True)
    assert engine.llm.events == ["sleep"]
    engine.send_partners({0: (tiny_model(seed=1), True)})
    engine.llm.events = []
    engine.set_rule(LogitMixing(0.5), [1])
    events = [event if isinstance(event, str) else event[0] for event in draw(engine)]
    assert events[0] == "wake weights" and events.index("partner_0") < events.index("set_blend")
    assert events[-3:] == ["wake kv_cache", "generate", "sleep"]


def test_experts_are_kept_as_they_are_sent(vllm, folder, monkeypatch):
    assert "moe_backend" not in start(folder, tiny_model("qwen3_moe")).llm.started_with
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert start(folder, tiny_model("qwen3_moe")).llm.started_with["moe_backend"] == "triton"
    assert "moe_backend" not in start(folder).llm.started_with


def test_a_teacher_in_memory_is_sent_once(vllm, folder):
    engine, teacher = start(folder), tiny_model(seed=1)
    engine.send_partners({0: (teacher, True)})
    assert engine.llm.events[-1] == ("check_takes_weights", "partner_0")
    for expected in (dict(teacher.named_parameters()), {}):
        engine.llm.events = []
        engine.sync_weights()
        sent = {name: tensor for kind, name, tensor in (e for e in engine.llm.events if e[0] == "partner_0")}
        assert sent.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in sent.items())
        assert any(event[0] == "student" for event in engine.llm.events)


@pytest.mark.parametrize("merged", [True, False])
def test_adapters_are_merged_or_left_out(vllm, folder, merged):
    untied = tiny_model(seed=1, tie_word_embeddings=False)
    engine, model = start(folder), tiny_lora(copy.deepcopy(untied), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    whole = copy.deepcopy(model).merge_and_unload() if merged else untied
    expected = dict(whole.named_parameters())
    engine.send_partners({0: (model, merged)})
    engine.llm.events = []
    engine.sync_weights()
    sent = {name: tensor for kind, name, tensor in (e for e in engine.llm.events if e[0] == "partner_0")}
    assert sent.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in sent.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


def test_one_matrix_that_an_adapter_has_trained_as_two(vllm, folder):
    engine, model = start(folder), tiny_lora(tiny_model(seed=1, tie_word_embeddings=True), modules_to_save=["lm_head"])
    with pytest.raises(UnsupportedError, match="`teacher_model` is an adapter with .*`merge_and_unload"):
        engine.send_partners({0: (model, True)})
    engine.send_partners({0: (model, False)})  # the student's base is as it was


def test_ranks_with_an_engine_each_wait_for_none_of_the_others(vllm, folder, monkeypatch):
    """Their turns with tools are not as many."""
    engine = start(folder, draft_tokens="auto")
    monkeypatch.setattr(_engine, "broadcast_object_list", None)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", None)
    assert "kl_behavior_student" in engine.take_statistics()


# A server


class Client:
    """In the shape of TRL's client of a server."""

    def __init__(self, base_url, group_port, connection_timeout):
        self.base_url, self.posts, self.partners = base_url, [], ["teacher"]

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def reset_prefix_cache(self):
        self.posts.append("reset")

    def _post(self, url, json):
        if self.partners is None:
            raise Exception("Request failed: 404")
        self.posts.append((url, json["method"], *json["args"]))
        answers = {
            "describe_blend": {"partners": self.partners},
            "take_blend_statistics": {"kl_behavior_student": [2.0, 4, 1.0]},
        }
        return {"results": [answers.get(json["method"])] * 2}


def test_a_server_is_told_by_rpc(vllm, folder, monkeypatch):
    monkeypatch.setattr(trl_vllm, "VLLMClient", Client)
    engine = start(folder, mode="server", server_base_url="http://host:1", partners=[None])
    url = "http://host:1/collective_rpc"
    first = Blend(LogitMixing(0.3)).to_dict()
    assert engine.vllm_client.posts == [(url, "describe_blend"), (url, "lead_drafts"), (url, "set_blend", first)]
    assert engine.take_statistics() == {"kl_behavior_student": (2.0, 4, 1.0)}
    with pytest.raises(ConfigError, match=r"The server holds 1 teacher\(s\), \['teacher'\], but the trainer has 2"):
        start(folder, mode="server", server_base_url="http://host:1", partners=[None, None])
    with monkeypatch.context() as patch:
        raw = {"model_config": {"logprobs_mode": "raw_logprobs"}}
        patch.setattr(Client, "get_server_info", lambda self: raw)
        with pytest.raises(ConfigError, match="http://host:1 was started with `--logprobs-mode raw_logprobs`"):
            start(folder, mode="server", server_base_url="http://host:1", partners=[None])
    monkeypatch.setattr(Client, "_post", lambda self, url, json: 1 / 0)
    with pytest.raises(EngineError, match="http://host:1 did not answer `describe_blend`"):
        start(folder, mode="server", server_base_url="http://host:1", partners=[None])


def test_a_server_that_is_gone(vllm, folder, monkeypatch):
    monkeypatch.setattr(trl_vllm, "VLLMClient", Client)
    url = f"http://127.0.0.1:{free_port()}"  # nobody listens there
    engine = start(folder, mode="server", server_base_url=url, partners=[None])
    client = object.__new__(vllm_client.VLLMClient)  # TRL's own, which looks for the server when it is made
    client.base_url, client.session, client.model = url, vllm_client.requests.Session(), "model"
    engine.vllm_client = client
    with pytest.raises(EngineError, match=f"server at {url} draws no more rollouts: .*`resume_from_checkpoint=True`"):
        engine.generate(prompts=[[5, 6]], images=None, num_generations=1)
    with pytest.raises(EngineError, match=f"server at {url} did not answer `take_blend_statistics`"):
        engine.take_statistics()


# Which teachers


def config(**given):
    settings = {"teacher_model_init_kwargs": None, "teacher_model_revision": None, "trust_remote_code": False}
    return SimpleNamespace(**{"vllm_mode": "colocate", **settings, **given})


def test_partners_of(vllm, folder, tmp_path):
    teacher = tiny_model(seed=1)
    teacher.name_or_path = folder
    assert _engine.partners_of([], config()) == [None]
    given = config(teacher_model_init_kwargs={"dtype": torch.bfloat16, "attn_implementation": "eager"})
    assert _engine.partners_of([folder, teacher], given) == [Partner(folder, dtype="bfloat16")] * 2
    given = config(teacher_model_init_kwargs={"dtype": "auto"}, trust_remote_code=True)
    assert _engine.partners_of([folder], given) == [Partner(folder, trust_remote_code=True)]
    given = config(teacher_model_init_kwargs={"revision": "v2"}, teacher_model_revision="v1")
    assert _engine.partners_of([folder], given) == [Partner(folder, "v2")]  # what the loss loads, too
    assert _engine.partners_of([folder, folder], config(vllm_mode="server")) == [None, None]
    adapted = tiny_lora(tiny_model())
    adapted.peft_config["default"].base_model_name_or_path = folder
    adapted.save_pretrained(tmp_path / "adapter")
    assert _engine.partners_of([str(tmp_path / "adapter")], config()) == [Partner(folder)]
    assert _engine.in_memory(teacher, [folder, teacher, "adapter"], [teacher, teacher, adapted]) == {
        1: (teacher, True),
        2: (adapted, True),
    }
    assert _engine.in_memory(teacher, [], []) == {0: (teacher, False)}


@pytest.mark.parametrize("name", ["quantization_config", "subfolder", "gguf_file", "variant"])
def test_weights_that_an_engine_is_not_told_of(vllm, folder, name):
    with pytest.raises(UnsupportedError, match=f"`teacher_model_init_kwargs` has `{name}='x'`"):
        _engine.partners_of([folder], config(teacher_model_init_kwargs={name: "x"}))


def test_teachers_that_an_engine_cannot_load(vllm, folder):
    with pytest.raises(UnsupportedError, match="`teacher_model` was built in memory.*Save it with its tokenizer"):
        _engine.partners_of([tiny_model()], config())
    teacher = tiny_model()
    teacher.name_or_path, teacher.is_quantized = folder, True
    with pytest.raises(UnsupportedError, match="`teacher_model` is a quantized model in memory"):
        _engine.partners_of([teacher], config())


def test_without_vllm(monkeypatch, folder):
    monkeypatch.setattr("trl_blend.serving.arguments.version", lambda name: "0.30.0")
    with pytest.raises(UnsupportedError, match="0.30.0 is installed"):
        _engine.partners_of([folder], config())

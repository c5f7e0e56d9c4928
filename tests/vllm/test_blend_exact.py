"""The engine draws from the blend: its log-probabilities and its frequencies are those of transformers."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaConfig

from tests.tiny import tiny_model
from tests.vllm.conftest import keep_weights_on_the_cpu
from tests.vllm.engines import SHAPE, generate, prompts, running, saved, set_blend, teacher_forced, worst_error
from trl_blend import LogitMixing, ProbabilityMixing, SpeculativeKD, TrustRegion
from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.generation.rules import ChernoffBlend, ContrastiveDecoding, LogitArithmetic
from trl_blend.ops.vocab import EosMap
from trl_blend.serving.blend import Blend, Partner


pytestmark = pytest.mark.vllm

TOLERANCE = 5e-5
# The rule finds its weight to 1e-4, wherever rounding leads it; these models differ by up to 20 nats at a token
CHERNOFF_TOLERANCE = 1e-4 * 20
ONE_PARTNER = {
    "logits": LogitMixing(0.3),
    "probabilities": ProbabilityMixing((0.4,)),
    "trust_region": TrustRegion(0.05),
    "skd": SpeculativeKD(5, 0.6),
    "chernoff": ChernoffBlend(0.8),
    "contrastive": ContrastiveDecoding(0.1, 0.5),
    "arithmetic": LogitArithmetic(1.2, (-0.4,)),
    "teacher_only": LogitMixing((1.0,)),
}
TWO_PARTNERS = {
    "logits": LogitMixing((0.3, 0.2)),
    "probabilities": ProbabilityMixing((0.1, 0.5)),
    "arithmetic": LogitArithmetic(1.0, (0.7, -0.7)),
}
# Student and partners: an architecture, or one with its settings
PAIRS = {
    "deeper": ["qwen3", ("qwen3", {"num_hidden_layers": 3})],
    "other_family_and_heads": ["qwen3", ("llama", {"head_dim": 64, "num_key_value_heads": 1})],
    "wider_vocabulary": ["llama", ("qwen3", {"vocab_size": 80})],
    "narrower_vocabulary": [("qwen3", {"vocab_size": 80}), "llama"],
    "sliding_windows": ["gemma3", ("gemma3", {"head_dim": 64, "num_hidden_layers": 4})],
    "gemma3_beside_qwen3": ["qwen3", "gemma3"],
    "window_of_the_student": ["mistral", ("llama", {"num_hidden_layers": 1})],
    "window_of_the_partner": ["llama", "mistral"],
    "experts_beside_dense": ["qwen3", "qwen3_moe"],
    "dense_beside_experts": ["qwen3_moe", "qwen3"],
    "experts_beside_experts": ["qwen3_moe", ("qwen3_moe", {"num_experts": 6})],
    "two_partners": ["qwen3", ("llama", {"vocab_size": 72}), ("qwen3_moe", {"num_hidden_layers": 1})],
}


def write_pair(folder, pair):
    folders = []
    for seed, one in enumerate(pair):
        arch, overrides = (one, {}) if isinstance(one, str) else one
        if arch == "gemma3" and "num_hidden_layers" in overrides:
            overrides = {"layer_types": ["sliding_attention", "full_attention"] * 2, **overrides}
        folders.append(saved(folder / str(seed), arch, seed=seed, **overrides))
    models = [AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval() for path in folders]
    return folders, models


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, tmp_path_factory):
    """An engine, and the models that it holds, by transformers."""
    folders, models = write_pair(tmp_path_factory.mktemp("pair"), PAIRS[request.param])
    rule = LogitMixing((0.3,) + (0.2,) * (len(folders) - 2))
    with running(folders[0], folders[1:], Blend(rule)) as llm:
        yield llm, models, Blend(rule)


def check(pair, blend, temperature, **settings):
    llm, models, _ = pair
    set_blend(llm, blend)
    rows = generate(llm, prompts(), temperature, **settings)
    assert sum(len(ids) for _, ids, _ in rows) > 20
    tolerance = CHERNOFF_TOLERANCE if isinstance(blend.rule, ChernoffBlend) else TOLERANCE
    assert worst_error(models, blend, rows) < tolerance
    return rows


def test_log_probabilities_of_every_pair(pair):
    llm, models, first = pair
    rows = generate(llm, prompts())  # with what the engine was started with
    assert worst_error(models, first, rows) < TOLERANCE
    # Nothing else would pass for it: a weight that is a little off is seen
    off = Blend(LogitMixing(tuple(weight + 0.01 for weight in first.rule.weights)))
    assert worst_error(models, off, rows) > 20 * TOLERANCE
    for rule in (ONE_PARTNER if len(models) == 2 else TWO_PARTNERS).values():
        rows += check(pair, Blend(rule, temperature=0.7), 0.7)
    set_blend(llm, Blend())
    rows += generate(llm, prompts())
    # What one of the models has no row for is never drawn, by the student alone neither
    assert max(token for _, ids, _ in rows for token in ids) < min(model.config.vocab_size for model in models)


def test_weights_that_are_sent_to_experts(pair):
    """The last test of each pair. The kernel of a CPU wants another layout, so that only what arrives is compared."""
    llm, models, _ = pair
    (engine,) = llm.apply_model(lambda model: model)
    names = ["student", *(f"partner_{index}" for index in range(len(models) - 1))]
    for index, (name, model) in enumerate(zip(names, models, strict=True)):
        if model.config.model_type != "qwen3_moe":
            llm.collective_rpc("check_takes_weights", args=(name,))
            continue
        with pytest.raises(UnsupportedError, match=rf"lays the experts of `{name}` out for a kernel \(CPU\)"):
            llm.collective_rpc("check_takes_weights", args=(name,))
        sent = {key: one + 1 for key, one in model.named_parameters() if ".experts." in key}
        assert sent
        if index == 0:
            engine.load_weights(sent.items())
        else:
            engine.load_partner_weights(index - 1, sent.items())
        found = dict(getattr(engine, name).named_parameters())
        for key, tensor in sent.items():
            key = key.replace("gate_up_proj", "routed_experts.w13_weight")
            assert torch.equal(found[key.replace("down_proj", "routed_experts.w2_weight")], tensor)


def test_a_prompt_with_a_token_that_a_partner_has_no_row_for_does_not_end_the_engine(tmp_path):
    folders, models = write_pair(tmp_path, PAIRS["narrower_vocabulary"])
    blend = Blend(LogitMixing(0.3))
    with running(folders[0], folders[1:], blend) as llm:
        generate(llm, [[10, models[0].config.vocab_size - 1, 12]])
        assert worst_error(models, blend, generate(llm, prompts())) < TOLERANCE


@pytest.fixture(scope="module")
def simple(tmp_path_factory):
    folders, models = write_pair(tmp_path_factory.mktemp("simple"), PAIRS["deeper"])
    with running(folders[0], folders[1:], Blend(ONE_PARTNER["logits"])) as llm:
        yield llm, models, None


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("name", ONE_PARTNER)
def test_rules_and_temperatures(simple, name, temperature):
    check(simple, Blend(ONE_PARTNER[name], temperature=temperature), temperature)


@pytest.mark.parametrize("name", ONE_PARTNER)
def test_greedy_tokens_are_the_most_likely_ones(simple, name):
    llm, models, _ = simple
    blend = Blend(ONE_PARTNER[name])
    set_blend(llm, blend)
    for prompt, ids, _ in generate(llm, prompts(), temperature=0.0):
        policy, _, _ = teacher_forced(models, blend, prompt, ids)
        chosen = policy.gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
        assert (policy.amax(-1) - chosen).max() < TOLERANCE


@pytest.mark.parametrize("name", ["logits", "trust_region", "skd"])
def test_merged_ends_of_sequence(simple, name):
    eos = EosMap(1, (9, 17, 500))
    rows = check(simple, Blend(ONE_PARTNER[name], temperature=0.7, eos=eos), 0.7)
    assert not {9, 17} & {token for _, ids, _ in rows for token in ids}


def test_only_tokens_are_drawn(simple):
    for rule in (ONE_PARTNER["probabilities"], ONE_PARTNER["contrastive"]):
        rows = check(simple, Blend(rule, vocab_size=30), 1.0)
        assert max(token for _, ids, _ in rows for token in ids) < 30


def test_without_a_rule_the_partners_do_not_run(simple):
    llm, models, _ = simple
    (tower,) = llm.apply_model(lambda model: model.partner_0)
    calls = []
    handle = tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        set_blend(llm, Blend())
        rows = generate(llm, prompts(shortest=2))
        assert not calls and worst_error(models[:1], Blend(LogitMixing(())), rows) < TOLERANCE
        # What the partner has not seen is not taken from the cache of prefixes
        assert llm.reset_prefix_cache()
        blend = Blend(ONE_PARTNER["logits"])
        set_blend(llm, blend)
        assert worst_error(models, blend, generate(llm, prompts(shortest=2))) < TOLERANCE and calls
    finally:
        handle.remove()


def test_statistics_are_those_of_the_drawn_tokens(simple):
    llm, models, _ = simple
    blend = Blend(ONE_PARTNER["trust_region"], temperature=0.7, stop_token_ids=(1, 20, 21, 22, 23), records=True)
    set_blend(llm, blend)
    llm.collective_rpc("take_blend_statistics")
    rows = generate(llm, prompts(), 0.7, stop_token_ids=[20, 21, 22, 23])
    (sums,) = llm.collective_rpc("take_blend_statistics")
    tokens = sum(len(ids) for _, ids, _ in rows)
    assert any(ids[-1] in (20, 21, 22, 23) for _, ids, _ in rows)  # the engine was a step ahead of some ends
    assert all(count == tokens for _, count, _ in sums.values())
    steps = [teacher_forced(models, blend, prompt, ids) for prompt, ids, _ in rows]
    for name in ("teacher_weight", "teacher_feasible", "kl_behavior_student", "kl_behavior_teacher"):
        values = torch.cat([step.statistics[name] for _, step, _ in steps])
        assert sums[name][0] == pytest.approx(values.sum().item(), rel=1e-3)
        assert sums[name][2] == pytest.approx(values.max().item(), rel=1e-3)
    teacher = torch.cat([partner[0].log_softmax(-1) for _, _, partner in steps]).double()
    behavior = torch.cat([policy for policy, _, _ in steps]).double()
    assert sums["teacher_logp_0"][0] == pytest.approx((behavior.exp() * teacher).sum().item(), rel=1e-3)
    assert sums["teacher_entropy_0"][0] == pytest.approx(-(teacher.exp() * teacher).sum().item(), rel=1e-3)
    assert llm.collective_rpc("take_blend_statistics") == [{}]
    generate(llm, prompts(2), 0.7)
    set_blend(llm, Blend(ONE_PARTNER["logits"], records=True))  # whose statistics are others
    rows = generate(llm, prompts(2))
    (sums,) = llm.collective_rpc("take_blend_statistics")
    assert "teacher_weight" not in sums
    assert sums["kl_behavior_student"][1] >= sum(len(ids) for _, ids, _ in rows)


def test_another_number_of_weights_is_refused(simple):
    with pytest.raises(ConfigError, match=r"2 weight\(s\) for an engine with 1 partner"):
        set_blend(simple[0], Blend(LogitMixing((0.1, 0.2))))


# Frequencies

DRAWS = 50_000


def g_test(counts, probabilities):
    """p-value of the likelihood-ratio test, cells of few expected counts taken together."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = expected > 0
    assert not counts[~kept].any()
    counts, expected = counts[kept], expected[kept]
    statistic = 2 * torch.special.xlogy(counts, counts / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


@torch.no_grad()
def enumerated(models, blend, prompt):
    """Probabilities of the first token `(V,)` and of the first two `(V, V)`, in float64."""
    first = teacher_forced(models, blend, prompt, [0])[0][0].double().exp()
    second = [teacher_forced(models, blend, [*prompt, token], [0])[0][0].double().exp() for token in range(len(first))]
    return first, first[:, None] * torch.stack(second)


@pytest.mark.parametrize("name", ["logits", "trust_region"])
def test_frequencies_are_those_of_the_blend(simple, name):
    llm, models, _ = simple
    prompt, blend = prompts()[3], Blend(ONE_PARTNER[name], temperature=0.9)
    set_blend(llm, blend)
    rows = generate(llm, [prompt] * DRAWS, 0.9, max_tokens=2, ignore_eos=True)
    drawn = torch.tensor([ids for _, ids, _ in rows])
    size = 64
    firsts = drawn[:, 0].bincount(minlength=size).double()
    pairs = (drawn[:, 0] * size + drawn[:, 1]).bincount(minlength=size * size).double()
    first, both = enumerated(models, blend, prompt)
    assert g_test(firsts, first) > 1e-3 and g_test(pairs, both.flatten()) > 1e-3
    # Power: it tells the blend from one whose weight is off by .05, and from the student
    others = [LogitMixing(0.25), LogitMixing(0.35)] if name == "logits" else [TrustRegion(0.035), TrustRegion(0.07)]
    for rule in (*others, LogitMixing(0.0)):
        first, both = enumerated(models, Blend(rule, temperature=0.9), prompt)
        assert g_test(firsts, first) < 1e-6 and g_test(pairs, both.flatten()) < 1e-6


def repeat_output_layer(folder):
    """Some checkpoints hold it although it is tied to the embedding."""
    tensors = load_file(f"{folder}/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})


def test_an_output_layer_that_a_checkpoint_repeats_follows_the_embedding(monkeypatch, tmp_path):
    """Of a model with both tied a trainer sends the embedding only."""
    keep_weights_on_the_cpu(monkeypatch)
    folders, models = write_pair(tmp_path, ["qwen3", "qwen3"])
    for folder in folders:
        repeat_output_layer(folder)
    trained = tiny_model(seed=5, **SHAPE)
    weights, blend = [(name, weight.data) for name, weight in trained.named_parameters()], Blend(LogitMixing(0.3))
    assert trained.config.tie_word_embeddings and "lm_head.weight" not in dict(weights)
    with running(folders[0], folders[1:], blend) as llm:
        assert worst_error(models, blend, generate(llm, prompts())) < TOLERANCE
        llm.apply_model(lambda model: len(model.load_weights(weights)))
        llm.reset_prefix_cache()
        assert worst_error([trained, models[1]], blend, generate(llm, prompts())) < TOLERANCE


def test_what_the_towers_cannot_be_passed(simple, tmp_path):
    from vllm.config import ModelConfig

    from trl_blend.serving import model as serving

    llm, _, _ = simple
    recurrent = MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=64, architectures=["MambaForCausalLM"])
    recurrent.save_pretrained(tmp_path / "recurrent")
    (engine,) = llm.apply_model(lambda model: model)
    with pytest.raises(UnsupportedError, match="prompt came as embeddings"):
        engine(None, torch.arange(3), inputs_embeds=torch.zeros(3, 64))
    settings = copy.copy(engine._configs[0])
    settings.model_config = ModelConfig(
        str(tmp_path / "recurrent"), tokenizer=engine._configs[0].model_config.tokenizer
    )
    with pytest.raises(UnsupportedError, match="the student .*MambaForCausalLM.* has a recurrent state"):
        serving._tower(settings, "the student", "")
    stages = SimpleNamespace(pipeline_parallel_size=2)
    content = SimpleNamespace(trl_blend={"partners": [], "blend": Blend().to_dict()})
    with pytest.raises(UnsupportedError, match="`pipeline_parallel_size=2`: .*Use `tensor_parallel_size`"):
        given = SimpleNamespace(model_config=SimpleNamespace(hf_config=content), parallel_config=stages)
        serving.BlendForCausalLM(vllm_config=given)


def test_a_teacher_in_its_own_dtype(tmp_path):
    folders, models = write_pair(tmp_path, PAIRS["other_family_and_heads"])
    models[1].to(torch.bfloat16)
    blend = Blend(LogitMixing(0.5))
    with running(folders[0], [Partner(folders[1], dtype="bfloat16")], blend) as llm:
        (engine,) = llm.apply_model(lambda model: model)
        assert {one.dtype for one in engine.student.parameters()} == {torch.float32}
        assert {one.dtype for one in engine.partner_0.parameters()} == {torch.bfloat16}
        rows = generate(llm, prompts())
    error, off = (worst_error(models, Blend(LogitMixing(weight)), rows) for weight in (0.5, 0.4))
    assert error < 0.4 < off  # logits of 20 nats, rounded to 8 bits in every layer


def test_a_teacher_with_a_shorter_context_is_named(tmp_path):
    folders, _ = write_pair(tmp_path, ["qwen3", ("qwen3", {"max_position_embeddings": 64})])
    with (
        pytest.raises(ConfigError, match="/1' reads fewer tokens than the 128 .*Lower `max_model_len`"),
        running(folders[0], folders[1:], Blend(LogitMixing(0.3))),
    ):
        pass


def test_compiled(tmp_path, monkeypatch):
    from vllm.compilation.counter import compilation_counter

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    folders, models = write_pair(tmp_path, PAIRS["deeper"])
    blend, before = Blend(ONE_PARTNER["logits"]), compilation_counter.num_models_seen
    with running(folders[0], folders[1:], blend, enforce_eager=False) as llm:
        assert compilation_counter.num_models_seen >= before + 2  # each tower by itself
        assert worst_error(models, blend, generate(llm, prompts())) < TOLERANCE


@pytest.mark.parametrize("pair", ["wider_vocabulary", "experts_beside_dense"])
def test_two_devices(monkeypatch, tmp_path, pair):
    """Half of each layer on either of two workers, which agree on what was drawn."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    folders, models = write_pair(tmp_path, PAIRS[pair])
    blend = Blend(LogitMixing(0.3))
    with running(folders[0], folders[1:], blend, tensor_parallel_size=2) as llm:
        assert worst_error(models, blend, generate(llm, prompts())) < TOLERANCE
        blend = Blend(TrustRegion(0.05), temperature=0.7, records=True)
        set_blend(llm, blend)
        rows = generate(llm, prompts(), 0.7)
        assert worst_error(models, blend, rows) < TOLERANCE
        first, second = llm.collective_rpc("take_blend_statistics")
    assert first == second and first["kl_behavior_student"][1] == sum(len(ids) for _, ids, _ in rows)


def test_the_plugin_costs_nothing_without_a_blend():
    code = (
        "import sys, time\n"
        "import vllm.plugins\n"
        "from vllm import ModelRegistry\n"
        "before = set(sys.modules)\n"
        "start = time.perf_counter()\n"
        "vllm.plugins.load_general_plugins()\n"
        "seconds = time.perf_counter() - start\n"
        "loaded = {name for name in set(sys.modules) - before if name.startswith('trl_blend')}\n"
        "print('TrlBlendForCausalLM' in ModelRegistry.get_supported_archs(), seconds < 1.0, *sorted(loaded))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    modules = "trl_blend trl_blend._version trl_blend.serving trl_blend.serving.plugin"
    assert done.stdout.splitlines()[-1] == f"True True {modules}"


def test_drafts_are_refused_where_their_sampler_is_wrong(tmp_path):
    """That of vLLM 0.31 on a CPU; `test_drafts` corrects it."""
    folders, _ = write_pair(tmp_path, PAIRS["deeper"])
    with (
        pytest.raises(Exception, match="draws wrong tokens from drafts on a CPU"),
        running(folders[0], folders[1:], Blend(LogitMixing(0.3)), draft_tokens=(2,)),
    ):
        pass

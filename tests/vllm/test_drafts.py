"""Drafts change the price of the blend's tokens and nothing else: not their distribution, not their probabilities."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.vllm.conftest import expand_on_the_cpu, keep_weights_on_the_cpu
from tests.vllm.engines import generate, passes, prompts, running, saved, set_blend, teacher_forced, worst_error
from tests.vllm.test_blend_exact import PAIRS, TOLERANCE, g_test, repeat_output_layer, write_pair
from trl_blend import LogitMixing, TrustRegion
from trl_blend.generation.step import blend_step
from trl_blend.ops.trust_region import acceptance_bound
from trl_blend.serving.arguments import engine_arguments
from trl_blend.serving.blend import Blend, Partner
from trl_blend.serving.drafts import NUMBERS


pytestmark = pytest.mark.vllm

DRAFTS = 4
RULES = {
    **{f"logits_{weight}": LogitMixing(weight) for weight in (0.1, 0.3, 0.5)},
    **{f"trust_region_{budget}": TrustRegion(budget) for budget in (0.001, 0.01, 0.05)},
}
STOPS = (20, 21, 22, 23)


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        expand_on_the_cpu(patch)
        yield


@pytest.fixture(scope="module")
def drafting(on_the_cpu, tmp_path_factory):
    folders, models = write_pair(tmp_path_factory.mktemp("drafting"), PAIRS["deeper"])
    with running(folders[0], folders[1:], Blend(LogitMixing(0.3)), draft_tokens=(DRAFTS,)) as llm:
        yield llm, models


def statistics(llm):
    (sums,) = llm.collective_rpc("take_blend_statistics")
    return sums


def passes_per_token(llm):
    total, count, _ = statistics(llm)["passes_per_token"]
    return total / count


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("name", RULES)
def test_log_probabilities(drafting, name, temperature):
    llm, models = drafting
    blend = Blend(RULES[name], temperature=temperature, records=True)
    set_blend(llm, blend)
    rows = generate(llm, prompts(), temperature)
    assert worst_error(models, blend, rows) < TOLERANCE
    assert passes_per_token(llm) < 0.9  # there were accepted drafts among them
    assert worst_error(models, Blend(LogitMixing(0.0), temperature=temperature), rows) > 20 * TOLERANCE


@pytest.mark.parametrize("name", ["logits_0.3", "trust_region_0.05"])
def test_greedy_tokens_are_the_most_likely_ones(drafting, name):
    llm, models = drafting
    blend = Blend(RULES[name], records=True)
    set_blend(llm, blend)
    for prompt, ids, _ in generate(llm, prompts(), temperature=0.0):
        policy, _, _ = teacher_forced(models, blend, prompt, ids)
        chosen = policy.gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
        assert (policy.amax(-1) - chosen).max() < TOLERANCE
    assert passes_per_token(llm) < 0.9


def test_completions_end_inside_a_run_of_drafts(drafting):
    llm, models = drafting
    blend = Blend(TrustRegion(0.001), stop_token_ids=(1, *STOPS))
    set_blend(llm, blend)
    rows = generate(llm, prompts(12), max_tokens=40, stop_token_ids=list(STOPS), seed=3)
    assert worst_error(models, blend, rows) < TOLERANCE
    ends = [ids[-1] in (1, *STOPS) for _, ids, _ in rows]
    assert sum(ends) >= 6 and not any(token in (1, *STOPS) for _, ids, _ in rows for token in ids[:-1])
    # The length limit: greedy tokens up to it are those of a longer run
    long = [ids for _, ids, _ in generate(llm, prompts(), 0.0, max_tokens=12, ignore_eos=True)]
    for limit in range(1, DRAFTS + 4):
        rows = generate(llm, prompts(), 0.0, max_tokens=limit, ignore_eos=True)
        assert [ids for _, ids, _ in rows] == [ids[:limit] for ids in long]
    # And the context of the engine, 128
    near = prompts(1, shortest=128 - DRAFTS - 3)
    rows = generate(llm, near, max_tokens=40, ignore_eos=True)
    assert [len(ids) for _, ids, _ in rows] == [DRAFTS + 3] and worst_error(models, blend, rows) < TOLERANCE


def test_statistics_are_those_of_the_drawn_tokens(drafting):
    """Rows of refused drafts, and those behind the end of a completion, are left out of them."""
    llm, models = drafting
    stops = tuple(set(range(6, 60, 4)) - {prompt[-1] for prompt in prompts(12)})
    blend = Blend(TrustRegion(0.05), temperature=0.7, stop_token_ids=(1, *stops), records=True)
    set_blend(llm, blend)
    rows = generate(llm, prompts(12) * 4, 0.7, max_tokens=70, stop_token_ids=list(stops))
    assert all(ids[-1] in (1, *stops) for _, ids, _ in rows)
    sums, tokens = statistics(llm), sum(len(ids) for _, ids, _ in rows)
    assert sums["passes_per_token"][1] == sums["kl_behavior_student"][1] == tokens
    steps = [teacher_forced(models, blend, prompt, ids) for prompt, ids, _ in rows]
    for name in ("teacher_weight", "kl_behavior_student", "kl_behavior_teacher"):
        values = torch.cat([step.statistics[name] for _, step, _ in steps])
        assert sums[name][0] == pytest.approx(values.sum().item(), rel=1e-3)
    # A pass gives the drafts that were accepted and, but where one of them is the end, a token more
    passes, accepted = sums["passes_per_token"][0], sums["accepted_drafts"][0]
    assert sums["draft_acceptance"][0] == accepted and tokens - passes <= accepted <= tokens
    assert acceptance_bound(0.05) < accepted / sums["draft_acceptance"][1] < 1.0


def test_without_a_blend_every_draft_is_accepted(drafting):
    """The student drafts for itself: a pass of the models for five tokens, and the teacher does not run."""
    llm, models = drafting
    set_blend(llm, Blend())
    with passes(llm) as counts:
        rows = generate(llm, prompts(4), max_tokens=21, ignore_eos=True)
    assert worst_error(models[:1], Blend(LogitMixing(())), rows) < TOLERANCE
    assert counts["teacher"] == 0 and counts["student"] <= 1 + 20 / (DRAFTS + 1) + 1
    assert llm.reset_prefix_cache()


def test_the_number_of_drafts_changes_between_generations(on_the_cpu, tmp_path):
    folders, models = write_pair(tmp_path, PAIRS["deeper"])
    rule = TrustRegion(0.05)
    with running(folders[0], folders[1:], Blend(rule), draft_tokens=NUMBERS) as llm:
        for number in (4, 0, 2, 8, 0, 1):
            blend = Blend(rule, draft_tokens=number, records=True)
            set_blend(llm, blend)
            llm.reset_prefix_cache()
            with passes(llm) as counts:
                rows = generate(llm, prompts(4), max_tokens=21, ignore_eos=True)
            assert worst_error(models, blend, rows) < TOLERANCE
            assert counts["drafts"] == number * counts["student"] and counts["teacher"] == counts["student"]
            assert (counts["student"] == 21) == (number == 0)
            sums = statistics(llm)
            assert (sums["draft_acceptance"][1] == 0) == (number == 0) and sums["draft_tokens"][2] == number
        set_blend(llm, Blend(draft_tokens=0))
        with passes(llm) as counts:
            rows = generate(llm, prompts(4), max_tokens=21, ignore_eos=True)
        assert counts == {"student": 21, "teacher": 0, "drafts": 0}
        assert worst_error(models[:1], Blend(LogitMixing(())), rows) < TOLERANCE


@pytest.mark.parametrize("pair", ["narrower_vocabulary", "other_family_and_heads", "two_partners"])
def test_pairs(pair, tmp_path):
    folders, models = write_pair(tmp_path, PAIRS[pair])
    blend = Blend(LogitMixing((0.3,) + (0.2,) * (len(folders) - 2)), temperature=0.9)
    with running(folders[0], folders[1:], blend, draft_tokens=(3,)) as llm:
        rows = generate(llm, prompts(16), 0.9, ignore_eos=True)
        assert worst_error(models, blend, rows) < TOLERANCE
        # A draft that a teacher has no row for is refused
        assert max(token for _, ids, _ in rows for token in ids) < min(model.config.vocab_size for model in models)


@pytest.mark.parametrize("case", ["own", "repeated", "experts", "another", "deeper"])
def test_the_student_is_held_once(monkeypatch, tmp_path, case):
    """Twice if it has experts, which vLLM may lay out anew after loading, and beside drafts of other weights."""
    keep_weights_on_the_cpu(monkeypatch)
    folders, models = write_pair(tmp_path, PAIRS["dense_beside_experts" if case == "experts" else "deeper"])
    if case == "repeated":
        repeat_output_layer(folders[0])
    draft_model = {"another": saved(tmp_path / "another", seed=7), "deeper": folders[1]}.get(case, folders[0])
    arguments = engine_arguments([Partner(folders[1])], Blend(), draft_model=draft_model, draft_tokens=(3,))
    speculation = arguments["speculative_config"]
    with running(folders[0], folders[1:], Blend(), draft_tokens=(3,), speculative_config=speculation) as llm:
        (student,) = llm.apply_model(lambda model: model.student)
        (drafts,) = llm.collective_rpc(lambda worker: worker.get_draft_model())
        students, own = ({it.data_ptr() for it in model.parameters()} for model in (student, drafts))
        assert len(students) > 10 and (students == own if case in ("own", "repeated") else not students & own)
        for weight in (0.3, 0.0):
            blend = Blend(LogitMixing(weight), records=True)
            set_blend(llm, blend)
            assert worst_error(models, blend, generate(llm, prompts())) < TOLERANCE
        accepted, tested, _ = statistics(llm)["draft_acceptance"]
        assert (accepted > 0.99 * tested > 10) == (case not in ("another", "deeper"))


# Frequencies

DRAWS, VOCABULARY, LENGTH, PROMPT = 8_000, 6, 6, [2, 5, 3]


@pytest.fixture(scope="module")
def small(on_the_cpu, tmp_path_factory):
    """Six tokens, so that all completions can be enumerated; the models are far apart."""
    root = tmp_path_factory.mktemp("small")
    folders = [
        saved(root / str(seed), seed=seed, vocab_size=VOCABULARY, num_hidden_layers=1 + seed) for seed in range(2)
    ]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval() for path in folders]
    options = {"max_num_seqs": 1024, "max_num_batched_tokens": 8192, "skip_tokenizer_init": True}
    prefixes = [torch.tensor(list(product(range(VOCABULARY), repeat=length))).long() for length in range(LENGTH)]
    prompt = torch.tensor(PROMPT)
    with torch.no_grad():
        logits = [
            [model(torch.cat([prompt.expand(len(ids), -1), ids], dim=1)).logits[:, -1] for model in models]
            for ids in prefixes
        ]
    with running(folders[0], folders[1:], Blend(), draft_tokens=NUMBERS, **options) as llm:
        yield llm, logits


def enumerated(logits, blend):
    """Probabilities `(V, …, V)` of all completions, in float64, from both models' logits behind all prefixes."""
    logps = torch.zeros((), dtype=torch.float64)
    settings = {"temperature": blend.temperature, "eos": None, "vocab_size": VOCABULARY}
    for student, teacher in logits:
        step, _ = blend_step(blend.rule, student, [teacher], **settings)
        next_logps = step.logits.double().log_softmax(-1)
        logps = logps[..., None] + next_logps.view(*logps.shape, VOCABULARY)
    return logps.exp()


def completions(llm, blend, number=DRAFTS):
    from vllm import SamplingParams

    set_blend(llm, replace(blend, draft_tokens=number))
    torch.manual_seed(0)
    params = SamplingParams(temperature=blend.temperature, max_tokens=LENGTH, ignore_eos=True, detokenize=False)
    results = llm.generate([{"prompt_token_ids": PROMPT}] * DRAWS, params, use_tqdm=False)
    return torch.tensor([list(result.outputs[0].token_ids) for result in results])


def p_values(drawn, logits, blend):
    """Of the G-test, for each pair of neighbouring tokens of a completion."""
    exact, found = enumerated(logits, blend), []
    for place in range(LENGTH - 1):
        counts = (drawn[:, place] * VOCABULARY + drawn[:, place + 1]).bincount(minlength=VOCABULARY**2).double()
        others = [axis for axis in range(LENGTH) if axis not in (place, place + 1)]
        found.append(g_test(counts, exact.sum(others).flatten()))
    return found


@pytest.mark.parametrize(
    ("rule", "temperature", "others"),
    [
        (LogitMixing(0.1), 1.0, [LogitMixing(0.0)]),
        (LogitMixing(0.3), 0.7, [LogitMixing(0.25), LogitMixing(0.35)]),
        (LogitMixing(0.5), 1.0, [LogitMixing(0.45), LogitMixing(0.55)]),
        (TrustRegion(0.001), 0.7, []),  # the student is too close to be told from it
        (TrustRegion(0.01), 1.0, [LogitMixing(0.0)]),
        (TrustRegion(0.05), 0.7, [LogitMixing(0.0), TrustRegion(0.02)]),
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_blend(small, rule, temperature, others):
    """Tokens 2 to 5 are drafts of the first run, or follow a refused one; token 6 stands behind them."""
    llm, logits = small
    blend = Blend(rule, temperature=temperature, records=True)
    drawn = completions(llm, blend)
    assert min(p_values(drawn, logits, blend)) > 1e-3
    assert passes_per_token(llm) < 0.6
    for other in others:  # power: pairs inside the first run tell it from these
        assert min(p_values(drawn, logits, Blend(other, temperature=temperature))[1 : DRAFTS - 1]) < 1e-6


def test_frequencies_do_not_depend_on_the_number_of_drafts(small):
    llm, logits = small
    blend = Blend(TrustRegion(0.05), records=True)
    for number, most in {2: 0.9, 0: 1.0, 8: 0.6}.items():
        drawn = completions(llm, blend, number)
        assert min(p_values(drawn, logits, blend)) > 1e-3
        assert passes_per_token(llm) <= most and (number == 0 or most < 1.0)
        assert max(p_values(drawn, logits, Blend(LogitMixing(0.0)))) < 1e-6  # power


def one_hot_acceptance(module):
    """A draft is accepted as if the student could have drawn nothing else."""
    original = module._rejection_random_sample
    return "_rejection_random_sample", lambda out, ends, ids, probs, *rest: original(out, ends, ids, None, *rest)


def residual_of_nothing(module):
    """In place of a refused draft the blend's own token is drawn, not one of what it has more of than the student."""
    original = module.sample_recovered_tokens

    def sample(length, numbers, ends, ids, probs, *rest):
        return original(length, numbers, ends, ids, torch.zeros_like(probs), *rest)

    return "sample_recovered_tokens", sample


def sharper_drafts(module):
    """Drafts are taken for samples of another temperature than they are of."""
    original = module.rejection_sample

    def sample(ids, numbers, length, ends, probs, *rest, **settings):
        return original(ids, numbers, length, ends, (2 * probs.log()).softmax(-1), *rest, **settings)

    return "rejection_sample", sample


@pytest.mark.parametrize("mutation", [one_hot_acceptance, residual_of_nothing, sharper_drafts])
def test_frequencies_tell_a_wrong_sampler(small, monkeypatch, mutation):
    from vllm.v1.sample import rejection_sampler

    llm, logits = small
    monkeypatch.setattr(rejection_sampler, *mutation(rejection_sampler))
    blend = Blend(TrustRegion(0.05))
    assert max(p_values(completions(llm, blend), logits, blend)[1 : DRAFTS - 1]) < 1e-6

import math

import pytest
import torch
from transformers import LogitsProcessorList

from tests.generation.teacher_forced import CACHE, left_padded_prompts, mixture_logprobs, teacher_forced_logits
from tests.tiny import EOS_ID, PAD_ID, VOCAB_SIZE, tiny_model
from trl_blend.errors import UnsupportedError
from trl_blend.generation.partner import PartnerDecoder
from trl_blend.generation.processor import BlendLogitsProcessor
from trl_blend.generation.rules import BlendStep, LogitMixing, ProbabilityMixing


NEW_TOKENS = 7
NO_EOS = 63  # an id that is never drawn below, so that every row runs to the end
PAIRS = [("qwen3", "llama"), ("llama", "gemma3"), ("gemma3", "gemma2"), ("gemma2", "qwen3"), ("qwen3", "gpt2")]
RULES = {"logits": LogitMixing, "probs": ProbabilityMixing}


def generate(student, partners, rule, prompts, *, temperature=1.0, returned=1, record=True, seed=0, **settings):
    """`student.generate` with a processor built by hand; returns its output and the record."""
    mask = prompts["attention_mask"].repeat_interleave(returned, dim=0)
    processor = BlendLogitsProcessor(
        rule, [PartnerDecoder(partner, mask) for partner in partners], temperature=temperature, record=record
    )
    torch.manual_seed(seed)
    settings = {"eos_token_id": NO_EOS, "pad_token_id": PAD_ID, "suppress_tokens": [NO_EOS], "top_k": 0, **settings}
    output = student.generate(
        **prompts,
        do_sample=True,
        temperature=temperature,
        num_return_sequences=returned,
        max_new_tokens=NEW_TOKENS,
        logits_processor=LogitsProcessorList([processor]),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **settings,
    )
    return output, processor.finish(output.sequences, mask.shape[1]) if record else None


def expected_logprobs(student, partners, rule, output, prompts, *, temperature=1.0, suppressed=(NO_EOS,)):
    """Teacher-forced behaviour log-probabilities `(B, T, V)` of the generated sequences, and each model's logits."""
    models = [student, *partners]
    logits = [teacher_forced_logits(m, output.sequences, prompts["attention_mask"], VOCAB_SIZE) for m in models]
    logits[0][..., list(suppressed)] = -math.inf
    weights = [1.0 - math.fsum(rule.weights), *rule.weights]
    space = "logits" if isinstance(rule, LogitMixing) else "probs"
    return mixture_logprobs(logits, weights, temperature, space), logits


def assert_policy_equals(output, expected):
    """The scores that `generate` sampled from are the expected policy, up to a constant per row."""
    scores = torch.stack(output.scores, dim=1).double().log_softmax(-1)
    torch.testing.assert_close(scores.exp(), expected.exp(), rtol=0, atol=1e-5)
    likely = expected > -15
    torch.testing.assert_close(scores[likely], expected[likely], rtol=0, atol=1e-4)


def gathered(logprobs, output):
    tokens = output.sequences[:, -logprobs.shape[1] :]
    return logprobs.gather(-1, tokens[..., None]).squeeze(-1).float()


@pytest.mark.parametrize("pad_id", [PAD_ID, NO_EOS], ids=["pad", "pad_is_eos"])
@pytest.mark.parametrize("student_arch, partner_arch", PAIRS)
def test_scores_and_record_equal_teacher_forcing(student_arch, partner_arch, pad_id):
    student, partner = tiny_model(student_arch, seed=1), tiny_model(partner_arch, seed=2)
    prompts, rule = left_padded_prompts(pad_id), LogitMixing(0.4)
    output, record = generate(student, [partner], rule, prompts, pad_token_id=pad_id)
    expected, logits = expected_logprobs(student, [partner], rule, output, prompts)
    assert_policy_equals(output, expected)
    assert record.behavior_logps.shape == (3, NEW_TOKENS)
    torch.testing.assert_close(record.behavior_logps, gathered(expected, output), rtol=0, atol=1e-5)
    teacher = gathered(logits[1].log_softmax(-1), output)
    torch.testing.assert_close(record.teacher_logps, teacher[None], rtol=0, atol=1e-5)
    # The scores are a new tensor: the student's own logits are as the student made them
    raw = torch.stack(output.logits, dim=1)
    torch.testing.assert_close(raw[..., :NO_EOS], logits[0][..., :NO_EOS], rtol=0, atol=1e-4)


@pytest.mark.parametrize("space", RULES)
def test_temperature_and_several_sequences_per_prompt(space):
    student, partner = tiny_model("qwen3", seed=1), tiny_model("gemma3", seed=2)
    prompts, rule = left_padded_prompts(PAD_ID), RULES[space](0.4)
    settings = {"temperature": 0.7}
    # `suppress_tokens` acts before the blend, and probability mixing would bring the token back
    output, record = generate(student, [partner], rule, prompts, returned=3, suppress_tokens=None, **settings)
    expected, logits = expected_logprobs(student, [partner], rule, output, prompts, suppressed=(), **settings)
    assert record.behavior_logps.shape == (9, NEW_TOKENS)
    assert_policy_equals(output, expected)
    torch.testing.assert_close(record.behavior_logps, gathered(expected, output), rtol=0, atol=1e-5)
    teacher = gathered((logits[1] / 0.7).log_softmax(-1), output)
    torch.testing.assert_close(record.teacher_logps[0], teacher, rtol=0, atol=1e-5)


@pytest.mark.parametrize("space", RULES)
def test_statistics_are_those_of_every_prefix(space):
    student, partner = tiny_model("llama", seed=1), tiny_model("qwen3", seed=2)
    prompts, rule = left_padded_prompts(PAD_ID), RULES[space](0.4)
    output, record = generate(student, [partner], rule, prompts, temperature=1.3, suppress_tokens=None)
    expected, logits = expected_logprobs(student, [partner], rule, output, prompts, temperature=1.3, suppressed=())
    student_logprobs = (logits[0].double() / 1.3).log_softmax(-1)
    kl = (expected.exp() * (expected - student_logprobs)).sum(-1).float()
    assert list(record.statistics) == ["kl_behavior_student"] and kl.min() > 1e-3
    torch.testing.assert_close(record.statistics["kl_behavior_student"], kl, rtol=1e-4, atol=1e-5)


def test_two_partners():
    student, partners = tiny_model("qwen3", seed=1), [tiny_model("llama", seed=2), tiny_model("gemma3", seed=3)]
    prompts, rule = left_padded_prompts(PAD_ID), LogitMixing((0.2, 0.5))
    output, record = generate(student, partners, rule, prompts)
    expected, logits = expected_logprobs(student, partners, rule, output, prompts)
    assert_policy_equals(output, expected)
    teachers = torch.stack([gathered(one.log_softmax(-1), output) for one in logits[1:]])
    torch.testing.assert_close(record.teacher_logps, teachers, rtol=0, atol=1e-5)


@pytest.mark.parametrize("space", RULES)
@pytest.mark.parametrize("partner_vocab", [56, 72])
def test_partner_with_another_padded_vocabulary(space, partner_vocab):
    student, partner = tiny_model("qwen3", seed=1), tiny_model("llama", seed=2, vocab_size=partner_vocab)
    prompts, rule = left_padded_prompts(PAD_ID), RULES[space](0.4)
    suppressed = tuple(range(56, 64))  # padded rows are no tokens: a trained student never emits them
    output, _ = generate(student, [partner], rule, prompts, seed=3, suppress_tokens=list(suppressed))
    expected, _ = expected_logprobs(student, [partner], rule, output, prompts, suppressed=suppressed)
    assert_policy_equals(output, expected)


@pytest.mark.parametrize("student_arch", ["qwen3", "gemma3"])
def test_static_cache_student(student_arch):
    student, partner = tiny_model(student_arch, seed=1), tiny_model("gemma3", seed=2)
    prompts, rule = left_padded_prompts(PAD_ID), LogitMixing(0.4)
    output, record = generate(
        student, [partner], rule, prompts, returned=2, cache_implementation="static", disable_compile=True
    )
    expected, _ = expected_logprobs(student, [partner], rule, output, prompts)
    assert type(output[CACHE]).__name__ == "StaticCache"
    assert_policy_equals(output, expected)
    torch.testing.assert_close(record.behavior_logps, gathered(expected, output), rtol=0, atol=1e-5)


def test_finished_row_beside_an_unfinished_one():
    student, partner = tiny_model("qwen3", seed=1), tiny_model("llama", seed=2)
    prompts, rule = left_padded_prompts(EOS_ID), LogitMixing(0.4)
    first = generate(student, [partner], rule, prompts)[0].sequences[:, prompts["input_ids"].shape[1] :]
    stop = first[0, 2].item()  # the same seed draws the same token again, which then ends row 0
    output, record = generate(student, [partner], rule, prompts, eos_token_id=[NO_EOS, stop], pad_token_id=stop)
    tokens = output.sequences[:, prompts["input_ids"].shape[1] :]
    finished = (tokens == stop).int().cumsum(1) > 0
    assert finished[0, 2:].all() and not finished[1:].all(dim=1).any() and tokens.shape[1] == NEW_TOKENS
    expected, _ = expected_logprobs(student, [partner], rule, output, prompts)
    valid = ~finished | (finished.int().cumsum(1) == 1)  # up to and including a row's end token
    difference = record.behavior_logps - gathered(expected, output)
    assert difference[valid].abs().max() < 1e-5
    for values in (record.behavior_logps, record.teacher_logps, *record.statistics.values()):
        assert values.isfinite().all()


def test_partner_reads_each_token_once_and_keeps_one_row_of_logits():
    student, partner = tiny_model("qwen3", seed=1), tiny_model("gemma3", seed=2)
    prompts, seen = left_padded_prompts(PAD_ID), []
    partner.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs["input_ids"].shape[1], out.logits.shape[1])),
        with_kwargs=True,
    )
    generate(student, [partner], LogitMixing(0.4), prompts, record=False)
    assert seen == [(7, 1)] + [(1, 1)] * (NEW_TOKENS - 1)


def test_partner_without_logits_to_keep():
    student, partner = tiny_model("qwen3", seed=1), tiny_model("llama", seed=2)
    prompts, rule = left_padded_prompts(PAD_ID), LogitMixing(0.4)
    forward = partner.forward
    partner.forward = lambda input_ids, attention_mask=None, position_ids=None, **rest: forward(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **rest
    )
    assert not partner._supports_logits_to_keep()
    output, _ = generate(student, [partner], rule, prompts)
    assert_policy_equals(output, expected_logprobs(student, [partner], rule, output, prompts)[0])


def test_partner_decodes_in_evaluation_mode_and_its_modes_are_restored():
    student, partner = tiny_model("qwen3", seed=1), tiny_model("qwen3", seed=2, attention_dropout=0.5)
    prompts, rule = left_padded_prompts(PAD_ID), LogitMixing(0.4)
    partner.train()
    partner.model.layers[0].eval()
    modes = [module.training for module in partner.modules()]
    output, _ = generate(student, [partner], rule, prompts)
    assert [module.training for module in partner.modules()] == modes and any(modes) and not all(modes)
    expected, _ = expected_logprobs(student, [partner.eval()], rule, output, prompts)
    assert_policy_equals(output, expected)


def test_modes_are_restored_when_the_forward_pass_raises():
    def fail(module, args):
        raise ValueError("broken")

    partner = tiny_model("qwen3").train()
    partner.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="broken"):
        PartnerDecoder(partner, torch.ones(1, 3)).step(torch.full((1, 3), 5))
    assert all(module.training for module in partner.modules())


def test_token_that_the_partner_cannot_read_is_refused():
    decoder = PartnerDecoder(tiny_model("qwen3", vocab_size=56), torch.ones(1, 3))
    decoder.step(torch.full((1, 3), 55))
    with pytest.raises(UnsupportedError, match="Token id 56 is beyond the 56 embedding rows"):
        decoder.step(torch.tensor([[55, 55, 55, 56]]))


@pytest.mark.parametrize("rule", [ProbabilityMixing(0.6), LogitMixing(1.0)])
def test_forbidden_tokens_stay_forbidden(rule):
    student, partner = tiny_model("qwen3", seed=1), tiny_model("qwen3", seed=2)
    ids = left_padded_prompts(PAD_ID)["input_ids"][:1]
    mask = torch.ones_like(ids)
    scores = student(ids).logits[:, -1].detach()
    forbidden = int(partner(ids).logits[0, -1].argmax())
    scores[:, forbidden] = -math.inf
    allowed = torch.arange(VOCAB_SIZE) != forbidden
    processors = {
        keep: BlendLogitsProcessor(rule, [PartnerDecoder(partner, mask)], keep_forbidden=keep, record=True)
        for keep in (True, False)
    }
    policies = {keep: processor(ids, scores).softmax(-1)[0] for keep, processor in processors.items()}
    assert policies[True][forbidden] == 0.0 and policies[False][forbidden] > 0.1
    logits = [scores[:, allowed], partner(ids).logits[:, -1][:, allowed]]
    weights = [1.0 - rule.weights[0], rule.weights[0]]
    space = "logits" if isinstance(rule, LogitMixing) else "probs"
    expected = mixture_logprobs(logits, weights, 1.0, space).exp().float()[0]
    torch.testing.assert_close(policies[True][allowed], expected, rtol=1e-4, atol=1e-6)
    # The teacher's own probability of the emitted token is recorded, not one renormalised over what is allowed
    token = int(policies[True].argmax())
    record = processors[True].finish(torch.cat([ids, torch.tensor([[token]])], dim=1), ids.shape[1])
    unrestricted = partner(ids).logits[0, -1].log_softmax(-1)[token]
    torch.testing.assert_close(record.teacher_logps.squeeze(), unrestricted.detach(), rtol=0, atol=1e-5)
    assert record.statistics["kl_behavior_student"].isfinite().all()


def test_a_rule_is_any_callable():
    class Sharpen:
        def __call__(self, student_logits, partner_logits):
            logits = student_logits + 2.0 * partner_logits[0]
            return BlendStep(logits, {"largest": logits.amax(-1)})

    student, partner = tiny_model("qwen3", seed=1), tiny_model("llama", seed=2)
    prompts = left_padded_prompts(PAD_ID)
    output, record = generate(student, [partner], Sharpen(), prompts, temperature=0.7, suppress_tokens=None)
    logits = [teacher_forced_logits(m, output.sequences, prompts["attention_mask"]) / 0.7 for m in (student, partner)]
    sharpened = logits[0] + 2.0 * logits[1]
    expected = sharpened.double().log_softmax(-1)
    assert_policy_equals(output, expected)
    torch.testing.assert_close(record.behavior_logps, gathered(expected, output), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(record.statistics["largest"], sharpened.amax(-1), rtol=0, atol=1e-4)


def test_record_is_cut_to_the_tokens_that_were_returned():
    # `generate` may take a step that it undoes before it returns (deferred stop check)
    partner, ids = tiny_model("qwen3"), torch.arange(5, 12)[None]
    processor = BlendLogitsProcessor(LogitMixing(0.5), [PartnerDecoder(partner, torch.ones(1, 4))], record=True)
    for length in (4, 5, 6, 7):
        processor(ids[:, :length], torch.zeros(1, VOCAB_SIZE))
    record = processor.finish(ids[:, :7], 4)
    assert record.behavior_logps.shape == (1, 3) and record.statistics["kl_behavior_student"].shape == (1, 3)
    expected = partner(ids).logits[0, 3:6].log_softmax(-1).gather(-1, ids[0, 4:7, None]).squeeze(-1)
    torch.testing.assert_close(record.teacher_logps[0, 0], expected.detach(), rtol=0, atol=1e-5)


def test_steps_other_than_one_token_are_refused():
    decoder = PartnerDecoder(tiny_model("qwen3"), torch.ones(2, 4, dtype=torch.long))
    ids = torch.full((2, 8), 7)
    with pytest.raises(UnsupportedError, match=r"shape \(2, 5\) at decoding step 0, expected \(2, 4\)"):
        decoder.step(ids[:, :5])
    decoder.step(ids[:, :4])
    with pytest.raises(UnsupportedError, match=r"shape \(2, 7\) at decoding step 1"):
        decoder.step(ids[:, :7])
    with pytest.raises(UnsupportedError, match=r"shape \(1, 5\)"):
        decoder.step(ids[:1, :5])


def test_finish_without_recording():
    processor = BlendLogitsProcessor(LogitMixing(0.5), [])
    with pytest.raises(RuntimeError, match="record=True"):
        processor.finish(torch.zeros(1, 3), 2)

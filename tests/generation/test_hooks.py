import math

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from tests.generation.teacher_forced import (
    DETAILS,
    SAMPLING,
    assert_recorded,
    mixture_logprobs,
    recorded_logps,
    sample,
    teacher_forced_logits,
)
from tests.tiny import EOS_ID, tiny_model
from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.generation import LogitMixing, ProbabilityMixing, SpeculativeKD, TrustRegion, blended_generation


RULE = LogitMixing(0.4)


# What is sampled


@pytest.mark.parametrize("rule", [LogitMixing(0.4), ProbabilityMixing(0.4)])
def test_tokens_are_exact_draws(student, teacher, rule):
    prompts = {"input_ids": torch.tensor([[7, 21, 9, 30]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    draws, temperature = 20_000, 0.7
    with blended_generation(student, teacher, rule):
        output = sample(student, prompts, max_new_tokens=1, num_return_sequences=draws, temperature=temperature)
    frequencies = torch.bincount(output[:, -1], minlength=64) / draws
    one = torch.cat([prompts["input_ids"], torch.tensor([[0]])], dim=1)
    logits = [teacher_forced_logits(model, one, prompts["attention_mask"])[0, 0] for model in (student, teacher)]
    space = "logits" if isinstance(rule, LogitMixing) else "probs"

    def distance(weight, temperature):
        policy = mixture_logprobs(logits, [1.0 - weight, weight], temperature, space).exp()
        return 0.5 * (frequencies - policy).abs().sum().item()

    assert distance(0.4, 0.7) < 0.02
    assert min(distance(0.0, 0.7), distance(1.0, 0.7), distance(0.6, 0.7), distance(0.4, 1.0)) > 0.05


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9}, {"do_sample": False}])
def test_weight_zero_is_the_student(student, teacher, prompts, settings):
    plain = sample(student, prompts, **settings)
    with blended_generation(student, teacher, LogitMixing(0.0)):
        blended = sample(student, prompts, **settings)
    assert torch.equal(plain, blended)
    with blended_generation(student, teacher, LogitMixing(0.9)):
        assert not torch.equal(sample(student, prompts, **settings), plain)


@pytest.mark.parametrize("cls", [LogitMixing, ProbabilityMixing])
def test_weight_one_is_the_teacher(student, teacher, prompts, cls):
    with blended_generation(student, teacher, cls(1.0)):
        blended = sample(student, prompts, do_sample=False)
    assert torch.equal(blended, sample(teacher, prompts, do_sample=False))
    assert not torch.equal(blended, sample(student, prompts, do_sample=False))


def test_records(student, teacher, prompts):
    with blended_generation(student, teacher, RULE, record=True) as session:
        first = sample(student, prompts, temperature=0.7, **DETAILS)
        second = sample(student, prompts, seed=1, num_return_sequences=2)
    assert len(session.records) == 2 and isinstance(second, torch.Tensor)
    assert_recorded(session.records[0], [student, teacher], first, prompts, temperature=0.7)
    assert_recorded(session.records[1], [student, teacher], second, prompts)
    with blended_generation(student, teacher, RULE) as session:
        sample(student, prompts)
    assert session.records == []


def test_several_teachers(student, teacher, prompts):
    rule, other = LogitMixing((0.2, 0.3)), tiny_model("gemma3", seed=3)
    with blended_generation(student, [teacher, other], rule, record=True) as session:
        output = sample(student, prompts)
    models = (student, teacher, other)
    logits = [teacher_forced_logits(model, output, prompts["attention_mask"]) for model in models]
    expected = mixture_logprobs(logits, [0.5, 0.2, 0.3], 1.0, "logits").gather(-1, output[:, 7:, None]).squeeze(-1)
    valid = recorded_logps([student, teacher], output, prompts)[1]
    torch.testing.assert_close(session.records[0].behavior_logps[valid], expected.float()[valid], rtol=0, atol=1e-5)
    with blended_generation(student, [teacher, other], RULE), pytest.raises(ConfigError, match="2 partners"):
        sample(student, prompts)


# How `generate` is called


@pytest.mark.parametrize("source", ["kwargs", "config", "config_and_kwargs", "model", "greedy", "positional"])
def test_temperature_is_the_one_generate_uses(student, teacher, prompts, source):
    settings = {"kwargs": {"temperature": 0.7}, "greedy": {"do_sample": False, "temperature": None}}.get(source, {})
    call = student.generate
    if source.startswith("config"):
        settings = {"generation_config": GenerationConfig(temperature=0.7 if source == "config" else 3.0)}
        settings |= {"temperature": 0.7} if source == "config_and_kwargs" else {}
    elif source == "model":
        student.generation_config.temperature = 0.7
    with blended_generation(student, teacher, RULE, record=True) as session:
        if source == "positional":
            config = GenerationConfig(temperature=0.7, **SAMPLING)
            output = student.generate(prompts["input_ids"], config, attention_mask=prompts["attention_mask"])
        else:
            output = sample(student, prompts, **settings)
    temperature = 1.0 if source == "greedy" else 0.7
    assert_recorded(session.records[0], [student, teacher], output, prompts, temperature=temperature)
    assert student.generate == call


def test_missing_mask_is_the_one_generate_infers(student, teacher, prompts):
    ids = prompts["input_ids"]
    ids[0, 2] = 9  # no pad inside a prompt: with pad != eos every pad counts as padding
    with blended_generation(student, teacher, RULE, record=True) as session:
        inferred = sample(student, {"input_ids": ids})
        assert torch.equal(inferred, sample(student, prompts))
        everything = sample(student, {"input_ids": ids}, pad_token_id=EOS_ID, eos_token_id=EOS_ID)
    all_ones = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert_recorded(session.records[0], [student, teacher], inferred, prompts)
    assert_recorded(session.records[2], [student, teacher], everything, all_ones)


def test_callers_processors_act_on_the_blend(student, teacher, prompts):
    seen = []

    class OnlyEvenTokens(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores)
            return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 1, -math.inf)

    own = LogitsProcessorList([OnlyEvenTokens()])
    with blended_generation(student, teacher, LogitMixing(1.0)):
        output = sample(student, prompts, logits_processor=own, max_new_tokens=2)
    assert len(own) == 1 and (output[:, 7:] % 2 == 0).all()
    taught = teacher_forced_logits(teacher, output, prompts["attention_mask"])
    torch.testing.assert_close(torch.stack(seen, dim=1), taught, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rule", [LogitMixing(1.0), ProbabilityMixing(0.9)])
def test_min_new_tokens_holds(student, teacher, prompts, rule):
    def end_now(module, args, output):
        output.logits[..., EOS_ID] += 100.0
        return output

    teacher.register_forward_hook(end_now)
    with blended_generation(student, teacher, rule):
        assert sample(student, prompts).shape[1] == 8
        assert sample(student, prompts, min_new_tokens=5).shape[1] == 7 + 6


def test_streamer(student, teacher, prompts):
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens.append(value.reshape(1, -1))

        def end(self):
            self.ended = True

    prompt = {name: values[:1] for name, values in prompts.items()}
    streamer = Collect()
    with blended_generation(student, teacher, RULE, record=True) as session:
        output = sample(student, prompt, streamer=streamer)
    assert streamer.ended and torch.equal(torch.cat(streamer.tokens, dim=1), output)
    assert len(session.records) == 1


# The hook itself


def test_hook_is_removed(student, teacher, prompts):
    plain = sample(student, prompts)
    with pytest.raises(KeyError), blended_generation(student, teacher, RULE):
        assert not torch.equal(sample(student, prompts), plain)
        raise KeyError
    assert "generate" not in vars(student) and "generate_batch" not in vars(student)
    assert torch.equal(sample(student, prompts), plain)


def test_an_attribute_that_was_there_is_put_back(student, teacher, prompts):
    own, calls = type(student).generate, []

    def generate(*args, **kwargs):
        calls.append(kwargs)
        return own(student, *args, **kwargs)

    student.generate = generate
    with blended_generation(student, teacher, LogitMixing(1.0)):
        blended = sample(student, prompts, do_sample=False)
    assert student.generate is generate and len(calls) == 1
    assert torch.equal(blended, sample(teacher, prompts, do_sample=False))


def test_a_generate_call_that_raises_leaves_nothing_behind(student, teacher, prompts):
    class Fail(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise ValueError("broken")

    with blended_generation(student, teacher, RULE, record=True) as session:
        good = sample(student, prompts)
        with pytest.raises(ValueError, match="broken"):
            sample(student, prompts, logits_processor=LogitsProcessorList([Fail()]))
        assert torch.equal(sample(student, prompts), good)
    assert len(session.records) == 2
    assert torch.equal(session.records[0].behavior_logps, session.records[1].behavior_logps)


def test_nested_blocks_are_refused_and_the_outer_one_goes_on(student, teacher, prompts):
    other = tiny_model("gemma3", seed=3)
    with blended_generation(student, teacher, LogitMixing(1.0)):
        with pytest.raises(UnsupportedError, match="nested"), blended_generation(student, other, LogitMixing(1.0)):
            pass
        taught = sample(student, prompts, do_sample=False)
    assert torch.equal(taught, sample(teacher, prompts, do_sample=False)) and "generate" not in vars(student)


def test_one_teacher_for_two_students(student, teacher, prompts):
    other = tiny_model("gemma3", seed=3)
    with (
        blended_generation(student, teacher, RULE, record=True) as first,
        blended_generation(other, teacher, RULE, record=True) as second,
        blended_generation(teacher, other, RULE, record=True) as third,
    ):
        outputs = [sample(model, prompts) for model in (student, other, teacher)]
    for session, pair, output in zip(
        (first, second, third), ([student, teacher], [other, teacher], [teacher, other]), outputs, strict=True
    ):
        assert_recorded(session.records[0], pair, output, prompts)


def test_compiled_wrapper(student, teacher, prompts):
    compiled = torch.compile(student)  # nothing is compiled: `generate` belongs to the model inside
    with blended_generation(compiled, teacher, LogitMixing(1.0)):
        taught = sample(compiled, prompts, do_sample=False)
    assert torch.equal(taught, sample(teacher, prompts, do_sample=False))


# Rows that are no tokens, numbers that are none


def padded(model, rows):
    """The model with more rows than it has tokens, which it prefers to them."""
    model.resize_token_embeddings(rows, mean_resizing=False)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[64:] = head.weight[: rows - 64] * 3.0
    return model


@pytest.mark.parametrize("rule", [RULE, ProbabilityMixing(0.4), TrustRegion(0.1), SpeculativeKD(5, 0.6)])
def test_rows_beyond_the_tokens_have_no_part(prompts, rule):
    student, teacher = (tiny_model(seed=seed, tie_word_embeddings=False) for seed in (1, 2))
    larger = [padded(tiny_model(seed=s, tie_word_embeddings=False), rows) for s, rows in ((1, 70), (2, 76))]
    with blended_generation(*larger, rule, vocab_size=64, record=True) as session:
        output = sample(larger[0], prompts, do_sample=False)  # a draw from more rows takes other random numbers
    with blended_generation(student, teacher, rule, record=True) as expected:
        assert torch.equal(output, sample(student, prompts, do_sample=False))
    record, exact = session.records[0], expected.records[0]
    torch.testing.assert_close(record.behavior_logps, exact.behavior_logps)
    torch.testing.assert_close(record.teacher_logps, exact.teacher_logps)
    assert record.statistics.keys() == exact.statistics.keys()
    for name, values in record.statistics.items():
        torch.testing.assert_close(values, exact.statistics[name])
    with blended_generation(*larger, rule):
        assert sample(larger[0], prompts)[:, prompts["input_ids"].shape[1] :].max() >= 64  # without being told


@pytest.mark.parametrize(("broken", "name"), [("student", "the student"), ("teacher", "the teacher")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_said(student, teacher, prompts, broken, name, value):
    model = {"student": student, "teacher": teacher}[broken]
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = value
    with (
        blended_generation(student, teacher, RULE),
        pytest.raises(UnsupportedError, match=f"The logits of {name} are not numbers"),
    ):
        sample(student, prompts)

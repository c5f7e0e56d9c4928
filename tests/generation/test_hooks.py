import math

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.generation.streamers import BaseStreamer

from tests.generation.teacher_forced import left_padded_prompts, mixture_logprobs, teacher_forced_logits
from tests.tiny import EOS_ID, PAD_ID, tiny_lora, tiny_model
from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.generation import LogitMixing, ProbabilityMixing, blended_generation


RULE = LogitMixing(0.4)
SAMPLING = {"do_sample": True, "top_k": 0, "max_new_tokens": 6, "pad_token_id": PAD_ID}
DETAILS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.fixture
def student():
    return tiny_model("qwen3", seed=1)


@pytest.fixture
def teacher():
    return tiny_model("llama", seed=2)


@pytest.fixture
def prompts():
    return left_padded_prompts(PAD_ID)


def sample(model, prompts, seed=0, **settings):
    torch.manual_seed(seed)
    return model.generate(**prompts, **{**SAMPLING, **settings})


def recorded_logps(models, output, prompts, weight=0.4, temperature=1.0):
    """Teacher-forced behaviour log-probabilities of the emitted tokens, and the mask of those before a row's end."""
    sequences = getattr(output, "sequences", output)
    logits = [teacher_forced_logits(model, sequences, prompts["attention_mask"]) for model in models]
    logprobs = mixture_logprobs(logits, [1.0 - weight, weight], temperature, "logits")
    tokens = sequences[:, -logprobs.shape[1] :]
    ended = (tokens == EOS_ID).int().cumsum(1)
    return logprobs.gather(-1, tokens[..., None]).squeeze(-1).float(), (ended == 0) | (ended.cumsum(1) == 1)


def assert_recorded(record, models, output, prompts, **settings):
    expected, valid = recorded_logps(models, output, prompts, **settings)
    torch.testing.assert_close(record.behavior_logps[valid], expected[valid], rtol=0, atol=1e-5)


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


# PEFT


@pytest.mark.parametrize("arch", ["qwen3", "gemma3"])
@pytest.mark.parametrize("inner", [False, True], ids=["peft_generate", "inner_generate"])
def test_base_of_a_lora_student_is_the_reference(prompts, arch, inner):
    base = tiny_model(arch, seed=1)
    model = tiny_lora(tiny_model(arch, seed=1))
    model.train()
    trainable = {name: (parameter.requires_grad, id(parameter)) for name, parameter in model.named_parameters()}
    with blended_generation(model, None, RULE, record=True) as session:
        output = sample(model.get_base_model() if inner else model, prompts, **DETAILS)
    assert {name: (p.requires_grad, id(p)) for name, p in model.named_parameters()} == trainable
    assert all(module.training for module in model.modules())
    model.eval()
    assert_recorded(session.records[0], [model, base], output, prompts)
    # Only the partner runs without adapters
    raw = torch.stack(output.logits, dim=1)
    valid = recorded_logps([model, base], output, prompts)[1]
    adapted = teacher_forced_logits(model, output.sequences, prompts["attention_mask"])
    torch.testing.assert_close(raw[valid], adapted[valid], rtol=0, atol=1e-4)
    assert (adapted - teacher_forced_logits(base, output.sequences, prompts["attention_mask"])).abs().max() > 0.1


def test_base_reference_holds_no_second_copy(prompts):
    model, ran = tiny_lora(tiny_model("qwen3", seed=1)), []
    model.get_base_model().lm_head.register_forward_hook(
        lambda module, args, out: ran.append(module.weight.data_ptr())
    )
    with blended_generation(model, None, RULE):
        sample(model, prompts)
    assert len(ran) % 2 == 0 and set(ran) == {model.get_base_model().lm_head.weight.data_ptr()}


def test_base_reference_ignores_trained_modules(prompts):
    base = tiny_model("llama", seed=1)
    model = tiny_lora(tiny_model("llama", seed=1), target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.get_base_model().lm_head.modules_to_save["default"].weight.data.mul_(2.0)
    with blended_generation(model, None, RULE, record=True) as session:
        output = sample(model, prompts)
    assert_recorded(session.records[0], [model, base], output, prompts)


def test_adapters_added_through_transformers(prompts):
    base, model = tiny_model("llama", seed=1), tiny_model("llama", seed=1)
    model.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    with blended_generation(model, None, RULE, record=True) as session:
        output = sample(model, prompts)
    assert_recorded(session.records[0], [model, base], output, prompts)


def test_base_reference_is_restored_when_its_forward_raises(prompts):
    model = tiny_lora(tiny_model("qwen3", seed=1))
    before = sample(model, prompts)
    calls = []

    def fail(module, args):
        calls.append(module)
        if len(calls) == 2:  # the student's prefill is the first call, the base's the second
            raise ValueError("broken")

    handle = model.get_base_model().lm_head.register_forward_pre_hook(fail)
    with blended_generation(model, None, RULE, record=True) as session, pytest.raises(ValueError, match="broken"):
        sample(model, prompts)
    handle.remove()
    assert session.records == [] and torch.equal(sample(model, prompts), before)


def test_teacher_may_be_a_peft_model(student, prompts):
    teacher = tiny_lora(tiny_model("llama", seed=2))
    with blended_generation(student, teacher, RULE, record=True) as session:
        output = sample(student, prompts)
    assert_recorded(session.records[0], [student, teacher], output, prompts)


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"init_lora_weights": "pissa"}])
def test_base_that_adapters_changed_is_refused(settings):
    model = tiny_lora(tiny_model("llama"), **settings)
    with pytest.raises(UnsupportedError, match=next(iter(settings))), blended_generation(model, None, RULE):
        pass


def test_base_reference_needs_adapters(student):
    with pytest.raises(UnsupportedError, match="no adapters"), blended_generation(student, None, RULE):
        pass


def test_own_adapted_model_as_teacher_is_refused():
    model = tiny_lora(tiny_model("llama"))
    for teacher in (model, model.get_base_model()):
        with pytest.raises(UnsupportedError, match="teacher=None"), blended_generation(model, teacher, RULE):
            pass


def test_student_as_its_own_teacher(student, prompts):
    plain = sample(student, prompts)
    with blended_generation(student, student, ProbabilityMixing(0.5), record=True) as session:
        assert torch.equal(sample(student, prompts), plain)
    assert session.records[0].statistics["kl_behavior_student"].max() < 1e-5


def test_prompt_learning_is_refused(student):
    tuned = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for arguments in ((tuned, student), (student, tuned), (tuned, None)):
        with pytest.raises(UnsupportedError, match="virtual tokens"), blended_generation(*arguments, RULE):
            pass


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


# What is refused


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_beams": 2}, "beam"),
        ({"num_beams": 2, "do_sample": False}, "num_beams=2"),
        ({"prompt_lookup_num_tokens": 2}, "assisted"),
        ({"do_sample": False, "top_k": 4, "penalty_alpha": 0.6}, "contrastive"),
        ({"custom_generate": lambda *args, **kwargs: None}, "custom_generate"),
        ({"cache_implementation": "paged"}, "paged"),
        ({"position_ids": torch.zeros(3, 7, dtype=torch.long)}, "position_ids"),
        ({"token_type_ids": torch.zeros(3, 7, dtype=torch.long)}, "token_type_ids"),
        ({"inputs_embeds": torch.zeros(3, 7, 32)}, "inputs_embeds"),
    ],
)
def test_decoding_that_would_be_wrong_is_refused(student, teacher, prompts, settings, message):
    with blended_generation(student, teacher, RULE), pytest.raises(UnsupportedError, match=message):
        sample(student, prompts, **settings)


def test_assistant_model_is_refused(student, teacher, prompts):
    with blended_generation(student, teacher, RULE), pytest.raises(UnsupportedError, match="assisted"):
        sample(student, {name: values[:1] for name, values in prompts.items()}, assistant_model=tiny_model("llama"))


def test_prompt_that_the_teacher_cannot_see_is_refused(student, teacher, prompts):
    cache = DynamicCache(config=student.config)
    student(**prompts, past_key_values=cache, use_cache=True)
    with blended_generation(student, teacher, RULE):
        with pytest.raises(UnsupportedError, match="past_key_values"):
            sample(student, prompts, past_key_values=cache)
        sample(student, prompts, past_key_values=DynamicCache(config=student.config))  # an empty one is fine
        with pytest.raises(UnsupportedError, match="attention_mask"):
            sample(student, {**prompts, "input_ids": prompts["input_ids"][:, -1:]})
        with pytest.raises(UnsupportedError, match="input_ids"):
            student.generate(bos_token_id=3)
        with pytest.raises(UnsupportedError, match="generate_batch"):
            student.generate_batch([[5, 6]])


def test_models_that_cannot_be_blended_are_refused(student):
    seq2seq = BartForConditionalGeneration(
        BartConfig(
            vocab_size=64,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=1,
            decoder_attention_heads=1,
        )
    )
    for arguments in ((seq2seq, student), (student, seq2seq)):
        with pytest.raises(UnsupportedError, match="encoder-decoder"), blended_generation(*arguments, RULE):
            pass
    wrapped = torch.nn.Sequential(student)
    for arguments in ((wrapped, student), (student, wrapped), (student, [student.model])):
        with pytest.raises(UnsupportedError, match="unwrap"), blended_generation(*arguments, RULE):
            pass
    with pytest.raises(ConfigError, match="empty"), blended_generation(student, [], RULE):
        pass
    with pytest.raises(ConfigError, match="rule"), blended_generation(student, student, 0.5):
        pass

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from tests.generation.teacher_forced import DETAILS, assert_recorded, recorded_logps, sample, teacher_forced_logits
from tests.tiny import tiny_lora, tiny_model
from trl_blend.errors import UnsupportedError
from trl_blend.generation import LogitMixing, ProbabilityMixing, blended_generation


RULE = LogitMixing(0.4)


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


def test_adapters_added_through_transformers(prompts, monkeypatch):
    # transformers may want a newer PEFT for this than there is; what it does is the same
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0")
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

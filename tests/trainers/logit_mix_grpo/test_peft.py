"""A LoRA student whose own base is the teacher: its loss and rollouts against the reference."""

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from tests import reference
from tests.tiny import tiny_lora, tiny_model
from tests.trainers import forced, runs


WEIGHT = 0.4
TWO_UPDATES = {"teacher_weight": WEIGHT, "num_iterations": 2, "max_steps": 2, "learning_rate": 1e-3}


def lora(**settings):
    # Random rather than zero: otherwise the student is its own base at the first step
    return LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **settings
    )


def build_lora(build, **kwargs):
    return build(trainer_kwargs={"peft_config": lora()}, **TWO_UPDATES, **kwargs)


def adapter_gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if "lora" in name}


@pytest.mark.parametrize("teacher", [None, "teacher"])
def test_loss_and_gradient_equal_the_reference(build, teacher):
    record = runs.train(build_lora(build, teacher=teacher, loss_type="grpo"))
    partner = forced.frozen(1 if teacher else 0)
    old = None
    for call, gradients in zip(record.calls, record.gradients, strict=True):
        student = forced.with_parameters(tiny_lora(tiny_model(seed=0)), call.parameters)
        old = old or forced.logps(student, [partner], [WEIGHT], call.inputs)
        rows = forced.tokens(call.inputs)
        loss = reference.grpo_mixed_loss(
            forced.completion_logits(student, call.inputs),
            [forced.completion_logits(partner, call.inputs)],
            [WEIGHT],
            rows,
            forced.ones(rows),
            call.inputs["advantages"].tolist(),
            old,
            aggregation="grpo",
        )
        loss.backward()
        assert call.loss == pytest.approx(loss.item(), abs=1e-5)
        runs.assert_close_tensors(gradients, adapter_gradients(student), relative=1e-4)


def lora_layers(model):
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    return layers


def test_dropout_of_the_adapter_does_not_reach_the_base(build):
    """The student is in training mode in the forward pass of the loss only, and stays in it afterwards."""
    trainer = build(teacher=None, trainer_kwargs={"peft_config": lora(lora_dropout=0.5)}, **TWO_UPDATES)
    modes = []
    layer = lora_layers(trainer.model)[0]
    layer.register_forward_pre_hook(
        lambda module, args: modes.append((module.disable_adapters, torch.is_grad_enabled(), module.training))
    )
    trainer.train()
    assert {training for disabled, _, training in modes if disabled} == {False}
    assert {training for disabled, graded, training in modes if not disabled and graded} == {True}
    assert trainer.model.training and layer.training


def test_dropout_does_not_reach_the_rollouts(build):
    """The tokens are drawn from the policy that their recorded log-probabilities are of."""
    settings = {"objective": "student", "teacher_weight": WEIGHT}
    trainer = build(teacher=None, trainer_kwargs={"peft_config": lora(lora_dropout=0.5)}, **settings)
    (call,) = runs.train(trainer).calls
    student = forced.with_parameters(tiny_lora(tiny_model(seed=0)), call.parameters)
    expected = forced.logps(student, [forced.frozen(0)], [WEIGHT], call.inputs)
    forced.assert_close_rows(forced.kept(call.inputs["old_per_token_logps"], call.inputs), expected, 1e-4)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_gradients_accumulate(build, loss_type):
    """The same generation batch in one micro-batch, or in two."""
    settings = {"teacher": None, "trainer_kwargs": {"peft_config": lora()}, "teacher_weight": WEIGHT}
    settings["loss_type"] = loss_type
    whole = runs.train(build(per_device_train_batch_size=8, **settings))
    halves = runs.train(build(per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings))
    assert len(whole.calls) == 1 and len(halves.calls) == 2
    assert sum(halves.losses) == pytest.approx(whole.losses[0], abs=1e-6)
    runs.assert_close_tensors(halves.gradients[0], whole.gradients[0], relative=1e-4)


def test_a_base_that_an_engine_has_rounded_is_the_same_base(build):
    """At each step vLLM is sent adapters that are merged into their base and out again."""

    class Rounds(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            for name, parameter in model.named_parameters():
                if "lora" not in name:
                    parameter.data.mul_(1 + 1e-6)

    first = build_lora(build, save_strategy="steps", save_steps=1)
    first.add_callback(Rounds())
    first.train()
    resumed = build_lora(build)
    resumed.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-1")
    assert resumed.state.global_step == 2

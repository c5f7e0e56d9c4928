"""Losses are those of the whole models, in forms where hidden states and the output layer's weight alone are not."""

import copy
import functools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MambaConfig, MambaForCausalLM, MptConfig, MptForCausalLM

from tests import reference, reference_divergences
from tests.models.architectures import tiny_architecture
from tests.tiny import VOCAB_SIZE, tiny_lora, tiny_model, tiny_tokenizer
from tests.trainers import forced, runs, scored
from tests.trainers.trust_region_opd import policies
from trl_blend.errors import EngineError, UnsupportedError
from trl_blend.models.fingerprint import identify_model


TOKENIZER = {"processing_class": tiny_tokenizer()}
SMALL = {"per_device_train_batch_size": 4, "max_completion_length": 5}
OPD = {"rollout_policy": "student", **SMALL}


def eos(model):
    model.generation_config.eos_token_id = list(runs.EOS_IDS)
    return model


def lora(**settings):
    fields = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **settings}
    return LoraConfig(task_type="CAUSAL_LM", **fields)


def check_distillation(record, index, student, teacher):
    """Loss and gradient of a call against the reverse KL of the two whole models."""
    call = record.calls[index]
    student = forced.with_parameters(copy.deepcopy(student), call.parameters)
    teacher = copy.deepcopy(teacher).double()
    rows = zip(policies.token_logits(student, call.inputs), policies.token_logits(teacher, call.inputs), strict=True)
    loss = sum(reference_divergences.reverse_kl_loss(s, t, s)[0] for s, t in rows) / len(policies.emitted(call.inputs))
    loss.backward()
    assert call.loss == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
    trained = {name: weight.grad for name, weight in student.named_parameters() if name in record.gradients[index]}
    runs.assert_close_tensors(record.gradients[index], trained, relative=2e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_distillation_from_a_teacher_with_an_adapter_on_its_output_layer(build_opd, tied):
    teacher = eos(tiny_lora(tiny_model(seed=1, tie_word_embeddings=tied), target_modules=["v_proj", "lm_head"]))
    identity = identify_model(teacher)
    record = runs.train(build_opd(teacher=teacher, **OPD))
    check_distillation(record, 0, tiny_model(), teacher)
    assert identify_model(teacher) == identity


def test_a_mixture_with_a_teacher_with_an_adapter_on_its_output_layer(build):
    teacher = tiny_lora(tiny_model(seed=1), target_modules=["v_proj", "lm_head"])
    settings = {"num_iterations": 2, "max_steps": 2, "learning_rate": 1e-3}
    record = runs.train(build(teacher=teacher, teacher_weight=0.6, **settings))
    first, second = record.calls
    whole, student = copy.deepcopy(teacher).double(), forced.student_at(first.parameters)
    old = forced.logps(student, [whole], [0.6], first.inputs)
    forced.assert_close_rows(forced.kept(second.inputs["old_per_token_logps"], first.inputs), old, 1e-4)
    loss = reference.grpo_mixed_loss(
        forced.completion_logits(forced.student_at(second.parameters), second.inputs),
        [forced.completion_logits(whole, second.inputs)],
        [0.6],
        forced.tokens(second.inputs),
        forced.ones(forced.tokens(second.inputs)),
        second.inputs["advantages"].tolist(),
        old,
        num_items=second.inputs["num_items_in_batch"].item(),
    )
    assert second.loss == pytest.approx(loss.item(), abs=1e-5)


def test_learned_positions_are_counted_from_the_first_token(build_opd):
    no_dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    student, teacher = (eos(tiny_model("gpt2", seed=seed, **no_dropout)) for seed in (0, 1))
    record = runs.train(build_opd(student=copy.deepcopy(student), teacher=teacher, trainer_kwargs=TOKENIZER, **OPD))
    assert not record.calls[0].inputs["prompt_mask"].all()
    check_distillation(record, 0, student, tiny_model("gpt2", seed=1))


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [6, 7, 20]}])
@pytest.mark.parametrize("base_is_teacher", [False, True])
def test_adapters_that_train_the_output_layer(build_opd, settings, base_is_teacher):
    """The second step too: there the base's output layer is no longer the student's."""
    base = tiny_model(tie_word_embeddings="trainable_token_indices" in settings)
    student = get_peft_model(eos(copy.deepcopy(base)), lora(**settings))
    teacher = None if base_is_teacher else "teacher"
    run = {"max_steps": 2, "learning_rate": 1e-2, "student": copy.deepcopy(student), "trainer_kwargs": TOKENIZER}
    record = runs.train(build_opd(teacher=teacher, **run, **OPD))
    for index in range(2):
        check_distillation(record, index, student, base if base_is_teacher else tiny_model(seed=1))
    trained = "lm_head.modules_to_save" if "modules_to_save" in settings else "trainable_tokens_delta"
    (name,) = [name for name in record.gradients[0] if trained in name]
    assert not torch.equal(record.calls[1].parameters[name], record.calls[0].parameters[name])


def test_a_teacher_that_does_more_before_its_output_layer_is_refused(build_opd):
    trainer = build_opd(teacher=eos(tiny_architecture("modernbert-decoder")), trainer_kwargs=TOKENIZER, **OPD)
    with pytest.raises(
        UnsupportedError, match=r"`teacher_model` \(ModernBertDecoderForCausalLM\): .* by up to .* nats"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_student_whose_output_is_not_that_of_its_layer_is_refused_for_an_evaluation(build):
    trainer = build(trainer_kwargs={"eval_dataset": runs.dataset()})
    trainer.model.lm_head.register_forward_hook(lambda layer, args, output: 1.05 * output)
    with pytest.raises(UnsupportedError, match=r"`model` \(Qwen3ForCausalLM of .*\): .* of its own logits"):
        trainer.evaluate()


def test_at_weight_zero_nothing_is_compared(build):
    trainer = build(teacher=None, teacher_weight=0.0)
    trainer.model.lm_head.register_forward_hook(lambda layer, args, output: 1.05 * output)
    trainer.train()


CONFIG = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
MPT = MptConfig(vocab_size=VOCAB_SIZE, d_model=32, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=128)


@pytest.mark.parametrize(
    "option", [{"packing": True, "max_length": 64}, {"padding_free": True}], ids=["packed", "flat"]
)
@pytest.mark.parametrize(
    "student",
    [
        lambda: MptForCausalLM(MPT),
        lambda: MambaForCausalLM(MambaConfig(**CONFIG, state_size=4, pad_token_id=0, eos_token_id=1)),
    ],
    ids=["mpt", "mamba"],
)
def test_rows_that_are_not_kept_apart_are_not_packed(models, tmp_path, student, option):
    rows = scored.scored_rollouts(scored.load(models, "student"), scored.load(models, "teacher"), num_rows=4)
    settings = {"train_dataset": rows, "trainer_kwargs": TOKENIZER}
    with pytest.raises(UnsupportedError, match="packed behind another one differ .* Set `packing=False`"):
        scored.build_offline(models, tmp_path, student=student(), **option, **settings).train()
    scored.build_offline(models, tmp_path, student=student(), **settings).train()


# -------------------- gradients


class Cut(torch.nn.Module):
    """A layer that passes no gradient on, as one that was packed for inference."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        with torch.no_grad():
            return self.layer(*args, **kwargs).requires_grad_(True)


@pytest.fixture(params=["grpo", "opd", "offline"])
def make(request, make):
    return functools.partial(make, request.param)


def test_a_step_without_any_gradient_is_an_error(make):
    trainer = make(trainer_kwargs={"peft_config": lora()})
    trainer.model.get_base_model().model.norm = Cut(trainer.model.get_base_model().model.norm)
    with pytest.raises(UnsupportedError, match="Step 1: 4 of the 4 weights to be trained got no gradient"):
        trainer.train()


def test_a_step_that_leaves_some_weights_out_is_a_warning(make, caplog):
    trainer = make(trainer_kwargs={"peft_config": lora()})
    layers = trainer.model.get_base_model().model.layers
    layers[0].mlp = Cut(layers[0].mlp)
    layers[0].input_layernorm = Cut(layers[0].input_layernorm)
    layers[0].self_attn.o_proj = Cut(layers[0].self_attn.o_proj)
    trainer.train()
    assert "2 of the 4 weights to be trained got no gradient" in caplog.text


def test_a_gradient_that_is_no_number_is_an_error(make):
    trainer = make()
    next(trainer.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(EngineError, match="Step 1: the gradient is NaN"):
        trainer.train()

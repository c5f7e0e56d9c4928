"""Partners of another architecture, size or vocabulary than the student's, and conversational prompts."""

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests import reference
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import forced, runs


WEIGHT = 0.4


def resized(logits, vocab_size):
    return [[reference.resize(row, vocab_size) for row in rows] for rows in logits]


PARTNERS = {
    "untied": lambda: tiny_model("llama", seed=1),
    "soft-capped, sliding window": lambda: tiny_model("gemma2", seed=1),
    "wider": lambda: tiny_model(seed=1, hidden_size=48, num_hidden_layers=1),
    "padded vocabulary": lambda: tiny_model(seed=1, vocab_size=72),
}


OBJECTIVES = {"mixed": {"objective": "mixed"}, "student": {"objective": "student", "is_clip_mode": "none"}}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("partner", PARTNERS)
def test_loss_with_another_model_as_partner(build, tmp_path, partner, objective):
    partner = PARTNERS[partner]()
    # Not the student's: soft-capping needs the eager attention
    load = {"attn_implementation": partner.config._attn_implementation}
    partner.save_pretrained(tmp_path / "partner")
    tiny_tokenizer().save_pretrained(tmp_path / "partner")
    settings = {"teacher_weight": WEIGHT, "loss_type": "grpo", **OBJECTIVES[objective]}
    record = runs.train(build(teacher=str(tmp_path / "partner"), teacher_model_init_kwargs=load, **settings))
    (call,) = record.calls
    assert_loss(record, call, forced.student_at(call.parameters), partner.double(), objective, 64)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_student_with_unused_rows(build, tmp_path, objective):
    """Rows of the student that are no tokens get nothing from the teacher; the mixture leaves them out."""
    student = tiny_model(seed=5, vocab_size=72)
    student.generation_config.eos_token_id = list(runs.EOS_IDS)
    student.save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    settings = {"teacher_weight": WEIGHT, "loss_type": "grpo", **OBJECTIVES[objective]}
    record = runs.train(build(student=str(tmp_path / "student"), **settings))
    (call,) = record.calls
    assert max(max(row) for row in forced.tokens(call.inputs)) < 64
    assert_loss(record, call, forced.with_parameters(student, call.parameters), forced.frozen(1), objective, 72)


def test_probability_mixing_never_draws_a_row_that_the_teacher_lacks(build, tmp_path):
    """It could, unlike logit mixing, and the teacher would have to read it next."""
    student = tiny_model(seed=5, vocab_size=96)
    student.generation_config.eos_token_id = list(runs.EOS_IDS)
    student.save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    alone = runs.train(build(parent=True, student=str(tmp_path / "student")))
    assert max(max(row) for row in forced.tokens(alone.calls[0].inputs)) >= 64
    trainer = build(student=str(tmp_path / "student"), mixing_space="probs", teacher_weight=0.1)
    record = runs.train(trainer)
    assert max(max(row) for row in forced.tokens(record.calls[0].inputs)) < 64
    assert trainer.generation_config.suppress_tokens == list(range(64, 96))


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_greedy_decodes_draw_no_row_that_is_no_token(build, tmp_path, weight):
    student = tiny_model(seed=5, vocab_size=96)
    student.generation_config.eos_token_id = list(runs.EOS_IDS)
    student.save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    trainer = build(student=str(tmp_path / "student"), teacher_weight=0.4)
    prompts = torch.arange(5, 45).view(8, 5)
    alone = student.generate(prompts, do_sample=False, max_new_tokens=6)
    assert alone.max() >= 64  # it would
    with trainer._decoding_greedily(), trainer.policy((weight,), recording=False):
        completion_ids, _ = trainer._generate_single_turn(prompts.tolist(), None, {}, 1)
    assert max(max(row) for row in completion_ids) < 64


def assert_loss(record, call, student, partner, objective, vocab_size):
    partner.requires_grad_(False)
    inputs, rows = call.inputs, forced.tokens(call.inputs)
    student_logits = forced.completion_logits(student, inputs)
    partner_logits = resized(forced.completion_logits(partner, inputs), vocab_size)
    advantages = inputs["advantages"].tolist()
    if objective == "mixed":
        loss = reference.grpo_mixed_loss(
            student_logits, [partner_logits], [WEIGHT], rows, forced.ones(rows), advantages, aggregation="grpo"
        )
    else:
        behavior = reference.token_logps([z.detach() for z in student_logits], [partner_logits], [WEIGHT], rows)
        forced.assert_close_rows(
            forced.kept(inputs["old_per_token_logps"], inputs), [[x.item() for x in row] for row in behavior], 1e-4
        )
        loss = reference.grpo_student_loss(
            student_logits, rows, forced.ones(rows), advantages, behavior, aggregation="grpo"
        )
    loss.backward()
    assert call.loss == pytest.approx(loss.item(), abs=1e-5)
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    runs.assert_close_tensors(record.gradients[0], expected, relative=1e-4)


def test_conversational_prompts(build):
    """The partner reads the prompt as the student's chat template renders it."""
    messages = [[{"role": "user", "content": prompt}] for prompt in runs.PROMPTS]
    dataset = Dataset.from_dict({"prompt": messages})
    record = runs.train(build(objective="student", teacher_weight=WEIGHT, train_dataset=dataset))
    (call,) = record.calls
    prompt = call.inputs["prompt_ids"][0][call.inputs["prompt_mask"][0].bool()].tolist()
    assert prompt[0] == 4 and prompt[-1] == 5, "<user> … <assistant>"
    expected = forced.logps(forced.student_at(call.parameters), [forced.frozen(1)], [WEIGHT], call.inputs)
    forced.assert_close_rows(forced.kept(call.inputs["old_per_token_logps"], call.inputs), expected, 1e-4)


def test_a_mixture_of_experts_keeps_its_router_loss(build, tmp_path):
    """With a copy of the student as teacher the parent's loss comes out, router loss and its gradient included."""
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    special = {"pad_token_id": 0, "eos_token_id": list(runs.EOS_IDS), "bos_token_id": None}
    student = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=64, initializer_range=0.4, **shape, **experts, **special))
    student.save_pretrained(tmp_path / "moe")
    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    name = str(tmp_path / "moe")
    settings = {"student": name, "router_aux_loss_coef": 0.5, "loss_type": "grpo"}
    parent = runs.train(build(parent=True, **settings))
    alone = runs.train(build(parent=True, **{**settings, "router_aux_loss_coef": 0.0}))
    ours = runs.train(build(teacher=name, teacher_weight=WEIGHT, **settings))
    assert ours.losses == pytest.approx(parent.losses, abs=1e-5)
    assert ours.logged("aux_loss") == pytest.approx(parent.logged("aux_loss"), abs=1e-5) != []
    # The policy's part of the gradient is scaled by 1 - w, the router's is not
    policy = alone.gradients[0]
    expected = {n: g - policy[n] + (1 - WEIGHT) * policy[n] for n, g in parent.gradients[0].items()}
    runs.assert_close_tensors(ours.gradients[0], expected, relative=1e-3)


def test_pad_equal_to_eos(build, tmp_path):
    """As with many tokenizers: the mask of a prompt or completion cannot be read off its ids."""
    student = tiny_model(seed=0)
    student.generation_config.eos_token_id = [1]
    student.save_pretrained(tmp_path / "student")
    for folder in (tmp_path / "student", tmp_path / "teacher"):
        tiny_tokenizer(pad_token="<eos>").save_pretrained(folder)
    tiny_model(seed=1).save_pretrained(tmp_path / "teacher")
    settings = {"student": str(tmp_path / "student"), "teacher": str(tmp_path / "teacher"), "seed": 3}
    # Long enough for some rows to end
    record = runs.train(build(objective="student", teacher_weight=WEIGHT, max_completion_length=40, **settings))
    (call,) = record.calls
    rows = forced.tokens(call.inputs)
    assert any(row[-1] == 1 for row in rows) and any(row[-1] != 1 for row in rows)
    student = forced.with_parameters(student, call.parameters)
    expected = forced.logps(student, [forced.frozen(1)], [WEIGHT], call.inputs)
    forced.assert_close_rows(forced.kept(call.inputs["old_per_token_logps"], call.inputs), expected, 2e-4)

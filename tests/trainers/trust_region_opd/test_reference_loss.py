"""Loss and gradient of real steps against `tests.reference_divergences`, from full-vocabulary logits in float64."""

import pytest

from tests import reference_divergences
from tests.tiny import VOCAB_SIZE
from tests.trainers import forced, runs
from tests.trainers.trust_region_opd import policies


SMALL = {"per_device_train_batch_size": 4, "max_completion_length": 5}
TOP_K = {"kl_support": "student_top_k", "kl_top_k": 6}
VETO = {"distillation_target": "veto", "veto_weight_start": 0.6, "veto_warmup_steps": 4}
INTERPOLATED = {"distillation_target": "interpolated", "target_weight": 0.3}
BEYOND = {"distillation_target": "interpolated", "target_weight": 1.7}
UNCERTAIN = {"forward_kl_entropy": 2.2}
BLEND = {"kl_budget": 0.5, "kl_budget_schedule": "constant"}
STUDENT = {"rollout_policy": "student"}
OTHER_EOS = [20, 33]
CASES = {
    "full": (1.0, {}, False, (64, 64)),
    "full_cold": (0.7, {}, False, (64, 64)),
    "full_eos": (1.3, {}, True, (64, 64)),
    "full_padded_teacher": (0.7, {}, False, (64, 72)),
    "full_padded_student_eos": (1.3, {}, True, (72, 64)),
    "top_k": (0.7, TOP_K, False, (64, 64)),
    "top_k_eos_padded_teacher": (1.3, TOP_K, True, (64, 72)),
    "top_k_padded_student": (1.0, TOP_K, False, (72, 64)),
    "veto": (1.3, VETO, False, (64, 64)),
    "veto_eos_padded_student": (0.7, VETO, True, (72, 64)),
    "veto_top_k": (0.7, TOP_K | VETO, False, (64, 64)),
    "veto_top_k_eos_padded_teacher": (1.3, TOP_K | VETO, True, (64, 72)),
    "interpolated": (0.7, INTERPOLATED, False, (64, 64)),
    "interpolated_eos_padded_student": (1.3, INTERPOLATED, True, (72, 64)),
    "interpolated_top_k_padded_teacher": (1.0, TOP_K | INTERPOLATED, False, (64, 72)),
    "beyond": (1.0, BEYOND, False, (64, 64)),
    "uncertain": (1.0, UNCERTAIN, False, (64, 64)),
    "uncertain_eos_padded_student": (1.0, UNCERTAIN, True, (72, 64)),
}


NEUTRAL = {"veto_weight": 0.0, "top_k": None, "eos": None, "target_weight": 1.0, "forward_kl_entropy": None}


def reference_losses(student, teacher, inputs, *, reference=None, **settings):
    """Loss, entropy and divergence of every token, as lists."""
    rows = zip(*(policies.token_logits(model, inputs) for model in (student, teacher, reference or teacher)))
    values = [
        reference_divergences.reverse_kl_loss(s, t, s.detach(), reference=r if reference else None, **settings)
        for s, t, r in rows
    ]
    return tuple(zip(*values, strict=True))


def settings_of(name):
    """Settings of the trainer, and of the reference at step 1 of the Veto schedule."""
    temperature, loss, eos, sizes = CASES[name]
    settings = {"temperature": temperature, **loss, **(BLEND if "eos" in name else STUDENT)}
    expected = {
        "temperature": temperature,
        "top_k": loss.get("kl_top_k"),
        "veto_weight": 0.6 * 3 / 4 if "veto_weight_start" in loss else 0.0,
        "target_weight": loss.get("target_weight", 1.0),
        "reference": forced.frozen(0, vocab_size=sizes[0]) if "target_weight" in loss else None,
        "forward_kl_entropy": loss.get("forward_kl_entropy"),
        "eos": policies.eos_pair(OTHER_EOS) if eos else None,
    }
    if eos:
        settings["teacher_eos_token_id"] = OTHER_EOS
    if sizes != (VOCAB_SIZE, VOCAB_SIZE):
        settings |= policies.padded_models(*sizes)
    return settings, expected, sizes


@pytest.mark.parametrize("name", CASES)
def test_a_step(build_opd, name):
    settings, expected, sizes = settings_of(name)
    record = runs.train(build_opd(max_steps=2, learning_rate=1e-3, **SMALL, **settings))
    call = record.calls[1]
    tokens = policies.emitted(call.inputs)
    assert len({len(row) for row in forced.tokens(call.inputs)}) > 1 and max(tokens) < VOCAB_SIZE
    student = forced.student_at(call.parameters, vocab_size=sizes[0])
    teacher = forced.frozen(1, vocab_size=sizes[1])
    losses, entropies, divergences = reference_losses(student, teacher, call.inputs, **expected)
    loss = sum(losses) / len(tokens)
    loss.backward()
    assert call.loss == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
    gradients = {key: parameter.grad for key, parameter in student.named_parameters()}
    runs.assert_close_tensors(record.gradients[1], gradients, relative=2e-4)
    assert record.logged("entropy")[1] == pytest.approx(sum(entropies).item() / len(tokens), rel=1e-4)
    logged = record.logged("blend/reverse_kl")
    assert bool(logged) == record.trainer.uses_own_divergence == (name not in ("full", "full_cold"))
    if logged:
        assert logged[1] == pytest.approx(sum(divergences).item() / len(tokens), rel=1e-4)
    # Each setting matters on this batch
    for key, value in NEUTRAL.items():
        if expected[key] != value:
            others, _, _ = reference_losses(student, teacher, call.inputs, **{**expected, key: value})
            assert call.loss != pytest.approx((sum(others) / len(tokens)).item(), abs=1e-3), key


@pytest.mark.parametrize("name", ["full", "top_k", "veto"])
def test_accumulation_is_the_sum_over_the_tokens_of_the_batch(build_opd, name):
    settings, _, _ = settings_of(name)
    accumulation = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_completion_length": 5}
    record = runs.train(build_opd(**accumulation, **settings, max_steps=1))
    assert len(record.calls) == 3
    lengths = [len(policies.emitted(call.inputs)) for call in record.calls]
    assert len(set(lengths)) > 1, "micro-batches of equal length: this would test nothing"
    student = forced.student_at(record.calls[0].parameters)
    top_k, veto_weight = settings.get("kl_top_k"), settings.get("veto_weight_start", 0.0)
    for call in record.calls:
        losses, _, _ = reference_losses(
            student,
            forced.frozen(1),
            call.inputs,
            temperature=settings["temperature"],
            top_k=top_k,
            veto_weight=veto_weight,
        )
        loss = sum(losses) / sum(lengths)
        loss.backward()
        assert call.loss == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
    gradients = {key: parameter.grad for key, parameter in student.named_parameters()}
    runs.assert_close_tensors(record.gradients[0], gradients, relative=2e-4)


def test_the_losses_of_both_kernels_agree(build_opd):
    """This package's reverse KL on the whole vocabulary, at Veto weight 0, is TRL's."""
    settings = {"max_steps": 3, "max_grad_norm": 1.0}
    veto = {"distillation_target": "veto", "veto_weight_start": 0.0}
    ours, parent = runs.train(build_opd(**STUDENT, **veto, **settings)), runs.train(build_opd(parent=True, **settings))
    assert ours.trainer.uses_own_divergence
    assert ours.losses == pytest.approx(parent.losses, rel=1e-4) and ours.losses != parent.losses
    assert ours.logged("blend/reverse_kl") == pytest.approx(ours.losses, rel=1e-5)
    runs.assert_close_tensors(ours.gradients[0], parent.gradients[0], relative=1e-4)

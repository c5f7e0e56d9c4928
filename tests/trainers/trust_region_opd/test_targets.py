"""Other targets and fewer positions: their limits, what they are measured by, and where the reference comes from."""

import pytest
from peft import LoraConfig, get_peft_model

from tests import reference, reference_divergences
from tests.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.trainers import forced, runs
from tests.trainers.trust_region_opd import policies
from tests.trainers.trust_region_opd.test_reference_loss import reference_losses
from trl_blend.errors import ConfigError, UnsupportedError


TOKENIZER = {"processing_class": tiny_tokenizer()}
STUDENT = {"rollout_policy": "student"}
INTERPOLATED = {**STUDENT, "distillation_target": "interpolated", "target_weight": 0.3}
TIP = {**STUDENT, "token_selection": "tip", "tip_entropy_quantile": 0.6, "tip_divergence_quantile": 0.7}
UNCERTAIN = {**STUDENT, "forward_kl_entropy": 2.2}
MERGED = {"teacher_eos_token_id": [20, 33]}
SMALL = {"per_device_train_batch_size": 4, "max_completion_length": 5, "max_steps": 2, "learning_rate": 1e-3}


def lora(**settings):
    return {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **settings)}


# The interpolated target


@pytest.mark.parametrize("settings", [{}, MERGED], ids=["", "eos"])
def test_all_weight_on_the_teacher_is_the_teacher(build_opd, settings):
    """With TRL's own loss where that is the teacher's, and no third model."""
    weight = {**INTERPOLATED, "target_weight": 1.0}
    ours, plain = (runs.train(build_opd(**one, **settings, max_steps=3)) for one in (weight, STUDENT))
    runs.assert_same_run(ours, plain)
    assert ours.trainer._reference is None and ours.trainer.uses_own_divergence == bool(settings)


def test_a_resumed_run_keeps_the_reference_of_the_first_step(build_opd):
    settings = {**INTERPOLATED, "per_device_train_batch_size": 2, "max_steps": 4}
    whole = runs.train(build_opd(**settings, save_strategy="steps", save_steps=2))
    again = build_opd(**settings)
    resumed = runs.train(again, resume_from_checkpoint=f"{whole.trainer.args.output_dir}/checkpoint-2")
    assert resumed.losses == whole.losses[2:]
    runs.assert_same_tensors(runs.snapshot(again.model), runs.snapshot(whole.trainer.model))
    at_step_0 = runs.snapshot(build_opd(**STUDENT).model)
    runs.assert_same_tensors(runs.snapshot(again._reference), at_step_0)
    assert any((runs.snapshot(again.model)[name] != tensor).any() for name, tensor in at_step_0.items())


def test_a_student_in_memory_is_copied(build_opd):
    student = tiny_model(seed=0)
    student.generation_config.eos_token_id = list(runs.EOS_IDS)
    given = {"student": student, "trainer_kwargs": {"processing_class": tiny_tokenizer()}}
    ours, named = (runs.train(build_opd(**INTERPOLATED, **SMALL, **one)) for one in (given, {}))
    runs.assert_same_run(ours, named)
    assert not any(parameter.requires_grad for parameter in ours.trainer._reference.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_of_a_lora_student_is_its_base(build_opd, checkpointing):
    settings = {**INTERPOLATED, **SMALL, "gradient_checkpointing": checkpointing, "learning_rate": 1e-2}
    record = runs.train(build_opd(**settings, trainer_kwargs=lora()))
    assert sum(p.numel() for p in record.trainer._reference.parameters()) == 0  # no copy
    call = record.calls[1]
    student = forced.with_parameters(tiny_lora(tiny_model(seed=0), r=4, lora_alpha=8), call.parameters)
    teacher, base = forced.frozen(1), {"reference": forced.frozen(0), "target_weight": 0.3}
    losses, _, _ = reference_losses(student, teacher, call.inputs, **base)
    loss = sum(losses) / len(losses)
    loss.backward()
    assert call.loss == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: p.grad for name, p in student.named_parameters() if "lora" in name}
    runs.assert_close_tensors(record.gradients[1], expected, relative=5e-4)
    # which the student has left
    others, _, _ = reference_losses(student, teacher, call.inputs, **{**base, "reference": student})
    assert call.loss != pytest.approx((sum(others) / len(others)).item(), abs=1e-4)


@pytest.mark.parametrize("settings", [INTERPOLATED, TIP, UNCERTAIN], ids=["interpolated", "tip", "uncertain"])
def test_evaluation_is_the_distance_to_the_teacher(build_opd, settings):
    data = {"trainer_kwargs": {"eval_dataset": runs.dataset()}}
    ours, plain = (build_opd(**one, **data).evaluate() for one in (settings, STUDENT))
    for name in ("eval_loss", "eval_blend/reverse_kl"):
        assert ours[name] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert not {"eval_blend/kept_share", "eval_blend/forward_kl_share"} & set(ours)


REFUSED = {
    "no teacher": ({"teacher": None, "trainer_kwargs": lora()}, ConfigError, "beside a teacher"),
    "pissa": ({"trainer_kwargs": lora(init_lora_weights="pissa")}, UnsupportedError, "`init_lora_weights='pissa'`"),
    "bias": ({"trainer_kwargs": lora(bias="all")}, UnsupportedError, "`bias='all'`"),
    "trained": ({"trainer_kwargs": lora(init_lora_weights=False)}, UnsupportedError, "`merge_and_unload`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_reference_that_is_not_the_student_at_step_0(build_opd, name):
    settings, error, text = REFUSED[name]
    with pytest.raises(error, match="`distillation_target='interpolated'` with `target_weight=0.3` needs") as raised:
        build_opd(**INTERPOLATED, **settings)
    assert text in str(raised.value)


@pytest.mark.parametrize("what", ["modules_to_save", "magnitudes"])
def test_a_new_adapter_beside_what_was_trained(build_opd, what):
    settings = {"modules_to_save": ["embed_tokens"]} if what == "modules_to_save" else {"use_dora": True}
    student = get_peft_model(tiny_model(seed=0), LoraConfig(target_modules=["v_proj"], **settings))
    build_opd(**INTERPOLATED, student=student, trainer_kwargs=TOKENIZER)
    for name, parameter in student.named_parameters():
        if "modules_to_save" in name or "magnitude" in name:
            parameter.data *= 1.1
    with pytest.raises(UnsupportedError, match="needs the student at step 0, which is the base .* logit differs by"):
        build_opd(**INTERPOLATED, student=student, trainer_kwargs=TOKENIZER)


def test_a_model_that_zero_3_has_split(build_opd):
    student = tiny_model(seed=0)
    next(student.parameters()).ds_id = 0
    with pytest.raises(UnsupportedError, match="ZeRO-3 has split the weights of `model`. Pass its name"):
        build_opd(student=student, trainer_kwargs={"processing_class": tiny_tokenizer()}, **INTERPOLATED)


# The forward KL of uncertain teachers


def test_the_share_of_positions_with_the_forward_kl(build_opd):
    record = runs.train(build_opd(**UNCERTAIN, **SMALL))
    for call, share in zip(record.calls, record.logged("blend/forward_kl_share"), strict=True):
        rows = policies.token_logits(forced.frozen(1), call.inputs)
        entropies = [reference.entropy(reference.log_softmax(row)).item() for row in rows]
        assert share == pytest.approx(sum(entropy > 2.2 for entropy in entropies) / len(entropies))
        assert 0 < share < 1


def test_a_threshold_that_no_teacher_reaches_is_the_reverse_kl(build_opd):
    ours, plain = (
        runs.train(build_opd(**settings, **SMALL, **MERGED))
        for settings in ({**UNCERTAIN, "forward_kl_entropy": 99.0}, STUDENT)
    )
    assert ours.losses == pytest.approx(plain.losses, rel=1e-6)
    runs.assert_close_tensors(ours.gradients[0], plain.gradients[0], relative=1e-5)


# Fewer positions


def tip_loss(student, calls, **settings):
    """Mean of the loss over the positions that are kept of one batch, and which these are."""
    found = [reference_losses(student, forced.frozen(1), call.inputs, **settings) for call in calls]
    losses, entropies, divergences = (sum((list(one[index]) for one in found), []) for index in range(3))
    kept = reference_divergences.tip_kept(
        [value.item() for value in entropies], [value.item() for value in divergences], 0.6, 0.7
    )
    return sum(loss for loss, keep in zip(losses, kept, strict=True) if keep) / sum(kept), kept


@pytest.mark.parametrize(
    "settings",
    [{}, {"forward_kl_entropy": 2.2}, {"kl_support": "student_top_k", "kl_top_k": 6}],
    ids=["plain", "uncertain", "top-k"],
)
def test_the_loss_is_the_mean_over_the_positions_kept(build_opd, settings):
    record = runs.train(build_opd(**TIP, **SMALL, **settings))
    expected = {"forward_kl_entropy": settings.get("forward_kl_entropy"), "top_k": settings.get("kl_top_k")}
    for index, call in enumerate(record.calls):
        student = forced.student_at(call.parameters)
        loss, kept = tip_loss(student, [call], **expected)
        loss.backward()
        assert 2 < sum(kept) < len(kept) - 2
        assert call.loss == pytest.approx(loss.item(), rel=1e-5)
        gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
        runs.assert_close_tensors(record.gradients[index], gradients, relative=2e-4)
        assert record.logged("blend/kept_share")[index] == pytest.approx(sum(kept) / len(kept))
        # The divergence that is logged stays that of all positions
        *_, divergences = reference_losses(student, forced.frozen(1), call.inputs, top_k=expected["top_k"])
        mean = sum(divergences).item() / len(divergences)
        assert record.logged("blend/reverse_kl")[index] == pytest.approx(mean, rel=1e-4)


def test_accumulated_micro_batches_count_by_all_their_tokens(build_opd):
    """Each selects its own positions, and these stand for all of its tokens."""
    accumulation = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_completion_length": 5}
    record = runs.train(build_opd(**TIP, **accumulation, max_steps=1))
    lengths = [len(policies.emitted(call.inputs)) for call in record.calls]
    assert lengths[0] != lengths[1]
    student = forced.student_at(record.calls[0].parameters)
    for call, length in zip(record.calls, lengths, strict=True):
        loss = tip_loss(student, [call])[0] * length / sum(lengths)
        loss.backward()
        assert call.loss == pytest.approx(loss.item(), rel=1e-5)
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    runs.assert_close_tensors(record.gradients[0], gradients, relative=2e-4)


def test_a_selection_of_all_positions_is_none(build_opd):
    ours, plain = (
        runs.train(build_opd(**settings, **SMALL, **MERGED))
        for settings in ({**TIP, "tip_entropy_quantile": 0.0}, STUDENT)
    )
    runs.assert_same_run(ours, plain)
    assert ours.logged("blend/kept_share") == [1.0, 1.0]


def test_padding_is_not_kept(build_opd):
    """Rows of different lengths: the positions past an end have neither entropy nor divergence."""
    trainer = build_opd(**TIP, **SMALL)
    seen = []
    select = trainer._selected

    def selecting(valid, result):
        seen.append((valid, *select(valid, result)))
        return seen[-1][1:]

    trainer._selected = selecting
    trainer.train()
    for valid, kept, scale in seen:
        assert kept.shape == (int(valid.sum()),) and not valid.all()
        assert scale.item() == pytest.approx(len(kept) / int(kept.sum()))

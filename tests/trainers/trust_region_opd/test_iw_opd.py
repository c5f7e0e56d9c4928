"""The sampled-token loss of IW-OPD: TRL's own trainer on the same rollouts, the float64 reference, and blends."""

import pytest
import torch
from trl import DistillationTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

from tests import reference_divergences
from tests.tiny import VOCAB_SIZE
from tests.trainers import forced, runs
from tests.trainers.trust_region_opd import policies
from trl_blend.errors import UnsupportedError


SMALL = {"per_device_train_batch_size": 4, "max_completion_length": 5, "learning_rate": 1e-3}
IW_OPD = {"distillation_objective": "iw_opd"}
STUDENT = {"rollout_policy": "student", **IW_OPD}
BLEND = {"kl_budget": 0.5, "kl_budget_schedule": "constant", **IW_OPD}
OTHER_EOS = [20, 33]


def trls(models, folder, calls, **settings):
    """TRL's experimental trainer, which is given the rollouts of recorded calls instead of drawing its own."""
    shared = {name: value for name, value in runs.SETTINGS.items() if name in IWOPDConfig.__dataclass_fields__}
    args = IWOPDConfig(
        output_dir=str(folder), **{**shared, "num_generations": 1, "remove_unused_columns": False, **settings}
    )
    trainer = IWOPDTrainer(
        model=str(models / "student"),
        teacher_model=str(models / "teacher"),
        args=args,
        train_dataset=runs.dataset(),
        data_collator=lambda rows: {},  # the rollouts come from below
    )
    batches = iter(calls)

    def rollouts(batch):
        inputs = next(batches).inputs
        halves = [inputs["prompt_ids"], inputs["completion_ids"]]
        masks = [inputs["prompt_mask"], inputs["completion_mask"]]
        trainer._buffer_step += 1
        return {
            "input_ids": torch.cat(halves, dim=1),
            "attention_mask": torch.cat(masks, dim=1),
            "labels": torch.cat([torch.full_like(halves[0], -100), halves[1].masked_fill(masks[1] == 0, -100)], dim=1),
            "prompts": halves[0],
            "prompt_attention_mask": masks[0],
        }

    trainer._prepare_inputs = rollouts
    # That of the dataset's rows; without it the loss is divided by the tokens of the rollouts
    trainer._get_num_items_in_batch = lambda *args: None
    return trainer


@pytest.mark.parametrize(("temperature", "gamma"), [(0.7, 0.0), (1.0, 0.5), (0.7, 2.0)])
def test_it_is_trls_on_the_same_rollouts(build_opd, models, tmp_path, temperature, gamma):
    settings = {**SMALL, "temperature": temperature, "iw_opd_gamma": gamma, "max_steps": 4, "max_grad_norm": 1.0}
    ours = runs.train(build_opd(**STUDENT, **settings))
    theirs = runs.train(trls(models, tmp_path / "trl", ours.calls, **settings))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4) and len(ours.losses) == 4
    for own, other in zip(ours.gradients, theirs.gradients, strict=True):
        runs.assert_close_tensors(own, other, relative=1e-3)
    runs.assert_close_tensors(runs.snapshot(ours.trainer.model), runs.snapshot(theirs.trainer.model), relative=1e-4)
    assert ours.logged("blend/iw_opd_weight") == pytest.approx(theirs.logged("iw_opd/mean_weight"), rel=1e-4)
    if gamma == 0.0:  # else TRL logs the weighted mean
        means = [-mean for mean in theirs.logged("iw_opd/mean_advantage")]
        assert ours.logged("blend/reverse_kl") == pytest.approx(means, rel=1e-3)


CASES = {
    "student": (1.0, STUDENT, False, (64, 64)),
    "student_padded_student": (0.7, STUDENT, False, (72, 64)),
    "student_eos": (1.3, STUDENT, True, (64, 64)),
    "blend": (1.0, BLEND, False, (64, 64)),
    "blend_eos_padded_teacher": (0.7, BLEND, True, (64, 72)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step(build_opd, name):
    temperature, settings, merges, sizes = CASES[name]
    if merges:
        settings = {**settings, "teacher_eos_token_id": OTHER_EOS}
    if sizes != (VOCAB_SIZE, VOCAB_SIZE):
        settings = {**settings, **policies.padded_models(*sizes)}
    record = runs.train(build_opd(**SMALL, **settings, temperature=temperature, max_steps=2))
    call = record.calls[1]
    student = forced.student_at(call.parameters, vocab_size=sizes[0])
    teacher = forced.frozen(1, vocab_size=sizes[1])
    eos = policies.eos_pair(OTHER_EOS) if merges else None
    policy = policies.trust_region(0.5) if "blend" in name else None
    losses, weights, gaps = reference_losses(student, teacher, call.inputs, temperature, eos, policy)
    loss = sum(losses) / len(losses)
    loss.backward()
    assert call.loss == pytest.approx(loss.item(), rel=1e-3 if policy else 1e-5)
    gradients = {key: parameter.grad for key, parameter in student.named_parameters()}
    runs.assert_close_tensors(record.gradients[1], gradients, relative=2e-3 if policy else 2e-4)
    assert record.logged("blend/iw_opd_weight")[1] == pytest.approx(policies.mean(weights), rel=1e-4)
    assert record.logged("blend/reverse_kl")[1] == pytest.approx(policies.mean(gaps), rel=2e-3)
    assert ("behavior_logps" in call.inputs) == bool(policy)
    if policy:  # the ratio matters here
        others, _, _ = reference_losses(student, teacher, call.inputs, temperature, eos, None)
        assert call.loss != pytest.approx(sum(others).item() / len(others), rel=0.05)


def reference_losses(student, teacher, inputs, temperature, eos, policy):
    """Loss, weight and estimated reverse KL of every token of a batch, from full logits in float64."""
    rows = [[row[:, :VOCAB_SIZE] for row in forced.completion_logits(model, inputs)] for model in (student, teacher)]
    found = [], [], []
    for own, other, tokens in zip(*rows, forced.tokens(inputs), strict=True):
        behavior = None
        if policy is not None:
            canonical = reference_divergences.canonical_logprobs
            pairs = [[canonical(z.detach(), temperature, eos).tolist() for z in pair] for pair in zip(own, other)]
            behavior = [policy(s, t)[token] for (s, t), token in zip(pairs, tokens, strict=True)]
        settings = {"behavior_logps": behavior, "temperature": temperature, "eos": eos}
        losses, logps, weights = reference_divergences.iw_opd_losses(list(own), list(other), tokens, 0.5, **settings)
        gaps = [loss.item() / logp.item() / w for loss, logp, w in zip(losses, logps, weights, strict=True)]
        for values, new in zip(found, (losses, weights, gaps), strict=True):
            values.extend(new)
    return found


def test_accumulated_micro_batches_are_one_batch(build_opd):
    """With the recorded probabilities of each rollout beside it, whatever order they are split in."""
    whole, split = (
        runs.train(
            build_opd(**{**SMALL, **BLEND, "per_device_train_batch_size": size}, gradient_accumulation_steps=steps)
        )
        for size, steps in ((8, 1), (2, 4))
    )
    assert sum(split.losses) == pytest.approx(sum(whole.losses), rel=1e-5)
    runs.assert_close_tensors(split.gradients[0], whole.gradients[0], relative=1e-4)


def test_own_rollouts_after_the_warmup_have_no_ratio(build_opd):
    blend = {"kl_budget": 0.5, "blend_warmup_steps": 1, **IW_OPD}
    calls = runs.train(build_opd(**SMALL, **blend, max_steps=2)).calls
    assert ["behavior_logps" in call.inputs for call in calls] == [True, False]


def test_evaluation_measures_the_divergence_from_the_teacher(build_opd):
    data = {"trainer_kwargs": {"eval_dataset": runs.dataset()}}
    ours, plain = (build_opd(**settings, **data).evaluate() for settings in (STUDENT, {"rollout_policy": "student"}))
    assert ours["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert ours["eval_blend/reverse_kl"] == pytest.approx(plain["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{"use_vllm": True}, {"trainer_kwargs": {"tools": [print]}}], ids=["vllm", "tools"]
)
def test_blends_whose_probabilities_are_not_recorded(build_opd, monkeypatch, settings):
    match = "divides by the probability that a blended rollout was drawn with.*`rollout_policy='student'`"
    runs.check_refusal(build_opd, DistillationTrainer, monkeypatch, UnsupportedError, match, **BLEND, **settings)
    runs.check_refusal(build_opd, DistillationTrainer, monkeypatch, runs.ModelLoaded, None, **STUDENT, **settings)

"""One step of the trainer against float64 loops: loss and gradient, whatever shape the batch has."""

import copy

import pytest
import torch
from peft import LoraConfig

from tests import reference_offline
from tests.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.trainers import runs, scored
from tests.trainers.runs import assert_close_tensors, set_parameters, snapshot
from trl_blend.ops import LMHead
from trl_blend.ops.head.top_k import top_k_divergence
from trl_blend.trainers.offline_opd.data import TOP_K, ScoredRolloutCollator, prepare
from trl_blend.trainers.offline_opd.forward import OfflineForward


PLAIN = {"vocab_size": 64, "max_length": None, "packing": False, "shuffle_seed": None}
LOSSES = ("sampled_token", "top_k_reverse_kl", "top_k_forward_kl")
LAYOUTS = {
    "padded": {},
    "padding-free": {"padding_free": True},
    "packed": {"packing": True, "max_length": 64},
    "packed into several": {"packing": True, "max_length": 20},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "accumulated, padding-free": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "padding_free": True,
    },
}


def reference_step(model, rows, offline_loss, aggregation, frozen=None):
    """Loss and gradient of one step over all `rows`, in float64."""
    model = copy.deepcopy(model).double()
    model.zero_grad()
    frozen = model if frozen is None else frozen
    losses = []
    for row in rows:
        ids, start = row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"])
        logits = model(torch.tensor([ids])).logits[0]
        losses.append([])
        for t, token in enumerate(row["completion_ids"]):
            z = logits[start + t - 1]
            if offline_loss == "corrected":
                scores = row["teacher_logps"][t], row["rollout_logps"][t]
                loss = reference_offline.corrected_loss(z, z, token, *scores)
            elif offline_loss == "baseline":
                masses = [*row["teacher_topk_logps"][t], row["teacher_tail_logmass"][t]]
                teacher = row["teacher_logps"][t], row["teacher_topk_ids"][t], masses
                loss = reference_offline.baseline_loss(z, z, token, *teacher)
            elif offline_loss == "extrapolated":
                scores = row["teacher_logps"][t], row["student_logps"][t]
                loss = reference_offline.extrapolated_loss(z, z, token, *scores, 1.25)
            elif offline_loss == "sampled_token":
                loss = reference_offline.sampled_token_loss(z, z, token, row["teacher_logps"][t])
            else:
                masses = [*row["teacher_topk_logps"][t], row["teacher_tail_logmass"][t]]
                direction = offline_loss.split("_")[2]
                loss = reference_offline.top_k_kl(z, row["teacher_topk_ids"][t], masses, direction)
            losses[-1].append(loss)
    weights = [row["row_weight"] for row in rows] if "row_weight" in rows.column_names else None
    total = reference_offline.aggregate(losses, aggregation, weights)
    total.backward()
    return total.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def moved(model, seed=3):
    """Another student than the one that drew the rollouts, as after some steps."""
    generator = torch.Generator().manual_seed(seed)
    shifted = {name: p + 0.05 * torch.randn(p.shape, generator=generator) for name, p in snapshot(model).items()}
    set_parameters(model, shifted)
    return model


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("offline_loss", "aggregation"), [*((loss, "sequence") for loss in LOSSES), ("sampled_token", "token")]
)
def test_step_equals_the_reference(build_offline, models, rows, offline_loss, aggregation, layout):
    student = moved(scored.load(models, "student"))
    expected_loss, expected = reference_step(student, rows, offline_loss, aggregation)
    trainer = build_offline(student=student, offline_loss=offline_loss, loss_aggregation=aggregation, **layout)
    record = runs.train(trainer)
    assert len(record.calls) == layout.get("gradient_accumulation_steps", 1)
    assert sum(step.loss for step in record.calls) == pytest.approx(expected_loss, rel=1e-5)
    (gradients,) = record.gradients
    assert_close_tensors(gradients, expected, 1e-4)


@pytest.mark.parametrize("labelled_only", [False, True])
def test_top_k_reads_all_positions_or_the_labelled_ones(models, tmp_path, rows, labelled_only):
    """TRL hands the fused head the labelled positions alone where it has kernels for it, and all of them elsewhere."""
    args = scored.offline_config(tmp_path, offline_loss="top_k_reverse_kl")
    features = ScoredRolloutCollator(pad_token_id=0)(list(prepare(rows, uses_top_k=True, **PLAIN)))
    mask = features["labels"][:, 1:] != -100
    hidden, weight = torch.randn(*mask.shape, 4), torch.randn(64, 4)
    targets = features["labels"][:, 1:].clamp(min=0)
    kept = mask.reshape(-1) if labelled_only else slice(None)
    forward = OfflineForward(None, {name: features[name] for name in TOP_K}, args)
    head = LMHead(hidden.reshape(-1, 4)[kept], weight)
    loss, *_ = forward._top_k(mask, head, targets.reshape(-1)[kept], 1.0, ("log_probs",))
    columns = (features[name][:, 1:][mask] for name in TOP_K)
    expected = top_k_divergence(LMHead(hidden[mask], weight), targets[mask], *columns).loss
    found = loss if labelled_only else loss.reshape(mask.shape)[mask]
    torch.testing.assert_close(found, expected)
    assert len(loss) == len(targets.reshape(-1)[kept])


@pytest.mark.parametrize("layout", ["padded", "packed", "accumulated, padding-free"])
def test_ratio_to_the_policy_of_the_rollouts(build_offline, models, rows, layout):
    student = moved(scored.load(models, "student"))
    expected_loss, expected = reference_step(student, rows, "corrected", "sequence")
    plain, _ = reference_step(student, rows, "sampled_token", "sequence")
    trainer = build_offline(student=student, importance_correction="token", **LAYOUTS[layout])
    record = runs.train(trainer)
    assert abs(expected_loss - plain) > 0.1
    assert sum(step.loss for step in record.calls) == pytest.approx(expected_loss, rel=1e-5)
    assert_close_tensors(record.gradients[0], expected, 1e-4)
    assert record.logged("offline/importance_ratio")[0] > 0


ADVANTAGES = {"baseline": {"advantage_baseline": "kl"}, "extrapolated": {"reward_extrapolation": 1.25}}


@pytest.mark.parametrize("layout", ["padded", "packed", "accumulated, padding-free"])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_other_advantages(build_offline, models, rows, name, layout):
    student = moved(scored.load(models, "student"))
    expected_loss, expected = reference_step(student, rows, name, "sequence")
    plain, _ = reference_step(student, rows, "sampled_token", "sequence")
    record = runs.train(build_offline(student=student, **ADVANTAGES[name], **LAYOUTS[layout]))
    assert abs(expected_loss - plain) > 0.1
    assert sum(step.loss for step in record.calls) == pytest.approx(expected_loss, rel=1e-5)
    assert_close_tensors(record.gradients[0], expected, 1e-4)
    divergence = record.logged("offline/divergence")
    assert divergence[0] > 0 if name == "baseline" else not divergence


def test_the_baseline_is_the_value_of_the_top_k_loss(build_offline):
    logged = [
        runs.train(build_offline(**settings)).logged("offline/divergence")
        for settings in (ADVANTAGES["baseline"], {"offline_loss": "top_k_reverse_kl"})
    ]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_the_baseline_reads_all_positions_or_the_labelled_ones(models, tmp_path, rows):
    args = scored.offline_config(tmp_path, advantage_baseline="kl")
    features = ScoredRolloutCollator(pad_token_id=0)(list(prepare(rows, uses_top_k=True, **PLAIN)))
    mask = features["labels"][:, 1:] != -100
    hidden, weight = torch.randn(*mask.shape, 4), torch.randn(64, 4)
    targets = features["labels"][:, 1:].clamp(min=0)
    found = []
    for kept in (slice(None), mask.reshape(-1)):
        forward = OfflineForward(None, {name: features[name] for name in TOP_K}, args)
        forward._baseline(mask, LMHead(hidden.reshape(-1, 4)[kept], weight), targets.reshape(-1)[kept])
        found.append(forward.divergence)
    columns = (features[name][:, 1:][mask] for name in TOP_K)
    expected = top_k_divergence(LMHead(hidden[mask], weight), targets[mask], *columns).loss
    torch.testing.assert_close(found[0][mask], expected)
    torch.testing.assert_close(*found)
    assert not found[0].requires_grad and found[0][~mask].abs().max() == 0


WEIGHTS = [0.5, 0.0, 3.0, 1.0, 0.01, 1.0, 2.0, 0.25]


def weighted(rows, weights=WEIGHTS):
    return rows.add_column("row_weight", weights)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_weights_of_the_rows(build_offline, models, rows, aggregation, layout):
    student, data = moved(scored.load(models, "student")), weighted(rows)
    expected_loss, expected = reference_step(student, data, "sampled_token", aggregation)
    plain, _ = reference_step(student, rows, "sampled_token", aggregation)
    settings = {"loss_aggregation": aggregation, "train_dataset": data, **layout}
    record = runs.train(build_offline(student=student, **settings))
    assert abs(expected_loss - plain) > 0.02
    assert sum(step.loss for step in record.calls) == pytest.approx(expected_loss, rel=1e-5)
    assert_close_tensors(record.gradients[0], expected, 1e-4)


@pytest.mark.parametrize("layout", ["padded", "packed into several", "accumulated, padding-free"])
@pytest.mark.parametrize("scale", [1, 1e-3])
def test_equal_weights_are_none(build_offline, rows, layout, scale):
    """Bit by bit where they are 1; of any other size only their ratios count, with sums far below one row too."""
    data = weighted(rows, [scale] * len(rows))
    settings = {"loss_aggregation": "token", **LAYOUTS[layout]}
    plain, same = (runs.train(build_offline(train_dataset=d, **settings)) for d in (rows, data))
    assert_close_tensors(same.gradients[0], plain.gradients[0], 0 if scale == 1 else 1e-4)


def test_rows_without_any_weight_move_nothing(build_offline, rows):
    record = runs.train(build_offline(train_dataset=weighted(rows, [0.0] * len(rows))))
    assert record.calls[0].loss == 0 and all(grad.abs().max() == 0 for grad in record.gradients[0].values())


def test_cap_of_the_ratio(build_offline, models):
    student = moved(scored.load(models, "student"))
    trainer = build_offline(student=student, importance_correction="token", importance_cap=0.25)
    assert runs.train(trainer).logged("offline/importance_ratio")[0] <= 0.25


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_a_model_that_transformers_does_not_take_for_a_shifting_one(build_offline, tmp_path, rows, aggregation):
    """Its labels are counted without a shift, once per micro-batch."""
    student = tiny_model("gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    expected_loss, expected = reference_step(student, rows, "sampled_token", aggregation)
    trainer = build_offline(
        student=student,
        loss_aggregation=aggregation,
        trainer_kwargs={"processing_class": tiny_tokenizer()},
        **LAYOUTS["accumulated"],
    )
    record = runs.train(trainer)
    assert sum(step.loss for step in record.calls) == pytest.approx(expected_loss, rel=1e-5)
    assert_close_tensors(record.gradients[0], expected, 1e-4)


def test_the_two_aggregations_differ(models, rows):
    student = scored.load(models, "student")
    (_, first), (_, second) = (reference_step(student, rows, LOSSES[0], how) for how in ("sequence", "token"))
    with pytest.raises(AssertionError):
        assert_close_tensors(first, second, 1e-2)


def test_packs_hold_several_rows(build_offline, rows):
    trainer = build_offline(packing=True, max_length=20)
    lengths = trainer.train_dataset["seq_lengths"]
    assert 1 < len(lengths) < len(rows) and sum(map(len, lengths)) == len(rows)


def test_adapters(build_offline, models, rows):
    student = tiny_lora(scored.load(models, "student"))
    _, expected = reference_step(student, rows, "sampled_token", "sequence")
    record = runs.train(build_offline(student=student))
    assert_close_tensors(record.gradients[0], expected, 1e-4)


@pytest.mark.parametrize("offline_loss", LOSSES)
def test_new_adapter_on_a_frozen_head(build_offline, offline_loss):
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
    trainer = build_offline(trainer_kwargs={"peft_config": config}, offline_loss=offline_loss, max_steps=2)
    record = runs.train(trainer)
    names = {name for name, _ in trainer.model.named_parameters() if "lora" in name}
    assert names == set(record.gradients[0])
    final, first = runs.snapshot(trainer.model), record.calls[0].parameters
    moved_names = {name for name, value in final.items() if not torch.equal(value, first[name])}
    assert moved_names == names


def test_first_gradient_is_that_of_live_distillation_on_the_same_rollouts(build_offline, models, rows):
    """Live: both models in memory, log-probs of both computed in the step, nothing read from the data but tokens."""
    student, teacher = scored.load(models, "student"), scored.load(models, "teacher")
    record = runs.train(build_offline())
    total = 0.0
    for row in rows:
        ids, start = torch.tensor([row["prompt_ids"] + row["completion_ids"]]), len(row["prompt_ids"])
        tokens = torch.tensor(row["completion_ids"])[:, None]
        own, target = (
            m(ids).logits[0, start - 1 : -1].log_softmax(-1).gather(-1, tokens)[:, 0] for m in (student, teacher)
        )
        total = total + ((own - target).detach() * own).mean() / len(rows)
    total.backward()
    assert_close_tensors(record.gradients[0], {n: p.grad for n, p in student.named_parameters()}, 1e-5)


@pytest.mark.parametrize("offline_loss", LOSSES)
def test_student_equal_to_its_teacher_has_no_loss_and_no_gradient(build_offline, models, offline_loss):
    student = scored.load(models, "student")
    rows = scored.scored_rollouts(student, student)
    record = runs.train(build_offline(student=student, train_dataset=rows, offline_loss=offline_loss))
    _, other = reference_step(scored.load(models, "teacher"), rows, offline_loss, "sequence")
    assert abs(record.calls[0].loss) < 1e-5
    largest = max(grad.abs().max() for grad in record.gradients[0].values())
    assert largest < 1e-5 * max(grad.abs().max() for grad in other.values())


def test_half_precision_columns_change_the_loss_by_their_rounding(build_offline, rows):
    half = rows.map(lambda row: {"teacher_logps": torch.tensor(row["teacher_logps"]).half().tolist()})
    first, second = (runs.train(build_offline(train_dataset=data)).calls[0].loss for data in (rows, half))
    assert first != second and first == pytest.approx(second, rel=1e-3)


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_evaluation_loss_is_the_same_quantity(build_offline, models, rows, aggregation, layout):
    trainer = build_offline(
        trainer_kwargs={"eval_dataset": rows},
        loss_aggregation=aggregation,
        per_device_eval_batch_size=8,
        **LAYOUTS[layout],
    )
    expected, _ = reference_step(scored.load(models, "student"), rows, "sampled_token", aggregation)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")  # of TRL, which builds logits for them
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_evaluation_is_of_all_rows_alike(build_offline, models, rows, layout):
    data = weighted(rows)
    trainer = build_offline(trainer_kwargs={"eval_dataset": data}, per_device_eval_batch_size=8, **LAYOUTS[layout])
    expected, _ = reference_step(scored.load(models, "student"), rows, "sampled_token", "sequence")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.predict(data).metrics["test_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_training_goes_on_with_its_weights_after_an_evaluation(build_offline, rows):
    """Two steps at learning rate 0 over all rows: the same loss before and after."""
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "learning_rate": 0.0}
    trainer = build_offline(train_dataset=weighted(rows), trainer_kwargs={"eval_dataset": rows}, **evaluated)
    first, second = runs.train(trainer).logged("loss")
    assert first == pytest.approx(second, rel=1e-6) and first != 0

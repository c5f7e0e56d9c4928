"""Whole runs: streaming, metrics, the bound on the drift."""

import logging
import math

import pytest
import torch

from tests.trainers import runs, scored
from tests.trainers.runs import assert_same_tensors, set_parameters, snapshot


@pytest.fixture(scope="module")
def many_rows(models):
    return scored.scored_rollouts(scored.load(models, "student"), scored.load(models, "teacher"), num_rows=16, seed=1)


# Four steps of two micro-batches in an epoch
RUN = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}


def test_streaming_takes_the_same_steps(build_offline, many_rows):
    # In their order: a stream has no random access
    settings = {**RUN, "train_sampling_strategy": "sequential"}
    whole = runs.train(build_offline(train_dataset=many_rows, **settings))
    streamed = runs.train(build_offline(train_dataset=many_rows.to_iterable_dataset(), **settings))
    assert [step.loss for step in streamed.calls] == [step.loss for step in whole.calls] and len(whole.calls) == 8
    assert_same_tensors(snapshot(streamed.trainer.model), snapshot(whole.trainer.model))


# Metrics


def expected_metrics(model, rows):
    """From full logits in float64, token by token."""
    model = model.double()
    advantages, reverse, drift, unlikely = [], [], [], []
    for row in rows:
        ids, start = row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"])
        logprobs = scored.logprobs(model, ids)[start - 1 : -1]
        for t, token in enumerate(row["completion_ids"]):
            own, mu = logprobs[t, token].item(), row["rollout_logps"][t]
            target, first = row["teacher_logps"][t], row["student_logps"][t]
            advantages.append(target - own)
            unlikely.append(target < -10)
            for values, other in ((reverse, target), (drift, first)):
                values.append(math.exp(own - mu) * (own - other - 1) + math.exp(other - mu))
    n = len(advantages)
    mean = sum(advantages) / n
    return {
        "offline/advantage": mean,
        "offline/advantage_std": math.sqrt(sum((a - mean) ** 2 for a in advantages) / n),
        "offline/reverse_kl": sum(reverse) / n,
        "offline/drift_kl": sum(drift) / n,
        "offline/unlikely_share": sum(unlikely) / n,
    }


@pytest.mark.parametrize("layout", [{}, {"padding_free": True}], ids=["padded", "padding-free"])
def test_metrics_are_token_means_since_the_last_log(build_offline, models, many_rows, layout):
    settings = {**RUN, **layout, "logging_steps": 2, "train_sampling_strategy": "sequential", "learning_rate": 0.0}
    trainer = build_offline(train_dataset=many_rows, **settings)
    record = runs.train(trainer)
    for log in range(2):
        rows = many_rows.select(range(8 * log, 8 * log + 8))
        for name, value in expected_metrics(scored.load(models, "student"), rows).items():
            assert record.logged(name)[log] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert record.logged("offline/unlikely_share")[0] > 0 and not record.logged("offline/divergence")


def test_drift_is_zero_before_the_first_update_and_grows(build_offline, models, many_rows):
    record = runs.train(build_offline(train_dataset=many_rows, **RUN))
    drift = record.logged("offline/drift_kl")
    assert abs(drift[0]) < 1e-6 and drift[1] > 1e-3
    # The rows of the last step, with the weights before it
    model = scored.load(models, "student")
    set_parameters(model, record.calls[6].parameters)
    seen = [
        row
        for step in record.calls[6:]
        for row in many_rows
        if any(row["completion_ids"] == labels[labels != -100].tolist() for labels in step.inputs["labels"])
    ]
    assert len(seen) == 4
    assert drift[3] == pytest.approx(expected_metrics(model, seen)["offline/drift_kl"], rel=1e-4)


def test_metrics_of_evaluation_and_of_a_top_k_loss(build_offline, models, rows):
    trainer = build_offline(trainer_kwargs={"eval_dataset": rows}, offline_loss="top_k_reverse_kl")
    trainer.evaluate()
    found = trainer.state.log_history[-1]
    expected = expected_metrics(scored.load(models, "student"), rows)
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert found["eval_offline/divergence"] > 0


def test_metrics_of_several_evaluation_sets(build_offline, models, rows):
    sets = {"first": rows.select(range(2)), "second": rows.select(range(2, len(rows)))}
    trainer = build_offline(trainer_kwargs={"eval_dataset": sets})
    found = trainer.evaluate()
    for name, part in sets.items():
        expected = expected_metrics(scored.load(models, "student"), part)["offline/reverse_kl"]
        assert found[f"eval_{name}_offline/reverse_kl"] == pytest.approx(expected, rel=1e-4)
    assert "eval_offline/reverse_kl" not in found


def test_what_the_data_does_not_hold_is_not_measured(build_offline, rows):
    fewer = rows.remove_columns(["student_logps"])
    record = runs.train(build_offline(train_dataset=fewer))
    assert record.logged("offline/reverse_kl") and not record.logged("offline/drift_kl")
    fewer = rows.remove_columns(["student_logps", "rollout_logps"])
    record = runs.train(build_offline(train_dataset=fewer))
    assert record.logged("offline/advantage") and not record.logged("offline/reverse_kl")


@pytest.mark.parametrize(("action", "steps"), [("stop", 2), ("warn", 4)])
def test_bound_on_the_drift(build_offline, many_rows, caplog, action, steps):
    trainer = build_offline(train_dataset=many_rows, **RUN, max_policy_drift=1e-3, policy_drift_action=action)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == steps
    assert "max_policy_drift=0.001" in caplog.text and ("Training stops here" in caplog.text) == (action == "stop")


def test_a_wide_bound_changes_nothing(build_offline, many_rows, caplog):
    trainer = build_offline(train_dataset=many_rows, **RUN, max_policy_drift=1e3, policy_drift_action="stop")
    trainer.train()
    assert trainer.state.global_step == 4 and "max_policy_drift" not in caplog.text


@pytest.mark.parametrize("drift", [float("nan"), None, 0.5])
def test_a_drift_that_is_not_above_the_bound_does_not_stop(build_offline, drift):
    trainer = build_offline(max_policy_drift=0.5, policy_drift_action="stop")
    trainer._bound_drift(drift)
    assert not trainer.control.should_training_stop
    trainer._bound_drift(0.6)
    assert trainer.control.should_training_stop


def test_one_forward_of_the_student_per_micro_batch(build_offline, many_rows):
    trainer = build_offline(train_dataset=many_rows, **RUN)
    trainer.compare_logits(trainer.model)  # the forward passes of a few tokens at the start
    trainer._compared_logits = True
    calls = []
    trainer.model.model.register_forward_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    trainer.train()
    assert calls == [True] * 8

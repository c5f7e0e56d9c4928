"""What is logged, against a recomputation from full-vocabulary logits; completions tables."""

import pandas as pd
import pytest
import torch

from tests import reference
from tests.trainers import forced, runs


def token_mean(rows):
    values = [value for row in rows for value in row]
    return sum(values) / len(values)


def kl_behavior_student(student, partners, weights, inputs, temperature, space):
    """Exact `KL(μ‖p_S)` at every prefix of the rollouts."""
    with torch.no_grad():
        logits = [forced.completion_logits(model, inputs) for model in (student, *partners)]
    return [
        [
            reference.kl_divergence(
                reference.mixed_logprobs(rows[0][t], [row[t] for row in rows[1:]], weights, temperature, space),
                reference.log_softmax(rows[0][t] / temperature),
            ).item()
            for t in range(len(rows[0]))
        ]
        for rows in zip(*logits, strict=True)
    ]


@pytest.mark.parametrize(
    ("teachers", "weights", "space", "temperature", "objective"),
    [
        (["teacher"], [0.4], "logits", 0.8, "mixed"),
        (["teacher"], [0.4], "probs", 1.2, "student"),
        (["teacher", "second"], [0.3, 0.2], "logits", 1.0, "student"),
        (["teacher", "second"], [1.0, -0.6], "arithmetic", 1.2, "mixed"),
    ],
)
def test_mixing_metrics(build, teachers, weights, space, temperature, objective):
    settings = {"mixing_space": space, "temperature": temperature, "objective": objective}
    record = runs.train(build(teacher=teachers, teacher_weight=weights, **settings))
    (call,) = record.calls
    student, partners = forced.student_at(call.parameters), [forced.frozen(1), forced.frozen(2)][: len(teachers)]
    divergences = kl_behavior_student(student, partners, weights, call.inputs, temperature, space)
    assert record.logged("mixing/kl_behavior_student") == [pytest.approx(token_mean(divergences), abs=1e-4)]
    for index, partner in enumerate(partners):
        suffix = f"_{index}" if len(teachers) > 1 else ""
        logps = forced.logps(partner, [], [], call.inputs, temperature)
        assert record.logged(f"mixing/teacher_logp{suffix}") == [pytest.approx(token_mean(logps), abs=1e-4)]
        assert record.logged(f"mixing/teacher_weight{suffix}") == [weights[index]]


@pytest.mark.parametrize(
    ("mode", "cap", "level"),
    [
        ("max", 1.2, "token"),
        ("floor", 1.2, "token"),
        ("floor", 1.2, "sequence"),
        ("ppo", 1.6, "token"),
        ("none", None, "token"),
    ],
)
def test_importance_metrics(build, mode, cap, level):
    clipped = {"ppo": {"epsilon": 0.05, "epsilon_high": 0.6}, "none": {}}.get(mode, {"is_clip_max": cap})
    settings = {"is_clip_mode": mode, **clipped}
    settings["importance_sampling_level"] = level
    record = runs.train(build(objective="student", teacher_weight=0.4, **settings))
    (call,) = record.calls
    student = forced.student_at(call.parameters)
    behavior = forced.logps(student, [forced.frozen(1)], [0.4], call.inputs)
    own = forced.logps(student, [], [], call.inputs)
    rows = reference.ratios(own, behavior, forced.ones(own), level)
    ratios = [ratio.item() for row in rows for ratio in (row if level == "token" else row[:1])]
    expected = {
        "ratio_mean": sum(ratios) / len(ratios),
        "ratio_max": max(ratios),
        "effective_sample_size": sum(ratios) ** 2 / sum(ratio**2 for ratio in ratios) / len(ratios),
        "clipped_share": sum(ratio > cap for ratio in ratios) / len(ratios) if cap else 0.0,
    }
    assert {name: record.logged(f"importance/{name}") for name in expected} == {
        name: [pytest.approx(value, abs=1e-4)] for name, value in expected.items()
    }
    if mode != "none" and level == "token":
        assert 0.0 < expected["clipped_share"] < sum(ratio > 1.0 for ratio in ratios) / len(ratios)


def ratios_of(call, parameters):
    behavior = forced.logps(forced.student_at(parameters), [forced.frozen(1)], [0.4], call.inputs)
    own = forced.logps(forced.student_at(call.parameters), [], [], call.inputs)
    return [r.item() for row in reference.ratios(own, behavior, forced.ones(own), "token") for r in row]


def test_importance_of_micro_batches_and_steps_is_that_of_their_union(build):
    """Neither a mean of means nor a mean of maxima."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    record = runs.train(build(objective="student", teacher_weight=0.4, logging_steps=2, is_clip_max=1.2, **settings))
    assert len(record.calls) == 4
    ratios = [ratios_of(call, record.calls[index // 2 * 2].parameters) for index, call in enumerate(record.calls)]
    union = [ratio for part in ratios for ratio in part]
    assert record.logged("importance/ratio_mean") == [pytest.approx(sum(union) / len(union), abs=1e-4)]
    assert record.logged("importance/ratio_max") == [pytest.approx(max(union), abs=1e-4)]
    expected = sum(ratio > 1.2 for ratio in union) / len(union)
    assert record.logged("importance/clipped_share") == [pytest.approx(expected, abs=1e-6)]
    assert max(union) > sum(max(part) for part in ratios) / 4 + 0.01


def test_importance_is_not_logged_for_mixed_nor_at_weight_zero(build):
    decay = {"teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 1, "max_steps": 2}
    assert runs.train(build(objective="mixed")).logged("importance/ratio_mean") == []
    assert len(runs.train(build(objective="student", **decay)).logged("importance/ratio_mean")) == 1


def test_the_completions_table_has_the_weight(build, capsys):
    decay = {"teacher_weight": 0.4, "teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 4}
    trainer = build(log_completions=True, max_steps=2, **decay)
    trainer.train()
    for step, weight in ((1, 0.4), (2, 0.3)):
        table = pd.read_parquet(f"{trainer.args.output_dir}/completions/completions_{step:05d}.parquet")
        assert len(table) == 8
        assert table["teacher_weight"].tolist() == pytest.approx([weight] * 8)
        assert {"step", "prompt", "completion", "reward", "advantage"} <= set(table.columns)
    assert "teacher_weight" in capsys.readouterr().out


def test_share_of_prompts_with_any_reward(build):
    """Of two prompts with four rollouts each, only those of the first are rewarded, and of these only one."""

    def rewards(prompts, **kwargs):
        return [float(index == 1) for index in range(len(prompts))]

    assert runs.train(build(reward_funcs=rewards)).logged("mixing/rewarded_prompts") == [0.5]


def test_the_completions_table_with_two_teachers(build):
    trainer = build(log_completions=True, teacher=["teacher", "second"], teacher_weight=[0.25, 0.5])
    trainer.train()
    table = pd.read_parquet(f"{trainer.args.output_dir}/completions/completions_00001.parquet")
    assert table["teacher_weight_0"].tolist() == [0.25] * 8 and table["teacher_weight_1"].tolist() == [0.5] * 8

"""`eval_policy`: which policy is evaluated, and under which names its metrics appear."""

import pytest
import torch
from transformers import set_seed

from tests.trainers import runs
from trl_blend.ops.importance import ImportanceSums, importance_statistics, summarize_importance
from trl_blend.trainers.logit_mix_grpo import trainer as grpo_trainer


WEIGHT = 0.5
EVAL_PROMPTS = ("3*3=", "10-1=", "why?", "zz", "5 5 5", "a=b")


def seven(completion_ids, **kwargs):
    return [float(len(ids) % 7) for ids in completion_ids]


def evaluate(trainer):
    """Metrics of an evaluation from a fixed seed, without timings."""
    set_seed(5)
    metrics = trainer.evaluate()
    return {name: value for name, value in metrics.items() if "second" not in name and "time" not in name}


def build_eval(build, **settings):
    defaults = {"teacher_weight": WEIGHT, "reward_funcs": [runs.reward, seven], "num_generations_eval": 2}
    defaults["trainer_kwargs"] = {"eval_dataset": runs.dataset(EVAL_PROMPTS)}
    return build(**{**defaults, **settings})


def parent_metrics(build):
    settings = {"reward_funcs": [runs.reward, seven], "num_generations_eval": 2}
    settings["trainer_kwargs"] = {"eval_dataset": runs.dataset(EVAL_PROMPTS)}
    return evaluate(build(parent=True, **settings))


@pytest.mark.parametrize("objective", ["mixed", "student"])
def test_the_student_is_evaluated_as_grpo_evaluates_it(build, objective):
    expected = parent_metrics(build)
    metrics = evaluate(build_eval(build, objective=objective, eval_policy="student"))
    # Everything that the parent logs is there, un-prefixed and under the policy's name
    assert {name: metrics[name] for name in expected} == expected
    prefixed = {name.removeprefix("eval_student/"): value for name, value in metrics.items() if "_student/" in name}
    assert {"reward", "rewards/seven/mean", "completions/mean_length", "entropy"} <= set(prefixed)
    for name in (name for name in prefixed if not name.startswith("mixing/")):
        assert prefixed[name] == expected[f"eval_{name}"]
    assert metrics["eval_mixing/teacher_weight"] == metrics["eval_student/mixing/teacher_weight"] == 0.0
    assert not any(name.startswith("eval_mixed/") for name in metrics)
    assert not any("importance" in name for name in metrics)


@pytest.mark.parametrize("objective", ["mixed", "student"])
def test_the_mixed_policy_is_evaluated_with_the_teacher(build, objective):
    metrics = evaluate(build_eval(build, objective=objective, eval_policy="mixed"))
    assert metrics["eval_mixing/teacher_weight"] == metrics["eval_mixed/mixing/teacher_weight"] == WEIGHT
    assert metrics["eval_mixed/mixing/kl_behavior_student"] > 0.05
    assert metrics["eval_mixed/reward"] == metrics["eval_reward"] != parent_metrics(build)["eval_reward"]
    assert not any(name.startswith("eval_student/") for name in metrics)


@pytest.mark.parametrize("objective", ["mixed", "student"])
def test_a_weight_of_one_evaluates_the_teacher(build, objective):
    """The mixed policy at weight 1 draws what the teacher alone would draw from the same seed."""
    decay = {"teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 2}
    metrics = evaluate(build_eval(build, objective=objective, eval_policy="mixed", teacher_weight=1.0, **decay))
    settings = {"reward_funcs": [runs.reward, seven], "num_generations_eval": 2}
    settings["trainer_kwargs"] = {"eval_dataset": runs.dataset(EVAL_PROMPTS)}
    teacher = evaluate(build(parent=True, student="teacher", **settings))
    for name in ("eval_reward", "eval_rewards/seven/mean", "eval_completions/mean_length"):
        assert metrics[name] == teacher[name]


@pytest.mark.parametrize("objective", ["mixed", "student"])
def test_both(build, objective):
    metrics = evaluate(build_eval(build, objective=objective, eval_policy="both"))
    mixed = {name.removeprefix("eval_mixed/") for name in metrics if name.startswith("eval_mixed/")}
    student = {name.removeprefix("eval_student/") for name in metrics if name.startswith("eval_student/")}
    for name in ("reward", "rewards/seven/mean", "completions/mean_length", "entropy", "mixing/teacher_weight"):
        assert name in mixed and name in student
        # Un-prefixed: the deployed policy
        assert metrics[f"eval_{name}"] == metrics[f"eval_{objective}/{name}"]
    assert metrics["eval_mixed/mixing/teacher_weight"] == WEIGHT
    assert metrics["eval_student/mixing/teacher_weight"] == 0.0
    assert metrics["eval_mixed/reward"] != metrics["eval_student/reward"]
    assert "mixing/kl_behavior_student" in mixed and "mixing/kl_behavior_student" not in student
    assert ("importance/ratio_mean" in mixed) == (objective == "student")


def test_evaluation_during_training_leaves_the_training_metrics_alone(build):
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "eval_policy": "both"}
    trainer = build_eval(build, **settings)
    record = runs.train(trainer)
    assert record.logged("mixing/teacher_weight") == [WEIGHT, WEIGHT]
    assert len(record.logged("eval_student/reward")) == len(record.logged("eval_mixed/reward")) == 2
    entries = [set(entry) for entry in trainer.state.log_history]
    assert not any("reward" in entry and "eval_reward" in entry for entry in entries)
    # Training samples from the mixture again after an evaluation of the student
    assert record.logged("mixing/kl_behavior_student")[1] > 0.05
    assert trainer._rule is None


def test_the_ratios_of_training_are_logged_without_those_of_an_evaluation(build, monkeypatch):
    settings = {"max_steps": 2, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = build_eval(build, objective="student", eval_policy="mixed", **settings)
    sums = []

    def recorded(*args, **kwargs):
        found = importance_statistics(*args, **kwargs)
        sums.append((trainer.model.training, found))
        return found

    monkeypatch.setattr(grpo_trainer, "importance_statistics", recorded)
    record = runs.train(trainer)
    assert sums[0][0] and not sums[1][0]  # an evaluation comes between the two steps
    first, second = (torch.stack(found) for training, found in sums if training)
    together = ImportanceSums(*(first + second))._replace(ratio_max=torch.maximum(first[3], second[3]))
    for name, value in summarize_importance(together).items():
        assert record.logged(f"importance/{name}") == [pytest.approx(value, rel=1e-5)], name


def test_the_schedule_applies_to_the_evaluation(build):
    settings = {"teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 4, "max_steps": 2}
    trainer = build_eval(build, eval_policy="mixed", **settings)
    trainer.train()
    assert evaluate(trainer)["eval_mixing/teacher_weight"] == pytest.approx(WEIGHT / 2)

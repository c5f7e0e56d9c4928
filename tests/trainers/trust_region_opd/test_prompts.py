"""How often a prompt is drawn into a generation batch, and in which order."""

from collections import Counter

import pytest
from datasets import Dataset

from tests.trainers import runs


PROMPTS = tuple(f"{number}+1=" for number in range(16))
ACCUMULATED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4}


def batches_of(trainer):
    """Prompts of every generation batch of a run, in order."""
    batches, generate = [], trainer._generate_and_score_completions

    def recording(rows):
        batches.append([row["prompt"] for row in rows])
        return generate(rows)

    trainer._generate_and_score_completions = recording
    trainer.train()
    return batches


def data(kind):
    rows = Dataset.from_dict({"prompt": list(PROMPTS)})
    return rows if kind == "map" else rows.to_iterable_dataset()


@pytest.mark.parametrize("kind", ["map", "iterable"])
@pytest.mark.parametrize("settings", [{"rollout_policy": "student"}, {"kl_budget": 0.1, "blend_warmup_steps": 2}])
def test_each_prompt_is_rolled_out_four_times(build_opd, kind, settings):
    trainer = build_opd(num_rollouts_per_prompt=4, train_dataset=data(kind), **ACCUMULATED, **settings)
    rollouts = runs.record_opd_rollouts(trainer)
    batches = batches_of(trainer)
    assert len(batches) == 4
    for batch in batches:
        assert sorted(Counter(batch).values()) == [4, 4]
        assert batch == [prompt for prompt in dict.fromkeys(batch) for _ in range(4)]  # side by side
    assert len({prompt for batch in batches for prompt in batch}) == 8  # and no prompt in two batches
    # Four rollouts, not one four times
    completions = [tuple(ids) for ids in rollouts[0].inputs["completion_ids"].tolist()]
    assert len(set(completions)) > 2


@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_one_rollout_per_prompt_is_the_order_of_trl(build_opd, kind):
    ours = batches_of(build_opd(rollout_policy="student", train_dataset=data(kind), **ACCUMULATED))
    parent = batches_of(build_opd(parent=True, train_dataset=data(kind), **ACCUMULATED))
    assert ours == parent and len({prompt for batch in ours for prompt in batch}) == len(PROMPTS)


@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_the_prompts_of_a_batch_are_those_of_trl_in_its_order(build_opd, kind):
    """Four rollouts of two prompts use the prompts in the order in which TRL would, four times as slowly."""
    settings = {**ACCUMULATED, "max_steps": 2}
    ours = batches_of(
        build_opd(rollout_policy="student", num_rollouts_per_prompt=4, train_dataset=data(kind), **settings)
    )
    parent = batches_of(build_opd(parent=True, train_dataset=data(kind), **settings))
    assert [prompt for batch in ours for prompt in dict.fromkeys(batch)] == parent[0][:4]


def test_rollouts_of_a_prompt_may_be_split_over_micro_batches(build_opd):
    """It is the generation batch that holds them, whose rows are shuffled before it is split."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    (batch,) = batches_of(build_opd(num_rollouts_per_prompt=8, train_dataset=data("map"), **settings))
    assert len(batch) == 8 and len(set(batch)) == 1


def test_evaluation_draws_each_prompt_once(build_opd):
    trainer = build_opd(num_rollouts_per_prompt=4, trainer_kwargs={"eval_dataset": runs.dataset()})
    rollouts = runs.record_opd_rollouts(trainer)
    trainer.evaluate()
    assert sum(len(rollout.inputs["completion_ids"]) for rollout in rollouts) == len(runs.PROMPTS)

"""The teacher weight that waits for the reward."""

import pytest

from tests.trainers import runs
from trl_blend.errors import ConfigError


WAITS = {"teacher_weight": 0.6, "teacher_weight_schedule": "reward", "teacher_weight_decay_steps": 3}


def script(*means):
    """A reward function whose calls have these means, one per optimizer step."""
    calls = iter(means)

    def scripted(completion_ids, **kwargs):
        mean, count = next(calls), len(completion_ids)
        return [mean + 0.1 * (-1) ** index for index in range(count)]

    return scripted


def weights(result):
    return pytest.approx(result.logged("mixing/teacher_weight"))


def test_the_weight_falls_after_steps_with_the_reward_only(build):
    trainer = build(**WAITS, max_steps=7, reward_funcs=script(0.2, 0.7, 0.4, 0.5, 0.0, 0.9, 0.9))
    result = runs.train(trainer)
    assert [0.6, 0.6, 0.4, 0.4, 0.2, 0.2, 0.0] == weights(result)
    assert trainer.current_weights() == (0.0,)


def test_the_reward_is_the_weighted_sum_that_is_logged(build):
    """Two functions with weights 1 and -1; evaluation moves nothing."""
    settings = {**WAITS, "max_steps": 2, "reward_weights": [1.0, -1.0]}
    result = runs.train(build(**settings, reward_funcs=[script(0.7, 0.9), script(0.7, 0.2)]))
    assert result.logged("reward") == pytest.approx([0.0, 0.7]) and [0.6, 0.6] == weights(result)
    trainer = build(**settings, reward_funcs=[script(0.9, 0.9, 0.0), script(0.2, 0.2, 0.0)])
    assert [0.6, 0.4] == weights(runs.train(trainer))
    trainer.model.eval()
    trainer._calculate_rewards([{"prompt": "a"}] * 8, ["a"] * 8, ["b"] * 8, [[5]] * 8)
    assert not trainer.step_rewards


def test_the_reward_is_that_of_all_rollouts_of_a_step(build):
    """Two generation batches for each step, or two steps for each generation batch."""
    several = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "teacher_weight_min_reward": 0.4}
    alternating = script(0.9, 0.0, 0.9, 0.0, 0.1, 0.6)
    result = runs.train(build(**WAITS, **several, max_steps=3, reward_funcs=alternating))
    assert result.logged("reward") == pytest.approx([0.45, 0.45, 0.35])
    assert result.logged("mixing/teacher_weight") == pytest.approx([0.6, 0.4, 0.2])
    trainer = build(**WAITS, steps_per_generation=2, max_steps=4, reward_funcs=script(0.9, 0.1))
    runs.train(trainer)
    assert trainer.weight_steps == 2


def test_what_no_function_scores_is_left_out_as_in_the_metric(build):
    def rewards(completions, **kwargs):
        return [None if index % 4 == 0 else 0.6 + 0.1 * (index % 2) for index in range(len(completions))]

    trainer = build(**WAITS, teacher_weight_min_reward=0.63, max_steps=1, reward_funcs=rewards)
    (logged,) = runs.train(trainer).logged("reward")
    assert logged > 0.63 and trainer.weight_steps == 1


def test_a_resumed_run_goes_on_where_the_weight_stood(build):
    script_of_all = (0.2, 0.7, 0.4, 0.7)
    saved = build(**WAITS, max_steps=4, reward_funcs=script(*script_of_all), save_strategy="steps", save_steps=2)
    whole = runs.train(saved)
    resumed = build(**WAITS, max_steps=4, reward_funcs=script(*script_of_all[2:]))
    rest = runs.train(resumed, resume_from_checkpoint=f"{saved.args.output_dir}/checkpoint-2")
    assert [0.6, 0.6, 0.4, 0.4] == weights(whole)
    assert rest.logged("mixing/teacher_weight")[-2:] == whole.logged("mixing/teacher_weight")[-2:]
    runs.assert_same_tensors(runs.snapshot(resumed.model), runs.snapshot(saved.model))


def test_the_threshold_belongs_to_this_schedule(tmp_path):
    with pytest.raises(ConfigError, match="`teacher_weight_min_reward=0.3` has no effect"):
        runs.config(output_dir=str(tmp_path), teacher_weight=0.5, teacher_weight_min_reward=0.3)

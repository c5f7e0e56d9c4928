"""
Losses of GRPO on the mixed policy.

With a teacher that is a copy of the student, `p_mix = p_S` at any weight: the parent's loss must come out, and, by the
chain rule through the student's logits, `1 - w` times its gradient.
"""

import math

import pytest
import torch

from tests.trainers import runs


WEIGHT = 0.3
# The others are those of `test_reference_loss.py`. cispo's `epsilon_high` is an upper bound of the ratio itself
LOSS_TYPES = {
    "cispo": {"epsilon_high": 5.0},
    "sapo": {},
    "vespo": {},
    "luspo": {},
}
LEVELS = ("token", "sequence")


def scaled(gradients, factor):
    return {name: gradient * factor for name, gradient in gradients.items()}


@pytest.fixture(scope="module")
def parent_run(models, tmp_path_factory):
    """First step of TRL's own run, once for each of the settings."""
    cache = {}

    def run(**settings):
        key = str(settings)
        if key not in cache:
            cache[key] = runs.train(runs.build(models, tmp_path_factory.mktemp("run"), parent=True, **settings))
        return cache[key]

    return run


def assert_parents_first_step(ours, parent, factor=1 - WEIGHT):
    assert torch.equal(ours.calls[0].inputs["completion_ids"], parent.calls[0].inputs["completion_ids"])
    assert ours.losses[0] == pytest.approx(parent.losses[0], abs=1e-6)
    runs.assert_close_tensors(ours.gradients[0], scaled(parent.gradients[0], factor), relative=1e-4)
    for name in ("entropy", "reward", "completions/mean_length"):
        assert ours.logged(name)[0] == pytest.approx(parent.logged(name)[0], abs=1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_copy_of_the_student_as_teacher_changes_the_gradient_scale_only(build, parent_run, loss_type, level):
    settings = {"loss_type": loss_type, "importance_sampling_level": level, **LOSS_TYPES[loss_type]}
    # The second step has ratios other than 1: every loss must run there, too
    ours = runs.train(build(teacher="student", teacher_weight=WEIGHT, num_iterations=2, max_steps=2, **settings))
    assert_parents_first_step(ours, parent_run(**settings))
    assert all(math.isfinite(loss) for loss in ours.losses) and ours.losses[1] != ours.losses[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"mixing_space": "probs"},
        {"temperature": 0.6},
        {"top_entropy_quantile": 0.5},
        {"entropy_coef": 0.1},
        {"off_policy_mask_threshold": 0.5},
        {"mask_truncated_completions": True},
        {"scale_rewards": "batch"},
        {"gradient_checkpointing": True},
        {"cast_lm_head_to_fp32": True},
    ],
    ids=str,
)
def test_other_options_of_grpo_act_on_the_mixture(build, parent_run, settings):
    parent_settings = {name: value for name, value in settings.items() if name != "mixing_space"}
    ours = runs.train(build(teacher="student", teacher_weight=WEIGHT, **settings))
    assert_parents_first_step(ours, parent_run(**parent_settings))


def test_an_expert_that_equals_the_anti_expert_leaves_grpo(build, parent_run):
    settings = {"teacher_weight": [0.8, -0.8], "mixing_space": "arithmetic"}
    ours = runs.train(build(teacher=["teacher", "teacher"], **settings))
    assert_parents_first_step(ours, parent_run(), factor=1.0)
    assert ours.logged("mixing/kl_behavior_student") == [pytest.approx(0.0, abs=1e-6)]


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo"])
@pytest.mark.parametrize("level", LEVELS)
def test_student_with_the_losses_that_have_their_own_treatment_of_the_ratio(build, parent_run, loss_type, level):
    settings = {"loss_type": loss_type, "importance_sampling_level": level, **LOSS_TYPES[loss_type]}
    student = {"objective": "student", "is_clip_mode": "ppo", "teacher_weight": WEIGHT}
    same = runs.train(build(teacher="student", **student, **settings))
    parent = parent_run(**settings)
    assert same.losses[0] == pytest.approx(parent.losses[0], abs=1e-5)
    runs.assert_close_tensors(same.gradients[0], parent.gradients[0], relative=1e-4)
    other = runs.train(build(teacher="teacher", **student, **settings))
    assert math.isfinite(other.losses[0]) and other.losses[0] != pytest.approx(parent.losses[0], abs=1e-3)

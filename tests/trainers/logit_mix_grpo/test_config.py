"""The values of the mixture that are refused, and what it becomes at each step."""

import re

import pytest

from tests import reference
from tests.trainers.runs import config
from trl_blend.errors import ConfigError
from trl_blend.generation.rules import LogitArithmetic, LogitMixing, ProbabilityMixing


@pytest.fixture
def make(tmp_path):
    return lambda **settings: config(tmp_path, **settings)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan"), [0.2, 1.2], [-0.2, 0.5]])
def test_a_weight_outside_the_unit_interval_is_an_error(make, weight):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        make(teacher_weight=weight)


def test_weights_that_sum_above_one_are_an_error(make):
    with pytest.raises(ConfigError, match=r"\[0.6, 0.5\].*sums to 1.1"):
        make(teacher_weight=[0.6, 0.5])
    assert make(teacher_weight=[0.6, 0.4], **DECAY).teacher_weight == [0.6, 0.4]


@pytest.mark.parametrize("given", [1, [0.6, 0.4]])
def test_a_student_that_has_no_part_in_its_objective(make, given):
    with pytest.raises(ConfigError, match=r"teacher_weight=\[.*leaves the student no part"):
        make(teacher_weight=given)
    assert make(teacher_weight=given, objective="student").mixes
    assert make(teacher_weight=given, mixing_space="arithmetic").mixes


def test_weights_of_arithmetic_are_any_finite_numbers(make):
    assert make(teacher_weight=[2, -1.5], mixing_space="arithmetic").teacher_weight == [2.0, -1.5]
    with pytest.raises(ConfigError, match=r"`teacher_weight\[0\]` is nan. Set it to a finite number"):
        make(teacher_weight=float("nan"), mixing_space="arithmetic")


@pytest.mark.parametrize(
    ("given", "held"),
    [(0.3, [0.3]), ([0.3], [0.3]), ((0.2, 0.1), [0.2, 0.1]), (0, [0.0]), ([0.2, 0.1], [0.2, 0.1])],
)
def test_a_bare_weight_becomes_a_list(make, given, held):
    args = make(teacher_weight=given)
    assert args.teacher_weight == held
    assert all(type(weight) is float for weight in args.teacher_weight)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "reward"])
@pytest.mark.parametrize("steps", [None, 0, -5])
def test_a_decay_needs_steps(make, schedule, steps):
    message = f"{schedule!r}` needs `teacher_weight" if steps is None else f"`teacher_weight_decay_steps={steps}` must"
    with pytest.raises(ConfigError, match=message):
        make(teacher_weight_schedule=schedule, teacher_weight_decay_steps=steps)
    assert make(teacher_weight_schedule=schedule, teacher_weight_decay_steps=5).teacher_weight_decay_steps == 5


@pytest.mark.parametrize("schedule", ["constant", "adaptive"])
def test_steps_without_a_decay_are_an_error(make, schedule):
    with pytest.raises(
        ConfigError, match="`teacher_weight_decay_steps=10` has no effect.* or `.*='reward'`, or leave"
    ):
        make(teacher_weight_schedule=schedule, teacher_weight_decay_steps=10)


def test_adaptive_moves_a_single_weight(make):
    with pytest.raises(ConfigError, match=r"single weight.*\[0.2, 0.3\]"):
        make(teacher_weight_schedule="adaptive", teacher_weight=[0.2, 0.3])


def test_adaptive_moves_a_share(make):
    with pytest.raises(ConfigError, match=r"'adaptive'` moves a weight in \(0, 1\).*`mixing_space='arithmetic'`"):
        make(teacher_weight_schedule="adaptive", mixing_space="arithmetic")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("adaptive_num_prompts", 0),
        ("adaptive_interval", 0),
        *(("adaptive_scale", value) for value in (0.0, float("nan"), float("inf"), "5")),
        *(("adaptive_offset", value) for value in (float("nan"), float("-inf"))),
        *(("adaptive_max_weight", value) for value in (0.0, 1.1, float("nan"))),
    ],
)
def test_adaptive_settings_out_of_range(make, name, value):
    with pytest.raises(ConfigError, match=f"`{name}={value!r}` must be"):
        make(teacher_weight_schedule="adaptive", **{name: value})


@pytest.mark.parametrize("objective", ["mixed", "student"])
def test_the_evaluated_policy_defaults_to_the_deployed_one(make, objective):
    assert make(objective=objective).eval_policy == objective
    assert make(objective=objective, eval_policy="both").eval_policy == "both"
    other = {"mixed": "student", "student": "mixed"}[objective]
    assert make(objective=objective, eval_policy=other).eval_policy == other


def test_mixes_only_if_a_step_can_have_a_weight(make):
    assert make(teacher_weight=0.1).mixes
    assert make(teacher_weight=[0.0, 0.1]).mixes
    assert not make(teacher_weight=0.0).mixes
    assert not make(teacher_weight=[0.0, 0.0]).mixes
    # The adaptive weight leaves 0 after its first update
    assert make(teacher_weight=0.0, teacher_weight_schedule="adaptive").mixes


# The sampling distribution of the objective "student"


@pytest.mark.parametrize(
    "setting",
    [
        {"top_k": 5},
        {"repetition_penalty": 1.1},
        {"generation_kwargs": {"top_p": 0.9}},
        {"generation_kwargs": {"do_sample": False}},
        {"generation_kwargs": {"temperature": 0.5}},
    ],
    ids=str,
)
def test_student_refuses_settings_that_change_the_sampling_distribution(make, setting):
    ((name, value),) = setting.get("generation_kwargs", setting).items()
    with pytest.raises(ConfigError, match=f"`{name}={value}` changes the distribution"):
        make(objective="student", **setting)
    # Nothing is sampled from a mixture at weight 0, and "mixed" only warns, in the trainer
    make(objective="student", teacher_weight=0.0, **setting)
    make(objective="mixed", **setting)


@pytest.mark.parametrize("objective", ["mixed", "student"])
@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
def test_one_sequence_is_sampled_per_row(make, name, objective):
    with pytest.raises(ConfigError, match=f"`{name}=2`"):
        make(objective=objective, generation_kwargs={name: 2})
    make(objective=objective, generation_kwargs={name: 1})
    make(objective=objective, generation_kwargs={name: 2}, teacher_weight=0.0)


@pytest.mark.parametrize("mode", ["none", "max", "floor"])
def test_clip_modes_replace_delta(make, mode):
    with pytest.raises(ConfigError, match=f"`delta=2.0`.*`is_clip_mode='{mode}'`"):
        make(objective="student", is_clip_mode=mode, delta=2.0)
    make(objective="student", is_clip_mode="ppo", delta=2.0)
    make(objective="mixed", delta=2.0)


@pytest.mark.parametrize("mode", ["none", "max", "floor"])
@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo"])
def test_clip_modes_need_the_clipped_surrogate(make, mode, loss_type):
    settings = {"objective": "student", "loss_type": loss_type, "is_clip_mode": mode}
    if loss_type == "cispo":
        settings["epsilon_high"] = 5.0
    with pytest.raises(ConfigError, match=f"`is_clip_mode='{mode}'`.*`loss_type='{loss_type}'`"):
        make(**settings)
    make(**{**settings, "is_clip_mode": "ppo"})
    make(**{**settings, "objective": "mixed", "is_clip_mode": "floor"})


@pytest.mark.parametrize("mode", ["floor", "max"])
@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan"), "3"])
def test_the_cap_must_be_positive(make, mode, cap):
    with pytest.raises(ConfigError, match=f"`is_clip_max={cap!r}` must be"):
        make(objective="student", is_clip_mode=mode, is_clip_max=cap)
    assert make(objective="student", is_clip_mode=mode, is_clip_max=float("inf")).is_clip_max == float("inf")


ADAPTIVE = ("adaptive_num_prompts", "adaptive_interval", "adaptive_scale", "adaptive_offset")
DECAY = {"teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 5}
UNREAD = [
    *(({name: 7}, name, "teacher_weight_schedule='constant'") for name in ADAPTIVE),
    ({"adaptive_success_threshold": 0.5, **DECAY}, "adaptive_success_threshold", "teacher_weight_schedule='linear'"),
    ({"is_clip_mode": "none"}, "is_clip_mode", "objective='mixed'"),
    ({"is_clip_max": 2.0}, "is_clip_max", "objective='mixed'"),
    ({"objective": "student", "is_clip_mode": "none", "is_clip_max": 2.0}, "is_clip_max", "is_clip_mode='none'"),
    ({"objective": "student", "is_clip_mode": "ppo", "is_clip_max": 2.0}, "is_clip_max", "is_clip_mode='ppo'"),
    ({"objective": "student", "epsilon": 0.3}, "epsilon", "is_clip_mode='floor'"),
    ({"objective": "student", "epsilon_high": 0.3}, "epsilon_high", "is_clip_mode='floor'"),
    ({"teacher_weight": 0.0, "mixing_space": "probs"}, "mixing_space", "teacher_weight=[0.0]"),
    ({"teacher_weight": 0.0, **DECAY}, "teacher_weight_schedule", "teacher_weight=[0.0]"),
    ({"teacher_weight": 0.0, "eval_policy": "both"}, "eval_policy", "teacher_weight=[0.0]"),
    (
        {"teacher_weight": 0.0, "objective": "student", "is_clip_mode": "ppo"},
        "is_clip_mode",
        "teacher_weight=[0.0]",
    ),
]


@pytest.mark.parametrize(("settings", "name", "because"), UNREAD, ids=str)
def test_settings_that_nothing_reads(make, settings, name, because):
    with pytest.raises(ConfigError, match=rf"`{name}=.*` has no effect with `{re.escape(because)}`"):
        make(**settings)


def test_settings_at_their_defaults_are_left_alone(make):
    make(adaptive_scale=5.0, is_clip_max=3.0, is_clip_mode="floor")
    make(teacher_weight=0.0, mixing_space="logits", is_clip_max=3.0)
    # A weight that decays to 0 hands over to TRL's clipping
    make(objective="student", epsilon=0.3, **DECAY)


def test_the_floor_is_below_the_cap_and_not_for_the_kl_term(make):
    floor = {"objective": "student", "is_clip_mode": "floor"}
    with pytest.raises(ConfigError, match="`is_clip_max=0.9`.*Set it to 1"):
        make(**floor, is_clip_max=0.9)
    with pytest.raises(ConfigError, match="`use_bias_correction_kl=True`.*`beta=0.1`"):
        make(**floor, beta=0.1)
    make(**floor, is_clip_max=1.0)
    make(**floor, beta=0.1, use_bias_correction_kl=False)


# Schedules


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rule_follows_the_schedule(make, schedule):
    settings = {"teacher_weight_schedule": schedule, "teacher_weight_decay_steps": 4}
    args = make(teacher_weight=[0.4, 0.2], **settings)
    by_hand = {"linear": reference.linear_weight, "cosine": reference.cosine_weight}[schedule]
    for step in range(4):
        expected = [by_hand(step, weight, 4) for weight in (0.4, 0.2)]
        assert args.weights_at(step) == pytest.approx(expected, abs=1e-15)
        assert args.rule_at(step) == LogitMixing(args.weights_at(step))
    assert [args.rule_at(step) for step in (4, 5, 10**6)] == [None] * 3


def test_rules(make):
    assert make(teacher_weight=0.3).rule_at(10**6) == LogitMixing((0.3,))
    assert make(teacher_weight=0.3, mixing_space="probs").rule_at(0) == ProbabilityMixing((0.3,))
    assert make(teacher_weight=[0.0, 0.0]).rule_at(0) is None
    args = make(teacher_weight=[1, -1], mixing_space="arithmetic", **DECAY)
    assert args.rule_at(0) == LogitArithmetic(1.0, (1.0, -1.0)) and args.rule_at(5) is None
    assert args.weights_at(4) == pytest.approx((0.2, -0.2))
    # The adaptive schedule knows the weight of step 0; the trainer gives the later ones
    args = make(teacher_weight=0.3, teacher_weight_schedule="adaptive")
    assert args.weights_at(7) == (0.3,) and args.rule_of((0.6,)) == LogitMixing((0.6,))
    assert args.rule_of((0.0,)) is None

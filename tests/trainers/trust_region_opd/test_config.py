"""What each method reads and refuses, and what its rollouts are drawn from at each step."""

import re
from dataclasses import fields

import pytest
from trl import DistillationConfig

from tests import reference
from tests.trainers import runs
from trl_blend import TrustRegionOPDConfig
from trl_blend.errors import ConfigError
from trl_blend.generation.rules import ChernoffBlend, ContrastiveDecoding, LogitMixing, SpeculativeKD, TrustRegion


BLENDS = ("trust_region", "fixed_weight", "speculative_kd", "chernoff", "contrastive")
INHERITED = {field.name for field in fields(DistillationConfig)}
# Each method with its settings, and what they become when they are not given
METHODS = {
    "trust_region": {"kl_budget": 0.01, "blend_warmup_steps": 50},
    "fixed_weight": {"teacher_weight": 0.5},
    "speculative_kd": {"skd_top_k": 15, "skd_teacher_temperature": 0.2},
    "contrastive": {"contrastive_alpha": 0.1, "contrastive_beta": 0.5},
    "student": {},
}
METHOD_SETTINGS = ("kl_budget", "teacher_weight", "skd_top_k", "skd_teacher_temperature", "blend_warmup_steps")
METHOD_SETTINGS += ("contrastive_alpha", "contrastive_beta")


@pytest.fixture
def make(tmp_path):
    return lambda **settings: runs.opd_config(tmp_path, **settings)


def test_inherited_settings_keep_their_defaults(tmp_path):
    ours = TrustRegionOPDConfig(str(tmp_path), use_cpu=True, bf16=False)
    parent = DistillationConfig(str(tmp_path), use_cpu=True, bf16=False)
    # Made anew for each instance: never equal
    names = INHERITED - {"accelerator_config", "logging_dir"}
    assert {name: getattr(ours, name) for name in names} == {name: getattr(parent, name) for name in names}


def test_the_best_model_is_the_closest(make):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    assert make(**best, metric_for_best_model="eval_blend/reverse_kl").greater_is_better is False
    assert make(**best).metric_for_best_model == "loss"  # of TRL, which is a divergence
    for settings in ({"kl_support": "student_top_k"}, {"distillation_objective": "iw_opd"}):
        for metric in (None, "eval_loss", "eval_math_loss"):
            with pytest.raises(ConfigError, match="no divergence.*Set `metric_for_best_model='eval_blend/reverse_kl'"):
                make(**best, **settings, metric_for_best_model=metric)


# What a method fills in, and what it refuses

FILLED = {name: value for settings in METHODS.values() for name, value in settings.items()}
FILLED |= {"veto_weight_start": 0.4, "veto_warmup_steps": 50}
FILLED |= {"iw_opd_gamma": 0.5, "target_weight": 0.5, "tip_entropy_quantile": 0.5, "tip_divergence_quantile": 0.9}
FILLED |= {"temperature_warmup_start": 0.9, "temperature_warmup_steps": 25}


@pytest.mark.parametrize("name", FILLED)
def test_what_none_becomes_is_documented(name):
    entry = re.split(rf"^ {{8}}{name} \(", TrustRegionOPDConfig.__doc__, flags=re.MULTILINE)[1]
    assert f"`{FILLED[name]}`" in re.split(r"^ {8}\w", entry, flags=re.MULTILINE)[0]


@pytest.mark.parametrize("policy", METHODS)
def test_a_method_fills_in_its_own_settings_and_leaves_the_others(make, policy):
    args = make(rollout_policy=policy)
    expected = dict.fromkeys(METHOD_SETTINGS) | METHODS[policy]
    assert {name: getattr(args, name) for name in METHOD_SETTINGS} == expected


@pytest.mark.parametrize("policy", METHODS)
@pytest.mark.parametrize(
    ("name", "value"),
    [("kl_budget", 0.02), ("teacher_weight", 0.3), ("skd_top_k", 25), ("skd_teacher_temperature", 0.6)],
)
def test_a_setting_of_another_method_has_no_effect(make, policy, name, value):
    settings = {"rollout_policy": policy, name: value}
    if policy == "trust_region":
        settings["blend_warmup_steps"] = 5
    if name in METHODS[policy]:
        assert getattr(make(**settings), name) == value
        return
    with pytest.raises(ConfigError, match="has no effect") as error:
        make(**settings)
    message = str(error.value)
    owner = next(method for method, owned in METHODS.items() if name in owned)
    assert f"`{name}={value}`" in message and f"`rollout_policy={policy!r}`" in message
    assert f"Set `rollout_policy={owner!r}`" in message


def test_a_warmup_of_the_blend_has_no_effect_for_the_student(make):
    with pytest.raises(ConfigError, match="`blend_warmup_steps=5` has no effect with `rollout_policy='student'`"):
        make(rollout_policy="student", blend_warmup_steps=5)


@pytest.mark.parametrize(("name", "value"), [("veto_weight_start", 0.2), ("veto_warmup_steps", 9)])
def test_veto_settings_belong_to_the_veto_target(make, name, value):
    with pytest.raises(ConfigError, match=f"`{name}={value}` has no effect with `distillation_target='teacher'`"):
        make(**{name: value})
    args = make(distillation_target="veto", **{name: value})
    expected = {"veto_weight_start": 0.4, "veto_warmup_steps": 50} | {name: value}
    assert {key: getattr(args, key) for key in expected} == expected


LOSSES = [
    ("target_weight", 0.2, "distillation_target", "interpolated"),
    ("tip_entropy_quantile", 0.2, "token_selection", "tip"),
    ("tip_divergence_quantile", 0.2, "token_selection", "tip"),
    ("iw_opd_gamma", 1.0, "distillation_objective", "iw_opd"),
]


@pytest.mark.parametrize(("name", "value", "switch", "needed"), LOSSES)
def test_settings_of_a_loss_belong_to_it(make, name, value, switch, needed):
    was = {"distillation_target": "teacher", "token_selection": "all", "distillation_objective": "jsd"}[switch]
    with pytest.raises(ConfigError, match=f"`{name}={value}` has no effect with `{switch}='{was}'`. Set `{switch}='"):
        make(**{name: value})
    assert getattr(make(**{switch: needed, name: value}), name) == value
    assert getattr(make(**{switch: needed}), name) == FILLED[name]


def test_the_forward_kl_is_that_of_the_whole_teacher(make):
    for name, value in (
        ("kl_support", "student_top_k"),
        ("distillation_target", "veto"),
        ("distillation_target", "interpolated"),
    ):
        with pytest.raises(ConfigError, match=f"`forward_kl_entropy=0.8` adds .*`{name}='{value}'` compares"):
            make(forward_kl_entropy=0.8, **{name: value})
    assert make(forward_kl_entropy=0.8, token_selection="tip").forward_kl_entropy == 0.8


@pytest.mark.parametrize("policy", BLENDS)
@pytest.mark.parametrize("given", [{"temperature_warmup_start": 0.9}, {"temperature_warmup_steps": 5}])
def test_a_temperature_warmup_is_the_students(make, policy, given):
    with pytest.raises(ConfigError, match=rf"warm up the student's own sampling.*`rollout_policy='{policy}'`"):
        make(rollout_policy=policy, **given)
    args = make(rollout_policy="student", **given)
    expected = {"temperature_warmup_start": 0.9, "temperature_warmup_steps": 25} | given
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_annealed_budget_needs_its_steps(make, schedule):
    with pytest.raises(ConfigError, match="needs `blend_warmup_steps`") as error:
        make(kl_budget=0.01, kl_budget_schedule=schedule)
    assert "`kl_budget=0.01`" in str(error.value) and f"`kl_budget_schedule={schedule!r}`" in str(error.value)
    assert make(kl_budget=0.01, kl_budget_schedule=schedule, blend_warmup_steps=7).blend_warmup_steps == 7
    # The paper's own settings are a whole: both or neither
    assert make(kl_budget_schedule=schedule).blend_warmup_steps == 50
    assert make(kl_budget_schedule=schedule, blend_warmup_steps=7).kl_budget == 0.01


def test_no_steps_are_needed_where_nothing_is_annealed(make):
    assert make(kl_budget=0.01, kl_budget_schedule="constant").blend_warmup_steps is None
    assert make(kl_budget=0.0).blend_warmup_steps is None
    assert make(rollout_policy="fixed_weight").blend_warmup_steps is None


# Values


OUT_OF_RANGE = [
    ({"kl_budget": -0.01, "blend_warmup_steps": 5}, "kl_budget"),
    ({"kl_budget": float("nan"), "blend_warmup_steps": 5}, "kl_budget"),
    ({"kl_budget": float("inf"), "blend_warmup_steps": 5}, "kl_budget"),
    ({"blend_warmup_steps": 0}, "blend_warmup_steps"),
    ({"blend_warmup_steps": -5}, "blend_warmup_steps"),
    ({"rollout_policy": "fixed_weight", "blend_warmup_steps": -5}, "blend_warmup_steps"),
    ({"rollout_policy": "fixed_weight", "teacher_weight": -0.1}, "teacher_weight"),
    ({"rollout_policy": "fixed_weight", "teacher_weight": 1.1}, "teacher_weight"),
    ({"rollout_policy": "fixed_weight", "teacher_weight": float("nan")}, "teacher_weight"),
    ({"rollout_policy": "speculative_kd", "skd_top_k": 0}, "skd_top_k"),
    ({"rollout_policy": "contrastive", "contrastive_alpha": 0.0}, "contrastive_alpha"),
    ({"rollout_policy": "contrastive", "contrastive_beta": -0.5}, "contrastive_beta"),
    ({"rollout_policy": "speculative_kd", "skd_teacher_temperature": 0.0}, "skd_teacher_temperature"),
    ({"rollout_policy": "speculative_kd", "skd_teacher_temperature": -1.0}, "skd_teacher_temperature"),
    ({"rollout_policy": "speculative_kd", "skd_teacher_temperature": float("inf")}, "skd_teacher_temperature"),
    ({"rollout_policy": "student", "temperature_warmup_start": 0.0}, "temperature_warmup_start"),
    ({"rollout_policy": "student", "temperature_warmup_start": 1.1}, "temperature_warmup_start"),
    ({"rollout_policy": "student", "temperature_warmup_steps": 0}, "temperature_warmup_steps"),
    ({"num_rollouts_per_prompt": 0}, "num_rollouts_per_prompt"),
    ({"kl_support": "student_top_k", "kl_top_k": 0}, "kl_top_k"),
    ({"distillation_target": "veto", "veto_weight_start": 1.0}, "veto_weight_start"),
    ({"distillation_target": "veto", "veto_weight_start": -0.1}, "veto_weight_start"),
    ({"distillation_target": "veto", "veto_weight_start": float("nan")}, "veto_weight_start"),
    ({"distillation_target": "veto", "veto_warmup_steps": 0}, "veto_warmup_steps"),
    ({"distillation_target": "interpolated", "target_weight": 0.0}, "target_weight"),
    ({"distillation_target": "interpolated", "target_weight": -0.1}, "target_weight"),
    ({"distillation_target": "interpolated", "target_weight": float("inf")}, "target_weight"),
    ({"distillation_target": "interpolated", "target_weight": float("nan")}, "target_weight"),
    ({"token_selection": "tip", "tip_entropy_quantile": 1.1}, "tip_entropy_quantile"),
    ({"token_selection": "tip", "tip_divergence_quantile": -0.1}, "tip_divergence_quantile"),
    ({"forward_kl_entropy": -0.1}, "forward_kl_entropy"),
    ({"forward_kl_entropy": float("nan")}, "forward_kl_entropy"),
    ({"distillation_objective": "iw_opd", "iw_opd_gamma": -0.1}, "iw_opd_gamma"),
    ({"distillation_objective": "iw_opd", "iw_opd_gamma": "0.5"}, "iw_opd_gamma"),
    ({"kl_budget": "0.1", "blend_warmup_steps": 5}, "kl_budget"),
]


@pytest.mark.parametrize(("settings", "name"), OUT_OF_RANGE, ids=[f"{n}={s[n]}" for s, n in OUT_OF_RANGE])
def test_values_out_of_range(make, settings, name):
    with pytest.raises(ConfigError, match=re.escape(f"`{name}={settings[name]!r}`") + ".* must be "):
        make(**settings)


def test_values_at_the_ends_of_their_ranges(make):
    make(kl_budget=0.0)
    make(rollout_policy="fixed_weight", teacher_weight=0.0)
    make(rollout_policy="fixed_weight", teacher_weight=1.0)
    make(rollout_policy="speculative_kd", skd_top_k=1)
    make(distillation_target="veto", veto_weight_start=0.0, veto_warmup_steps=1)
    make(distillation_target="interpolated", target_weight=2.5)
    make(token_selection="tip", tip_entropy_quantile=0.0, tip_divergence_quantile=1.0)
    make(forward_kl_entropy=0.0)
    make(distillation_objective="iw_opd", iw_opd_gamma=0.0)
    make(rollout_policy="student", temperature=0.8, temperature_warmup_start=0.8, temperature_warmup_steps=1)


def test_a_degenerate_veto_target_says_why(make):
    with pytest.raises(ConfigError, match="the student's entropy cancels out"):
        make(distillation_target="veto", veto_weight_start=1.0)


UNREAD = [
    ({"rollout_policy": "fixed_weight", "kl_budget_schedule": "constant"}, "kl_budget_schedule", "rollout_policy"),
    ({"rollout_policy": "student", "kl_budget_schedule": "cosine"}, "kl_budget_schedule", "rollout_policy"),
    ({"kl_top_k": 8}, "kl_top_k", "kl_support='full'"),
    ({"kl_budget": 0.0, "kl_budget_schedule": "constant"}, "kl_budget_schedule", "kl_budget=0.0"),
    ({"kl_budget": 0.0, "blend_warmup_steps": 5}, "blend_warmup_steps", "kl_budget=0.0"),
    (
        {"rollout_policy": "fixed_weight", "teacher_weight": 0.0, "blend_warmup_steps": 5},
        "blend_warmup_steps",
        "teacher_weight=0.0",
    ),
]


@pytest.mark.parametrize(("settings", "name", "because"), UNREAD, ids=str)
def test_settings_that_nothing_reads(make, settings, name, because):
    with pytest.raises(ConfigError, match=f"`{name}=.*` has no effect with `{because}"):
        make(**settings)


def test_eos_ids_that_are_not_merged_have_no_effect(make):
    with pytest.raises(ConfigError, match=r"`teacher_eos_token_id=\[7\]` has no effect with `canonicalize_eos=False`"):
        make(teacher_eos_token_id=7, canonicalize_eos=False)
    assert make(canonicalize_eos=False).canonicalize_eos is False


def test_one_temperature_is_warmed_up(make):
    settings = {"rollout_policy": "student", "generation_kwargs": {"temperature": 0.5}}
    with pytest.raises(ConfigError, match="`temperature=0.5`, which overrides the temperature warmup"):
        make(temperature_warmup_start=0.4, **settings)
    make(temperature_warmup_start=0.4, temperature=0.5, **settings)
    make(**settings)


OWN_LOSSES = [
    ("kl_support", "student_top_k"),
    ("distillation_target", "veto"),
    ("distillation_target", "interpolated"),
    ("token_selection", "tip"),
    ("forward_kl_entropy", 0.8),
]


@pytest.mark.parametrize(("name", "value"), [*OWN_LOSSES, ("distillation_objective", "iw_opd")])
def test_own_losses_are_those_of_the_reverse_kl(make, name, value):
    with pytest.raises(ConfigError, match=f"`{name}={value!r}` is defined for the reverse KL.*`beta=0.5`"):
        make(beta=0.5, **{name: value})
    assert make(beta=0.5).beta == 0.5


@pytest.mark.parametrize(("name", "value"), OWN_LOSSES)
def test_a_loss_of_sampled_tokens_has_no_divergence_to_change(make, name, value):
    with pytest.raises(
        ConfigError, match=f"`{name}={value!r}` changes the divergence.*'iw_opd'` is a loss of sampled"
    ):
        make(distillation_objective="iw_opd", **{name: value})


# Blended decoding is defined on full distributions


@pytest.mark.parametrize("policy", BLENDS)
@pytest.mark.parametrize(
    "setting",
    [
        {"top_k": 5},
        {"generation_kwargs": {"repetition_penalty": 1.1}},
        {"generation_kwargs": {"do_sample": False}},
        {"generation_kwargs": {"temperature": 0.5}},
        {"generation_kwargs": {"num_beams": 2}},
    ],
    ids=str,
)
def test_settings_that_reshape_the_distribution_after_the_blend(make, policy, setting):
    ((name, value),) = setting.get("generation_kwargs", setting).items()
    with pytest.raises(ConfigError, match=f"`{name}={value}`") as error:
        make(rollout_policy=policy, **setting)
    assert repr(policy) in str(error.value) or name == "num_beams"
    make(rollout_policy="student", **setting)
    if policy == "trust_region":
        make(kl_budget=0.0, **setting)


# Schedules


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_budget_follows_its_schedule(make, schedule):
    args = make(kl_budget=0.02, kl_budget_schedule=schedule, blend_warmup_steps=4)
    by_hand = {"linear": reference.linear_weight, "cosine": reference.cosine_weight}[schedule]
    rules = [args.rule_at(step) for step in range(7)]
    values = [rule.kl_budget if rule else 0.0 for rule in rules]
    assert values[:5] == pytest.approx([by_hand(step, 0.02, 4) for step in range(5)], abs=1e-17)
    assert values[0] == 0.02 and values[4:] == [0.0, 0.0, 0.0] and all(values[:4])


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"kl_budget": 0.02, "kl_budget_schedule": "constant"}, TrustRegion(0.02)),
        ({"rollout_policy": "fixed_weight", "teacher_weight": 0.3}, LogitMixing(0.3)),
        ({"rollout_policy": "speculative_kd"}, SpeculativeKD(15, 0.2)),
        ({"rollout_policy": "contrastive", "contrastive_alpha": 0.3}, ContrastiveDecoding(0.3, 0.5)),
    ],
)
def test_a_constant_rule_lasts_the_run_or_the_warmup(make, settings, rule):
    args = make(**settings)
    assert [args.rule_at(step) for step in (0, 3, 10**6)] == [rule] * 3
    args = make(**settings, blend_warmup_steps=3)
    assert [args.rule_at(step) for step in range(5)] == [rule] * 3 + [None] * 2


def test_the_chernoff_blend_falls_to_the_student(make):
    assert [make(rollout_policy="chernoff").rule_at(step) for step in (0, 10**6)] == [ChernoffBlend(1.0)] * 2
    args = make(rollout_policy="chernoff", blend_warmup_steps=4)
    rules = [args.rule_at(step) for step in range(5)]
    assert rules == [ChernoffBlend(scale) for scale in (1.0, 0.75, 0.5, 0.25)] + [None]


@pytest.mark.parametrize(
    "settings",
    [
        {"rollout_policy": "student"},
        {"kl_budget": 0.0},
        {"rollout_policy": "fixed_weight", "teacher_weight": 0.0},
    ],
)
def test_a_run_that_never_blends(make, settings):
    args = make(**settings)
    assert not args.blends
    assert [args.rule_at(step) for step in (0, 1, 10**6)] == [None] * 3


@pytest.mark.parametrize("policy", BLENDS)
def test_a_run_that_blends(make, policy):
    assert make(rollout_policy=policy).blends

import ast
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml
from trl import GRPOConfig, TrlParser

from tests.trainers.runs import config
from trl_blend import LogitMixGRPOConfig
from trl_blend.errors import ConfigError
from trl_blend.generation.settings import distribution_warpers
from trl_blend.trainers._options import choices_of


OWN_FIELDS = [f for f in fields(LogitMixGRPOConfig) if f.name not in {p.name for p in fields(GRPOConfig)}]
CHOICES = {
    "teacher_weight_schedule": ("constant", "linear", "cosine", "adaptive"),
    "mixing_space": ("logits", "probs"),
    "objective": ("mixed", "student"),
    "is_clip_mode": ("ppo", "none", "max"),
    "eval_policy": ("mixed", "student", "both"),
}


@pytest.fixture
def make(tmp_path):
    return lambda **settings: config(tmp_path, **settings)


def test_defaults(make):
    args = make()
    assert {f.name: getattr(args, f.name) for f in OWN_FIELDS} == {
        "teacher_model_name_or_path": None,
        "teacher_model_revision": None,
        "teacher_model_init_kwargs": None,
        "teacher_weight": [0.5],
        "teacher_weight_schedule": "constant",
        "teacher_weight_decay_steps": None,
        "mixing_space": "logits",
        "objective": "mixed",
        "is_clip_mode": "max",
        "is_clip_max": 3.0,
        "adaptive_num_prompts": 64,
        "adaptive_interval": 1,
        "adaptive_scale": 5.0,
        "adaptive_offset": 0.1,
        "adaptive_success_threshold": 1.0,
        "eval_policy": "mixed",
    }
    assert args.beta == 0.0


# Documentation


def documented() -> dict[str, str]:
    """Entry of each field in the class docstring."""
    parts = re.split(r"^ {8}(\w+) \(", LogitMixGRPOConfig.__doc__, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def test_every_field_is_documented_in_order_and_has_a_help_string():
    assert list(documented()) == [f.name for f in OWN_FIELDS]
    for f in OWN_FIELDS:
        assert len(f.metadata["help"]) > 20, f.name


@pytest.mark.parametrize("name", [f.name for f in OWN_FIELDS])
def test_the_docstring_states_the_default(name):
    field = next(f for f in OWN_FIELDS if f.name == name)
    default = field.default if field.default is not MISSING else field.default_factory()
    head = documented()[name].split("):\n")[0]
    assert "*optional*" in head
    stated = re.search(r"defaults to `(.+?)`", head)
    if default is None:
        assert stated is None
    else:
        value = ast.literal_eval(stated.group(1))
        assert value == (default[0] if name == "teacher_weight" else default)


@pytest.mark.parametrize("name", CHOICES)
def test_the_help_or_the_docstring_names_every_choice(name):
    for choice in CHOICES[name]:
        assert f'"{choice}"' in documented()[name]
        assert choice in choices_of(LogitMixGRPOConfig)[name]


# Values


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_value_of_a_choice_field_names_the_choices(make, name):
    with pytest.raises(ConfigError) as error:
        make(**{name: "nonsense"})
    assert f"`{name}='nonsense'`" in str(error.value)
    for choice in CHOICES[name]:
        assert repr(choice) in str(error.value)
    assert "None" not in str(error.value)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan"), [0.2, 1.2], [-0.2, 0.5]])
def test_a_weight_outside_the_unit_interval_is_an_error(make, weight):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        make(teacher_weight=weight)


def test_weights_that_sum_above_one_are_an_error(make):
    with pytest.raises(ConfigError, match=r"\[0.6, 0.5\].*sums to 1.1"):
        make(teacher_weight=[0.6, 0.5])
    assert make(teacher_weight=[0.6, 0.4]).teacher_weight == [0.6, 0.4]


@pytest.mark.parametrize(
    ("given", "held"),
    [(0.3, [0.3]), ([0.3], [0.3]), ((0.2, 0.1), [0.2, 0.1]), (0, [0.0]), (1, [1.0]), ([0.2, 0.1], [0.2, 0.1])],
)
def test_a_bare_weight_becomes_a_list(make, given, held):
    args = make(teacher_weight=given)
    assert args.teacher_weight == held
    assert all(type(weight) is float for weight in args.teacher_weight)


def test_a_bare_teacher_name_becomes_a_list(make):
    assert make(teacher_model_name_or_path="some/model").teacher_model_name_or_path == ["some/model"]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [None, 0, -5])
def test_a_decay_needs_steps(make, schedule, steps):
    with pytest.raises(ConfigError, match="`teacher_weight_decay_steps`") as error:
        make(teacher_weight_schedule=schedule, teacher_weight_decay_steps=steps)
    assert repr(schedule) in str(error.value) and f"got {steps}" in str(error.value)
    assert make(teacher_weight_schedule=schedule, teacher_weight_decay_steps=5).teacher_weight_decay_steps == 5


@pytest.mark.parametrize("schedule", ["constant", "adaptive"])
def test_steps_without_a_decay_are_an_error(make, schedule):
    with pytest.raises(ConfigError, match="`teacher_weight_decay_steps=10` has no effect"):
        make(teacher_weight_schedule=schedule, teacher_weight_decay_steps=10)


def test_adaptive_moves_a_single_weight(make):
    with pytest.raises(ConfigError, match=r"single weight.*\[0.2, 0.3\]"):
        make(teacher_weight_schedule="adaptive", teacher_weight=[0.2, 0.3])


@pytest.mark.parametrize(
    ("name", "value"), [("adaptive_num_prompts", 0), ("adaptive_interval", 0), ("adaptive_scale", 0.0)]
)
def test_adaptive_settings_out_of_range(make, name, value):
    with pytest.raises(ConfigError, match=f"`{name}={value}`"):
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

WARPERS = {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}


@pytest.mark.parametrize("through", ["field", "generation_kwargs"])
@pytest.mark.parametrize("name", WARPERS)
def test_student_refuses_settings_that_change_the_sampling_distribution(make, name, through):
    setting = {name: WARPERS[name]}
    setting = setting if through == "field" else {"generation_kwargs": setting}
    with pytest.raises(ConfigError, match=f"`{name}={WARPERS[name]}` changes the distribution"):
        make(objective="student", **setting)
    # Nothing is sampled from a mixture at weight 0, and "mixed" only warns, in the trainer
    make(objective="student", teacher_weight=0.0, **setting)
    assert distribution_warpers(make(objective="mixed", **setting)) == {name: WARPERS[name]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("typical_p", 0.5),
        ("epsilon_cutoff", 0.01),
        ("eta_cutoff", 0.01),
        ("no_repeat_ngram_size", 2),
        ("top_h", 0.5),
        ("watermarking_config", {"bias": 2.0}),
        ("do_sample", False),
    ],
)
def test_student_refuses_every_other_warper_of_generation_kwargs(make, name, value):
    with pytest.raises(ConfigError, match=re.escape(f"`{name}={value}`")):
        make(objective="student", generation_kwargs={name: value})


def test_student_refuses_a_generation_temperature_that_is_not_the_loss_temperature(make):
    with pytest.raises(ConfigError, match="`temperature=0.5`"):
        make(objective="student", temperature=1.0, generation_kwargs={"temperature": 0.5})
    make(objective="student", temperature=0.5, generation_kwargs={"temperature": 0.5})


def test_neutral_values_are_no_warpers(make):
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert distribution_warpers(make(objective="student", **neutral)) == {}
    assert distribution_warpers(make(objective="student", generation_kwargs=neutral)) == {}
    # `generation_kwargs` has the last word, as in the trainer
    assert distribution_warpers(make(objective="student", top_k=5, generation_kwargs={"top_k": 0})) == {}


@pytest.mark.parametrize("objective", ["mixed", "student"])
@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
def test_one_sequence_is_sampled_per_row(make, name, objective):
    with pytest.raises(ConfigError, match=f"`{name}=2`"):
        make(objective=objective, generation_kwargs={name: 2})
    make(objective=objective, generation_kwargs={name: 1})
    make(objective=objective, generation_kwargs={name: 2}, teacher_weight=0.0)


@pytest.mark.parametrize("mode", ["none", "max"])
def test_clip_modes_replace_delta(make, mode):
    with pytest.raises(ConfigError, match=f"`delta=2.0`.*`is_clip_mode='{mode}'`"):
        make(objective="student", is_clip_mode=mode, delta=2.0)
    make(objective="student", is_clip_mode="ppo", delta=2.0)
    make(objective="mixed", is_clip_mode=mode, delta=2.0)


@pytest.mark.parametrize("mode", ["none", "max"])
@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo"])
def test_clip_modes_need_the_clipped_surrogate(make, mode, loss_type):
    settings = {"objective": "student", "loss_type": loss_type, "is_clip_mode": mode}
    if loss_type == "cispo":
        settings["epsilon_high"] = 5.0
    with pytest.raises(ConfigError, match=f"`is_clip_mode='{mode}'`.*`loss_type='{loss_type}'`"):
        make(**settings)
    make(**{**settings, "is_clip_mode": "ppo"})
    make(**{**settings, "objective": "mixed"})


def test_the_cap_must_be_positive(make):
    with pytest.raises(ConfigError, match="`is_clip_max=0.0`"):
        make(objective="student", is_clip_max=0.0)
    make(objective="student", is_clip_mode="none", is_clip_max=0.0)


# Command line and YAML

BASE = ["--use_cpu", "--bf16", "False", "--report_to", "none"]


def parse(tmp_path: Path, *arguments: str, **settings) -> LogitMixGRPOConfig:
    command = ["--output_dir", str(tmp_path), *BASE, *arguments]
    if settings:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        command += ["--config", str(path)]
    (args,) = TrlParser((LogitMixGRPOConfig,)).parse_args_and_config(command)
    return args


@pytest.mark.parametrize("weight", [0.3, [0.2, 0.1]])
@pytest.mark.parametrize("source", ["command line", "yaml"])
def test_the_parser_takes_one_weight_or_several(tmp_path, weight, source):
    values = weight if isinstance(weight, list) else [weight]
    if source == "yaml":
        args = parse(tmp_path, teacher_weight=weight)
    else:
        args = parse(tmp_path, "--teacher_weight", *map(str, values))
    assert args.teacher_weight == values


def test_the_parser_round_trips_every_other_field(tmp_path):
    values = {
        "teacher_model_name_or_path": ["some/teacher", "another/one"],
        "teacher_model_revision": "v2",
        "teacher_model_init_kwargs": {"dtype": "bfloat16"},
        "teacher_weight_schedule": "cosine",
        "teacher_weight_decay_steps": 12,
        "mixing_space": "probs",
        "objective": "student",
        "is_clip_mode": "none",
        "is_clip_max": 2.5,
        "adaptive_num_prompts": 7,
        "adaptive_interval": 3,
        "adaptive_scale": 4.0,
        "adaptive_offset": 0.2,
        "adaptive_success_threshold": 0.5,
        "eval_policy": "both",
    }
    assert set(values) == {f.name for f in OWN_FIELDS} - {"teacher_weight"}
    arguments = []
    for name, value in values.items():
        words = value if isinstance(value, list) else [str(value).replace("'", '"')]
        arguments += [f"--{name}", *words]
    for args in (parse(tmp_path, *arguments), parse(tmp_path, **values)):
        assert {name: getattr(args, name) for name in values} == values


def test_the_command_line_overrides_the_yaml(tmp_path):
    assert parse(tmp_path, "--teacher_weight", "0.1", teacher_weight=[0.2, 0.3]).teacher_weight == [0.1]


@pytest.mark.parametrize("name", CHOICES)
def test_the_parser_names_the_choices_too(tmp_path, name, capsys):
    with pytest.raises((SystemExit, ConfigError)) as error:
        parse(tmp_path, f"--{name}", "nonsense")
    message = str(error.value) + capsys.readouterr().err
    assert all(choice in message for choice in CHOICES[name])

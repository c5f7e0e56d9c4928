"""The options of every config: their help, their words, and the way through the command line and YAML files."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import yaml
from transformers import AutoModelForCausalLM, HfArgumentParser
from trl import (
    DatasetMixtureConfig,
    DistillationConfig,
    GRPOConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    TrlParser,
)

from tests.trainers import runs, scored
from trl_blend import (
    LogitMixGRPOConfig,
    LogitMixGRPOTrainer,
    OfflineOPDConfig,
    OfflineOPDTrainer,
    TrustRegionOPDConfig,
    TrustRegionOPDTrainer,
)
from trl_blend.errors import ConfigError
from trl_blend.trainers._options import check_choices, choices_of, with_help
from trl_blend.trainers._run import default_config
from trl_blend.trainers.logit_mix_grpo import trainer as grpo_module
from trl_blend.trainers.offline_opd import trainer as offline_module
from trl_blend.trainers.trust_region_opd import trainer as opd_module


PARENTS = {LogitMixGRPOConfig: GRPOConfig, TrustRegionOPDConfig: DistillationConfig, OfflineOPDConfig: SFTConfig}
MAKERS = {
    LogitMixGRPOConfig: runs.config,
    TrustRegionOPDConfig: runs.opd_config,
    OfflineOPDConfig: scored.offline_config,
}
CHOICES = {
    "teacher_weight_schedule": ("constant", "linear", "cosine", "reward", "adaptive"),
    "mixing_space": ("logits", "probs", "arithmetic"),
    "objective": ("mixed", "student"),
    "is_clip_mode": ("floor", "max", "none", "ppo"),
    "eval_policy": ("mixed", "student", "both", None),
    "rollout_policy": ("trust_region", "fixed_weight", "speculative_kd", "chernoff", "contrastive", "student"),
    "kl_budget_schedule": ("linear", "constant", "cosine"),
    "distillation_objective": ("jsd", "iw_opd"),
    "kl_support": ("full", "student_top_k"),
    "distillation_target": ("teacher", "veto", "interpolated"),
    "token_selection": ("all", "tip"),
    "offline_loss": ("auto", "sampled_token", "top_k_reverse_kl", "top_k_forward_kl"),
    "advantage_baseline": ("none", "kl"),
    "importance_correction": ("none", "token", None),
    "loss_aggregation": ("sequence", "token"),
    "teacher_consistency": ("strict", "warn", "off"),
    "policy_drift_action": ("warn", "stop"),
}
WORDED = [(config, name) for config in PARENTS for name in choices_of(config)]


def own_names(config):
    inherited = {field.name for field in fields(PARENTS[config])}
    return [field.name for field in fields(config) if field.name not in inherited]


# -------------------- help


@with_help
@dataclass
class Example(ModelConfig):
    r"""
    Parameters:
        colour (`str`, *optional*, defaults to `"red"`):
            Colour \\( c \\) of the [`~trl.Thing`], 100% of it,
            in words. `None` means any.
    """

    colour: Literal["red", "blue"] | None = "red"
    dtype: str = "float32"


def test_help_is_what_the_docstring_says():
    found = {field.name: field.metadata["help"] for field in fields(Example)}
    assert found["colour"] == "Colour c of the `trl.Thing`, 100%% of it, in words. `None` means any."
    parent = {field.name: field.metadata["help"] for field in fields(ModelConfig)}
    assert {name: text for name, text in found.items() if name != "colour"} == parent
    assert "100% of it" in HfArgumentParser(Example).format_help()


@pytest.mark.parametrize("config", PARENTS)
def test_every_option_has_a_help(config):
    helps = {field.name: field.metadata["help"] for field in fields(config)}
    for name in own_names(config):
        assert len(helps[name]) > 20 and "\\\\(" not in helps[name], name


# -------------------- values that no run can mean

NO_RUN = {
    "max_steps": (0, 0.5j, "many"),
    "per_device_train_batch_size": (0, -1),
    "per_device_eval_batch_size": (0,),
    "gradient_accumulation_steps": (0,),
    "learning_rate": (-1e-5, float("nan"), float("inf"), "1e-5"),
    "weight_decay": (-0.1,),
    "max_grad_norm": (-1.0,),
    "report_to": ("wandbb", ["tensorboard", "everyone"]),
}
SAMPLING = {
    "temperature": (0, 0.0, -1.0, float("nan"), "hot"),
    "top_p": (0.0, 1.5),
    "max_completion_length": (0,),
    "repetition_penalty": (0.0,),
}
NO_RUNS = [
    (config, name, value)
    for config in PARENTS
    for name, values in (NO_RUN | ({} if config is OfflineOPDConfig else SAMPLING)).items()
    for value in values
]


@pytest.mark.parametrize(("config", "name", "value"), NO_RUNS, ids=str)
def test_values_that_no_run_can_mean(tmp_path, config, name, value):
    with pytest.raises(ConfigError, match=f"`{name}=") as error:
        MAKERS[config](tmp_path, **{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm_draft_tokens": 0}, "`vllm_draft_tokens=0` must be a number of tokens, at least 1, or 'auto'"),
        ({"vllm_draft_tokens": -2}, "`vllm_draft_tokens=-2` must be"),
        ({"vllm_draft_tokens": 2.5}, "`vllm_draft_tokens=2.5` must be"),
        ({"vllm_draft_tokens": "many"}, "`vllm_draft_tokens='many'` must be"),
        ({"use_vllm": False}, "`vllm_draft_tokens=4` has no effect with `use_vllm=False`. Set `use_vllm=True`"),
        ({"vllm_mode": "server"}, "no effect with `vllm_mode='server'`: a server drafts if it was started with"),
        ({"generation_kwargs": {"logit_bias": {3: 1.0}}}, "vLLM has no `logit_bias` with drafts"),
        ({"min_p": 0.1}, "vLLM has no `min_p` with drafts, and `min_p=0.1`"),
        ("off", "no step of this run uses a teacher"),
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [LogitMixGRPOConfig, TrustRegionOPDConfig])
def test_drafts_that_nothing_draws(tmp_path, config, settings, message):
    off = {LogitMixGRPOConfig: {"teacher_weight": 0.0}, TrustRegionOPDConfig: {"rollout_policy": "student"}}
    settings = off[config] if settings == "off" else settings
    if not set(settings) <= {field.name for field in fields(config)}:
        pytest.skip("TRL's distillation has no such setting")
    with pytest.raises(ConfigError, match=re.escape(message)):
        MAKERS[config](tmp_path, **{**DRAFTS, **settings})


@pytest.mark.parametrize("config", PARENTS)
def test_no_epochs_are_no_run_unless_the_steps_are_given(tmp_path, config):
    for epochs in (0, -1.0):
        with pytest.raises(ConfigError, match=f"`num_train_epochs={epochs}` must be positive"):
            MAKERS[config](tmp_path, max_steps=-1, num_train_epochs=epochs)
    assert MAKERS[config](tmp_path, max_steps=1, num_train_epochs=0).max_steps == 1


@pytest.mark.parametrize("config", PARENTS)
def test_what_the_parents_refuse_is_an_error_of_the_configuration(tmp_path, config):
    with pytest.raises(ConfigError, match="eval_steps|eval strategy"):
        MAKERS[config](tmp_path, lr_scheduler_type="greedy")


def test_a_report_that_cannot_be_made_here(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ConfigError, match="`report_to='wandb'` needs wandb, which is not installed"):
        runs.config(tmp_path, report_to="wandb")
    assert runs.config(tmp_path, report_to="all").report_to and runs.config(tmp_path, report_to="none") is not None


# -------------------- words


def test_choices_are_read_from_the_annotations():
    assert choices_of(Example) == {"colour": ("red", "blue", None)}

    @dataclass
    class Mine(Example):
        size: int = 1

    check_choices(Mine(colour=None))
    with pytest.raises(ConfigError, match="`colour='green'` is unknown. Choose one of 'red', 'blue'."):
        check_choices(Mine(colour="green"))


def test_the_words_are_these():
    assert {name: choices_of(config)[name] for config, name in WORDED} == CHOICES


@pytest.mark.parametrize(("config", "name"), WORDED)
def test_an_unknown_word_names_the_others(tmp_path, capsys, config, name):
    words = [word for word in CHOICES[name] if word is not None]
    entry = re.search(rf"^ {{8}}{name} \(.*?(?=^ {{0,8}}\S|\Z)", config.__doc__, flags=re.MULTILINE | re.DOTALL)[0]
    with pytest.raises(ConfigError) as error:
        MAKERS[config](tmp_path, **{name: "nonsense"})
    assert f"`{name}='nonsense'`" in str(error.value) and "None" not in str(error.value)
    with pytest.raises((SystemExit, ConfigError)) as parsed:
        parse(config, tmp_path, f"--{name}", "nonsense")
    on_the_command_line = str(parsed.value) + capsys.readouterr().err
    for word in words:
        assert repr(word) in str(error.value) and word in on_the_command_line and f'"{word}"' in entry


# -------------------- command line and YAML


def parse(config, tmp_path: Path, *arguments: str, **settings):
    command = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False", "--report_to", "none", *arguments]
    if settings:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        command += ["--config", str(path)]
    (args,) = TrlParser((config,)).parse_args_and_config(command)
    return args


DRAFTS = {"use_vllm": True, "vllm_mode": "colocate", "vllm_draft_tokens": 4}
PARSED = [
    (
        LogitMixGRPOConfig,
        {
            "teacher_model_name_or_path": ["some/teacher", "another/one"],
            "teacher_model_revision": "v2",
            "teacher_model_init_kwargs": {"dtype": "bfloat16"},
            "teacher_weight": [0.2, 0.1],
            "teacher_weight_schedule": "cosine",
            "teacher_weight_decay_steps": 12,
            "mixing_space": "probs",
            "objective": "student",
            "is_clip_mode": "none",
            "eval_policy": "both",
            **DRAFTS,
        },
    ),
    (
        LogitMixGRPOConfig,
        {
            "teacher_weight_schedule": "reward",
            "teacher_weight_decay_steps": 12,
            "teacher_weight_min_reward": 0.25,
        },
    ),
    (
        LogitMixGRPOConfig,
        {
            "teacher_weight": [0.2],
            "teacher_weight_schedule": "adaptive",
            "objective": "student",
            "is_clip_max": 2.5,
            "adaptive_num_prompts": 7,
            "adaptive_interval": 3,
            "adaptive_scale": 4.0,
            "adaptive_offset": 0.2,
            "adaptive_max_weight": 0.6,
            "adaptive_success_threshold": 0.5,
        },
    ),
    (
        TrustRegionOPDConfig,
        {
            "rollout_policy": "trust_region",
            "kl_budget": 0.05,
            "kl_budget_schedule": "cosine",
            "blend_warmup_steps": 15,
            "num_rollouts_per_prompt": 4,
            "kl_support": "student_top_k",
            "kl_top_k": 8,
            "distillation_target": "veto",
            "veto_weight_start": 0.6,
            "veto_warmup_steps": 12,
            "teacher_eos_token_id": [3, 4],
            "log_teacher_statistics": True,
            "success_threshold": 0.5,
            **DRAFTS,
        },
    ),
    (LogitMixGRPOConfig, {"teacher_weight": [1.0, -0.5], "mixing_space": "arithmetic"}),
    (TrustRegionOPDConfig, {"rollout_policy": "fixed_weight", "teacher_weight": 0.3, "canonicalize_eos": False}),
    (TrustRegionOPDConfig, {"rollout_policy": "speculative_kd", "skd_top_k": 25, "skd_teacher_temperature": 0.6}),
    (
        TrustRegionOPDConfig,
        {
            "distillation_target": "interpolated",
            "target_weight": 1.5,
            "token_selection": "tip",
            "tip_entropy_quantile": 0.8,
            "tip_divergence_quantile": 0.5,
        },
    ),
    (TrustRegionOPDConfig, {"forward_kl_entropy": 0.8}),
    (TrustRegionOPDConfig, {"distillation_objective": "iw_opd", "iw_opd_gamma": 1.0}),
    (TrustRegionOPDConfig, {"rollout_policy": "contrastive", "contrastive_alpha": 0.2, "contrastive_beta": 1.0}),
    (
        TrustRegionOPDConfig,
        {"rollout_policy": "student", "temperature_warmup_start": 0.8, "temperature_warmup_steps": 15},
    ),
    (
        OfflineOPDConfig,
        {
            "offline_loss": "sampled_token",
            "importance_correction": "token",
            "importance_cap": 2.0,
            "reward_extrapolation": 1.25,
            "loss_aggregation": "token",
            "teacher_consistency": "warn",
            "sft_teacher": "some/teacher",
            "teacher_model_name_or_path": "some/teacher",
            "teacher_model_revision": "v2",
            "teacher_model_init_kwargs": {"dtype": "bfloat16"},
            "rescore_num_rows": 3,
            "max_policy_drift": 0.1,
            "policy_drift_action": "stop",
            "stream_rollouts": True,
            "max_steps": 5,
        },
    ),
    (OfflineOPDConfig, {"offline_loss": "sampled_token", "advantage_baseline": "kl"}),
]


@pytest.mark.parametrize("config", PARENTS)
def test_the_parsed_options_are_all_there_are(config):
    given = {name for one, values in PARSED for name in values if one is config}
    assert given - {"max_steps", "use_vllm", "vllm_mode"} == set(own_names(config))


@pytest.mark.parametrize(("config", "values"), PARSED)
@pytest.mark.parametrize("source", ["command line", "yaml"])
def test_the_parser_round_trips_every_option(tmp_path, config, values, source):
    arguments = []
    for name, value in values.items():
        words = value if isinstance(value, list) else [str(value).replace("'", '"')]
        arguments += [f"--{name}", *map(str, words)]
    args = parse(config, tmp_path, **values) if source == "yaml" else parse(config, tmp_path, *arguments)
    assert {name: getattr(args, name) for name in values} == values


@pytest.mark.parametrize(
    ("config", "name", "given", "held"),
    [
        (LogitMixGRPOConfig, "teacher_weight", 0.3, [0.3]),
        (LogitMixGRPOConfig, "teacher_model_name_or_path", "some/teacher", ["some/teacher"]),
        (TrustRegionOPDConfig, "teacher_eos_token_id", 3, [3]),
    ],
)
def test_one_value_of_a_list_may_be_given_bare(tmp_path, config, name, given, held):
    assert getattr(parse(config, tmp_path, **{name: given}), name) == held
    assert getattr(parse(config, tmp_path, f"--{name}", str(given)), name) == held
    assert getattr(MAKERS[config](tmp_path, **{name: given}), name) == held


def test_the_command_line_overrides_the_yaml(tmp_path):
    args = parse(LogitMixGRPOConfig, tmp_path, "--teacher_weight", "0.1", teacher_weight=[0.2, 0.3])
    assert args.teacher_weight == [0.1]


@pytest.mark.parametrize("config", PARENTS)
def test_the_options_fit_beside_those_of_a_trl_script(config):
    parser = TrlParser((ScriptArguments, config, ModelConfig, DatasetMixtureConfig))
    assert own_names(config)[0] in parser.format_help()


# -------------------- a trainer without a config


@pytest.mark.parametrize("loaded", [False, True])
def test_the_default_config_is_named_after_the_student(models, loaded):
    student = str(models / "student")
    given = []
    named = type("SomeMethodConfig", (), {"__init__": lambda self, name: given.append(name)})
    default_config(named, AutoModelForCausalLM.from_pretrained(student) if loaded else student)
    assert given == ["student-SomeMethod"]


@pytest.mark.parametrize(
    ("module", "trainer", "config"),
    [
        (grpo_module, LogitMixGRPOTrainer, LogitMixGRPOConfig),
        (opd_module, TrustRegionOPDTrainer, TrustRegionOPDConfig),
        (offline_module, OfflineOPDTrainer, OfflineOPDConfig),
    ],
)
def test_a_trainer_without_a_config_asks_for_the_default(monkeypatch, module, trainer, config):
    asked = []
    made = SimpleNamespace(teacher_model_name_or_path=None)
    monkeypatch.setattr(module, "default_config", lambda *args: asked.append(args) or made)
    with pytest.raises(ConfigError, match="`args` is a SimpleNamespace"):
        trainer("some/student")
    assert asked == [(config, "some/student")]

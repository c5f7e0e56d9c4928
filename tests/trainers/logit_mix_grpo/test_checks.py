"""What the constructor refuses, and that it does so before a model is loaded."""

import functools
import logging
import shutil

import pytest
from peft import LoraConfig, PromptTuningConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ProcessorMixin,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import GRPOConfig, GRPOTrainer

from tests.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.trainers import runs
from trl_blend import LogitMixGRPOTrainer
from trl_blend.errors import ConfigError, TokenizerMismatchError, UnsupportedError


@pytest.fixture
def refuses(build, monkeypatch):
    """Assert that the constructor raises before anything is loaded."""
    return functools.partial(runs.check_refusal, build, GRPOTrainer, monkeypatch)


def test_the_guard_sees_a_model_that_is_loaded(refuses, build):
    refuses(runs.ModelLoaded, None)
    refuses(runs.ModelLoaded, None, teacher=["teacher", "second"], teacher_weight=[0.2, 0.1])
    assert build().partners


# Schedule and number of teachers


@pytest.mark.parametrize(
    ("eval_dataset", "state"),
    [(None, "missing"), ({"test": runs.dataset()}, "a dictionary"), (runs.dataset().select([]), "empty")],
)
def test_adaptive_needs_one_validation_set(refuses, eval_dataset, state):
    settings = {"teacher_weight_schedule": "adaptive", "trainer_kwargs": {"eval_dataset": eval_dataset}}
    message = refuses(ConfigError, "`eval_dataset`", **settings)
    assert f"is {state}" in message and "'adaptive'" in message


@pytest.mark.parametrize(
    ("teacher", "weights"), [("teacher", [0.2, 0.1]), (["teacher", "second"], [0.2]), (["teacher"], [0.2, 0.1])]
)
def test_one_weight_per_teacher(refuses, teacher, weights):
    num_teachers = len(teacher) if isinstance(teacher, list) else 1
    refuses(
        ConfigError, rf"{len(weights)} value\(s\) for {num_teachers} teacher", teacher=teacher, teacher_weight=weights
    )


def test_a_plain_grpo_config_is_refused(models, tmp_path):
    with pytest.raises(ConfigError, match="`args` is a GRPOConfig.*`LogitMixGRPOConfig`"):
        LogitMixGRPOTrainer(
            model=str(models / "student"),
            teacher_model=str(models / "teacher"),
            reward_funcs=runs.reward,
            args=runs.config(tmp_path, GRPOConfig),
            train_dataset=runs.dataset(),
        )


def test_adaptive_with_tools(refuses):
    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    for kwargs in ({"tools": [add]}, {"environment_factory": object}):
        kwargs["eval_dataset"] = runs.dataset()
        refuses(UnsupportedError, "`tools`", teacher_weight_schedule="adaptive", trainer_kwargs=kwargs)
        refuses(runs.ModelLoaded, None, trainer_kwargs=kwargs)


def test_the_student_itself_is_no_teacher(refuses, build, models):
    student = tiny_model(seed=0)
    refuses(ConfigError, "`teacher_model` is `model` itself", student=student, teacher=student)
    # Its name is: the SFT checkpoint that training starts from is the papers' reference
    trainer = build(teacher="student")
    assert trainer.partners[0] is not trainer.model


# Settings of a teacher that is loaded already


@pytest.mark.parametrize("teacher", ["model", ["teacher", "model"]])
@pytest.mark.parametrize(
    ("name", "value"), [("teacher_model_init_kwargs", {"dtype": "float32"}), ("teacher_model_revision", "main")]
)
def test_load_settings_with_an_instantiated_teacher(refuses, teacher, name, value):
    loaded = tiny_model(seed=1)
    teacher = loaded if teacher == "model" else ["teacher", loaded]
    weights = [0.1] * (len(teacher) if isinstance(teacher, list) else 1)
    message = refuses(ConfigError, "already instantiated", teacher=teacher, teacher_weight=weights, **{name: value})
    assert f"`{name}={value!r}`" in message


def test_load_settings_without_a_teacher(refuses):
    lora = LoraConfig(task_type="CAUSAL_LM")
    settings = {"teacher_model_revision": "main", "trainer_kwargs": {"peft_config": lora}}
    refuses(ConfigError, "`teacher_model` is not given", teacher=None, **settings)


def test_one_revision_for_several_teachers_is_ambiguous(refuses):
    settings = {"teacher": ["teacher", "second"], "teacher_weight": [0.1, 0.1], "teacher_model_revision": "v2"}
    refuses(ConfigError, "`teacher_model_revision='v2'` is ambiguous for 2 teachers", **settings)


# PEFT


def test_no_teacher_without_peft(refuses):
    refuses(ConfigError, "`teacher_model=None` means the base of a PEFT student", teacher=None)


LM_HEAD = {
    "target_modules": {"target_modules": ["q_proj", "lm_head"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("teacher", [None, "teacher"])
@pytest.mark.parametrize("field", LM_HEAD)
def test_lm_head_adapters(refuses, field, teacher):
    config = LoraConfig(task_type="CAUSAL_LM", **LM_HEAD[field])
    refuses(UnsupportedError, f"`{field}`.*`lm_head`", teacher=teacher, trainer_kwargs={"peft_config": config})


@pytest.mark.parametrize("field", LM_HEAD)
def test_lm_head_adapters_of_a_peft_model(refuses, field):
    student = tiny_lora(tiny_model("llama"), **LM_HEAD[field])
    message = refuses(UnsupportedError, f"`{field}`.*`lm_head`", student=student, teacher=None)
    assert f"Remove `lm_head` from `{field}`" in message


def test_prompt_learning(refuses):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    message = refuses(UnsupportedError, "virtual tokens", trainer_kwargs={"peft_config": config})
    assert "PromptTuningConfig" in message


# Tokenizers and architectures


@pytest.fixture
def other_tokenizer(models, tmp_path):
    """A copy of the teacher's folder with two tokens swapped."""
    folder = tmp_path / "other"
    shutil.copytree(models / "teacher", folder)
    path = folder / "tokenizer.json"
    text = path.read_text()
    assert '"a": 16' in text and '"b": 17' in text
    path.write_text(text.replace('"a": 16', '"a": 17').replace('"b": 17', '"b": 16', 1))
    return folder


@pytest.mark.parametrize("loaded", [False, True])
def test_different_tokenizers_name_the_first_differing_token(refuses, other_tokenizer, loaded):
    teacher = AutoModelForCausalLM.from_pretrained(other_tokenizer) if loaded else str(other_tokenizer)
    message = refuses(TokenizerMismatchError, "`teacher_model` is not the student's", teacher=teacher)
    assert "id 16 is 'a' for the student and 'b'" in message


def test_the_differing_teacher_of_several_is_named(refuses, other_tokenizer):
    settings = {"teacher": ["teacher", str(other_tokenizer)], "teacher_weight": [0.1, 0.1]}
    refuses(TokenizerMismatchError, r"`teacher_model\[1\]`", **settings)


def test_the_processing_class_is_what_is_compared(refuses, other_tokenizer):
    own = AutoTokenizer.from_pretrained(other_tokenizer)
    refuses(TokenizerMismatchError, "id 16 is 'b' for the student", trainer_kwargs={"processing_class": own})


@pytest.mark.parametrize("loaded", [False, True])
def test_an_encoder_decoder_partner(refuses, tmp_path, loaded):
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    model.save_pretrained(tmp_path / "t5")
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    message = refuses(UnsupportedError, "encoder-decoder", teacher=model if loaded else str(tmp_path / "t5"))
    assert "`teacher_model`" in message and "'t5'" in message


def test_a_teacher_with_too_few_rows(refuses, tmp_path):
    tiny_model(seed=1, vocab_size=60).save_pretrained(tmp_path / "short")
    tiny_tokenizer().save_pretrained(tmp_path / "short")
    refuses(TokenizerMismatchError, "`config.vocab_size=60`", teacher=str(tmp_path / "short"))


def test_a_teacher_without_a_tokenizer_is_taken_with_a_warning(build, caplog):
    with caplog.at_level(logging.WARNING):
        build(teacher=tiny_model(seed=1))
    assert "No tokenizer could be found for `teacher_model`" in caplog.text


class Processor(ProcessorMixin):
    """A processor in the shape of those of vision-language models."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.chat_template = None


def test_a_vision_language_processor(refuses):
    refuses(UnsupportedError, "Vision-language", trainer_kwargs={"processing_class": Processor(tiny_tokenizer())})


# Rollouts that are drawn without the teacher

ROLLOUTS = {
    "use_vllm": {"use_vllm": True},
    "use_transformers_continuous_batching": {"use_transformers_continuous_batching": True},
    "rollout_func": {"trainer_kwargs": {"rollout_func": lambda prompts, trainer: {}}},
}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollouts_without_the_teacher(refuses, name):
    message = refuses(UnsupportedError, f"`{name}` draws tokens without the teacher", **ROLLOUTS[name])
    assert "`teacher_weight=[0.5]`" in message
    # A weight that decays to 0, or starts there, still mixes
    decay = {"teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 5}
    refuses(UnsupportedError, f"`{name}`", **decay, **ROLLOUTS[name])


@pytest.mark.parametrize("name", ROLLOUTS)
def test_nothing_is_refused_at_weight_zero(refuses, name):
    refuses(runs.ModelLoaded, None, teacher_weight=0.0, **ROLLOUTS[name])


# What only the loaded student shows


def test_a_warper_of_the_mixed_objective_is_a_warning(build, caplog):
    with caplog.at_level(logging.WARNING):
        build(top_p=0.9)
    assert "{'top_p': 0.9}" in caplog.text and "change the distribution" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        build()
    assert "change the distribution" not in caplog.text


@pytest.fixture
def truncating_student(models):
    """A student whose checkpoint carries sampling settings, as those of many chat models do."""
    student = AutoModelForCausalLM.from_pretrained(models / "student")
    student.generation_config.update(do_sample=True, typical_p=0.5, top_k=5)
    return student


def test_warpers_of_the_students_checkpoint(build, truncating_student, caplog):
    trainer = build(parent=True, student=truncating_student)
    taken, _ = trainer.model._prepare_generation_config(trainer.generation_config)
    # What TRL leaves open comes from the checkpoint: `top_k` is 0 in its config, `typical_p` is not there
    assert (taken.typical_p, taken.top_k) == (0.5, 0)
    settings = {"objective": "student", "student": truncating_student}
    with pytest.raises(ConfigError, match=r"^{'typical_p': 0.5}.*generation_config.json.*`generation_kwargs`"):
        build(**settings)
    with pytest.raises(ConfigError, match=r"^{'top_k': 5, 'typical_p': 0.5}"):
        build(top_k=None, **settings)
    build(generation_kwargs={"typical_p": 1.0}, **settings)
    build(student=truncating_student, objective="mixed")
    assert "{'typical_p': 0.5}" in caplog.text


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_is_a_warning(build, caplog, dropout):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=dropout)
    with caplog.at_level(logging.WARNING):
        build(teacher=None, trainer_kwargs={"peft_config": config})
    assert ("The student has dropout" in caplog.text) == (dropout > 0)


@pytest.mark.parametrize("setting", [{"bias": "lora_only"}, {"init_lora_weights": "pissa"}], ids=str)
def test_an_adapter_that_changes_the_base_is_no_reference(build, setting):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **setting)
    with pytest.raises(UnsupportedError, match="`teacher` is None, but adapter 'default'"):
        build(teacher=None, trainer_kwargs={"peft_config": config})
    assert build(trainer_kwargs={"peft_config": config}).partners

"""What the constructors of all trainers with a teacher refuse, and that they do so before a model is loaded."""

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
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from tests.models.architectures import tiny_architecture
from tests.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.trainers import runs, scored
from tests.trainers.runs import assert_same_tensors, snapshot
from trl_blend import (
    LogitMixGRPOConfig,
    LogitMixGRPOTrainer,
    OfflineOPDConfig,
    OfflineOPDTrainer,
    TrustRegionOPDConfig,
    TrustRegionOPDTrainer,
)
from trl_blend.errors import ConfigError, TokenizerMismatchError, UnsupportedError
from trl_blend.trainers import _partners


PARENTS = {"grpo": GRPOTrainer, "opd": DistillationTrainer, "offline": SFTTrainer}
LORA = {"trainer_kwargs": {"peft_config": LoraConfig(task_type="CAUSAL_LM")}}


@pytest.fixture(params=["grpo", "opd"])
def kind(request):
    return request.param


@pytest.fixture
def make(kind, build, build_opd):
    return {"grpo": build, "opd": build_opd}[kind]


@pytest.fixture
def refuses(kind, make, monkeypatch):
    """Assert that the constructor raises before anything is loaded."""
    return functools.partial(runs.check_refusal, make, PARENTS[kind], monkeypatch)


def test_the_guard_sees_a_model_that_is_loaded(refuses, make):
    refuses(runs.ModelLoaded, None)
    assert make().partners


@pytest.mark.parametrize(
    ("trainer", "config", "name"),
    [
        (LogitMixGRPOTrainer, GRPOConfig, "LogitMixGRPOConfig"),
        (TrustRegionOPDTrainer, DistillationConfig, "TrustRegionOPDConfig"),
        (OfflineOPDTrainer, SFTConfig, "OfflineOPDConfig"),
    ],
)
def test_a_config_of_trl(models, tmp_path, trainer, config, name):
    args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ConfigError, match=f"`args` is a {config.__name__}. Pass an? `{name}`"):
        trainer(str(models / "student"), args=args, train_dataset=runs.dataset())


@pytest.mark.parametrize("value", ["student", AutoTokenizer], ids=["name", "class"])
@pytest.mark.parametrize(
    ("trainer", "config", "settings"),
    [
        (LogitMixGRPOTrainer, LogitMixGRPOConfig, {"teacher_weight": 0}),
        (LogitMixGRPOTrainer, LogitMixGRPOConfig, {}),
        (TrustRegionOPDTrainer, TrustRegionOPDConfig, {}),
        (OfflineOPDTrainer, OfflineOPDConfig, {}),
    ],
)
def test_what_is_no_tokenizer(models, tmp_path, trainer, config, settings, value):
    args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
    with pytest.raises(ConfigError, match=f"`processing_class` is a {type(value).__name__}, .* Pass a tokenizer"):
        trainer(str(models / "student"), args=args, train_dataset=runs.dataset(), processing_class=value)


@pytest.mark.parametrize("argument", ["model", "teacher_model"])
def test_a_wrong_path_is_named(refuses, argument, tmp_path):
    role = {"model": "student", "teacher_model": "teacher"}[argument]
    message = refuses(ConfigError, "neither a folder with a model", **{role: str(tmp_path / "misspelt")})
    assert message.startswith(f"`{argument}=") and "misspelt" in message


# -------------------- the teacher


def test_the_student_itself_is_no_teacher(refuses, make):
    student = tiny_model(seed=0)
    refuses(ConfigError, "`teacher_model` is `model` itself", student=student, teacher=student)
    # Its name is: the SFT checkpoint that training starts from is the papers' reference
    trainer = make(teacher="student")
    assert trainer.partners[0] is not trainer.model


@pytest.mark.parametrize(
    ("name", "value"), [("teacher_model_init_kwargs", {"dtype": "float32"}), ("teacher_model_revision", "main")]
)
def test_load_settings_of_a_teacher_that_is_not_loaded_by_name(kind, refuses, name, value):
    message = refuses(ConfigError, "already instantiated", teacher=tiny_model(seed=1), **{name: value})
    assert f"`{name}={value!r}`" in message
    refuses(ConfigError, "`teacher_model` is not given", teacher=None, **LORA, **{name: value})
    if kind == "grpo":
        several = {"teacher": ["teacher", tiny_model(seed=1)], "teacher_weight": [0.1, 0.1]}
        refuses(ConfigError, "already instantiated", **several, **{name: value})


def test_the_configuration_may_name_the_teacher(make, refuses, models):
    name = str(models / "teacher")
    named = make(teacher=None, teacher_model_name_or_path=name)
    assert_same_tensors(snapshot(named.partners[0]), snapshot(make(teacher="teacher").partners[0]))
    # Scripts pass the same name twice
    assert make(teacher="teacher", teacher_model_name_or_path=name).partners
    for teacher, shown in (("second", repr(str(models / "second"))), (tiny_model(seed=1), "a Qwen3ForCausalLM")):
        message = refuses(ConfigError, "Drop one", teacher=teacher, teacher_model_name_or_path=name)
        assert f"`teacher_model` is {shown}" in message and repr(name) in message


def test_a_new_adapter_learns_nothing_from_its_own_base(build_opd, monkeypatch):
    """Its loss is 0, and with it every gradient."""
    refuses = functools.partial(runs.check_refusal, build_opd, DistillationTrainer, monkeypatch)
    for adapter in (LORA, {"student": tiny_lora(tiny_model(), init_lora_weights=True)}):
        refuses(ConfigError, "a new adapter does not differ", teacher=None, **adapter)
    moved = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    assert build_opd(teacher=None, trainer_kwargs={"peft_config": moved}).partners == []
    tokenizer = {"trainer_kwargs": {"processing_class": tiny_tokenizer()}}
    assert build_opd(teacher=None, student=tiny_lora(tiny_model()), **tokenizer).partners == []


def test_a_threshold_of_no_reward(build_opd, monkeypatch):
    refuses = functools.partial(runs.check_refusal, build_opd, DistillationTrainer, monkeypatch)
    refuses(ConfigError, "`success_threshold=0.5` has no effect without `reward_funcs`", success_threshold=0.5)


def test_no_teacher_without_peft(kind, refuses):
    refuses(ConfigError, "`teacher_model=None` means the base of a PEFT student", teacher=None)
    if kind == "opd":
        refuses(ConfigError, "`teacher_model=None` means", teacher=None, rollout_policy="student")


@pytest.mark.parametrize("loaded", [False, True])
def test_different_tokenizers_name_the_first_differing_token(kind, refuses, other_tokenizer, loaded):
    teacher = AutoModelForCausalLM.from_pretrained(other_tokenizer) if loaded else str(other_tokenizer)
    for settings in ({}, {"rollout_policy": "student"} if kind == "opd" else {"objective": "student"}):
        message = refuses(TokenizerMismatchError, "`teacher_model` is not the student's", teacher=teacher, **settings)
        assert "id 16 is 'a' for the student and 'b'" in message
        assert ("`GOLDTrainer`" in message) == (kind == "opd")


def test_the_processing_class_is_what_is_compared(refuses, other_tokenizer):
    own = AutoTokenizer.from_pretrained(other_tokenizer)
    refuses(TokenizerMismatchError, "id 16 is 'b' for the student", trainer_kwargs={"processing_class": own})


@pytest.mark.parametrize("loaded", [False, True])
def test_an_encoder_decoder_as_teacher(refuses, tmp_path, loaded):
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
    refuses(
        TokenizerMismatchError,
        "`teacher_model` has 60 rows, fewer than the 64 tokens",
        teacher=str(tmp_path / "short"),
    )


def test_a_teacher_without_a_tokenizer_is_taken_with_a_warning(make, caplog):
    with caplog.at_level(logging.WARNING):
        make(teacher=tiny_model(seed=1))
    assert "No tokenizer could be found for `teacher_model`" in caplog.text


class Processor(ProcessorMixin):
    """A processor in the shape of those of vision-language models."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.chat_template = None


def test_a_vision_language_processor(kind, refuses):
    processor = {"trainer_kwargs": {"processing_class": Processor(tiny_tokenizer())}}
    off = {"grpo": {"teacher_weight": 0.0}, "opd": {"rollout_policy": "student"}}[kind]
    message = refuses(UnsupportedError, "Vision-language", **processor)
    assert {"grpo": "`teacher_weight=0`", "opd": "`rollout_policy='student'`"}[kind] in message
    refuses(runs.ModelLoaded, None, **off, **processor)


# -------------------- adapters

HEADS = {
    "target_modules": {"target_modules": ["q_proj", "lm_head"]},
    "regex": {"target_modules": ".*(q_proj|head)"},
    "target_parameters": {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]},
}


@pytest.mark.parametrize("teacher", [None, "teacher"])
@pytest.mark.parametrize("reach", HEADS)
def test_adapters_that_the_fused_head_would_ignore(refuses, reach, teacher):
    field = "target_parameters" if reach == "target_parameters" else "target_modules"
    match = f"`{field}=.*reaches the student's output layer, `lm_head`"
    config = LoraConfig(task_type="CAUSAL_LM", **HEADS[reach])
    message = refuses(UnsupportedError, match, teacher=teacher, trainer_kwargs={"peft_config": config})
    assert f"Remove `lm_head` from `{field}`" in message
    if reach != "target_parameters":
        student = tiny_lora(tiny_model("llama"), **HEADS[reach])
        refuses(UnsupportedError, "reaches the student's output layer", teacher=teacher, student=student)


def test_an_output_layer_of_another_name(refuses, tmp_path):
    student = tiny_architecture("rwkv")
    student.save_pretrained(tmp_path / "rwkv")
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["key", "head"])
    trainer_kwargs = {"peft_config": adapter, "processing_class": tiny_tokenizer()}
    match = "reaches the student's output layer, `head`"
    for model in (student, str(tmp_path / "rwkv")):
        refuses(UnsupportedError, match, student=model, trainer_kwargs=trainer_kwargs)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]},
    ],
    ids=str,
)
def test_adapters_that_leave_the_output_layer_to_itself_are_taken(refuses, settings):
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    refuses(runs.ModelLoaded, None, trainer_kwargs={"peft_config": config})


def test_prompt_learning(refuses):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    message = refuses(UnsupportedError, "virtual tokens", trainer_kwargs={"peft_config": config})
    assert "PromptTuningConfig" in message


def test_adapters_of_the_offline_trainer(models, tmp_path, monkeypatch):
    rows = scored.scored_rollouts(scored.load(models, "student"), scored.load(models, "teacher"), num_rows=2)
    build = functools.partial(scored.build_offline, models, tmp_path, train_dataset=rows)
    head = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for config, match in ((head, "output layer"), (prompt, "virtual tokens")):
        adapter = {"trainer_kwargs": {"peft_config": config}}
        runs.check_refusal(build, SFTTrainer, monkeypatch, UnsupportedError, match, **adapter)


@pytest.mark.parametrize("setting", [{"bias": "lora_only"}, {"init_lora_weights": "pissa"}], ids=str)
def test_an_adapter_that_changes_the_base_is_no_teacher(make, setting, monkeypatch):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **setting)
    monkeypatch.setattr(_partners, "check_adapter_has_moved", lambda *args: None)  # refuses before
    with pytest.raises(UnsupportedError, match="`teacher` is None, but adapter 'default'"):
        make(teacher=None, trainer_kwargs={"peft_config": config})
    assert make(trainer_kwargs={"peft_config": config}).partners


# -------------------- ids beyond the rows


def with_more_ids(folder, tokenizer=None):
    """A copy of a model whose tokenizer has an id more than the model has rows."""
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def more_ids(models, tmp_path):
    return {role: with_more_ids(shutil.copytree(models / role, tmp_path / role)) for role in ("student", "teacher")}


def test_an_id_without_a_row_that_never_occurs(make, more_ids):
    trainer = make(**more_ids, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_an_id_without_a_row_that_occurs(make, more_ids):
    rows = runs.dataset()
    rows = rows.map(lambda row, index: {"prompt": f"<image>{index}"}, with_indices=True)
    trainer = make(**more_ids, train_dataset=rows, max_steps=1)
    with pytest.raises(TokenizerMismatchError, match="prompt '<image>.*holds token id 64 .'<image>'.* ids 0 to 63"):
        trainer.train()


def test_special_tokens_need_rows(refuses, models, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.pad_token = "<image>"
    given = {
        role: with_more_ids(shutil.copytree(models / role, tmp_path / role), tokenizer)
        for role in ("student", "teacher")
    }
    message = refuses(TokenizerMismatchError, "has 64 rows", **given)
    assert "`pad_token` '<image>' has id 64" in message


def test_a_teacher_with_too_few_rows_and_no_tokenizer(refuses):
    teacher = tiny_model(seed=3, vocab_size=60)
    refuses(TokenizerMismatchError, "`teacher_model` has 60 rows, fewer than the 64 tokens", teacher=teacher)

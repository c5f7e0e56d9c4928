"""What the constructor refuses beside `tests/trainers/test_refusals.py`, before a model is loaded where it can."""

import functools
import json
import logging
import shutil

import pytest
from peft import LoraConfig
from trl import DistillationTrainer

from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import runs
from trl_blend import TrustRegionOPDConfig
from trl_blend.errors import ConfigError
from trl_blend.trainers.trust_region_opd.rewards import as_reward_functions


@pytest.fixture
def refuses(build_opd, monkeypatch):
    """Assert that the constructor raises before anything is loaded."""
    return functools.partial(runs.check_refusal, build_opd, DistillationTrainer, monkeypatch)


# Teacher


def test_several_teachers(refuses):
    refuses(ConfigError, "`teacher_model` has 2 models. Pass one", teacher=["teacher", "second"])
    refuses(runs.ModelLoaded, None, teacher=["teacher"])


def test_eos_tokens_of_a_teacher_that_is_the_base(refuses):
    base = {
        "teacher": None,
        "trainer_kwargs": {"peft_config": LoraConfig(task_type="CAUSAL_LM")},
        "teacher_eos_token_id": 3,
    }
    refuses(ConfigError, r"`teacher_eos_token_id=\[3\]` has no effect without `teacher_model`", **base)


TOP_K = {
    "kl_top_k": {"kl_support": "student_top_k", "kl_top_k": 65},
    "skd_top_k": {"rollout_policy": "speculative_kd", "skd_top_k": 65},
}


@pytest.mark.parametrize("name", TOP_K)
def test_a_top_k_above_the_vocabulary(refuses, name):
    refuses(ConfigError, f"`{name}=65` is more than the 64 tokens that both models have", **TOP_K[name])
    refuses(runs.ModelLoaded, None, **{**TOP_K[name], name: 64})


def test_several_processes_place_the_teacher_themselves(refuses, monkeypatch):
    settings = {"teacher_model_init_kwargs": {"device_map": "auto"}}
    refuses(runs.ModelLoaded, None, **settings)
    monkeypatch.setattr(TrustRegionOPDConfig, "world_size", 2)
    refuses(ConfigError, "`device_map='auto'`, but with 2 processes", **settings)


@pytest.mark.parametrize("name", TOP_K)
@pytest.mark.parametrize("sizes", [(72, 64), (64, 72)])
def test_top_k_is_within_the_smaller_vocabulary(refuses, name, sizes):
    models = {"student": tiny_model(vocab_size=sizes[0]), "teacher": tiny_model(seed=1, vocab_size=sizes[1])}
    tokenizer = {"trainer_kwargs": {"processing_class": tiny_tokenizer()}}
    refuses(ConfigError, f"`{name}=65` is more than the 64", **TOP_K[name], **models, **tokenizer)


# Batches


@pytest.mark.parametrize(
    ("settings", "batch"),
    [
        ({"num_rollouts_per_prompt": 3}, 8),
        ({"num_rollouts_per_prompt": 16}, 8),
        ({"num_rollouts_per_prompt": 4, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, 6),
    ],
)
def test_rollouts_per_prompt_divide_the_generation_batch(refuses, settings, batch):
    number = settings["num_rollouts_per_prompt"]
    message = refuses(ConfigError, f"`num_rollouts_per_prompt={number}` does not divide", **settings)
    assert f"generation batch of {batch} rollouts" in message
    # The batch that counts is that of the generation, not the micro-batch
    refuses(
        runs.ModelLoaded, None, num_rollouts_per_prompt=4, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )


# Rewards


async def later(completions, **kwargs):
    return [0.0] * len(completions)


MODELS = ["some/reward-model", tiny_model(), [runs.reward, "some/reward-model"], 3, later]


@pytest.mark.parametrize("reward_funcs", MODELS, ids=["name", "model", "list", "number", "coroutine"])
def test_reward_models_are_no_reward_functions(refuses, reward_funcs):
    message = refuses(ConfigError, "`reward_funcs` has", trainer_kwargs={"reward_funcs": reward_funcs})
    assert "plain functions" in message and "call a reward model from one" in message and len(message) < 400


def test_reward_functions_become_a_list():
    assert as_reward_functions(None) == [] and as_reward_functions(runs.reward) == [runs.reward]
    assert as_reward_functions([runs.reward, len]) == [runs.reward, len]


# What only the loaded models show


@pytest.mark.parametrize(("name", "value"), [("top_p", 0.9), ("top_k", 20), ("typical_p", 0.5)])
def test_sampling_settings_of_the_students_checkpoint(build_opd, models, tmp_path, name, value):
    student = tmp_path / "student"
    shutil.copytree(models / "student", student)
    path = student / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value, "do_sample": True}))
    # TRL's own fields have the last word where they are not None
    left_open = {name: None} if name in ("top_p", "top_k") else {}
    with pytest.raises(ConfigError, match=f"`generation_config.json` has `{name}={value}`") as error:
        build_opd(student=str(student), **left_open)
    assert f"`generation_kwargs={{'{name}': ...}}`" in str(error.value)
    assert build_opd(student=str(student), rollout_policy="student", **left_open)
    neutral = {"top_p": 1.0, "top_k": 0, "typical_p": 1.0}[name]
    assert build_opd(student=str(student), generation_kwargs={name: neutral}, **left_open)
    if left_open:
        assert build_opd(student=str(student))


@pytest.mark.parametrize("policy", ["trust_region", "student"])
def test_lm_heads_on_different_devices(build_opd, policy):
    teacher = tiny_model("llama", seed=1)
    teacher.hf_device_map = {"": "cpu"}  # so that it is left where it is
    teacher.lm_head.to("meta")
    with pytest.raises(ConfigError, match="`lm_head` is on cpu and the teacher's on meta") as error:
        build_opd(teacher=teacher, rollout_policy=policy)
    assert "`teacher_model_init_kwargs`" in str(error.value)


def other_eos():
    teacher = tiny_model(seed=1)
    teacher.generation_config.eos_token_id = [20]
    return teacher


DIFFERING = {
    "sizes": lambda: {"teacher": tiny_model(seed=1, vocab_size=72)},
    "eos": lambda: {"teacher": other_eos()},
}


@pytest.mark.parametrize("name", DIFFERING)
def test_another_divergence_needs_models_that_are_alike(build_opd, name):
    settings = {"beta": 0.5, "rollout_policy": "student"}
    with pytest.raises(ConfigError, match="`beta=0.5` selects another divergence") as error:
        build_opd(**settings, **DIFFERING[name]())
    assert "`beta=1.0`" in str(error.value) and "`canonicalize_eos=False`" in str(error.value)
    assert build_opd(rollout_policy="student", **DIFFERING[name]()).uses_own_divergence
    if name == "eos":
        assert not build_opd(canonicalize_eos=False, **settings, **DIFFERING[name]()).uses_own_divergence


# End-of-sequence tokens


def test_the_eos_map_is_said(build_opd, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = build_opd(teacher_eos_token_id=[20])
    assert trainer.eos.target == 1 and set(trainer.eos.merged) == {20, 30, 40, 50}
    assert "the teacher with [20]" in caplog.text and "which emit 1" in caplog.text
    assert build_opd(teacher=other_eos(), canonicalize_eos=False).eos is None
    assert build_opd(teacher_eos_token_id=list(reversed(runs.EOS_IDS))).eos is None


def test_the_teachers_eos_is_read_from_its_files(build_opd, models, tmp_path):
    assert build_opd().eos is None  # both have the ids of `runs.EOS_IDS`
    folder = tmp_path / "base"
    shutil.copytree(models / "teacher", folder)
    tiny_tokenizer(eos_token="<pad>").save_pretrained(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 20}))
    # The tokenizer's, then those of the generation config
    assert set(build_opd(teacher=str(folder)).eos.merged) == {0, 20, 30, 40, 50}


def test_an_unknown_eos_is_taken_to_be_the_students(build_opd, caplog):
    teacher = tiny_model(seed=1)
    teacher.generation_config.eos_token_id = None
    with caplog.at_level(logging.WARNING):
        trainer = build_opd(teacher=teacher)
    assert trainer.eos is None and "The teacher's end-of-sequence tokens are unknown" in caplog.text


def test_the_base_of_the_student_has_its_eos(build_opd):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    assert build_opd(teacher=None, trainer_kwargs={"peft_config": config}).eos is None


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset", "eval_dataset['odd']"])
def test_a_dataset_without_prompts_is_refused(refuses, where):
    wrong = runs.dataset().rename_column("prompt", "question")
    if where == "train_dataset":
        kwargs = {"train_dataset": wrong}
    else:
        kwargs = {"trainer_kwargs": {"eval_dataset": {"odd": wrong} if "odd" in where else wrong}}
    message = refuses(ConfigError, "has no column `prompt` but question", **kwargs)
    assert message.startswith(f"`{where}`")

"""
Neutral settings are the TRL parent, over the options of the parent: the same losses, gradients and weights, bit for
bit, and what TRL accepts is not refused.
"""

import functools
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, Qwen3Config, TrainerCallback

from tests.tiny import PAD_ID, VOCAB_SIZE, tiny_model, tiny_tokenizer
from tests.trainers import runs, tools


NEUTRAL = {"grpo": {"teacher_weight": 0.0}, "opd": {"rollout_policy": "student"}}
BUILD = {"grpo": runs.build, "opd": runs.build_opd}


def short(completion_ids, **kwargs):
    return [1.0 / len(ids) for ids in completion_ids]


def partly(completion_ids, **kwargs):
    """No reward for every third row."""
    return [None if index % 3 == 0 else len(ids) / 8 for index, ids in enumerate(completion_ids)]


async def later(completion_ids, **kwargs):
    return short(completion_ids)


def by_column(completion_ids, answer, **kwargs):
    return [float(len(ids) > int(value)) for ids, value in zip(completion_ids, answer, strict=True)]


def reward_model():
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_labels=1, pad_token_id=PAD_ID,
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config)


def lora(**settings):
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False, **settings})


def peft(**settings):
    return {"trainer_kwargs": {"peft_config": lora(**settings)}}


def wrapped():
    torch.manual_seed(3)
    student = tiny_model(seed=0)
    student.generation_config.eos_token_id = list(runs.EOS_IDS)
    return {
        "student": get_peft_model(student, lora(target_modules=["q_proj"])),
        "trainer_kwargs": {"processing_class": tiny_tokenizer()},
    }


def dtype(name):
    return {"model_init_kwargs": {"dtype": name}}


def conversations():
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in runs.PROMPTS]})


def streamed():
    return runs.dataset().to_iterable_dataset()


def with_tools():
    student = tools.models()[0]
    student.generation_config.eos_token_id = tools.EOS_IDS
    return {
        "student": student,
        "trainer_kwargs": {"processing_class": tools.tokenizer(), "tools": [tools.add]},
        "train_dataset": conversations(),
        "max_completion_length": 24,
    }


def steps_of(optimizer):
    """An optimizer made by the user."""
    student = tiny_model(seed=0)
    student.generation_config.eos_token_id = list(runs.EOS_IDS)
    return {
        "student": student,
        "trainer_kwargs": {
            "processing_class": tiny_tokenizer(),
            "optimizers": (optimizer(student.parameters()), None),
        },
    }


class Halfway(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 1


# Settings by name; a function where something is made anew for every run
BOTH: dict[str, Any] = {
    "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "bfloat16": lambda: dtype("bfloat16"),
    "mixed_precision": {"bf16": True},
    "padded": {"pad_to_multiple_of": 8},
    "unshuffled": {"shuffle_dataset": False},
    "cold": {"temperature": 0.5},
    "nucleus": {"top_p": 0.8, "top_k": 20},
    "min_p": {"min_p": 0.1},
    "penalised": {"repetition_penalty": 1.3},
    "generation_kwargs": {"generation_kwargs": {"min_new_tokens": 3, "suppress_tokens": [7]}},
    "static_cache": {"cache_implementation": "static"},
    "logged_completions": {"log_completions": True, "num_completions_to_print": 2, "log_unique_prompts": True},
    "stopped": lambda: {"trainer_kwargs": {"callbacks": [Halfway()]}},
    "own_optimizer": lambda: steps_of(functools.partial(torch.optim.SGD, lr=0.5)),
    "clipped": {"max_grad_norm": 0.1, "optim": "adafactor", "lr_scheduler_type": "cosine", "warmup_steps": 1},
    "averaged_over_tokens": {"average_tokens_across_devices": False},
    "evaluated": lambda: {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "trainer_kwargs": {"eval_dataset": {"a": runs.dataset(("3*3=", "1+1=", "zz", "4")), "b": runs.dataset()}},
    },
    "conversations": lambda: {"train_dataset": conversations()},
    "streamed": lambda: {"train_dataset": streamed()},
    "tools": with_tools,
    "lora": lambda: peft(),
    "lora_everywhere": lambda: peft(target_modules="all-linear"),
    "lora_bias": lambda: peft(bias="lora_only", target_modules=["q_proj"]),
    "dora": lambda: peft(use_dora=True),
    "rslora_dropout": lambda: peft(use_rslora=True, lora_dropout=0.2),
    "pissa": lambda: peft(init_lora_weights="pissa"),
    "trained_embedding": lambda: peft(modules_to_save=["embed_tokens"], target_modules=["q_proj"]),
    "trained_norm": lambda: peft(modules_to_save=["norm"], target_modules=["q_proj"]),
    "ia3": lambda: {"trainer_kwargs": {"peft_config": IA3Config(task_type="CAUSAL_LM")}},
    "trained_head": lambda: peft(modules_to_save=["lm_head"], target_modules=["q_proj"]),
    "wrapped": wrapped,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {
        "loss_cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
        "two_sided": {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.5},
        "sequence_level": {"importance_sampling_level": "sequence"},
        "generation_batch": {"generation_batch_size": 16},
        "truncated_masked": {"mask_truncated_completions": True},
        "scaled_by_batch": {"scale_rewards": "batch"},
        "unscaled": {"scale_rewards": "none"},
        "entropy_quantile": {"top_entropy_quantile": 0.4},
        "entropy_bonus": {"entropy_coef": 0.1},
        "adaptive_entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 1.0},
        "off_policy_mask": {"off_policy_mask_threshold": 0.5, "num_iterations": 2},
        "float32_head": {"cast_lm_head_to_fp32": True, **dtype("bfloat16")},
        "dropout_off": {"disable_dropout": True},
        "reference_uncorrected": {"beta": 0.2, "use_bias_correction_kl": False, "num_iterations": 2},
        "reference_synced": {"beta": 0.2, "sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 3},
        "reference_of_lora": lambda: {"beta": 0.2, **peft()},
        "many_rewards": {"reward_funcs": [runs.reward, short, later], "reward_weights": [1.0, -0.5, 2.0]},
        "rewards_apart": {
            "reward_funcs": [runs.reward, short],
            "multi_objective_aggregation": "normalize_then_sum",
        },
        "reward_missing": {"reward_funcs": [partly, short]},
        "reward_model": lambda: {
            "reward_funcs": [reward_model(), short],
            "trainer_kwargs": {"reward_processing_classes": [tiny_tokenizer(), None]},
        },
        "reward_column": lambda: {
            "reward_funcs": by_column,
            "train_dataset": Dataset.from_dict({"prompt": list(runs.PROMPTS), "answer": [str(i) for i in range(8)]}),
        },
        "two_generations": {"num_generations": 2, "num_generations_eval": 4},
        "prefix": lambda: {  # which the parent of the distillation trainer refuses
            "trainer_kwargs": {"peft_config": PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)}
        },
    },
    "opd": {
        "forward": {"beta": 0.0},
        "dropout_off": {"disable_dropout": True},
        "named_teacher": lambda: {"teacher_model_init_kwargs": {"dtype": "bfloat16"}},
    },
}
TABLE = [
    *(pytest.param(kind, name, id=f"{kind}-{name}") for kind, own in OPTIONS.items() for name in own),
    *(pytest.param(kind, name, id=f"{kind}-{name}", marks=pytest.mark.slow) for kind in OPTIONS for name in BOTH),
]


def settings_of(kind: str, name: str) -> dict[str, Any]:
    found = {**BOTH, **OPTIONS[kind]}[name]
    return {"max_steps": 2, **(found() if callable(found) else found)}


def run_of(kind: str, name: str, folder: Any, models: Any, monkeypatch: Any, **more: Any) -> Any:
    """What a run records."""
    with monkeypatch.context() as patch:
        if name == "tools":
            module = "trl.trainer.grpo_trainer" if kind == "grpo" else "trl.trainer.distillation_trainer"
            patch.setattr(f"{module}.parse_response", tools.every_other_call())
            if kind == "opd":
                more["teacher"] = tools.models()[1]  # which does not say that its tokenizer's end ends it, too
                more |= {} if "parent" in more else {"canonicalize_eos": False}
        torch.manual_seed(0)
        trainer = BUILD[kind](models, folder, **{**settings_of(kind, name), **more})
        return runs.train(trainer)


@pytest.mark.parametrize(("kind", "name"), TABLE)
def test_an_option_of_the_parent_is_the_parents(kind, name, models, tmp_path, monkeypatch):
    expected = run_of(kind, name, tmp_path / "parent", models, monkeypatch, parent=True)
    actual = run_of(kind, name, tmp_path / "ours", models, monkeypatch, **NEUTRAL[kind])
    runs.assert_same_run(actual, expected)
    ours, parents = (timeless(one.trainer.state.log_history) for one in (actual, expected))
    assert [{key: entry[key] for key in other} for entry, other in zip(ours, parents, strict=True)] == parents


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log entries without what depends on the clock."""
    clock = ("time", "second", "runtime", "flos")
    return [{key: value for key, value in entry.items() if not any(c in key for c in clock)} for entry in history]

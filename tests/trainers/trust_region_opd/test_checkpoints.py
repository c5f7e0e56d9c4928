"""What a checkpoint and a saved model hold."""

import json

import pytest

from tests.trainers import runs
from trl_blend.trainers._record import RECORD_FILE


RUN = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 4}
TRUST_REGION = {"kl_budget": 0.3, "blend_warmup_steps": 4}


@pytest.fixture(scope="module")
def checkpoint(models, tmp_path_factory):
    settings = {**RUN, **TRUST_REGION, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = runs.build_opd(models, tmp_path_factory.mktemp("run"), **settings)
    trainer.train()
    return f"{trainer.args.output_dir}/checkpoint-1"


def test_a_checkpoint_has_the_settings_of_the_method_beside_the_model(checkpoint):
    with open(f"{checkpoint}/{RECORD_FILE}", encoding="utf-8") as file:
        settings = json.load(file)["settings"]
    assert settings == {
        "rollout_policy": "trust_region",
        "kl_budget": 0.3,
        "kl_budget_schedule": "linear",
        "blend_warmup_steps": 4,
        "teacher_weight": None,
        "skd_top_k": None,
        "skd_teacher_temperature": None,
        "contrastive_alpha": None,
        "contrastive_beta": None,
        "temperature_warmup_start": None,
        "temperature_warmup_steps": None,
        "num_rollouts_per_prompt": 1,
        "distillation_objective": "jsd",
        "iw_opd_gamma": None,
        "vllm_draft_tokens": None,
        "kl_support": "full",
        "kl_top_k": 16,
        "distillation_target": "teacher",
        "veto_weight_start": None,
        "veto_warmup_steps": None,
        "target_weight": None,
        "token_selection": "all",
        "tip_entropy_quantile": None,
        "tip_divergence_quantile": None,
        "forward_kl_entropy": None,
        "canonicalize_eos": True,
        "teacher_eos_token_id": None,
        "temperature": 1.0,
        "beta": 1.0,
        "max_completion_length": 8,
        "learning_rate": 5e-3,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }


def test_a_checkpoint_holds_one_model(checkpoint):
    from safetensors.torch import load_file

    names = set(load_file(f"{checkpoint}/model.safetensors"))
    assert names and not any("teacher" in name or "partner" in name for name in names)

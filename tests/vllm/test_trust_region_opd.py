"""Blended rollouts with transformers, and those after the warmup with a real vLLM engine (`make test-vllm`)."""

import logging
from pathlib import Path

import pytest
import torch

from testbed import task
from trl_blend import TrustRegionOPDConfig, TrustRegionOPDTrainer
from trl_blend.trainers.trust_region_opd import trainer as module


pytestmark = pytest.mark.vllm

CHECKPOINTS = Path(task.__file__).resolve().parent / "checkpoints"
WARMUP, STEPS = 2, 4


def test_the_engine_takes_over_after_the_warmup_with_the_current_weights(cpu_engine, tmp_path, monkeypatch, caplog):
    args = TrustRegionOPDConfig(
        output_dir=str(tmp_path),
        kl_budget=0.01,
        blend_warmup_steps=WARMUP,
        max_steps=STEPS,
        learning_rate=1e-3,  # large, so that old weights would give other tokens
        per_device_train_batch_size=8,
        max_completion_length=task.MAX_NEW_TOKENS,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=128,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
    )
    trainer = TrustRegionOPDTrainer(
        model=str(CHECKPOINTS / "student"),
        teacher_model=str(CHECKPOINTS / "teacher"),
        args=args,
        train_dataset=task.build_prompt_dataset("train", 64),
    )
    by_engine, blended = [], []
    generate, blend = trainer.vllm_generation.generate, module.blended_generation

    def spy_on_engine(*spied_args, **kwargs):
        by_engine.append(trainer.state.global_step)
        return generate(*spied_args, **kwargs)

    def spy_on_blend(*spied_args, **kwargs):
        blended.append(trainer.state.global_step)
        return blend(*spied_args, **kwargs)

    monkeypatch.setattr(trainer.vllm_generation, "generate", spy_on_engine)
    monkeypatch.setattr(module, "blended_generation", spy_on_blend)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert blended == [0, 1] and by_engine == [2, 3]
    assert caplog.text.count("From here on rollouts are drawn from the student alone, with vLLM.") == 1
    budgets = [entry["blend/kl_budget"] for entry in trainer.state.log_history if "blend/kl_budget" in entry]
    assert budgets == [0.01, 0.005, 0.0, 0.0]

    # The engine's greedy tokens are those of the weights that training ended with
    prompt_ids = trainer._tokenize_prompts([row["prompt"] for row in task.build_prompt_dataset("test", 8)])[0]
    trainer.vllm_generation.temperature = trainer.vllm_generation.generation_kwargs["temperature"] = 0.0
    trainer._last_loaded_step = -1
    engine_ids = trainer._generate_single_turn(prompt_ids, None, {})
    model = trainer.model.eval()
    for ids, prompt in zip(engine_ids, prompt_ids, strict=True):
        tokens = torch.tensor([[*prompt, *ids]])
        with torch.no_grad():
            greedy = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].argmax(dim=-1)
        assert ids == greedy.tolist()

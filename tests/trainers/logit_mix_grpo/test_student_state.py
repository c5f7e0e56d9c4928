"""What the loaded student brings along: dropout, frozen adapter weights."""

import torch
from peft import LoraConfig

from tests.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.trainers.runs import dataset, train


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def test_greedy_decoding_ignores_dropout(build):
    trainer = build(
        teacher=None, teacher_weight=0.3, trainer_kwargs={"peft_config": LoraConfig(lora_dropout=0.5, **LORA)}
    )
    trainer.model.train()
    state, rows = torch.get_rng_state(), list(dataset())
    first, second = (trainer.greedy_rewards(rows, (0.3,)).rewards for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training


def test_frozen_adapter_weights_stay_frozen(build):
    model = tiny_lora(tiny_model(seed=0))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    trainer = build(
        student=model, teacher=None, teacher_weight=0.3, trainer_kwargs={"processing_class": tiny_tokenizer()}
    )
    train(trainer)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and not any("lora_A" in name for name in trainable)

"""Tools come with the parent: both models decode every turn of a conversation, and tool output is not trained on."""

from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer as grpo
from datasets import Dataset

from tests.trainers import tools
from tests.trainers.runs import train


@pytest.mark.parametrize("objective", ["mixed", "student"])
def test_log_probs_of_every_turn_are_those_of_the_behavior_policy(build, monkeypatch, objective):
    monkeypatch.setattr(grpo, "parse_response", tools.every_other_call())
    models = tools.models()
    prompts = [[{"role": "user", "content": text}] for text in ("1+2", "what is 3+4?")]
    trainer = build(
        student=models[0],
        teacher=models[1],
        teacher_weight=0.4,
        objective=objective,
        learning_rate=0.0,
        max_completion_length=200,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        trainer_kwargs={"processing_class": tools.tokenizer(), "tools": [tools.add]},
    )
    inputs = train(trainer).calls[0].inputs
    tool_mask, mask = inputs["tool_mask"].bool(), inputs["completion_mask"].bool()
    assert (mask & ~tool_mask).any(), "no tool output in the batch: this would test nothing"
    after_tool = (~tool_mask & mask).int().cumsum(1).bool() & tool_mask & mask
    assert after_tool.any(), "no second turn in the batch: this would test nothing"

    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    length = mask.size(1)
    with torch.no_grad():
        student, teacher = (
            model.eval()(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1].double()
            for model in models
        )
    expected = (0.6 * student + 0.4 * teacher).log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    drawn = mask & tool_mask
    recorded = inputs["sampling_per_token_logps"].double()
    torch.testing.assert_close(recorded[drawn], expected[drawn], atol=1e-4, rtol=0)
    if objective == "student":
        torch.testing.assert_close(inputs["old_per_token_logps"], inputs["sampling_per_token_logps"])


class Sums:
    """An environment that brings its own prompts."""

    def reset(self, **kwargs: Any) -> str:
        return "1+2=?"

    def add(self, a: int, b: int) -> int:
        """
        Add two numbers.

        Args:
            a: First number.
            b: Second number.
        """
        return a + b


@pytest.mark.parametrize("rows", [{"level": [1, 2]}, {"prompt": [[{"role": "user", "content": ""}]] * 2}])
def test_an_environment_may_bring_the_prompts(build, rows):
    student, teacher = tools.models()
    trainer = build(
        student=student,
        teacher=teacher,
        train_dataset=Dataset.from_dict(rows),
        trainer_kwargs={"processing_class": tools.tokenizer(), "environment_factory": Sums},
        max_steps=1,
    )
    record = train(trainer)
    assert "1+2=?" in trainer.processing_class.decode(record.calls[0].inputs["prompt_ids"][0])
    trainer.save_model()

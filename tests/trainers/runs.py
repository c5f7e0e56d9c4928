"""What the trainer tests share: settings of a tiny run, a reward that spreads over a group, a record of the run."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_blend import LogitMixGRPOConfig, LogitMixGRPOTrainer


# Of different lengths, so that every batch is left-padded
PROMPTS = ("12+3=", "7*8+1=", "1-1=", "what is 4+4?", "ab", "hello", "9/3", "(2)")
# Tokens that end a completion, many of them so that some rows finish early and others are truncated
EOS_IDS = (1, 20, 30, 40, 50)
MAX_LENGTH = 8
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": MAX_LENGTH,
    "max_steps": 1,
    "logging_steps": 1,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,  # the recorded gradients are the plain ones
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
}


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Depends on every token, and hardly ever equal within a group."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def dataset(prompts: tuple[str, ...] = PROMPTS) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts)})


def config(output_dir: Any, config_class: type = LogitMixGRPOConfig, **settings: Any) -> Any:
    return config_class(output_dir=str(output_dir), **{**SETTINGS, **settings})


def build(
    models: Path,
    output_dir: Any,
    *,
    parent: bool = False,
    student: Any = "student",
    teacher: Any = "teacher",
    reward_funcs: Any = reward,
    train_dataset: Dataset | None = None,
    trainer_kwargs: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """
    A trainer of the tiny models in `models`, or with `parent` TRL's own, which has no teacher.

    `student` and `teacher` are folder names in `models`, models, or (teacher) a list of these; the other settings
    are the config's.
    """
    located = {name: str(models / name) for name in ("student", "teacher", "second")}

    def locate(value: Any) -> Any:
        if isinstance(value, list):
            return [locate(one) for one in value]
        return located.get(value, value) if isinstance(value, str) else value

    kwargs: dict[str, Any] = {
        "model": locate(student),
        "reward_funcs": reward_funcs,
        "train_dataset": dataset() if train_dataset is None else train_dataset,
        **(trainer_kwargs or {}),
    }
    if parent:
        return GRPOTrainer(args=config(output_dir, GRPOConfig, **settings), **kwargs)
    args = config(output_dir, **settings)
    return LogitMixGRPOTrainer(teacher_model=locate(teacher), args=args, **kwargs)


class LossCall(NamedTuple):
    """One call of `_compute_loss`: what it saw, what it returned, and the trained weights at that moment."""

    inputs: dict[str, Any]
    loss: float
    parameters: dict[str, Tensor]
    current_weights: tuple[float, ...]


class Record(TrainerCallback):
    """Every loss, and every gradient that reached the optimizer, of a trainer it is attached to."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.calls: list[LossCall] = []
        self.gradients: list[dict[str, Tensor]] = []
        self._compute_loss = trainer._compute_loss
        trainer._compute_loss = self
        trainer.add_callback(self)

    def __call__(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        seen, parameters = copy.deepcopy(inputs), snapshot(self.trainer.model)
        weights = self.trainer.current_weights() if hasattr(self.trainer, "current_weights") else ()
        loss = self._compute_loss(model, inputs)
        self.calls.append(LossCall(seen, loss.item(), parameters, weights))
        return loss

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.gradients.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})

    @property
    def losses(self) -> list[float]:
        return [call.loss for call in self.calls]

    def logged(self, name: str) -> list[float]:
        return [entry[name] for entry in self.trainer.state.log_history if name in entry]


def snapshot(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def set_parameters(model: Any, parameters: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])


def train(trainer: Any, **kwargs: Any) -> Record:
    """Train and return the record of it."""
    record = Record(trainer)
    trainer.train(**kwargs)
    return record


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def assert_close_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    """Every tensor within `relative` of the expected one, in norm, and none of them zero altogether."""
    assert actual.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        norm = tensor.double().norm().item()
        assert norm > 0, f"{name}: the expected tensor is zero, which tests nothing"
        distance = (actual[name].double() - tensor.double()).norm().item()
        assert distance <= relative * norm, f"{name}: relative distance {distance / norm:.1e}"

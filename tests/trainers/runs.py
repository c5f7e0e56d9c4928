"""What the trainer tests share: settings of a tiny run, a reward that spreads over a group, a record of the run."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from trl_blend import LogitMixGRPOConfig, LogitMixGRPOTrainer, TrustRegionOPDConfig, TrustRegionOPDTrainer


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
# Settings of GRPO only
_GROUPS = ("num_generations",)


class ModelLoaded(Exception):
    """A model was loaded, or TRL's constructor entered, before the arguments were checked."""


def check_refusal(build, parent, monkeypatch, error, match, **kwargs):
    """Message of the `error` that `build(**kwargs)` raises before a model is loaded or the TRL `parent` is entered."""

    def fail(*args, **kwargs):
        raise ModelLoaded

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "from_pretrained", classmethod(fail))
        patch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
        patch.setattr(parent, "__init__", fail)
        with pytest.raises(error, match=match) as raised:
            build(**kwargs)
    return str(raised.value)


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Depends on every token, and hardly ever equal within a group."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def dataset(prompts: tuple[str, ...] = PROMPTS) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts)})


def config(output_dir: Any, config_class: type = LogitMixGRPOConfig, **settings: Any) -> Any:
    return config_class(output_dir=str(output_dir), **{**SETTINGS, **settings})


def opd_config(output_dir: Any, config_class: type = TrustRegionOPDConfig, **settings: Any) -> Any:
    shared = {name: value for name, value in SETTINGS.items() if name not in _GROUPS}
    return config_class(output_dir=str(output_dir), **{**shared, **settings})


def locate(models: Path, value: Any) -> Any:
    """Paths in the place of the names of the tiny models in `models`; anything else as it is."""
    if isinstance(value, list):
        return [locate(models, one) for one in value]
    named = isinstance(value, str) and value in ("student", "teacher", "second")
    return str(models / value) if named else value


def build_opd(
    models: Path,
    output_dir: Any,
    *,
    parent: bool = False,
    student: Any = "student",
    teacher: Any = "teacher",
    train_dataset: Dataset | None = None,
    trainer_kwargs: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """
    A distillation trainer of the tiny models in `models`, or with `parent` TRL's own.

    `student` and `teacher` are folder names in `models`, models, or (teacher) a list of these; the other settings
    are the config's.
    """
    trainer_class = DistillationTrainer if parent else TrustRegionOPDTrainer
    return trainer_class(
        model=locate(models, student),
        teacher_model=locate(models, teacher),
        args=opd_config(output_dir, DistillationConfig if parent else TrustRegionOPDConfig, **settings),
        train_dataset=dataset() if train_dataset is None else train_dataset,
        **(trainer_kwargs or {}),
    )


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
    """The same for GRPO, whose parent has no teacher."""
    return (GRPOTrainer if parent else LogitMixGRPOTrainer)(
        model=locate(models, student),
        reward_funcs=reward_funcs,
        args=config(output_dir, GRPOConfig if parent else LogitMixGRPOConfig, **settings),
        train_dataset=dataset() if train_dataset is None else train_dataset,
        **({} if parent else {"teacher_model": locate(models, teacher)}),
        **(trainer_kwargs or {}),
    )


class LossCall(NamedTuple):
    """One call of the loss: what it saw, what it returned, and the trained weights at that moment."""

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
        name = "_compute_loss" if hasattr(trainer, "_compute_loss") else "compute_loss"
        self._compute_loss = getattr(trainer, name)
        setattr(trainer, name, self)
        trainer.add_callback(self)

    def __call__(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen, parameters = copy.deepcopy(inputs), snapshot(self.trainer.model)
        weights = self.trainer.current_weights() if hasattr(self.trainer, "current_weights") else ()
        output = self._compute_loss(model, inputs, *args, **kwargs)
        loss = output[0] if isinstance(output, tuple) else output  # distillation: loss, entropy, number of tokens
        self.calls.append(LossCall(seen, loss.item(), parameters, weights))
        return output

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


class Rollout(NamedTuple):
    """One generation batch: the rows as they were drawn, what blended decoding recorded, the weights it drew with."""

    inputs: dict[str, Any]
    records: list[Any]
    parameters: dict[str, Tensor]


def record_opd_rollouts(trainer: Any) -> list[Rollout]:
    """A list that grows by one entry per generation batch of a distillation trainer; no records where none blends."""
    rollouts: list[Rollout] = []
    records: list[Any] = []
    generate, collect = trainer._generate_and_score_completions, trainer._diagnostics.collect

    def generating(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        records.clear()
        parameters, output = snapshot(trainer.model), generate(inputs)
        rollouts.append(Rollout(copy.deepcopy(output), list(records), parameters))
        return output

    def collecting(record: Any, lengths: list[int]) -> None:
        records.append(record)
        collect(record, lengths)

    trainer._generate_and_score_completions, trainer._diagnostics.collect = generating, collecting
    return rollouts


def assert_same_run(actual: Record, expected: Record) -> None:
    """Losses, gradients and final weights, bit for bit."""
    assert actual.losses == expected.losses and any(expected.losses)
    assert actual.logged("grad_norm") == expected.logged("grad_norm")
    assert len(actual.gradients) == len(expected.gradients) > 0
    for gradients, expected_gradients in zip(actual.gradients, expected.gradients):
        assert_same_tensors(gradients, expected_gradients)
    assert_same_tensors(snapshot(actual.trainer.model), snapshot(expected.trainer.model))


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

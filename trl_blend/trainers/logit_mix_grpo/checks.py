"""What a [`LogitMixGRPOTrainer`] refuses: as much as possible before a model is loaded, the rest before a step."""

from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import PreTrainedModel, ProcessorMixin

from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.generation.settings import distribution_warpers
from trl_blend.trainers import _partners
from trl_blend.trainers.logit_mix_grpo.config import LogitMixGRPOConfig


logger = get_logger(__name__)


def check_arguments(
    model: str | PreTrainedModel,
    teachers: list[str | PreTrainedModel],
    args: LogitMixGRPOConfig,
    *,
    eval_dataset: Any,
    processing_class: Any,
    peft_config: Any,
    rollout_func: Any,
    uses_tools: bool,
) -> None:
    """Check the constructor's arguments against each other; the errors are those of the trainer."""
    if not isinstance(args, LogitMixGRPOConfig):
        raise ConfigError(f"`args` is a {type(args).__name__}. Pass a `LogitMixGRPOConfig`.")
    _partners.check_processing_class(processing_class)
    num_teachers, weights = max(len(teachers), 1), args.teacher_weight
    if len(weights) != num_teachers:
        raise ConfigError(
            f"`teacher_weight={weights}` has {len(weights)} value(s) for {num_teachers} teacher(s). Give one weight "
            "per teacher."
        )
    _partners.check_teacher_arguments(teachers, args)
    if not args.mixes:
        return
    _partners.check_text_only(isinstance(processing_class, ProcessorMixin), "`teacher_weight=0`")
    _partners.check_adapters(model, teachers, peft_config, args, "`teacher_weight=0`")
    rollouts_without_teacher = {
        "use_transformers_continuous_batching": args.use_transformers_continuous_batching,
        "rollout_func": rollout_func is not None,
    }
    for name in (name for name, used in rollouts_without_teacher.items() if used):
        raise UnsupportedError(
            f"`{name}` draws tokens without the teacher, while `teacher_weight={args.teacher_weight}` needs them "
            f"drawn from the mixed policy. Drop `{name}`, or set `teacher_weight=0`."
        )
    _partners.check_not_the_student(model, teachers)
    if args.teacher_weight_schedule == "adaptive":
        _check_validation_prompts(eval_dataset, uses_tools)
    _partners.check_vocabularies(model, teachers, processing_class, args)


def check_student(student: PreTrainedModel, args: LogitMixGRPOConfig, *, is_vision_language: bool) -> None:
    """Check what only the loaded student shows."""
    _partners.check_text_only(is_vision_language, "`teacher_weight=0`")
    if warpers := distribution_warpers(args, student.generation_config):
        message = (
            f"{warpers}, from the configuration or the student's `generation_config.json`, change the distribution "
            "that tokens are drawn from"
        )
        if args.objective == "student":
            raise ConfigError(
                f"{message}, so the importance ratio of `objective='student'` would be wrong. Set them to neutral "
                "values in `generation_kwargs`, or use `objective='mixed'`."
            )
        logger.warning(f"{message}; the ratio of `objective='mixed'` is that of the full mixed policy.")
    if not args.disable_dropout and any(
        isinstance(module, torch.nn.Dropout) and module.p > 0 for module in student.modules()
    ):
        logger.warning(
            "The student has dropout. Rollouts are decoded without it, but the forward passes of the loss use it, so "
            "the importance ratio is noisy. Set `disable_dropout=True`, or `lora_dropout=0` in the PEFT configuration."
        )


def _check_validation_prompts(eval_dataset: Any, uses_tools: bool) -> None:
    if uses_tools:
        raise UnsupportedError(
            "`teacher_weight_schedule='adaptive'` decodes validation prompts outside of an environment, so it cannot "
            "be used with `tools` or `environment_factory`. Use another schedule."
        )
    problem = "missing" if eval_dataset is None else "a dictionary" if isinstance(eval_dataset, dict) else None
    if problem is None and next(iter(eval_dataset), None) is None:
        problem = "empty"
    if problem is not None:
        raise ConfigError(
            "`teacher_weight_schedule='adaptive'` decodes validation prompts, but `eval_dataset` is "
            f"{problem}. Pass one dataset of held-out prompts."
        )


def warn_of_few_prompts(found: int, wanted: int) -> None:
    """Say when the adaptive weight is measured on fewer prompts than asked for."""
    if found < wanted:
        logger.warning(f"`adaptive_num_prompts={wanted}`, but `eval_dataset` has {found} rows: those are used.")

"""What a [`LogitMixGRPOTrainer`] refuses: as much as possible before a model is loaded, the rest before a step."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, ProcessorMixin

from ...errors import ConfigError, UnsupportedError
from ...generation.partner import check_adapters_can_be_disabled
from .. import _partners
from .config import LogitMixGRPOConfig


if TYPE_CHECKING:
    from .trainer import LogitMixGRPOTrainer

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
    """
    Check the constructor's arguments against each other.

    Raises:
        [`~trl_blend.errors.ConfigError`]:
            If they contradict each other.
        [`~trl_blend.errors.TokenizerMismatchError`]:
            If a teacher has another tokenizer.
        [`~trl_blend.errors.UnsupportedError`]:
            If the combination would run but not correctly.
    """
    if not isinstance(args, LogitMixGRPOConfig):
        raise ConfigError(f"`args` is a {type(args).__name__}. Pass a `LogitMixGRPOConfig`.")
    _partners.check_teacher_arguments(teachers, args.teacher_weight, args)
    if not args.mixes:
        return
    check_text_only(isinstance(processing_class, ProcessorMixin))
    _check_adapters(model, teachers, peft_config)
    rollouts_without_teacher = {
        "use_vllm": args.use_vllm,
        "use_transformers_continuous_batching": args.use_transformers_continuous_batching,
        "rollout_func": rollout_func is not None,
    }
    for name in (name for name, used in rollouts_without_teacher.items() if used):
        raise UnsupportedError(
            f"`{name}` draws tokens without the teacher, while `teacher_weight={args.teacher_weight}` needs them "
            f"drawn from the mixed policy. Drop `{name}`, or set `teacher_weight=0`."
        )
    if any(teacher is model for teacher in teachers if not isinstance(teacher, str)):
        raise ConfigError("`teacher_model` is `model` itself. Pass a frozen copy, or its name.")
    if args.teacher_weight_schedule == "adaptive":
        _check_validation_prompts(eval_dataset, uses_tools)
    _partners.check_names(model, teachers, processing_class, args)


def check_student(trainer: "LogitMixGRPOTrainer", teachers: list) -> None:
    """
    Check what only the loaded and prepared student shows.

    Raises:
        [`~trl_blend.errors.ConfigError`]:
            If `objective="student"` would sample with truncation or penalties that its checkpoint carries.
        [`~trl_blend.errors.UnsupportedError`]:
            If it is a vision-language model, or its base cannot serve as the reference.
    """
    check_text_only(trainer._is_vlm)
    if not teachers:
        _check_base_as_reference(trainer)
    args = trainer.args
    if warpers := args.distribution_warpers(trainer.model.generation_config):
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
        isinstance(module, torch.nn.Dropout) and module.p > 0 for module in trainer.model.modules()
    ):
        logger.warning(
            "The student has dropout. Rollouts are decoded without it, but the forward passes of the loss use it, so "
            "the importance ratio is noisy. Set `disable_dropout=True`, or `lora_dropout=0` in the PEFT configuration."
        )


def _check_base_as_reference(trainer: "LogitMixGRPOTrainer") -> None:
    check_adapters_can_be_disabled(trainer.model)
    if trainer._dist.is_fsdp:
        raise UnsupportedError(
            "`teacher_model=None` reads the reference from the student, which FSDP shards: a rank whose sequences "
            "are finished would leave the others waiting for its shards. Pass the base model as `teacher_model`."
        )
    if trainer._dist.is_zero3 and not trainer.args.ds3_gather_for_generation:
        raise UnsupportedError(
            "`teacher_model=None` with ZeRO-3 decodes from gathered weights. Set `ds3_gather_for_generation=True`, or "
            "pass the base model as `teacher_model`."
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


def check_text_only(is_vision_language: bool) -> None:
    """Refuse vision-language students. One given by name is known as such only when its processor is loaded."""
    if is_vision_language:
        raise UnsupportedError(
            "Vision-language students cannot be mixed: the partner would need the image features at every decoding "
            "step. Set `teacher_weight=0`, or train the text model."
        )


def _check_adapters(model: Any, teachers: list, peft_config: Any) -> None:
    adapters = [peft_config] if peft_config is not None else []
    if not isinstance(model, str) and is_peft_model(model):
        adapters += list(model.peft_config.values())
    if not teachers and not adapters:
        raise ConfigError(
            "`teacher_model=None` means the base of a PEFT student, but there is no `peft_config` and `model` is not "
            "a PEFT model. Pass `teacher_model`, or `peft_config`, or set `teacher_weight=0`."
        )
    for adapter in adapters:
        _partners.check_lm_head_adapter(adapter)

"""What a [`LogitMixGRPOTrainer`] refuses before a model is loaded."""

from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, ProcessorMixin

from ...errors import ConfigError, UnsupportedError
from .. import _partners
from .config import LogitMixGRPOConfig


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
    if args.teacher_weight_schedule == "adaptive" and (eval_dataset is None or isinstance(eval_dataset, dict)):
        raise ConfigError(
            "`teacher_weight_schedule='adaptive'` decodes validation prompts, but `eval_dataset` is "
            f"{'missing' if eval_dataset is None else 'a dictionary'}. Pass one dataset of held-out prompts."
        )
    if warpers := args.distribution_warpers():
        logger.warning(
            f"{warpers} change the distribution that tokens are drawn from; the ratio of `objective='mixed'` is that "
            "of the full mixed policy."
        )
    _partners.check_names(model, teachers, processing_class, args)


def check_text_only(is_vision_language: bool) -> None:
    """Refuse vision-language students; a student given by name shows that it is one only when its processor is loaded."""
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

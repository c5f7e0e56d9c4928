"""What a [`TrustRegionOPDTrainer`] refuses: as much as possible before a model is loaded, the rest before a step."""

from typing import Any

from accelerate.logging import get_logger
from transformers import PreTrainedModel, ProcessorMixin

from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.generation.settings import distribution_warpers
from trl_blend.models.limits import eos_token_ids
from trl_blend.models.loading import find_tokenizer
from trl_blend.models.wrappers import what_changes_the_base
from trl_blend.ops.vocab import EosMap, eos_map
from trl_blend.trainers import _cards, _partners
from trl_blend.trainers._options import is_default
from trl_blend.trainers.trust_region_opd.config import TrustRegionOPDConfig


logger = get_logger(__name__)

_OFF = "`rollout_policy='student'`"
_GOLD = "To distil between different tokenizers, use TRL's `GOLDTrainer` (`trl.experimental.gold`)."


def check_arguments(
    model: str | PreTrainedModel,
    teachers: list[str | PreTrainedModel],
    args: TrustRegionOPDConfig,
    *,
    processing_class: Any,
    peft_config: Any,
    has_rewards: bool,
    uses_tools: bool,
) -> None:
    """Check the constructor's arguments against each other; the errors are those of the trainer."""
    if not isinstance(args, TrustRegionOPDConfig):
        raise ConfigError(f"`args` is a {type(args).__name__}. Pass a `TrustRegionOPDConfig`.")
    _partners.check_processing_class(processing_class)
    if len(teachers) > 1:
        raise ConfigError(f"`teacher_model` has {len(teachers)} models. Pass one: the loss has one target.")
    _partners.check_teacher_arguments(teachers, args)
    _partners.check_adapters(model, teachers, peft_config, args)
    if not has_rewards and not is_default(args, "success_threshold"):
        raise ConfigError(
            f"`success_threshold={args.success_threshold}` has no effect without `reward_funcs`. Leave it out."
        )
    if not teachers and args.teacher_eos_token_id is not None:
        raise ConfigError(
            f"`teacher_eos_token_id={args.teacher_eos_token_id}` has no effect without `teacher_model`: the student's "
            "own base ends its sequences as the student does. Drop it."
        )
    if args.distillation_objective == "iw_opd" and args.blends and (uses_tools or args.use_vllm):
        raise UnsupportedError(
            "`distillation_objective='iw_opd'` divides by the probability that a blended rollout was drawn with, "
            "which is recorded for one turn and by transformers only. Leave tools out and set `use_vllm=False`, or "
            f"set {_OFF}."
        )
    if args.uses_reference:
        _check_reference(model, teachers, args, peft_config)
    if not teachers:
        _partners.check_adapter_has_moved(model, peft_config)
    if args.world_size > 1 and (args.teacher_model_init_kwargs or {}).get("device_map") is not None:
        raise ConfigError(
            f"`teacher_model_init_kwargs` has `device_map={args.teacher_model_init_kwargs['device_map']!r}`, but with "
            f"{args.world_size} processes each of them holds the teacher on its own device. Drop `device_map`, or use "
            "one process."
        )
    _partners.check_not_the_student(model, teachers)
    if args.blends:
        _partners.check_text_only(isinstance(processing_class, ProcessorMixin), _OFF)
    batch = _cards.rows_per_step(args)
    if batch % args.num_rollouts_per_prompt:
        raise ConfigError(
            f"`num_rollouts_per_prompt={args.num_rollouts_per_prompt}` does not divide the generation batch of "
            f"{batch} rollouts ({args.per_device_train_batch_size} per device x {args.world_size} process(es) x "
            f"{args.gradient_accumulation_steps} accumulation steps). Change one of them."
        )
    rows = _partners.check_vocabularies(model, teachers, processing_class, args, remedy=_GOLD)
    top_k = {"skd_top_k": args.skd_top_k, "kl_top_k": args.kl_top_k if args.kl_support != "full" else None}
    for name, value in top_k.items():
        if value is not None and value > rows:
            raise ConfigError(
                f"`{name}={value}` is more than the {rows} tokens that both models have. Set it to {rows} or less."
            )


def needs_reference(args: TrustRegionOPDConfig) -> str:
    """Begin of a message."""
    return (
        f"`distillation_target='interpolated'` with `target_weight={args.target_weight}` needs the student at step 0"
    )


def _check_reference(model: Any, teachers: list, args: TrustRegionOPDConfig, peft_config: Any) -> None:
    """Refuse an interpolated target where the student at step 0 is not there, or is the teacher."""
    needs = needs_reference(args)
    if not teachers:
        raise ConfigError(
            f"{needs} beside a teacher, but `teacher_model=None` means its own base. Pass `teacher_model`."
        )
    adapters = _partners.adapters_of(model, peft_config, args)
    for adapter in adapters:
        changed_by = what_changes_the_base(adapter.to_dict())
        if changed_by is not None:
            raise UnsupportedError(
                f"{needs}, which is the base with the adapters disabled, but the adapter has `{changed_by}`, which "
                "changes the base's weights. Use another initialisation and no trained biases."
            )
    if adapters and not _partners.has_new_adapter(model, peft_config):
        raise UnsupportedError(
            f"{needs}, which is the base with the adapters disabled, but the adapter is not a new one. Merge it into "
            "its base (`merge_and_unload`), and train a new one on that."
        )
    if not adapters and any(hasattr(parameter, "ds_id") for parameter in getattr(model, "parameters", list)()):
        raise UnsupportedError(
            f"{needs}, but ZeRO-3 has split the weights of `model`. Pass its name, so that each process can load it."
        )


def check_loaded(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    args: TrustRegionOPDConfig,
    *,
    is_vision_language: bool,
    uses_own_divergence: bool,
    missing_token_ids: list[int],
) -> None:
    """Check what only the loaded and prepared models show."""
    if args.blends:
        _partners.check_text_only(is_vision_language, _OFF)
        for name, value in distribution_warpers(args, student.generation_config).items():
            raise ConfigError(
                f"The student's `generation_config.json` has `{name}={value}`, which cuts or reshapes the "
                f"distribution after the blend, but `rollout_policy={args.rollout_policy!r}` is defined on full "
                f"distributions. Set `generation_kwargs={{'{name}': ...}}` to its neutral value."
            )
    heads = [model.get_output_embeddings().weight.device for model in (student, teacher)]
    if heads[0] != heads[1]:
        raise ConfigError(
            f"The student's `lm_head` is on {heads[0]} and the teacher's on {heads[1]}, but the loss compares their "
            "logits tile by tile. Put the teacher's `lm_head` on the student's device in the `device_map` of "
            "`teacher_model_init_kwargs`; its other layers may be elsewhere."
        )
    if args.beta != 1.0 and uses_own_divergence:
        raise ConfigError(
            f"`beta={args.beta}` selects another divergence than the reverse KL, which is not available for two "
            "models whose vocabulary sizes or end-of-sequence tokens differ, or with ZeRO-3. Set `beta=1.0`, or "
            "make the models alike (`canonicalize_eos=False` leaves their end-of-sequence tokens as they are)."
        )
    if args.use_vllm and not args.blends and missing_token_ids:
        raise UnsupportedError(
            f"`use_vllm=True`: the student has {len(missing_token_ids)} vocabulary rows that the teacher lacks, and "
            "an engine that holds the student alone cannot be told never to emit them. Set `use_vllm=False`, or "
            "resize the student's embeddings."
        )


def find_eos_map(
    given: str | PreTrainedModel,
    teacher: PreTrainedModel,
    args: TrustRegionOPDConfig,
    *,
    student_ids: list[int],
    target: int,
) -> EosMap | None:
    """
    End-of-sequence tokens to merge into `target`; `None` where both models end with the same ones.

    `given` is the teacher as the user passed it, which leads to its tokenizer.
    """
    if not args.canonicalize_eos:
        return None
    teacher_ids = args.teacher_eos_token_id or _teacher_eos_ids(given, teacher, args)
    if not teacher_ids:
        logger.warning(
            "The teacher's end-of-sequence tokens are unknown: it was built in memory and its `generation_config` has "
            "none. They are taken to be the student's. Set `teacher_eos_token_id` if they are not."
        )
        return None
    merged = eos_map(student_ids, teacher_ids, target=target)
    if merged is not None:
        logger.warning(
            f"The student ends its sequences with {student_ids} and the teacher with {teacher_ids}. They "
            f"are treated as one event in the loss and in blended rollouts, which emit {merged.target}; each of them "
            "ends the student's own generations. Set `canonicalize_eos=False` to keep them apart."
        )
    return merged


def _teacher_eos_ids(given: str | PreTrainedModel, teacher: Any, args: TrustRegionOPDConfig) -> list[int]:
    # As TRL does for the student: the tokenizer's EOS first, then every id that the checkpoint declares
    declared = eos_token_ids(getattr(teacher, "generation_config", None))
    tokenizer = find_tokenizer(given, "teacher_model", **_partners.teacher_files(args))
    own = getattr(tokenizer, "eos_token_id", None)
    return declared if own is None or own in declared else [own, *declared]

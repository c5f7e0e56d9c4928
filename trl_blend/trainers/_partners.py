"""
The frozen partners of a student: what can be refused before anything is loaded, then their preparation.

Shared by the trainers. A partner is a causal language model with the student's tokenizer, held in full by every
process (see [`~trl_blend.models.loading.load_frozen`]).
"""

import copy
import re
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from trl_blend.errors import ConfigError, TokenizerMismatchError, UnsupportedError
from trl_blend.models.compatibility import check_partner_model, check_tokenizers, check_vocab_sizes
from trl_blend.models.limits import eos_token_ids, num_token_ids, vocabulary_rows
from trl_blend.models.loading import (
    find_adapter,
    find_config,
    find_tokenizer,
    load_frozen,
    load_trainable_adapter,
    of_files,
    supports_attention,
)
from trl_blend.models.output_layer import output_layer_name
from trl_blend.models.wrappers import AdapterConfig, check_adapters_can_be_disabled, evaluation_mode


logger = get_logger(__name__)

Teacher = str | PreTrainedModel | list[str | PreTrainedModel] | None


def as_list(teacher_model: Teacher) -> list[str | PreTrainedModel]:
    """Partners as a list; empty when the base of a PEFT student is the reference."""
    if teacher_model is None:
        return []
    return list(teacher_model) if isinstance(teacher_model, (list, tuple)) else [teacher_model]


def given_teachers(teacher_model: Teacher, args: Any) -> list[str | PreTrainedModel]:
    """The argument `teacher_model`, or else those that the configuration names; both only where they are the same."""
    given, named = as_list(teacher_model), as_list(getattr(args, "teacher_model_name_or_path", None))
    if given and named and given != named:
        shown = ", ".join(repr(one) if isinstance(one, str) else f"a {type(one).__name__}" for one in given)
        raise ConfigError(
            f"`teacher_model` is {shown}, but the configuration has `teacher_model_name_or_path="
            f"{args.teacher_model_name_or_path!r}`. Drop one of them."
        )
    return given or named


def check_processing_class(processing_class: Any) -> None:
    """Refuse what is neither a tokenizer nor a processor, such as a name."""
    if not isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin | None):
        raise ConfigError(
            f"`processing_class` is a {type(processing_class).__name__}, {processing_class!r:.80}. Pass a tokenizer "
            "of transformers, or leave it out for the one that belongs to `model`."
        )


def check_teacher_arguments(teachers: list[str | PreTrainedModel], args: Any) -> None:
    """Refuse settings of loading for a teacher that is loaded, and one revision of several teachers."""
    loaded = [teacher for teacher in teachers if not isinstance(teacher, str)]
    for name in ("teacher_model_init_kwargs", "teacher_model_revision"):
        value = getattr(args, name)
        if value and (loaded or not teachers):
            raise ConfigError(
                f"`{name}={value!r}` is used when a teacher is loaded from a name or path, but `teacher_model` is "
                f"{'already instantiated' if loaded else 'not given'}. Drop `{name}`, or pass the teacher's name."
            )
    if args.teacher_model_revision and len(teachers) > 1:
        raise ConfigError(
            f"`teacher_model_revision={args.teacher_model_revision!r}` is ambiguous for {len(teachers)} teachers. "
            "Load the teachers yourself and pass them as models."
        )


def check_not_the_student(model: str | PreTrainedModel, teachers: list[str | PreTrainedModel]) -> None:
    """Refuse a teacher that would be trained."""
    if any(teacher is model for teacher in teachers if not isinstance(teacher, str)):
        raise ConfigError("`teacher_model` is `model` itself. Pass a frozen copy, or its name.")


def check_adapter(peft_config: Any, argument: str = "peft_config") -> None:
    """Refuse prompt learning."""
    if getattr(peft_config, "is_prompt_learning", False):
        raise UnsupportedError(
            f"`{argument}={type(peft_config).__name__}` prepends virtual tokens, so student and teacher positions do "
            "not line up. Use LoRA or another adapter that leaves the inputs alone."
        )


def check_student_adapters(model: str | PreTrainedModel, configs: list[Any], args: Any) -> None:
    """Refuse prompt learning, and adapters on the output layer of the student: they would get no gradient."""
    for config in configs:
        check_adapter(config)
    if not configs:
        return
    head = _output_layer_name(model, args)
    for config in configs:
        for field in _fields_that_reach(config, head):
            raise UnsupportedError(
                f"`{field}={getattr(config, field)!r}` of `peft_config` reaches the student's output layer, "
                f"`{head}`. The fused log-probabilities read that layer's own weight, so the adapter would never be "
                f"trained. Remove `{head}` from `{field}`, or train the layer itself with `modules_to_save`."
            )


def _output_layer_name(model: str | PreTrainedModel, args: Any) -> str:
    if not isinstance(model, str):
        return output_layer_name(model.get_base_model() if is_peft_model(model) else model) or "lm_head"
    config = find_config(model, "model", **_of_student(args))
    tied = getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_tied_weights_keys", None)
    names = [name.removesuffix(".weight") for name in tied or () if name.endswith(".weight")]
    return names[0] if names else "lm_head"


def _fields_that_reach(config: Any, module: str) -> list[str]:
    """Fields of a PEFT configuration that put an adapter on a module. `"all-linear"` leaves the output layer out."""
    from peft.tuners.tuners_utils import check_target_module_exists

    found = []
    targets = getattr(config, "target_modules", None)
    if targets and targets != "all-linear" and check_target_module_exists(config, module):
        found.append("target_modules")
    parameters = getattr(config, "target_parameters", None) or []
    if any(f"{module}.weight" == name or f".{module}.weight".endswith(f".{name}") for name in parameters):
        found.append("target_parameters")
    return found


def check_vocabularies(
    student: str | PreTrainedModel,
    teachers: list[str | PreTrainedModel],
    processing_class: PreTrainedTokenizerBase | None,
    args: Any,
    remedy: str = "",
) -> int:
    """
    Compare tokenizers and configurations of student and teachers, before any weight is loaded. Returns the number of
    vocabulary rows that all models have.

    A tokenizer that cannot be found (a model built in memory) is not compared: a warning says so. `remedy` is a
    sentence to add to the error of two different tokenizers.
    """
    of_teacher = teacher_files(args)
    vocab_size = student_rows(student, args)
    student_tokenizer = processing_class or find_tokenizer(student, "model", **_of_student(args))
    student_tokenizer = getattr(student_tokenizer, "tokenizer", student_tokenizer)
    rows = [vocab_size]
    for index, teacher in enumerate(teachers):
        name = "teacher_model" if len(teachers) == 1 else f"teacher_model[{index}]"
        rows.append(_rows(teacher, find_config(teacher, name, **of_teacher)))
        tokenizer = find_tokenizer(teacher, name, **of_teacher)
        if student_tokenizer is None or tokenizer is None:
            logger.warning(
                f"No tokenizer could be found for `{name if tokenizer is None else 'model'}`, so it was not compared "
                "with the other one. Make sure that both map the same ids to the same tokens."
            )
        else:
            check_tokenizers(student_tokenizer, tokenizer, partner_name=name, remedy=remedy)
        check_vocab_sizes(vocab_size, rows[-1], student_tokenizer, partner_name=name)
    return min(rows)


def student_adapter(model: str | PreTrainedModel, args: Any) -> AdapterConfig | None:
    """Settings of the adapter that a student given by name is; `None` for a whole model, and for one in memory."""
    if not isinstance(model, str):
        return None
    revision = (args.model_init_kwargs or {}).get("revision")
    return find_adapter(model, "model", revision=revision, trust_remote_code=args.trust_remote_code)


def load_student_adapter(
    name: str,
    args: Any,
    processing_class: PreTrainedTokenizerBase | None,
    *,
    quantization_config: Any = None,
    **tokenizer_options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The adapter `name` on its base, to be trained further, and its tokenizer. The settings of loading are those of a
    base that TRL loads by name.
    """
    arguments = _student_arguments(args)
    if quantization_config is not None:
        arguments["quantization_config"] = quantization_config
    model = load_trainable_adapter(name, "model", **arguments)
    if processing_class is None:
        files = {"revision": arguments.get("revision"), "trust_remote_code": arguments["trust_remote_code"]}
        processing_class = find_tokenizer(name, "model", required=True, **files, **tokenizer_options)
    return model, processing_class


def copy_of_student(model: str | PreTrainedModel, loaded: PreTrainedModel, args: Any) -> PreTrainedModel:
    """A frozen copy of a student that has not been trained yet, whole on every process: by name where there is one."""
    if isinstance(model, str):
        return load_frozen(model, "model", **_student_arguments(args))
    return copy.deepcopy(loaded).requires_grad_(False).eval()


def _student_arguments(args: Any) -> dict[str, Any]:
    """With which TRL loads a student by name."""
    arguments = dict(args.model_init_kwargs or {})
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        arguments["device_map"] = None
    return {"trust_remote_code": args.trust_remote_code} | arguments


def num_tokens(student: PreTrainedModel, tokenizer: Any) -> int | None:
    """Ids below it are tokens; `None` where the student has no more rows than that."""
    tokens = num_token_ids(tokenizer, eos_token_ids(student.generation_config))
    return tokens if tokens < vocabulary_rows(student) else None


def check_prompt_ids(
    prompt_ids: list[list[int]], student: PreTrainedModel, partners: list[Any], tokenizer: Any
) -> None:
    """
    Refuse a prompt with a token that the student or a partner has no row for. The lookup itself ends in an index
    error, on CUDA in one that takes the whole process down.
    """
    rows = min(vocabulary_rows(model) for model in (student, *partners))
    for ids in prompt_ids:
        if ids and max(ids) >= rows:
            raise TokenizerMismatchError(
                f"The prompt {tokenizer.decode(ids)[:80]!r} holds token id {max(ids)} "
                f"({tokenizer.convert_ids_to_tokens(max(ids))!r}), but the models have rows for the ids 0 to "
                f"{rows - 1}. Drop the prompt, or use models that have a row for the token."
            )


def _of_student(args: Any) -> dict[str, Any]:
    revision = (args.model_init_kwargs or {}).get("revision")
    return {"revision": revision, "trust_remote_code": args.trust_remote_code}


def teacher_arguments(args: Any) -> dict[str, Any]:
    """Of `from_pretrained`, for a teacher given by name: `teacher_model_init_kwargs` have the last word."""
    arguments = {"trust_remote_code": args.trust_remote_code}
    if args.teacher_model_revision is not None:
        arguments["revision"] = args.teacher_model_revision
    return arguments | (args.teacher_model_init_kwargs or {})


def teacher_files(args: Any) -> dict[str, Any]:
    """Those of `teacher_arguments` with which a configuration and a tokenizer are found."""
    arguments = teacher_arguments(args)
    return {"trust_remote_code": arguments["trust_remote_code"]} | of_files(arguments)


def load_partners(
    teachers: list[str | PreTrainedModel], args: Any, defaults: dict[str, Any] | None = None
) -> list[PreTrainedModel]:
    """
    Load the teachers that are names, freeze all of them, and switch them to evaluation mode.

    They are loaded with `defaults` unless `teacher_model_init_kwargs` says otherwise, or a teacher has no such
    attention implementation. Without, the checkpoint decides the dtype and, in a single process, TRL the device.
    """
    placement = {"device_map": None} if args.distributed_state.distributed_type != "NO" else {}
    arguments = {"dtype": None} | placement | (defaults or {}) | teacher_arguments(args)
    partners = []
    for teacher in teachers:
        partner = teacher
        if isinstance(teacher, str):
            partner = load_frozen(teacher, "teacher_model", **_supported(teacher, arguments, args))
        check_partner_model(partner, "teacher_model")
        for adapter in (getattr(partner, "peft_config", None) or {}).values():
            check_adapter(adapter, "teacher_model")
        partners.append(partner.requires_grad_(False).eval())
    return partners


def _supported(teacher: str, arguments: dict[str, Any], args: Any) -> dict[str, Any]:
    """The arguments without the student's attention implementation, where a teacher does not have it."""
    attention = arguments.get("attn_implementation")
    if attention is None or "attn_implementation" in (args.teacher_model_init_kwargs or {}):
        return arguments
    if supports_attention(find_config(teacher, "teacher_model", **teacher_files(args)), attention):
        return arguments
    return {name: value for name, value in arguments.items() if name != "attn_implementation"}


def check_text_only(is_vision_language: bool, off: str) -> None:
    """Refuse vision-language students; the setting `off` leaves the partner out."""
    if is_vision_language:
        raise UnsupportedError(
            "Vision-language students cannot be blended: the partner would need the image features at every decoding "
            f"step. Set {off}, or train the text model."
        )


def adapters_of(model: Any, peft_config: Any, args: Any) -> list[Any]:
    """Configurations of the adapters that a student will have."""
    adapters = [peft_config] if peft_config is not None else []
    if not isinstance(model, str) and is_peft_model(model):
        adapters += list(model.peft_config.values())
    named = student_adapter(model, args)
    if named is not None and peft_config is not None:
        raise ConfigError(
            f"`model={model!r}` is an adapter already, and `peft_config` would put another one on it. Drop "
            "`peft_config` to go on training this one, or merge it into its base first (`merge_and_unload`)."
        )
    if named is not None:
        adapters.append(named.peft_config)
    return adapters


def check_adapters(model: Any, teachers: list, peft_config: Any, args: Any, off: str | None = None) -> None:
    """Refuse adapters that the fused head would ignore, and a missing teacher without adapters."""
    adapters = adapters_of(model, peft_config, args)
    if not teachers and not adapters:
        raise ConfigError(
            "`teacher_model=None` means the base of a PEFT student, but there is no `peft_config` and `model` is not "
            f"a PEFT model. Pass `teacher_model`, or `peft_config`{f', or set {off}' if off else ''}."
        )
    check_student_adapters(model, adapters, args)


def has_new_adapter(model: Any, peft_config: Any) -> bool:
    """Whether the student starts as the base of its adapter. That is never said of an adapter in files."""
    if peft_config is not None:
        initial = {value for name, value in vars(peft_config).items() if re.fullmatch(r"init_(\w+_)?weights", name)}
        return False not in initial
    if isinstance(model, str) or not is_peft_model(model):
        return False
    factors = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    return bool(factors) and not any(factor.any() for factor in factors)


@torch.no_grad()
def check_starts_as_base(student: Any, needs: str) -> None:
    """
    Refuse a student whose adapters already change what it says: some start with weights of their own, and modules or
    magnitudes may have been trained beside them.
    """
    row = torch.arange(min(vocabulary_rows(student), 16), device=student.device)[None]
    with evaluation_mode(student):
        own = student(input_ids=row).logits.float()
    with evaluation_mode(student, disable_adapters=True):
        base = student(input_ids=row).logits.float()
    gap, rounding = (own - base).abs().max().item(), 10 * torch.finfo(student.dtype).eps * base.abs().max().item()
    if not gap <= rounding:
        raise UnsupportedError(
            f"{needs}, which is the base with the adapters disabled, but with them a logit differs by {gap:.2g}. "
            "Merge them into the base (`merge_and_unload`), and train a new adapter on that."
        )


def check_adapter_has_moved(model: Any, peft_config: Any) -> None:
    """Refuse the student's own base as the target of a loss where the student starts as that base."""
    if has_new_adapter(model, peft_config):
        raise ConfigError(
            "`teacher_model=None` means the student's own base, from which a new adapter does not differ: the loss is "
            "0 and nothing is trained. Pass `teacher_model`, or a PEFT model whose adapter has been trained."
        )


def check_base_as_reference(model: Any, dist: Any, args: Any) -> None:
    """Refuse `teacher_model=None` where the student's weights cannot serve as a partner while it decodes."""
    check_adapters_can_be_disabled(model)
    if dist.is_fsdp:
        raise UnsupportedError(
            "`teacher_model=None` reads the reference from the student, which FSDP shards: a rank whose sequences "
            "are finished would leave the others waiting for its shards. Pass the base model as `teacher_model`."
        )
    if dist.is_zero3 and not args.ds3_gather_for_generation:
        raise UnsupportedError(
            "`teacher_model=None` with ZeRO-3 decodes from gathered weights. Set `ds3_gather_for_generation=True`, or "
            "pass the base model as `teacher_model`."
        )


def prepare_partner(partner: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """Place a partner beside the student, in full on every process, unless its own `device_map` says where it goes."""
    # `device_placement`: under FSDP, `prepare_model` otherwise leaves the model where it is
    placed = getattr(partner, "hf_device_map", None) is None
    return accelerator.prepare_model(partner, device_placement=placed, evaluation_mode=True)


def token_ids_without_partner(student: PreTrainedModel, partners: list[PreTrainedModel]) -> list[int]:
    """Padding rows of the student's vocabulary that some partner does not have."""
    sizes = [vocabulary_rows(partner) for partner in partners]
    return list(range(min(sizes), vocabulary_rows(student))) if sizes else []


def student_rows(model: str | PreTrainedModel, args: Any) -> int:
    """Vocabulary rows of the student, by its configuration where it is not loaded."""
    return _rows(model, find_config(model, "model", **_of_student(args)))


def _rows(model: str | PreTrainedModel, config: Any) -> int:
    """Vocabulary rows of a model, by its configuration where it is not loaded."""
    return vocabulary_rows(config if isinstance(model, str) else model)

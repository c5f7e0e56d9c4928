"""`blended_generation`: a context in which a model's own `generate` samples from a blend with a teacher."""

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode

from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.generation.partner import PartnerDecoder
from trl_blend.generation.processor import BlendLogitsProcessor
from trl_blend.generation.recording import RolloutRecord
from trl_blend.generation.rules import BlendRule
from trl_blend.generation.settings import FORBIDS, active_settings
from trl_blend.models.wrappers import adapter_layers, check_adapters_can_be_disabled, innermost_model
from trl_blend.ops.vocab import EosMap


_GENERATE_SIGNATURE = inspect.signature(GenerationMixin.generate)
# Tensors that the partners get too, or that do not concern them; any other would reach the student alone
_SHARED_TENSORS = frozenset({"input_ids", "attention_mask", "negative_prompt_ids", "negative_prompt_attention_mask"})


@dataclass
class BlendSession:
    """
    What [`blended_generation`] yields.

    Args:
        records (`list[RolloutRecord]`):
            One record per finished `generate` call, in order; empty with `record=False`.
    """

    records: list[RolloutRecord] = field(default_factory=list)


@contextmanager
def blended_generation(
    model: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | None,
    rule: BlendRule,
    *,
    eos: EosMap | None = None,
    vocab_size: int | None = None,
    record: bool = False,
) -> Iterator[BlendSession]:
    """
    Let `model.generate` sample from `rule` applied to `model` and `teacher`, for the length of a `with` block.

    Every setting of `generate` keeps its meaning: sampling or greedy, temperature, top-k, top-p,
    `num_return_sequences`, stopping criteria, streamers, static caches, the caller's own logits processors.
    Temperature, truncation and the caller's processors apply to the blend; `repetition_penalty` and other penalties
    apply to the student before it; a token that `generate` forbids (`min_new_tokens`, `bad_words_ids`, ...) stays
    forbidden. Note that `generate` truncates to `top_k=50` unless told otherwise: pass `top_k=0` to sample from the
    rule's policy itself.

    The partners see the prompt through the `attention_mask` given to `generate`. Without one they use the mask that
    `generate` itself infers: zeros at pad tokens if the prompt has any and pad differs from EOS, otherwise all ones.

    Both `model.generate` on a PEFT model and `generate` of the model inside it blend: the hook is an instance
    attribute on the innermost model, and is removed on leaving the block, also by an exception. A `generate` call that
    raises leaves no record and no state. Deliberately left out: beam search, assisted and custom decoding,
    `inputs_embeds` prompts, multimodal inputs, prompts continued from a cache.

    Args:
        model (`torch.nn.Module`):
            The student: a Hugging Face causal language model or a PEFT model of one, unwrapped.
        teacher (`torch.nn.Module`, `Sequence[torch.nn.Module]` or `None`):
            Frozen partner or partners with the student's tokenizer. `None`: the student's own base model, that is
            `model` with its adapters disabled during the partner's forward passes only; no weights are copied.
        rule ([`BlendRule`]):
            What to sample from, such as `LogitMixing(0.3)`.
        eos ([`~trl_blend.ops.EosMap`], *optional*):
            End-of-sequence tokens that are merged into the student's before the rule, for models of one family that
            stop with different tokens.
        vocab_size (`int`, *optional*):
            Ids below it are tokens, [`~trl_blend.models.limits.num_token_ids`] of the tokenizer; rows that only pad a
            model's vocabulary are not drawn then. All rows by default.
        record (`bool`, *optional*, defaults to `False`):
            Whether to record log-probabilities and statistics of every rollout.

    Yields:
        [`BlendSession`]: Holds the records.

    Raises:
        [`~trl_blend.errors.UnsupportedError`]: If `model` is already inside such a block; if a model is not a
            decoder-only Hugging Face model; if `teacher` is `None` and the base cannot be recovered; and, from
            `generate`, for what is left out above.
        [`~trl_blend.errors.ConfigError`]: If `teacher` is an empty sequence or `rule` is not callable.

    Example:

    ```python
    with blended_generation(model, teacher, LogitMixing(0.3), record=True) as session:
        sequences = model.generate(**inputs, do_sample=True, temperature=0.7, max_new_tokens=64)
    behavior_logps = session.records[0].behavior_logps
    ```
    """
    if not callable(rule):
        raise ConfigError(f"`rule` is {rule!r}. Pass a blend rule, such as `LogitMixing(0.3)`.")
    student: Any = innermost_model(model, "model")
    if isinstance(vars(student).get("generate"), _BlendedGenerate):
        raise UnsupportedError(
            f"`model` ({type(student).__name__}) is already inside a `blended_generation` block, and two blends of "
            "one model cannot be nested. Leave the outer block first, or pass several teachers to one block."
        )
    partners = _resolve_partners(model, student, teacher)
    session = BlendSession()
    previous = {name: vars(student)[name] for name in ("generate", "generate_batch") if name in vars(student)}
    student.generate = _BlendedGenerate(
        student, partners, teacher is None, rule, eos, vocab_size, session if record else None
    )
    student.generate_batch = _refuse_generate_batch
    try:
        yield session
    finally:
        for name in ("generate", "generate_batch"):
            delattr(student, name)
        vars(student).update(previous)


def _resolve_partners(
    model: nn.Module, student: GenerationMixin, teacher: nn.Module | Sequence[nn.Module] | None
) -> list[GenerationMixin]:
    if teacher is None:
        check_adapters_can_be_disabled(model)
        return [student]
    teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    if not teachers:
        raise ConfigError(
            "`teacher` is an empty sequence. Pass at least one model, or None for the student's own base."
        )
    partners = [innermost_model(one, "teacher") for one in teachers]
    if any(partner is student for partner in partners) and adapter_layers(model):
        raise UnsupportedError(
            "`teacher` is the model that carries `model`'s own adapters, so it equals the student. Pass "
            "`teacher=None` to blend with the base model, adapters disabled."
        )
    return partners


class _BlendedGenerate:
    """Stands in for a model's `generate`: adds the processor, calls the original, closes the record."""

    def __init__(
        self,
        student: Any,
        partners: Sequence[GenerationMixin],
        disable_adapters: bool,
        rule: BlendRule,
        eos: EosMap | None,
        vocab_size: int | None,
        session: BlendSession | None,
    ) -> None:
        functools.update_wrapper(self, student.generate)
        self._original = student.generate
        self._student = student
        self._partners = partners
        self._disable_adapters = disable_adapters
        self._rule = rule
        self._eos = eos
        self._vocab_size = vocab_size
        self._session = session

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(_GENERATE_SIGNATURE.bind(self._student, *args, **kwargs).arguments)
        del arguments["self"]
        arguments.update(arguments.pop("kwargs", {}))
        mask, processor = self._prepare(arguments)
        # First among the caller's processors, so that those act on the blend
        arguments["logits_processor"] = LogitsProcessorList([processor, *(arguments.get("logits_processor") or [])])
        output = self._original(**arguments)
        if self._session is not None:
            sequences = output if isinstance(output, Tensor) else output.sequences
            self._session.records.append(processor.finish(sequences, mask.shape[1]))
        return output

    def _prepare(self, arguments: dict[str, Any]) -> tuple[Tensor, BlendLogitsProcessor]:
        named = set(_GENERATE_SIGNATURE.parameters) | {"tokenizer", "assistant_tokenizer", "trust_remote_code"}
        settings, model_kwargs = self._student._prepare_generation_config(
            arguments.get("generation_config"), **{k: v for k, v in arguments.items() if k not in named}
        )
        _check_decoding(settings, arguments)
        _check_inputs(model_kwargs)
        mask = self._prompt_mask(arguments, settings, model_kwargs)
        forbids = arguments.get("prefix_allowed_tokens_fn") is not None
        processor = BlendLogitsProcessor(
            self._rule,
            [PartnerDecoder(model, mask, disable_adapters=self._disable_adapters) for model in self._partners],
            temperature=settings.temperature if settings.do_sample and settings.temperature is not None else 1.0,
            keep_forbidden=forbids or bool(active_settings(vars(settings), FORBIDS)),
            eos=self._eos,
            vocab_size=self._vocab_size,
            record=self._session is not None,
        )
        return mask, processor

    @torch.no_grad()
    def _prompt_mask(
        self, arguments: dict[str, Any], settings: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """Attention mask of the prompts, of shape `(B * num_return_sequences, S)`."""
        input_ids = arguments.get("inputs")
        input_ids = model_kwargs.get("input_ids") if input_ids is None else input_ids
        if input_ids is None or input_ids.dim() != 2:
            shape = None if input_ids is None else tuple(input_ids.shape)
            raise UnsupportedError(
                f"`input_ids` has shape {shape}. Blended generation needs token prompts of shape (batch, length)."
            )
        mask = model_kwargs.get("attention_mask")
        if mask is None:
            # What `generate` does for a missing mask; the flag only keeps it from warning a second time
            self._student._prepare_special_tokens(settings, kwargs_has_attention_mask=True, device=input_ids.device)
            mask = self._student._prepare_attention_mask_for_generation(input_ids, settings, {})
        if mask.shape != input_ids.shape:
            raise UnsupportedError(
                f"`attention_mask` has shape {tuple(mask.shape)} and `input_ids` {tuple(input_ids.shape)}. Pass whole "
                "prompts with a mask of the same shape."
            )
        return mask.repeat_interleave(settings.num_return_sequences or 1, dim=0)


def _check_decoding(settings: GenerationConfig, arguments: dict[str, Any]) -> None:
    mode = settings.get_generation_mode(arguments.get("assistant_model"))
    remedy = (
        "Blending supports sampling and greedy search (`num_beams=1`), where each partner's cache only ever grows."
    )
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise UnsupportedError(
            f"`generate` was asked for {mode.value.replace('_', ' ')} (`num_beams={settings.num_beams}`). {remedy}"
        )
    if arguments.get("custom_generate") is not None:
        raise UnsupportedError(f"`custom_generate` is {arguments['custom_generate']!r}. {remedy}")
    if settings.cache_implementation == "paged":
        raise UnsupportedError(f"`cache_implementation` is 'paged' (continuous batching). {remedy}")


def _check_inputs(model_kwargs: dict[str, Any]) -> None:
    if model_kwargs.get("inputs_embeds") is not None:
        raise UnsupportedError(
            "`inputs_embeds` is a prompt in the student's own embedding space, which the teacher cannot read. Pass "
            "`input_ids`."
        )
    for name, value in model_kwargs.items():
        # By its type: the name of the argument changes with the model and with the release of transformers
        if isinstance(value, Cache) and value.get_seq_length() > 0:
            raise UnsupportedError(
                f"`{name}` already holds {value.get_seq_length()} positions that the teacher has not seen. Pass the "
                "whole prompt and no filled cache."
            )
        if isinstance(value, Tensor) and name not in _SHARED_TENSORS:
            raise UnsupportedError(
                f"`{name}` (a tensor of shape {tuple(value.shape)}) would reach the student but not the teacher. "
                "Blended generation takes `input_ids` and `attention_mask` only."
            )


def _refuse_generate_batch(*args: Any, **kwargs: Any) -> Any:
    raise UnsupportedError(
        "`generate_batch` (continuous batching) was called inside a `blended_generation` block, where it would sample "
        "from the student alone. Use `generate`."
    )

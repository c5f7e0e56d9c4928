"""
The engine of vLLM that draws blended rollouts: TRL's own, which holds the teachers too and is told what to draw from.

Shared by the trainers. A trainer builds itself inside [`blended_engine`], hands its loaded teachers over, and sets
`blend` before it generates.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from trl.generation.vllm_generation import VLLMGeneration

from trl_blend import _compat
from trl_blend.errors import ConfigError, EngineError, TrlBlendError, UnsupportedError
from trl_blend.generation.rules import BlendRule
from trl_blend.generation.settings import without_sampling
from trl_blend.models.loading import base_of_adapter
from trl_blend.serving.arguments import check_version, engine_arguments, num_experts
from trl_blend.serving.blend import Blend, Partner
from trl_blend.serving.drafts import DraftChoice, schedule_drafts
from trl_blend.serving.statistics import Statistic
from trl_blend.trainers import _partners


# Of `teacher_model_init_kwargs`: they say which weights are meant, in a way that an engine is not told
_OTHER_WEIGHTS = ("quantization_config", "subfolder", "gguf_file", "variant")
_NOT_IN_ENGINE = "With `use_vllm=True` the engine loads the teacher from its files"


class BlendedVLLMGeneration(VLLMGeneration):
    """
    TRL's engine, which draws from a blend of the student with teachers that it holds beside it.

    Weights that the trainer sends reach the student only; a sleeping engine keeps the teachers.

    Args:
        *args, **kwargs:
            Of [`~trl.generation.vllm_generation.VLLMGeneration`].
        partners (`Sequence[Partner | None]`):
            Teachers of a colocated engine. `None`: the base of the student, which has adapters. A server holds its
            own, and their number is compared.
        blend ([`~trl_blend.serving.blend.Blend`]):
            What to draw from at first.
        partners_stop (`bool`):
            Whether the teachers leave the rollouts at some step. CUDA graphs are then captured in pieces, which
            leave them out; a graph of the whole model would run them.
        draft_tokens (`int` or `str`, *optional*):
            Tokens that the student drafts in a colocated engine, none while no teacher takes part; `"auto"`: chosen
            before each generation. A server may have been started with drafts.

    Attributes:
        blend ([`~trl_blend.serving.blend.Blend`]): What the next call of `generate` draws from.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a server holds another number of teachers, blends nothing, or returns
            log-probabilities of another distribution than the one that it draws from.
        [`~trl_blend.errors.UnsupportedError`]: If vLLM could not read the weights of this student.
    """

    def __init__(
        self,
        *args: Any,
        partners: Sequence[Partner | None],
        blend: Blend,
        partners_stop: bool,
        draft_tokens: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        self._partners, self._partners_stop = partners, partners_stop
        self._drafts = None if draft_tokens is None else DraftChoice(draft_tokens)
        self.blend = self._told = blend
        self._unsent: dict[int, tuple[PreTrainedModel, bool]] = {}
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        if self.mode == "server":
            super()._init_vllm()
            self._check_server()
            return
        partners = [Partner(self.model.name_or_path) if one is None else one for one in self._partners]
        numbers = () if self._drafts is None else self._drafts.numbers
        drafts = {"draft_model": self.model.name_or_path, "draft_tokens": numbers}
        arguments = engine_arguments(partners, self.blend, **drafts)
        if not self.enable_sleep_mode:
            del arguments["sleep_preserve_parameter_names"]
        if self._partners_stop:
            arguments["compilation_config"] = {"cudagraph_mode": "PIECEWISE"}
        if num_experts(self.model.config) and torch.cuda.is_available():
            arguments["moe_backend"] = "triton"  # others shuffle the weights, and new ones come as they are
        try:
            with _compat.engine_arguments(**arguments):
                super()._init_vllm()
        except (ValueError, RuntimeError) as error:
            if isinstance(error, TrlBlendError) or "memory" not in str(error):
                raise
            raise EngineError(
                f"The engine has not enough memory for the weights and caches of {len(partners) + 1} models: {error} "
                "Raise `vllm_gpu_memory_utilization` (vLLM's `gpu_memory_utilization`), or lower "
                "`vllm_max_model_length`."
            ) from error
        self._call("check_takes_weights", "student")
        if self._drafts is not None:
            self._call("lead_drafts")
            self._drafts.student_share = self._call("student_share")

    def _check_server(self) -> None:
        found = self._call("describe_blend")
        if self.accelerator.is_main_process and len(found["partners"]) != len(self._partners):
            raise ConfigError(
                f"The server holds {len(found['partners'])} teacher(s), {found['partners']}, but the trainer has "
                f"{len(self._partners)}. Serve the same ones."
            )
        if self.accelerator.is_main_process:
            mode = self.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
            if mode != "processed_logprobs":
                raise ConfigError(
                    f"The vLLM server at {self.vllm_client.base_url} was started with `--logprobs-mode {mode}`: its "
                    "log-probabilities are not those of the blend that it draws from. Start it with `--logprobs-mode "
                    "processed_logprobs`."
                )
        self._call("lead_drafts")  # which it has if it was started with `--speculative-config`
        self._tell()

    def send_partners(self, partners: Mapping[int, tuple[PreTrainedModel, bool]]) -> None:
        """
        Send teachers that are in memory to a colocated engine, together with the next weights of the student.

        Args:
            partners (`Mapping[int, tuple[PreTrainedModel, bool]]`):
                By index, a model and whether its adapters are part of it.

        Raises:
            [`~trl_blend.errors.UnsupportedError`]: If vLLM could not read them.
        """
        self._unsent = dict(partners) if self.mode == "colocate" else {}
        for index, (model, adapters) in self._unsent.items():
            if adapters and is_peft_model(model):
                _check_stays_tied(model)
            self._call("check_takes_weights", f"partner_{index}")

    def sync_weights(self) -> None:
        """Send the weights of the student, see [`~trl.generation.vllm_generation.VLLMGeneration.sync_weights`]."""
        super().sync_weights()
        while self._unsent:
            index, (model, adapters) = self._unsent.popitem()
            for weight in _parameters(model, adapters, self._dist.gather_params):
                self.llm.apply_model(partial(_load_partner, index=index, weight=weight))

    def generate(self, *args: Any, **kwargs: Any) -> tuple:
        """Draw from `blend`, see [`~trl.generation.vllm_generation.VLLMGeneration.generate`]."""
        if self.mode == "colocate" and self.enable_sleep_mode and self._llm_weights_sleeping:
            self.sync_weights()  # an engine that sleeps has no memory to be told anything
        try:
            if self.blend != self._told:
                self._tell()
            return super().generate(*args, **kwargs)
        except Exception as error:
            # No connection to a server, or vLLM's word for an engine that is gone
            gone = isinstance(error, OSError) or type(error).__name__ == "EngineDeadError"
            if isinstance(error, TrlBlendError) or not gone:
                raise
            where = f"server at {self.vllm_client.base_url}" if self.mode == "server" else "engine"
            raise EngineError(
                f"The vLLM {where} draws no more rollouts: {error} Start it again, and resume from the last "
                "checkpoint (`resume_from_checkpoint=True`)."
            ) from error

    def set_rule(self, rule: BlendRule | None, stop_token_ids: Sequence[int], **settings: Any) -> None:
        """
        Say what the next call of `generate` draws from, at the temperature that it samples at.

        Args:
            rule ([`~trl_blend.generation.rules.BlendRule`], *optional*):
                `None`: the student alone.
            stop_token_ids (`Sequence[int]`):
                Tokens that end a completion.
            **settings:
                Further fields of [`~trl_blend.serving.blend.Blend`].
        """
        temperature = self.generation_kwargs.get("temperature", self.temperature) or 1.0
        drafts = None if self._drafts is None else self._drafts(rule)
        self.blend = Blend(rule, temperature, stop_token_ids=tuple(stop_token_ids), draft_tokens=drafts, **settings)

    def _tell(self) -> None:
        teachers_return = self._told.rule is None and self.blend.rule is not None
        if teachers_return or (self._told.draft_tokens == 0 and self.blend.draft_tokens):
            self._reset_prefix_cache()  # they, or the draft model, have not seen what is in it
        self._call("set_blend", self.blend.to_dict())
        if self.blend.draft_tokens is not None:
            schedule_drafts(self.llm, self.blend.draft_tokens)
        self._told = self.blend

    def _reset_prefix_cache(self) -> None:
        if self.mode == "colocate":
            self.llm.reset_prefix_cache()
        elif self.accelerator.is_main_process:
            self.vllm_client.reset_prefix_cache()

    def take_statistics(self) -> dict[str, Statistic]:
        """
        What the last blend has drawn since the last call, see [`~trl_blend.serving.statistics.row_statistics`]. Every
        rank of an engine must call it; what a server has drawn is that of the main process, and nothing on the others.
        """
        if self.mode == "colocate":
            taken = {name: Statistic(*sums) for name, sums in self._call("take_blend_statistics").items()}
            if self._drafts is not None:
                accepted = [taken.get("draft_acceptance")]
                if self.tensor_parallel_size > 1:  # the same on the ranks that share an engine
                    torch.distributed.broadcast_object_list(accepted, group=self.tp_group, group_src=0)
                self._drafts.observe(self._told.rule, *accepted)
            return taken
        (sums,) = broadcast_object_list([self._call("take_blend_statistics")])
        own = self.accelerator.is_main_process
        return {name: Statistic(*values) if own else Statistic(0.0, 0, 0.0) for name, values in sums.items()}

    def _call(self, method: str, *args: Any) -> Any:
        """Result of a method of [`~trl_blend.serving.worker.BlendWorkerExtension`] on the first worker."""
        if self.mode == "colocate":
            return self.llm.collective_rpc(method, args=args)[0]
        if not self.accelerator.is_main_process:
            return None
        try:
            return _compat.call_server(self.vllm_client, method, args)[0]
        except Exception as error:
            raise EngineError(
                f"The vLLM server at {self.vllm_client.base_url} did not answer `{method}`. Serve an exported mixed "
                f"policy with `VLLM_SERVER_DEV_MODE=1`, as the trainer's page says. {error}"
            ) from error


def _load_partner(model: Any, index: int, weight: tuple[str, Tensor]) -> None:
    model.load_partner_weights(index, [weight])


def _check_stays_tied(model: Any) -> None:
    """Refuse an adapter that has trained one matrix of its base as two, which an engine would read as one."""
    from peft.utils import ModulesToSaveWrapper

    base = model.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    trained = any(isinstance(end, ModulesToSaveWrapper) for end in ends)
    stays_tied = getattr(model.active_peft_config, "ensure_weight_tying", False)
    if trained and base.config.tie_word_embeddings and not stays_tied:
        raise UnsupportedError(
            "`teacher_model` is an adapter with embeddings or an output layer of its own, on a base where both are "
            "one matrix, as a vLLM engine would keep them. Merge it (`merge_and_unload`), save it and pass the "
            "folder, or set `use_vllm=False`."
        )


@torch.no_grad()
def _parameters(model: Any, adapters: bool, gather: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights of a model under the names of its checkpoint, one by one, with its adapters merged or without them."""
    if adapters and is_peft_model(model):
        model = copy.deepcopy(model).merge_and_unload()
    if not is_peft_model(model):
        yield from ((name, parameter.data) for name, parameter in model.named_parameters())
        return
    parameters = dict(model.named_parameters())
    with gather(list(parameters.values())):  # a student may be sharded, no teacher is
        for name, parameter in parameters.items():
            if model.prefix not in name and "modules_to_save" not in name:
                name = name.removeprefix("base_model.model.").replace(".base_layer", "")
                yield name.replace(".original_module", ""), parameter.data


def blended_engine(
    args: Any,
    teachers: Sequence[str | PreTrainedModel],
    rule: BlendRule | None,
    *,
    blends: bool,
    partners_stop: bool,
) -> AbstractContextManager[None]:
    """
    Let a trainer that is built inside the context draw with a [`BlendedVLLMGeneration`], if it uses vLLM and blends.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration of the trainer.
        teachers (`Sequence[str | PreTrainedModel]`):
            Its teachers as they were given; none for the student's own base.
        rule ([`~trl_blend.generation.rules.BlendRule`], *optional*):
            Rule of the first step.
        blends (`bool`):
            Whether any step uses a teacher.
        partners_stop (`bool`):
            See [`BlendedVLLMGeneration`].
    """
    if not (args.use_vllm and blends):
        return nullcontext()
    temperature = (args.generation_kwargs or {}).get("temperature", args.temperature) or 1.0
    blend = Blend(rule, temperature, records=True)
    build = partial(
        BlendedVLLMGeneration,
        partners=partners_of(teachers, args),
        blend=blend,
        partners_stop=partners_stop,
        draft_tokens=args.vllm_draft_tokens,
    )
    return _compat.vllm_generation(build)


def greedy(engine: VLLMGeneration) -> AbstractContextManager[Any]:
    """Let an engine, TRL's own or one that blends, decode greedily inside the context."""
    plain = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return patch.multiple(engine, **plain, generation_kwargs=without_sampling(engine.generation_kwargs))


def of_trainer(trainer: Any) -> BlendedVLLMGeneration | None:
    """The engine of vLLM that draws a trainer's blended rollouts; `None` where transformers does."""
    engine = getattr(trainer, "vllm_generation", None)
    return engine if isinstance(engine, BlendedVLLMGeneration) else None


def partners_of(teachers: Sequence[str | PreTrainedModel], args: Any) -> list[Partner | None]:
    """
    The teachers as an engine is told of them; `[None]`, the student's base, where there are none.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If vLLM is not installed.
        [`~trl_blend.errors.UnsupportedError`]: If an engine cannot load a teacher, or vLLM is too old.
    """
    check_version()
    settings = dict(args.teacher_model_init_kwargs or {})
    for name in _OTHER_WEIGHTS:
        if settings.get(name) is not None:
            raise UnsupportedError(
                f"`teacher_model_init_kwargs` has `{name}={settings[name]!r}`. {_NOT_IN_ENGINE}, which this does not "
                "reach. Name a folder or repository that holds the weights as they are to be used, or set "
                "`use_vllm=False`."
            )
    if args.vllm_mode == "server":
        return [None] * max(len(teachers), 1)
    if not teachers:
        return [None]
    dtype = settings.get("dtype")
    dtype = str(dtype).removeprefix("torch.") if dtype not in (None, "auto") else None
    return [_partner(teacher, _partners.teacher_files(args), dtype) for teacher in teachers]


def _partner(teacher: str | PreTrainedModel, files: dict[str, Any], dtype: str | None) -> Partner:
    trust = files["trust_remote_code"]
    if isinstance(teacher, str):
        name, options = base_of_adapter(teacher, "teacher_model", **files)
        return Partner(name, options.get("revision"), dtype, trust)
    if getattr(teacher, "is_quantized", False):
        raise UnsupportedError(
            f"`teacher_model` is a quantized model in memory. {_NOT_IN_ENGINE}. Pass the name of a quantized "
            "checkpoint, or set `use_vllm=False`."
        )
    if not teacher.name_or_path:
        raise UnsupportedError(
            f"`teacher_model` was built in memory. {_NOT_IN_ENGINE}. Save it with its tokenizer and pass the folder, "
            "or set `use_vllm=False`."
        )
    return Partner(teacher.name_or_path, None, dtype, trust)


def in_memory(
    student: PreTrainedModel, given: Sequence[str | PreTrainedModel], loaded: Sequence[PreTrainedModel]
) -> dict[int, tuple[PreTrainedModel, bool]]:
    """The teachers whose weights are not, or not all, in the files that an engine loads, see `send_partners`."""
    if not given:
        return {0: (student, False)}
    pairs = enumerate(zip(given, loaded, strict=True))
    return {index: (model, True) for index, (one, model) in pairs if not isinstance(one, str) or is_peft_model(model)}

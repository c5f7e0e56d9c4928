"""
Every private or unstable symbol of TRL, transformers and accelerate that this package touches, one shim each, with the
upstream reference and the condition under which the shim goes. `tests/contract/` freezes what is assumed here.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import transformers.trainer as hf_trainer
import trl.generation.vllm_generation as trl_vllm
import trl.trainer.distillation_trainer as trl_distillation
import trl.trainer.grpo_trainer as trl_grpo
import trl.trainer.utils as trl_utils
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed

from trl_blend.ops.head.layer import LMHead
from trl_blend.ops.reduction import masked_sum


FusedLogProbs = Callable[[LMHead, torch.Tensor, float, tuple[str, ...]], tuple[torch.Tensor | None, ...] | None]
"""
`(head, targets, temperature, outputs) -> (log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1)`, or `None` for
TRL's own.
"""


@contextmanager
def fused_log_prob_function(function: FusedLogProbs) -> Iterator[None]:
    """
    Let every `model(..., labels=labels, fused_lm_head=True)` inside the context hand its hidden states and LM head to
    `function` instead of TRL's `ChunkedLogProbFunction`. Where it returns `None`, TRL's is computed.

    Upstream: the forward that `trl.trainer.utils.add_fused_lm_head` installs looks up `_ChunkedLogProbFunction` at
    each call. It has already run the backbone, shifted the labels, gathered an FSDP2 or ZeRO-3 head and resolved logit
    scale and soft-capping, so that none of it is repeated here. A head that ZeRO-3 does not manage, that of a teacher,
    it would ask for its shards. Removal: TRL accepts a log-prob function, and skips plain tensors.
    """

    original = trl_utils._ChunkedLogProbFunction

    class Redirected:
        @staticmethod
        def apply(*given):
            hidden, weight, bias, targets, temperature, _, softcap, logit_scale, outputs = given
            result = function(LMHead(hidden, weight, bias, logit_scale, softcap), targets, temperature, outputs)
            return original.apply(*given) if result is None else result

    with patch.multiple(trl_utils, _ChunkedLogProbFunction=Redirected, maybe_gather_lm_head_ctx=gather_lm_head):
        yield


class DivergenceInputs(NamedTuple):
    """
    What TRL's distillation loss compares: both output layers at the completion positions of a micro-batch.

    Args:
        student, teacher ([`~trl_blend.ops.LMHead`]):
            Output layers with hidden states of shape `(B * T, H)`.
        mask (`torch.Tensor` of shape `(B, T)`):
            Nonzero where a token counts.
        temperature (`float`):
            Softmax temperature of both.
    """

    student: LMHead
    teacher: LMHead
    mask: torch.Tensor
    temperature: float


DivergenceResult = tuple[torch.Tensor, torch.Tensor] | None
"""Per-token loss and student entropy, both `(B * T,)`; `None` for TRL's own divergence."""


@contextmanager
def divergence_function(function: Callable[[DivergenceInputs], DivergenceResult]) -> Iterator[None]:
    """
    Let `DistillationTrainer._compute_loss` inside the context hand both output layers to `function`. Where that
    returns per-token values they replace TRL's divergence, with TRL's reduction; where it returns `None`, TRL's is
    computed.

    Upstream: `_compute_loss` looks up `trl.trainer.distillation_trainer._chunked_divergence_loss` at each call, after
    both backbones have run through their wrappers and logit scale and soft-capping are resolved, so that none of it is
    repeated here. Removal: TRL accepts a divergence.
    """
    original = trl_distillation._chunked_divergence_loss

    def redirected(*given, **named):
        def head(role: str, hidden: torch.Tensor, weight: torch.Tensor) -> LMHead:
            weight, bias = plain_tensor(weight, hidden.dtype), named.get(f"{role}_lm_head_bias")
            return LMHead(
                hidden.reshape(-1, hidden.size(-1)),
                weight,
                None if bias is None else plain_tensor(bias, bias.dtype),
                named.get(f"{role}_logit_scale", 1.0),
                named.get(f"{role}_final_logit_softcapping"),
            )

        student_hidden, teacher_hidden, student_weight, teacher_weight, mask, _ = given
        student = head("student", student_hidden, student_weight)
        teacher = head("teacher", teacher_hidden, teacher_weight)
        result = function(DivergenceInputs(student, teacher, mask, named["temperature"]))
        if result is None:
            return original(*given, **named)
        per_token, entropy = result
        count, num_items = (mask != 0).sum(), named["num_items_in_batch"]
        denominator = count.clamp(min=1) if num_items is None else num_items
        return masked_sum(per_token, mask.reshape(-1)) / denominator, entropy.sum(), count

    with patch.object(trl_distillation, "_chunked_divergence_loss", redirected):
        yield


def plain_tensor(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    All of an FSDP2-sharded tensor, in `dtype`, gathered once; any other tensor as it is.

    Upstream: `_chunked_divergence_loss` does the same before it computes. Removal: with [`divergence_function`].
    """
    if isinstance(tensor, torch.distributed.tensor.DTensor):
        return tensor.full_tensor().to(dtype)
    return tensor


@contextmanager
def repeated_prompts(num_rollouts: int) -> Iterator[None]:
    """
    Let the samplers that `DistillationTrainer` builds inside the context draw every prompt `num_rollouts` times, in
    generation batches of the same number of rows.

    Upstream: `DistillationTrainer.get_train_dataloader` and `_get_train_sampler` pass `mini_repeat_count=1` to
    `RepeatSampler` and `repeat_iterable_dataset`. Removal: TRL's distillation has `num_generations`.
    """

    def repeated(build: Callable) -> Callable:
        def wrapper(*args, mini_repeat_count, batch_size, **kwargs):
            return build(*args, mini_repeat_count=num_rollouts, batch_size=batch_size // num_rollouts, **kwargs)

        return wrapper

    with (
        patch.object(trl_distillation, "RepeatSampler", repeated(trl_distillation.RepeatSampler)),
        patch.object(trl_distillation, "repeat_iterable_dataset", repeated(trl_distillation.repeat_iterable_dataset)),
    ):
        yield


def add_fused_lm_head(model: PreTrainedModel, temperature: float, cast_lm_head_to_fp32: bool) -> None:
    """Upstream: `trl.trainer.utils.add_fused_lm_head`. Removal: it becomes public."""
    with logit_fields(model.config):
        trl_utils.add_fused_lm_head(model, temperature=temperature, cast_lm_head_to_fp32=cast_lm_head_to_fp32)


@contextmanager
def logit_fields(*configs: PretrainedConfig) -> Iterator[None]:
    """
    Let TRL find the scale and soft-capping of logits inside the context where an architecture has them under names of
    its own.

    Upstream: `trl.trainer.utils.add_fused_lm_head` and `DistillationTrainer._compute_loss` read
    `final_logit_softcapping`, `logit_scale`, `output_multiplier`, `lm_head_multiplier` and `logits_scaling`. Removal:
    they read these too, and not the `logit_scale` of MPT, which its model does not apply.
    """
    with ExitStack() as stack:
        for config in {id(config): config.get_text_config() for config in configs}.values():
            fields: dict[str, float] = {}
            caps = [getattr(config, name, None) for name in ("logits_soft_cap", "output_logit_soft_cap")]
            for cap in caps:
                if cap is not None:
                    fields["final_logit_softcapping"] = cap
            divisor = getattr(config, "logits_mup_width_multiplier", None)
            if divisor is not None:
                fields["logit_scale"] = 1 / divisor
            if config.model_type == "mpt":
                fields["logit_scale"] = 1.0
            for name, value in fields.items():
                stack.enter_context(patch.object(config, name, value, create=True))
        yield


_gather_managed = trl_utils.maybe_gather_lm_head_ctx


def gather_lm_head(*parameters: torch.Tensor | None) -> AbstractContextManager[None]:
    """
    Gather the ZeRO-3 shards among `parameters`; tensors that ZeRO-3 does not manage are left alone.

    Upstream: `trl.trainer.utils.maybe_gather_lm_head_ctx`, which assumes that every tensor is managed. Removal: it
    becomes public and skips plain tensors.
    """
    return _gather_managed(*[p for p in parameters if hasattr(p, "ds_status")])


# Called as they are. Upstream: `trl.trainer.utils`. Removal: they become public.
create_model_from_path = trl_utils.create_model_from_path
get_callable_name = trl_utils.get_callable_name
get_config_model_id = trl_utils.get_config_model_id
print_prompt_completions_sample = trl_utils.print_prompt_completions_sample


def load_replicated(model_id: str, **kwargs) -> PreTrainedModel:
    """
    Load a frozen model with all of its weights on every process, also where a sharding backend would split them.

    A partner takes part in decoding, where a rank whose sequences are finished stops calling it: were it sharded, the
    other ranks would wait for that rank for ever.

    Upstream: `transformers` partitions models while loading under ZeRO-3, and under FSDP loads weights on the first
    rank only when `FSDP_CPU_RAM_EFFICIENT_LOADING` is set. `trl.trainer.utils.create_model_from_path` resolves the
    architecture and dtype names. Removal: a public way to opt out of both while loading.
    """
    with (
        patch.object(hf_deepspeed, "_hf_deepspeed_config_weak_ref", None),
        patch.dict(os.environ, {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}),
    ):
        return create_model_from_path(model_id, **kwargs)


@contextmanager
def vllm_generation(build: Callable[..., Any]) -> Iterator[None]:
    """
    Let a `GRPOTrainer` or `DistillationTrainer` that is built inside the context make its engine with `build`.

    Upstream: both modules look up `VLLMGeneration` in the constructor. Removal: the trainers accept an engine.
    """
    with patch.object(trl_grpo, "VLLMGeneration", build), patch.object(trl_distillation, "VLLMGeneration", build):
        yield


@contextmanager
def engine_arguments(**arguments: Any) -> Iterator[None]:
    """
    Let `VLLMGeneration._init_vllm` inside the context start its engine with further arguments of `vllm.LLM`.

    Upstream: `_init_vllm` looks up `trl.generation.vllm_generation.LLM` and passes a fixed set. Removal: it passes the
    caller's on.
    """
    with patch.object(trl_vllm, "LLM", functools.partial(trl_vllm.LLM, **arguments)):
        yield


def call_server(client: Any, method: str, args: Sequence[Any]) -> list[Any]:
    """
    Results of a method of every worker of a vLLM server.

    Upstream: `VLLMClient._post`, which retries and reads errors. Removal: `VLLMClient` has a call for
    `/collective_rpc`.
    """
    url = f"{client.base_url}/collective_rpc"
    return client._post(url, json={"method": method, "args": list(args)})["results"]


def card_template(path: str) -> str:
    """
    A trainer's `_template_file` for a template outside TRL.

    Upstream: `trl.trainer.utils.generate_model_card` puts the name behind `trl/templates/`, as text, so the path is
    given relative to that folder. Removal: TRL accepts a path.
    """
    return os.path.relpath(path, str(files("trl") / "templates"))


@contextmanager
def before_upload(folder: Path, prepare: Callable[[], None]) -> Iterator[None]:
    """
    Call `prepare` just before `Trainer._push_from_checkpoint` uploads `folder`.

    Upstream: that method decides whether to push, copies the model's files from the checkpoint to `output_dir` and
    uploads it through `transformers.trainer.hf_api()`, all in one. Removal: a hook between the copy and the upload.
    """
    original = hf_trainer.hf_api

    class Prepared:
        def __getattr__(self, name: str) -> Any:
            return getattr(original(), name)

        def upload_folder(self, *, folder_path: str, **kwargs: Any) -> Any:
            if Path(folder_path) == folder:
                prepare()
            return original().upload_folder(folder_path=folder_path, **kwargs)

    with patch.object(hf_trainer, "hf_api", Prepared):
        yield

"""
Every private or unstable symbol of TRL, transformers and accelerate that this package touches, one shim each, with the
upstream reference and the condition under which the shim goes. `tests/contract/` freezes what is assumed here.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.resources import files
from unittest.mock import patch

import torch
import trl.trainer.utils as trl_utils
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed

from .ops.mixed_head import LMHead


FusedLogProbs = Callable[[LMHead, torch.Tensor, float, tuple[str, ...]], tuple[torch.Tensor | None, ...]]
"""`(head, targets, temperature, outputs) -> (log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1)`."""


@contextmanager
def fused_log_prob_function(function: FusedLogProbs) -> Iterator[None]:
    """
    Let every `model(..., labels=labels, fused_lm_head=True)` inside the context hand its hidden states and LM head to
    `function` instead of TRL's `ChunkedLogProbFunction`.

    Upstream: the forward that `trl.trainer.utils.add_fused_lm_head` installs looks up `_ChunkedLogProbFunction` at
    each call. It has already run the backbone, shifted the labels, gathered an FSDP2 or ZeRO-3 head and resolved logit
    scale and soft-capping, so that none of it is repeated here. Removal: TRL accepts a log-prob function.
    """

    class Redirected:
        @staticmethod
        def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
            head = LMHead(hidden, weight, bias, logit_scale, softcap)
            return function(head, targets, temperature, outputs)

    with patch.object(trl_utils, "_ChunkedLogProbFunction", Redirected):
        yield


def add_fused_lm_head(model: PreTrainedModel, temperature: float, cast_lm_head_to_fp32: bool) -> None:
    """Upstream: `trl.trainer.utils.add_fused_lm_head`. Removal: it becomes public."""
    trl_utils.add_fused_lm_head(model, temperature=temperature, cast_lm_head_to_fp32=cast_lm_head_to_fp32)


def gather_lm_head(*parameters: torch.Tensor | None) -> AbstractContextManager[None]:
    """
    Gather the ZeRO-3 shards among `parameters`; tensors that ZeRO-3 does not manage are left alone.

    Upstream: `trl.trainer.utils.maybe_gather_lm_head_ctx`, which assumes that every tensor is managed. Removal: it
    becomes public and skips plain tensors.
    """
    return trl_utils.maybe_gather_lm_head_ctx(*[p for p in parameters if hasattr(p, "ds_status")])


def get_config_model_id(config: PretrainedConfig) -> str:
    """Upstream: `trl.trainer.utils.get_config_model_id`. Removal: it becomes public."""
    return trl_utils.get_config_model_id(config)


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
        return trl_utils.create_model_from_path(model_id, **kwargs)


def card_template(path: str) -> str:
    """
    A trainer's `_template_file` for a template outside TRL.

    Upstream: `trl.trainer.utils.generate_model_card` puts the name behind `trl/templates/`, as text, so the path is
    given relative to that folder. Removal: TRL accepts a path.
    """
    return os.path.relpath(path, str(files("trl") / "templates"))

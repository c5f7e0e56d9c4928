"""The output layer of a language model: from hidden states to logits."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor


# Called with parameters, it returns a context in which they are whole
GatherParameters: TypeAlias = Callable[..., AbstractContextManager[Any]]


class LMHead(NamedTuple):
    """
    Inputs of one output layer. Its logits are `z = (hidden @ weight.T + bias) * logit_scale`, then, with a softcap,
    `softcap * tanh(z / softcap)`.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Hidden states, one row per scored token.
        weight (`torch.Tensor` of shape `(V, H)`):
            Weight of the output layer, a plain tensor: call `full_tensor()` on a DTensor first.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias of the output layer.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Multiplier of the logits.
        softcap (`float`, *optional*):
            Softcap of the scaled logits (`final_logit_softcapping`).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


def no_gather(*params: Tensor) -> AbstractContextManager[Any]:
    return nullcontext()


def frozen(head: LMHead) -> LMHead:
    # Only a leaf can be a parameter that a gather recognises; it gets no gradient. Anything else is cut off, because
    # autograd would run the graph behind it, with zeros.
    def cut(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_leaf else tensor.detach()

    bias = None if head.bias is None else cut(head.bias)
    return head._replace(hidden=head.hidden.detach(), weight=cut(head.weight), bias=bias)


def projection_dtype(hidden: Tensor) -> torch.dtype:
    device_type = hidden.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype

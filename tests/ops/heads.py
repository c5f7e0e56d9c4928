"""Random output layers, and the log-probabilities of their mixture from the float64 reference."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests import reference
from trl_blend.ops import LMHead


def random_head(
    tokens: int,
    hidden_size: int,
    vocab: int,
    *,
    bias: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    requires_grad: bool = False,
    dtype: torch.dtype = torch.float64,
) -> LMHead:
    """A head whose logits have a standard deviation of about 2, whatever the hidden size."""
    hidden = (torch.randn(tokens, hidden_size) * 2 / hidden_size**0.5).to(dtype)
    weight = torch.randn(vocab, hidden_size).to(dtype)
    head_bias = torch.randn(vocab).to(dtype) if bias else None
    for tensor in (hidden, weight, head_bias):
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    return LMHead(hidden, weight, head_bias, logit_scale, softcap)


def leaves(head: LMHead) -> list[Tensor]:
    return [tensor for tensor in (head.hidden, head.weight, head.bias) if tensor is not None]


def to_double(head: LMHead) -> LMHead:
    """A float64 copy with its own leaves; requires grad where the original does."""
    return head._replace(
        **{
            name: tensor.detach().double().requires_grad_(tensor.requires_grad)
            for name in ("hidden", "weight", "bias")
            if (tensor := getattr(head, name)) is not None
        }
    )


def expected_log_probs(
    student: LMHead,
    partners: Sequence[LMHead],
    weights: Sequence[float],
    targets: Tensor,
    temperature: float = 1.0,
    space: str = "logits",
) -> tuple[Tensor, Tensor]:
    """`log p_mix(target)` and the entropy of `p_mix`, token by token."""
    vocab = student.weight.shape[0]
    logps, entropies = [], []
    for n, target in enumerate(targets.tolist()):
        rows = [
            reference.resize(reference.head_logits(head.hidden[n], *head[1:]), vocab) for head in (student, *partners)
        ]
        logprobs = reference.mixed_logprobs(rows[0], rows[1:], weights, temperature, space)
        logps.append(logprobs[target])
        entropies.append(reference.entropy(logprobs))
    return torch.stack(logps), torch.stack(entropies)


def materialized_log_probs(
    student: LMHead, partners: Sequence[LMHead], weights: Sequence[float], targets: Tensor
) -> Tensor:
    """`log p_mix(target)` for mixed logits the way that needs `(N, V)` tensors."""
    mixed = (1 - sum(weights)) * student.hidden @ student.weight.T
    for partner, weight in zip(partners, weights, strict=True):
        mixed = mixed + weight * partner.hidden @ partner.weight.T
    return mixed.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

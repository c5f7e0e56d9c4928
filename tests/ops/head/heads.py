"""Random output layers, and what the functions of `ops.head` should make of them, from the float64 reference."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests import reference, reference_divergences, reference_offline
from trl_blend.ops import EosMap, LMHead


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


def with_leaves(head: LMHead, change) -> LMHead:
    """The head with `change(tensor)` for each of its tensors."""
    return head._replace(**{name: change(t) for name in LMHead._fields[:3] if (t := getattr(head, name)) is not None})


def to_double(head: LMHead) -> LMHead:
    """A float64 copy with its own leaves; requires grad where the original does."""
    return with_leaves(head, lambda tensor: tensor.detach().double().requires_grad_(tensor.requires_grad))


def logit_rows(head: LMHead, vocab_size: int | None) -> list[Tensor]:
    return [reference.head_logits(hidden, *head[1:])[:vocab_size] for hidden in head.hidden]


def gradients(outputs: Sequence[Tensor], tensors: list[Tensor], directions: Sequence[Tensor]) -> list[Tensor]:
    """Gradient of the outputs along the directions, in float64."""
    total = sum((output * direction).sum() for output, direction in zip(outputs, directions, strict=True))
    grads = torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True, materialize_grads=True)
    return [grad.double() for grad in grads]


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


def expected_reverse_kl(
    student: LMHead,
    teacher: LMHead,
    *,
    reference: LMHead | None = None,
    eos: EosMap | None = None,
    vocab_size: int | None = None,
    **settings: Any,
) -> tuple[Tensor, ...]:
    """Loss, entropy and reverse KL, token by token."""
    size = min(student.weight.shape[0], teacher.weight.shape[0]) if vocab_size is None else vocab_size
    references = [None] * len(student.hidden) if reference is None else logit_rows(reference, size)
    tokens = [
        reference_divergences.reverse_kl_loss(
            row,
            teacher_row,
            row,
            reference=reference_row,
            eos=None if eos is None else (eos.target, list(eos.merged)),
            **settings,
        )
        for row, teacher_row, reference_row in zip(
            logit_rows(student, size), logit_rows(teacher, size), references, strict=True
        )
    ]
    return tuple(torch.stack(values) for values in zip(*tokens, strict=True))


def expected_support(
    student: LMHead,
    teacher: LMHead,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    eos: EosMap | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, ...]:
    """`log p(target)` under student and teacher, and the entropies of teacher and student, token by token."""
    size = min(student.weight.shape[0], teacher.weight.shape[0]) if vocab_size is None else vocab_size
    canonical = None if eos is None else (eos.target, list(eos.merged))
    tokens = []
    for target, *rows in zip(targets.tolist(), logit_rows(student, size), logit_rows(teacher, size), strict=True):
        token = eos.target if eos is not None and target in eos.merged else target
        own, other = (reference_divergences.canonical_logprobs(row, temperature, canonical) for row in rows)
        tokens.append((own[token], other[token], reference.entropy(other), reference.entropy(own)))
    return tuple(torch.stack(values) for values in zip(*tokens, strict=True))


class Stored(NamedTuple):
    """What a store holds of a teacher, in the order of the arguments of `top_k_divergence`."""

    targets: Tensor
    topk_ids: Tensor
    topk_logps: Tensor
    tail_logmass: Tensor


def stored(logprobs: Tensor, top_k: int) -> Stored:
    """The top-k of a teacher with the sampled token in the last place, and the tail."""
    targets = torch.randint(logprobs.shape[1], (len(logprobs),))
    ids = logprobs.topk(top_k).indices
    missing = ~(ids == targets[:, None]).any(-1)
    ids[missing, -1] = targets[missing]
    tail = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return Stored(targets, ids, logprobs.gather(-1, ids), tail)


def expected_top_k(student: LMHead, store: Stored, direction: str) -> tuple[Tensor, ...]:
    """Divergence, log-probability of the target, entropy, and whether the target is on top, token by token."""
    masses = torch.cat([store.topk_logps, store.tail_logmass.clamp(min=-30.0)[:, None]], dim=-1).tolist()
    tokens = []
    for row, target, ids, mass in zip(
        logit_rows(student, None), store.targets.tolist(), store.topk_ids.tolist(), masses, strict=True
    ):
        logprobs = reference.log_softmax(row)
        is_top1 = torch.tensor(float(logprobs.argmax() == target), dtype=torch.float64)
        loss = reference_offline.top_k_kl(row, ids, mass, direction)
        tokens.append((loss, logprobs[target], reference.entropy(logprobs), is_top1))
    return tuple(torch.stack(values) for values in zip(*tokens, strict=True))

"""The differentiable functions of `ops.head` under one signature, for the promises that all of them make."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.ops.head.heads import (
    Stored,
    expected_log_probs,
    expected_reverse_kl,
    expected_support,
    expected_top_k,
    random_head,
    stored,
)
from trl_blend.ops import EosMap, LMHead, mixed_log_probs, reverse_kl, support_statistics, top_k_divergence


N, V, TOP_K = 7, 11, 3
EOS = EosMap(9, (1, 6))


class Function(NamedTuple):
    """One setting of a function. `call` and `expected` take a student and a partner, or what is stored of it."""

    call: Callable[..., tuple[Tensor, ...]]
    expected: Callable[..., tuple[Tensor, ...]]
    differentiable: int  # how many of the outputs have a gradient
    partner: Callable[..., LMHead | Stored]
    rounds: bool  # half precision rounds the logits

    def loss(self, outputs: tuple[Tensor, ...]) -> Tensor:
        return sum(output.sum() for output in outputs[: self.differentiable])


def mixed(space: str) -> Function:
    def targets(student):
        return torch.arange(len(student.hidden)) % V

    def call(student, partner, **options):
        arguments = [student, [partner], [0.3], targets(student)]
        return tuple(mixed_log_probs(*arguments, temperature=0.9, space=space, **options))

    def expected(student, partner):
        return expected_log_probs(student, [partner], [0.3], targets(student), 0.9, space)

    return Function(call, expected, 2, random_head, True)


def divergence(**settings) -> Function:
    def call(student, teacher, **options):
        return tuple(reverse_kl(student, teacher, temperature=0.9, **settings, **options))[:3]

    def expected(student, teacher):
        return expected_reverse_kl(student, teacher, temperature=0.9, **settings)

    return Function(call, expected, 1, random_head, False)


def interpolated(**settings) -> Function:
    """With the student itself as the reference: it has another student's gradient, not its own."""

    def call(student, teacher, **options):
        arguments = {"reference": student, "target_weight": 0.6, "temperature": 0.9}
        return tuple(reverse_kl(student, teacher, **arguments, **settings, **options))[:3]

    def expected(student, teacher):
        return expected_reverse_kl(student, teacher, reference=student, target_weight=0.6, temperature=0.9, **settings)

    return Function(call, expected, 1, random_head, False)


def support(**settings) -> Function:
    def targets(student):
        return torch.arange(len(student.hidden)) % V

    def call(student, teacher, **options):
        found = support_statistics(student, teacher, targets(student), temperature=0.9, **settings, **options)
        return found.student_logps, found.teacher_logps, found.teacher_entropy, found.student_entropy

    def expected(student, teacher):
        return expected_support(student, teacher, targets(student), temperature=0.9, **settings)

    return Function(call, expected, 1, random_head, False)


def from_store(direction: str) -> Function:
    def call(student, store, **options):
        return tuple(top_k_divergence(student, *store, direction=direction, **options))

    def partner(tokens, hidden_size, vocab, *, dtype=torch.float64, **_):
        return stored(torch.randn(tokens, vocab, dtype=torch.float64).mul(2).log_softmax(-1), TOP_K)

    return Function(call, lambda student, store: expected_top_k(student, store, direction), 1, partner, True)


FUNCTIONS = {
    "mixed logits": mixed("logits"),
    "mixed probs": mixed("probs"),
    "reverse kl": divergence(),
    "reverse kl, veto, eos": divergence(veto_weight=0.4, eos=EOS),
    "reverse kl, forward kl, eos": divergence(forward_kl_entropy=1.5, eos=EOS),
    "reverse kl, top-k": divergence(top_k=TOP_K),
    "reverse kl, top-k, veto, eos": divergence(top_k=TOP_K, veto_weight=0.4, eos=EOS),
    "reverse kl, interpolated, eos": interpolated(eos=EOS),
    "sampled": support(),
    "sampled, eos": support(eos=EOS),
    "stored, reverse": from_store("reverse"),
    "stored, forward": from_store("forward"),
}
WITH_PARTNER = [name for name in FUNCTIONS if not name.startswith("stored")]

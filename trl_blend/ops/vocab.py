"""Vocabulary alignment and a shared end-of-sequence token for models of one tokenizer."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trl_blend.errors import ConfigError
from trl_blend.ops.reduction import at_least_float32


def align_vocab(logits: Tensor, vocab_size: int) -> Tensor:
    """
    Truncates the last dimension to `vocab_size` entries, or pads it with `-inf` (probability 0). Use it before logits
    of two models of one tokenizer meet.

    Checkpoints of one family pad their output layer to different sizes (Qwen2.5: 151,936 rows at 0.5B, 152,064 at 7B)
    while the tokenizer is the same: the surplus rows are never produced. After truncation the softmax runs over the
    entries that are left, so the distribution is renormalised. Not checked here: that the shared entries mean the same
    tokens.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`):
            Logits of one model.
        vocab_size (`int`):
            Size of the vocabulary to align to.

    Returns:
        `torch.Tensor` of shape `(..., vocab_size)`: The input itself where nothing changes. Gradients flow to the
        entries that are kept.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If `vocab_size` is not positive.
    """
    if vocab_size < 1:
        raise ConfigError(f"`vocab_size` is {vocab_size}. Pass the size of the student's output layer.")
    missing = vocab_size - logits.shape[-1]
    if missing > 0:
        return F.pad(logits, (0, missing), value=-math.inf)
    return logits[..., :vocab_size] if missing < 0 else logits


class EosMap(NamedTuple):
    """
    Which token carries the stop event, and which tokens are merged into it. Built by [`eos_map`].

    Args:
        target (`int`):
            EOS id of the student. It carries the whole stop event and is what is emitted.
        merged (`tuple[int, ...]`):
            Every other id that ends a sequence in either model.
    """

    target: int
    merged: tuple[int, ...]

    def ids(self, vocab_size: int) -> list[int]:
        """
        The ids below `vocab_size`, `target` first.

        Raises:
            [`~trl_blend.errors.ConfigError`]: If `target` is not below `vocab_size`.
        """
        if not 0 <= self.target < vocab_size:
            raise ConfigError(
                f"The EOS id is {self.target} but the vocabulary has {vocab_size} entries. Keep the student's EOS "
                "token inside `vocab_size`, or choose another `target`."
            )
        return [self.target, *(token for token in self.merged if token < vocab_size)]


def eos_map(
    student_eos_ids: Sequence[int], teacher_eos_ids: Sequence[int], target: int | None = None
) -> EosMap | None:
    """
    Finds which tokens are one stop event for two models. Use it where chat and base models meet, which end their
    sequences with different tokens; `None` where both end them with the same set.

    Args:
        student_eos_ids (`Sequence[int]`):
            Ids that end a sequence of the student; chat models often have two.
        teacher_eos_ids (`Sequence[int]`):
            The same for the teacher.
        target (`int`, *optional*):
            The student's id that carries the stop event. The first of `student_eos_ids` if not given.

    Returns:
        [`EosMap`] or `None`: `target` and the union of all other ids.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a model has no EOS id or a negative one, or `target` is not the
            student's.
    """
    for name, ids in (("student_eos_ids", student_eos_ids), ("teacher_eos_ids", teacher_eos_ids)):
        if not ids or min(ids) < 0:
            raise ConfigError(f"`{name}` is {list(ids)}. Pass at least one id, all of them 0 or more.")
    target = student_eos_ids[0] if target is None else target
    if target not in student_eos_ids:
        raise ConfigError(f"`target` is {target}. Choose one of the student's EOS ids, {list(student_eos_ids)}.")
    if set(student_eos_ids) == set(teacher_eos_ids):
        return None
    union = dict.fromkeys([*student_eos_ids, *teacher_eos_ids])
    return EosMap(target, tuple(token for token in union if token != target))


def canonicalize_eos(logits: Tensor, eos: EosMap) -> Tensor:
    r"""
    Moves the probability of every EOS token onto one coordinate. Use it on the logits of both models before anything
    compares them, where they end their sequences with different tokens.

    $$
    \tilde p(e) = \sum_{u \in \{e\} \cup \text{merged}} p(u), \qquad \tilde p(u) = 0 \text{ for the merged } u, \qquad
    \tilde p(v) = p(v) \text{ elsewhere}
    $$

    This is Eq. 7 of appendix D of [Trust-region behaviour blending](https://huggingface.co/papers/2605.31159), on
    logits: the target's becomes the log-sum-exp of all of them, the others `-inf`, so the total mass does not change.
    Applying it again changes nothing. Apply it after the temperature (a softmax of sums is not a sum of softmaxes at
    another temperature) and to every model before anything compares them.

    Not stated by the paper, chosen here: the paper maps each model's *native* EOS token. Here the union of both
    models' EOS tokens is merged in both. The two agree where each model only ever stops with its own token. Where the
    student gives a little mass to the teacher's EOS token, the paper's map, taken literally, would compare it with a
    teacher probability of 0, an infinite reverse KL.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`):
            Logits of one model, already divided by the temperature. They are not changed in place.
        eos ([`EosMap`]):
            Target and merged ids. Merged ids of `V` and above are ignored.

    Returns:
        `torch.Tensor` of shape `(..., V)`: Canonicalised logits in the dtype of the input (the sum is taken in
        float32, then rounded). Gradients flow to all logits, to the merged ones in proportion to their probabilities.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the target is not below `V`.
    """
    index = torch.tensor(eos.ids(logits.shape[-1]), device=logits.device)
    stop = _merge(logits.index_select(-1, index)).to(logits.dtype)
    return logits.index_fill(-1, index, -math.inf).index_copy(-1, index[:1], stop)


def _merge(logits: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension, which is kept; the gradient is 0, not NaN, where all are `-inf`."""
    wide = at_least_float32(logits)
    impossible = (wide == -math.inf).all(dim=-1, keepdim=True)
    return wide.masked_fill(impossible, 0.0).logsumexp(dim=-1, keepdim=True).masked_fill(impossible, -math.inf)

"""One step of blended decoding, for every engine: the logits of the models in, the behaviour policy out."""

import math
from collections.abc import Sequence

from torch import Tensor

from trl_blend.generation.rules import BlendRule, BlendStep
from trl_blend.ops.vocab import EosMap, align_vocab, canonicalize_eos


def blend_step(
    rule: BlendRule,
    student_logits: Tensor,
    partner_logits: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    eos: EosMap | None = None,
    vocab_size: int | None = None,
    keep_forbidden: bool = False,
) -> tuple[BlendStep, list[Tensor]]:
    """
    Behaviour policy of `rule` at a temperature, from raw logits. Use it in whatever draws tokens from a blend: it
    aligns the vocabularies, divides by the temperature and merges end-of-sequence tokens in the order that matters.

    Args:
        rule ([`BlendRule`]):
            Maps student and partner logits to the behaviour policy.
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Raw logits of the student. They decide vocabulary, device and type.
        partner_logits (`Sequence[torch.Tensor]`, each of shape `(..., V_i)`):
            Raw logits of the partners, truncated or padded with `-inf` to the student's vocabulary here.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        eos ([`~trl_blend.ops.EosMap`], *optional*):
            End-of-sequence tokens to merge into one, in every model.
        vocab_size (`int`, *optional*):
            Ids below it are tokens; the rows of every model from there on have no probability. All rows by default.
        keep_forbidden (`bool`, *optional*, defaults to `False`):
            Whether a token whose student logit is `-inf` is taken from the partners too, before the rule.

    Returns:
        [`BlendStep`] and `list[torch.Tensor]`: The step, whose logits are at temperature 1, and the partners' logits
        of shape `(..., V)` at the sampling temperature, without what `keep_forbidden` takes from them.
    """
    size = student_logits.shape[-1]
    tokens = size if vocab_size is None else min(size, vocab_size)
    student_logits, *partners = (
        align_vocab(align_vocab(logits.to(student_logits), tokens), size)
        for logits in (student_logits, *partner_logits)
    )
    scores = student_logits
    if temperature != 1.0:
        student_logits = student_logits / temperature
        partners = [logits / temperature for logits in partners]
    if eos is not None:
        # After the temperature: it is the tempered policies whose stop events are merged
        student_logits = canonicalize_eos(student_logits, eos)
        partners = [canonicalize_eos(logits, eos) for logits in partners]
    blended = partners
    if keep_forbidden:
        forbidden = scores == -math.inf
        student_logits = student_logits.masked_fill(forbidden, -math.inf)
        blended = [logits.masked_fill(forbidden, -math.inf) for logits in partners]
    return rule(student_logits, blended), partners

"""The logits processor that blends the student with its partners at every decoding step of `generate`."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from trl_blend.errors import UnsupportedError
from trl_blend.generation.partner import PartnerDecoder
from trl_blend.generation.recording import RolloutRecord, RolloutRecorder
from trl_blend.generation.rules import BlendRule
from trl_blend.generation.step import blend_step
from trl_blend.ops.vocab import EosMap


class BlendLogitsProcessor(LogitsProcessor):
    r"""
    Replaces the student's next-token scores by those of a blend rule.

    `generate` runs a caller's processors after its own penalties and constraints and before temperature, top-k and
    top-p. This one divides all logits by the temperature `τ`, applies the rule, and returns `τ` times the behaviour
    logits, so that the division by `τ` that follows gives exactly the rule's policy. Partner logits are moved to the
    student's device and dtype, and truncated or padded with `-inf` to its vocabulary. Logits that are not numbers are
    refused.

    One object serves one `generate` call with plain sampling or greedy search. No gradient flows.

    Args:
        rule ([`BlendRule`]):
            Maps student and partner logits to the behaviour policy.
        partners (`Sequence[PartnerDecoder]`):
            The partners, in the order of the rule's weights. Each keeps its own cache.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature that `generate` will divide the scores by; 1 when it decodes greedily.
        keep_forbidden (`bool`, *optional*, defaults to `False`):
            Whether a token whose incoming score is `-inf` is taken from the partners too. Set it when `generate`
            itself forbids tokens (`min_new_tokens`, `bad_words_ids`, ...); otherwise a rule could bring them back. The
            recorded `teacher_logps` remain those of the unrestricted partner.
        eos ([`~trl_blend.ops.EosMap`], *optional*):
            End-of-sequence tokens to merge into one, in every model, before the rule and the record.
        vocab_size (`int`, *optional*):
            Ids below it are tokens; the rows of every model from there on have no probability. All rows by default.
        record (`bool`, *optional*, defaults to `False`):
            Whether to collect a [`RolloutRecord`], see [`finish`][BlendLogitsProcessor.finish].
    """

    def __init__(
        self,
        rule: BlendRule,
        partners: Sequence[PartnerDecoder],
        *,
        temperature: float = 1.0,
        keep_forbidden: bool = False,
        eos: EosMap | None = None,
        vocab_size: int | None = None,
        record: bool = False,
    ) -> None:
        self.rule = rule
        self.partners = tuple(partners)
        self.temperature = temperature
        self.keep_forbidden = keep_forbidden
        self.eos = eos
        self.vocab_size = vocab_size
        self.recorder = RolloutRecorder() if record else None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Behaviour logits times the temperature `(B, V)`, given tokens `(B, S)` and the student's logits `(B, V)`."""
        partner_logits = [partner.step(input_ids).to(scores) for partner in self.partners]
        _check_numbers(scores, partner_logits)
        step, partner_logits = blend_step(
            self.rule,
            scores,
            partner_logits,
            temperature=self.temperature,
            eos=self.eos,
            vocab_size=self.vocab_size,
            keep_forbidden=self.keep_forbidden,
        )
        if self.recorder is not None:
            self.recorder.add(input_ids, step, partner_logits)
        return step.logits * self.temperature if self.temperature != 1.0 else step.logits

    def finish(self, sequences: Tensor, prompt_length: int) -> RolloutRecord:
        """
        Close the record with the sequences `(B, prompt_length + T)` that `generate` returned.

        Raises:
            `RuntimeError`: If the processor was built with `record=False`.
        """
        if self.recorder is None:
            raise RuntimeError("Nothing was recorded: build the processor with `record=True`.")
        return self.recorder.finish(sequences, prompt_length)


def _check_numbers(student_logits: Tensor, partner_logits: Sequence[Tensor]) -> None:
    """A model that gives no numbers would make the draw fail without saying which one it is."""
    best = torch.stack([logits.amax(dim=-1) for logits in (student_logits, *partner_logits)])
    if best.isfinite().all():
        return
    index = int((~best.isfinite()).any(dim=1).nonzero()[0])
    name = "the student" if index == 0 else f"teacher {index}" if len(partner_logits) > 1 else "the teacher"
    raise UnsupportedError(
        f"The logits of {name} are not numbers ({best[index][~best[index].isfinite()][0]}), so that no token can be "
        "drawn. Check that its checkpoint is whole and loaded in bfloat16 or float32; for a student in training, use "
        "a lower learning rate."
    )

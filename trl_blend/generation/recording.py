"""What one blended `generate` call leaves behind: log-probabilities of the emitted tokens, statistics and cost."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_blend.generation.rules import BlendStep
from trl_blend.ops.policies import log_normalizer


@dataclass(frozen=True)
class RolloutRecord:
    """
    Recorded quantities of one blended `generate` call: `B` returned sequences, `T` generated positions.

    Every tensor covers all `T` columns. In columns after a row's end-of-sequence token the values belong to the
    padding that `generate` emits there: the caller masks them. All policies are at the sampling temperature (1 when
    decoding is greedy) and before anything that `generate` applies after the blend (top-k, top-p, min-p, the caller's
    own processors): while one of those is active they are not the policy that tokens were drawn from.

    Args:
        behavior_logps (`torch.Tensor` of shape `(B, T)`):
            `log μ(y_t)` of the emitted tokens under the behaviour policy, in nats.
        teacher_logps (`torch.Tensor` of shape `(n_partners, B, T)`):
            Log-probability of the emitted tokens under each partner, in nats; `-inf` for a token it does not have.
        teacher_entropies (`torch.Tensor` of shape `(n_partners, B, T)`):
            Entropy of each partner's policy at each prefix, in nats.
        statistics (`dict[str, torch.Tensor]`, each of shape `(B, T)`):
            Statistics of the blend rule at each prefix.
    """

    behavior_logps: Tensor
    teacher_logps: Tensor
    teacher_entropies: Tensor
    statistics: dict[str, Tensor]

    def mask_of(self, lengths: Sequence[int]) -> Tensor:
        """Mask of the columns that belong to rows of the given lengths, of shape `(B, T)`."""
        device = self.behavior_logps.device
        columns = torch.arange(self.behavior_logps.size(1), device=device)
        return columns < torch.tensor(lengths, device=device)[:, None]


class DrawnLogProbs:
    """
    Log-probabilities of the tokens that `generate` draws, under one or several policies.

    The token drawn from a step is only known at the next one, so the step's `(B, V)` logits are kept until then;
    nothing else of that size is. Call [`add`][DrawnLogProbs.add] once per decoding step and
    [`finish`][DrawnLogProbs.finish] with the sequences that `generate` returned.
    """

    def __init__(self) -> None:
        self._pending: Sequence[tuple[Tensor, Tensor]] = ()
        self._logps: list[Tensor] = []

    def add(self, input_ids: Tensor, policies: Sequence[tuple[Tensor, Tensor]]) -> None:
        """One decoding step: the tokens so far `(B, S)`, and of each policy the logits `(B, V)` with `log Σ exp`."""
        if self._pending:
            self._gather(input_ids[:, -1])
        self._pending = policies

    def finish(self, sequences: Tensor, prompt_length: int) -> Tensor:
        """Log-probabilities `(n_policies, B, T)`, given the sequences `(B, prompt_length + T)`."""
        length = sequences.shape[1] - prompt_length
        # `generate` may have undone its last step (deferred stop check): then no token belongs to it
        if len(self._logps) < length:
            self._gather(sequences[:, -1])
        self._pending = ()
        return torch.stack(self._logps[:length], dim=-1)

    def _gather(self, tokens: Tensor) -> None:
        index = tokens.to(self._pending[0][0].device).unsqueeze(-1)
        gathered = [logits.gather(-1, index).squeeze(-1) - normalizer for logits, normalizer in self._pending]
        self._logps.append(torch.stack(gathered))


class RolloutRecorder:
    """
    Collects a [`RolloutRecord`] while `generate` runs. Call [`add`][RolloutRecorder.add] once per decoding step and
    [`finish`][RolloutRecorder.finish] with the sequences that `generate` returned.
    """

    def __init__(self) -> None:
        self._drawn = DrawnLogProbs()
        self._entropies: list[Tensor] = []
        self._statistics: list[dict[str, Tensor]] = []

    def add(self, input_ids: Tensor, step: BlendStep, partner_logits: Sequence[Tensor]) -> None:
        """Record one decoding step: the tokens so far `(B, S)`, and what follows from the tempered logits `(B, V)`."""
        known = step.log_normalizer
        probs = [logits.softmax(dim=-1) for logits in partner_logits]
        policies = [(step.logits, log_normalizer(step.logits) if known is None else known)]
        policies += [(z, log_normalizer(z, p)) for z, p in zip(partner_logits, probs, strict=True)]
        self._drawn.add(input_ids, policies)
        self._entropies.append(torch.stack([torch.special.entr(p).sum(dim=-1) for p in probs]))
        self._statistics.append(step.statistics)

    def finish(self, sequences: Tensor, prompt_length: int) -> RolloutRecord:
        """Close the record with the sequences `(B, prompt_length + T)` that `generate` returned."""
        logps = self._drawn.finish(sequences, prompt_length)  # (1 + n_partners, B, T)
        length = logps.shape[-1]
        entropies = torch.stack(self._entropies[:length], dim=-1)
        names = self._statistics[0].keys()
        statistics = {name: torch.stack([s[name] for s in self._statistics[:length]], dim=-1) for name in names}
        return RolloutRecord(logps[0], logps[1:], entropies, statistics)

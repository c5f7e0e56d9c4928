"""Reverse KL of a student against a teacher, or a target made of it, from hidden states, without `(N, V)` logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trl_blend.errors import ConfigError
from trl_blend.ops.head import tiles
from trl_blend.ops.head.layer import GatherParameters, LMHead, frozen, no_gather
from trl_blend.ops.head.tiles import (
    NO_MAXIMUM,
    Block,
    EosColumns,
    Kernel,
    RunningSoftmax,
    RunningTopK,
    Scratch,
    TiledModel,
    TileGradient,
)
from trl_blend.ops.vocab import EosMap


class ReverseKL(NamedTuple):
    """
    Result of [`reverse_kl`], one value per token, in nats.

    Args:
        loss (`torch.Tensor` of shape `(N,)`):
            What is minimised.
        student_entropy (`torch.Tensor` of shape `(N,)`):
            Entropy of `p_S`. No gradient.
        reverse_kl (`torch.Tensor` of shape `(N,)`):
            The divergence to read and log: over the full support that of `loss`, without a forward KL; `Σ_k c_k` over
            the student's top-k, whose loss is no divergence by value. No gradient.
        has_forward_kl (`torch.Tensor` of shape `(N,)`, bool, *optional*):
            With `forward_kl_entropy`, whether `loss` has the forward KL of the token, too.
    """

    loss: Tensor
    student_entropy: Tensor
    reverse_kl: Tensor
    has_forward_kl: Tensor | None = None


def reverse_kl(
    student: LMHead,
    teacher: LMHead,
    *,
    reference: LMHead | None = None,
    target_weight: float = 1.0,
    temperature: float = 1.0,
    veto_weight: float = 0.0,
    forward_kl_entropy: float | None = None,
    top_k: int | None = None,
    eos: EosMap | None = None,
    vocab_size: int | None = None,
    gather_parameters: GatherParameters = no_gather,
) -> ReverseKL:
    r"""
    Pulls the student's distribution of every token towards the teacher's, by minimising `KL(p_S‖p_T)`. Use it for
    on-policy distillation with a teacher in memory; with a `veto_weight` of 0.1 to 0.5 where the student should only
    be moved away from what the teacher rejects, with a `target_weight` of 0.3 to 0.9 where it should stay near a
    `reference`, and with a `top_k` of 16 to 64 to skip the teacher in the backward.

    Over the full support, towards the teacher or the target of [Veto](https://huggingface.co/papers/2601.07155), which
    is a product and not an interpolation:

    $$
    L = \sum_v p_S(v) \bigl(\log p_S(v) - \log Q(v)\bigr), \qquad
    Q \propto p_T\,\mathrm{sg}[p_S]^{w}, \qquad w = \text{veto\_weight}
    $$

    with gradient `p_S (log p_S - log Q - KL)` with respect to the student's logits (`Q` is a constant). With a
    `reference` (the student at step 0) a log-linear mixture takes the place of `p_T`, the trust-region teacher of
    [SDPO](https://huggingface.co/papers/2601.20802) (App. B):

    $$
    Q \propto p_{ref}^{1 - \alpha}\,p_T^{\alpha}, \qquad \alpha = \text{target\_weight}
    $$

    Above 1 it extrapolates: `-KL(p_S‖Q)` is up to a constant the expectation under `p_S` of the reward
    `α (log p_T - log p_ref) - (log p_S - log p_ref)` of [G-OPD](https://huggingface.co/papers/2602.12125).

    With `forward_kl_entropy`, `1[H(p_T) > forward_kl_entropy] · KL(p_T‖p_S)` is added, the loss of
    [entropy-aware distillation](https://huggingface.co/papers/2603.07079) over the whole vocabulary, with gradient
    `p_S - p_T`.

    Over the support `S_k` of the `k` tokens that the student finds most probable, the form of the public code of
    [on-policy distillation on a top-k support](https://huggingface.co/papers/2604.13016) (thunlp/OPD):

    $$
    L = \sum_{v \in S_k} \mathrm{sg}[c_v] \log p_S(v), \qquad
    c_v = w_v \bigl(\log p_S(v) - \log Q(v)\bigr), \qquad w = \mathrm{softmax}_{S_k}(\log p_S)
    $$

    with gradient `Σ_k c_k (1[v = k] - p_S(v))`. With `k = V` the gradient equals that of the full support.

    `p_S` and `p_T` are softmaxes of the first `vocab_size` logits, divided by the temperature, then with the stop
    event on one token ([`~trl_blend.ops.canonicalize_eos`]). The gradients are those of these distributions: those of
    a merged token go to all logits that were merged, in proportion to their probabilities.

    The gradient of `loss` reaches `student.hidden`, `student.weight` and `student.bias`. The tensors of the others
    get none, nor have the other outputs any. Where the teacher excludes a token with a logit of `-inf` and the student
    does not, the loss is huge but finite; above a `target_weight` of 1, what the reference excludes is excluded. Not
    done here: masking, reduction over tokens, double backward.

    On the top-k support the weights are renormalised; the log-probabilities inside `c` and outside are those of the
    full vocabulary (the paper's own formula renormalises both sides inside, too). What is deliberately not done is to
    differentiate the truncated sum `Σ_{S_k} p_S (log p_S - log Q)`: wherever it is positive, its gradient also lowers
    the mass of `S_k`, which makes the sum smaller without bringing the student any closer to the target.

    As in TRL's `ChunkedDivergenceFunction`, which is the full support with `veto_weight=0`, tiles of tokens x
    vocabulary are folded into online statistics and recomputed in the backward. Projections per tile: one of each
    model in the forward and in the backward; the backward of the top-k support needs the student's alone. Projections
    multiply in the dtype of the hidden states (under autocast, in its dtype) without rounding the result to it;
    everything else is float32, or float64 where hidden states are float64.

    Args:
        student ([`LMHead`]):
            Output layer of the student, `V_S` rows.
        teacher ([`LMHead`]):
            Output layer of the teacher, `V_T` rows, with any hidden size.
        reference ([`LMHead`], *optional*):
            Output layer of the reference, `V_S` rows. Needed for any `target_weight` but 1, where it is left out.
        target_weight (`float`, *optional*, defaults to `1.0`):
            Exponent of the teacher in the target, at least 0; that of the reference is 1 minus it.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of all softmaxes.
        veto_weight (`float`, *optional*, defaults to `0.0`):
            Exponent of the student in the target, in `[0, 1)`. At 0 the target is the teacher. At 1 the student's
            entropy would cancel out of the loss.
        forward_kl_entropy (`float`, *optional*):
            Entropy of the teacher in nats, above which the forward KL is added. Never if not given. Only for the full
            support, and the teacher as the target.
        top_k (`int`, *optional*):
            Size of the student's support. Every token if not given.
        eos ([`EosMap`], *optional*):
            Tokens that are one stop event. None are merged if not given.
        vocab_size (`int`, *optional*):
            Rows of both output layers that count. `min(V_S, V_T)` if not given.
        gather_parameters (`Callable`, *optional*):
            Context-manager factory, entered with the weights and biases in use around the forward and again in the
            backward (ZeRO-3: TRL's `maybe_gather_lm_head_ctx`). Does nothing by default.

    Returns:
        [`ReverseKL`]: `loss`, `student_entropy` and `reverse_kl` of shape `(N,)`, in float32 (float64 for float64
        hidden states), and `has_forward_kl` with `forward_kl_entropy`.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the temperature, a weight, the entropy, `top_k`, the vocabulary size, the
            EOS map or a shape is invalid.
    """
    if not 0.0 <= veto_weight < 1.0:
        raise ConfigError(
            f"`veto_weight` is {veto_weight}. Set it to at least 0 and below 1: from 1 on the loss no longer contains "
            "the entropy of the student."
        )
    if not 0.0 <= target_weight < math.inf:
        raise ConfigError(f"`target_weight` is {target_weight}. Set it to a number of at least 0; 1 is the teacher.")
    if target_weight == 1.0:
        reference = None
    elif reference is None:
        raise ConfigError(
            f"`target_weight` is {target_weight}, which needs a `reference`. Pass one, or leave it at 1."
        )
    if forward_kl_entropy is not None and (top_k is not None or veto_weight or reference is not None):
        raise ConfigError(
            f"`forward_kl_entropy` is {forward_kl_entropy}, which is defined for the whole vocabulary of the teacher. "
            "Leave `top_k`, `veto_weight` and `target_weight` at their defaults."
        )
    _check_pair(student, teacher, temperature)
    partners = [frozen(teacher)]
    if reference is not None:
        _check_pair(student, reference, temperature, "reference")
        partners.append(frozen(reference))
    models = [tiles.tiled(head, 1.0 / temperature) for head in (student, *partners)]
    # Before the weights are gathered, their number of rows is unknown under ZeRO-3
    with gather_parameters(*tiles.parameters_of(models)):
        vocab, eos_ids = _common_vocabulary(student, teacher, vocab_size, eos)
        if top_k is not None and not 1 <= top_k <= vocab:
            raise ConfigError(
                f"`top_k` is {top_k} and the vocabulary has {vocab} entries. Set it to a number from 1 to the "
                "size of the vocabulary, or to None for all of them."
            )
        if reference is not None and reference.weight.shape[0] < vocab:
            raise ConfigError(
                f"`reference` has {reference.weight.shape[0]} logits, but {vocab} count. Pass the student at step 0."
            )
        kernel = _ReverseKL(vocab, eos_ids, target_weight, veto_weight, forward_kl_entropy, top_k)
        return ReverseKL(*tiles.run(kernel, models, gather_parameters))


class SupportStatistics(NamedTuple):
    """
    Result of [`support_statistics`], one value per token, in nats.

    Args:
        student_logps (`torch.Tensor` of shape `(N,)`):
            `log p_S(target)`.
        teacher_logps (`torch.Tensor` of shape `(N,)`):
            `log p_T(target)`. No gradient.
        teacher_entropy (`torch.Tensor` of shape `(N,)`):
            Entropy of `p_T`. No gradient.
        student_entropy (`torch.Tensor` of shape `(N,)`):
            Entropy of `p_S`. No gradient.
    """

    student_logps: Tensor
    teacher_logps: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor


def support_statistics(
    student: LMHead,
    teacher: LMHead,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    eos: EosMap | None = None,
    vocab_size: int | None = None,
    gather_parameters: GatherParameters = no_gather,
) -> SupportStatistics:
    """
    Scores given tokens under both distributions that [`reverse_kl`] compares. Use it for a loss of sampled tokens, and
    for the diagnostics of a rollout: where the teacher supports what the student has sampled, and how sure it is.

    `log p_S(target)`, `log p_T(target)` and both entropies, from one pass over the vocabulary per model. The gradient
    of `log p_S(target)`, `1[target] - p_S` with respect to the student's logits, reaches the tensors of `student` as
    in [`reverse_kl`]; a stop event has that of all its tokens.

    Args:
        student ([`LMHead`]):
            Output layer of the student.
        teacher ([`LMHead`]):
            Output layer of the teacher.
        targets (`torch.Tensor` of shape `(N,)`):
            Token ids in `[0, vocab_size)`; every EOS id reads the merged token. Out-of-range ids give `-inf`.
        temperature, eos, vocab_size, gather_parameters:
            As in [`reverse_kl`].

    Returns:
        [`SupportStatistics`]: Four tensors of shape `(N,)`, in float32 (float64 for float64 hidden states).

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the temperature, the vocabulary size, the EOS map or a shape is invalid.
    """
    if targets.shape != student.hidden.shape[:1]:
        raise ConfigError(
            f"`targets` has shape {tuple(targets.shape)} and `hidden` has shape {tuple(student.hidden.shape)}. "
            "Flatten them to (N,) and (N, H), with the same tokens."
        )
    _check_pair(student, teacher, temperature)
    if eos is not None:
        targets = torch.where(torch.isin(targets, torch.tensor(eos.merged).to(targets)), eos.target, targets)
    models = [tiles.tiled(head, 1.0 / temperature) for head in (student, frozen(teacher))]
    with gather_parameters(*tiles.parameters_of(models)):
        vocab, eos_ids = _common_vocabulary(student, teacher, vocab_size, eos)
        return SupportStatistics(*tiles.run(_Support(vocab, eos_ids, targets), models, gather_parameters))


def _check_pair(student: LMHead, teacher: LMHead, temperature: float, role: str = "teacher") -> None:
    if not 0.0 < temperature < math.inf:
        raise ConfigError(f"`temperature` is {temperature}. Set it to a positive number.")
    shapes = [tuple(head.hidden.shape) for head in (student, teacher)]
    if any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise ConfigError(
            f"`hidden` has shape {shapes[0]} in the student and {shapes[1]} in the {role}. Flatten both to (N, H), "
            "with the same tokens."
        )


def _common_vocabulary(
    student: LMHead, teacher: LMHead, vocab_size: int | None, eos: EosMap | None
) -> tuple[int, tuple[int, ...]]:
    """Size of the vocabulary, and the ids of its stop event if there is more than one."""
    rows = [head.weight.shape[0] for head in (student, teacher)]
    vocab_size = min(rows) if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= min(rows):
        raise ConfigError(
            f"`vocab_size` is {vocab_size}, but the student has {rows[0]} logits and the teacher {rows[1]}. Set it "
            "to at most the smaller number."
        )
    ids = () if eos is None else tuple(eos.ids(vocab_size))
    return vocab_size, ids if len(ids) > 1 else ()


@dataclass(frozen=True)
class _ReverseKL(Kernel):
    """
    Loss of every token, and without gradient the student's entropy, the reverse KL and, with `forward_kl_entropy`,
    where the forward KL counts. The models are student, teacher and, unless `target_weight` is 1, reference.
    """

    vocab: int
    eos_ids: tuple[int, ...]  # the one that carries the stop event first; empty where there is nothing to merge
    target_weight: float
    veto_weight: float
    forward_kl_entropy: float | None
    top_k: int | None

    def reads_partners(self, grads: Sequence[Tensor | None]) -> bool:
        return self.top_k is None  # else the teacher is in the coefficients of the tokens already

    def target_(self, student: Tensor, partners: list[Tensor]) -> Tensor:
        """The target's logits, in the place of the teacher's."""
        target = partners[0]
        if len(partners) > 1:
            target.mul_(self.target_weight).add_(partners[1], alpha=1.0 - self.target_weight)
            if self.target_weight > 1.0:
                target.masked_fill_(partners[1] <= NO_MAXIMUM, NO_MAXIMUM)
        return target.add_(student, alpha=self.veto_weight) if self.veto_weight else target

    def forward(self, models: list[TiledModel], scratch: Scratch) -> tuple[Sequence[Tensor | None], list[Any]]:
        count, has_forward_kl = len(models[0].hidden), self.forward_kl_entropy is not None
        columns = [EosColumns(self.eos_ids, count, scratch) for _ in models]
        statistics = _Statistics(count, self.top_k, scratch, has_forward_kl)
        for block in tiles.vocab_blocks(models, self.vocab):
            for rows in tiles.token_rows(count):
                student, *partners = (_logits(block, rows, scratch, index) for index in range(len(models)))
                for eos, tile in zip(columns, (student, *partners), strict=True):
                    eos.take_(rows, tile, block)
                statistics.fold_(rows, student, self.target_(student, partners), block.start)
        if self.eos_ids:
            stop, *stops = (eos.merged() for eos in columns)
            stop_target = self.target_(stop, stops)
            # As one more column of the vocabulary, `(N, 1)`, which the fold overwrites
            statistics.fold_(slice(0, count), stop.clone(), stop_target.clone(), self.eos_ids[0])
        log_norm, target_norm = statistics.student.log_norm, statistics.target.log_norm
        support = statistics.support
        if support is None:
            reverse_kl = statistics.reverse_kl()
            loss = reverse_kl.clone()  # two outputs, of which one has no gradient
            saved = [log_norm, reverse_kl, target_norm]
            if self.forward_kl_entropy is not None:
                counts = statistics.target.entropy > self.forward_kl_entropy
                loss += torch.where(counts, statistics.forward_kl(), 0.0)
                saved.append(counts)
        else:
            logps = support.values - log_norm.unsqueeze(1)
            coefficients = support.values.softmax(dim=1) * (logps - (support.others - target_norm.unsqueeze(1)))
            loss, reverse_kl = (coefficients * logps).sum(dim=1), coefficients.sum(dim=1)
            saved = [log_norm, reverse_kl, coefficients, support.columns]
        at_eos = torch.empty_like(columns[0].logits)
        if self.eos_ids:
            logp = stop.squeeze(1) - log_norm
            if support is None:
                target_logp = stop_target.squeeze(1) - target_norm
                at_stop = logp.exp() * (logp - target_logp - reverse_kl)
                if has_forward_kl:
                    at_stop += torch.where(counts, logp.exp() - target_logp.exp(), 0.0)
            else:
                chosen = torch.where(support.columns == self.eos_ids[0], coefficients, 0.0).sum(dim=1)
                at_stop = chosen - reverse_kl * logp.exp()
            # The columns that were merged into one share its gradient
            at_eos = at_stop.unsqueeze(1) * torch.exp(columns[0].logits - stop)
        outputs = [loss, statistics.student.entropy, reverse_kl, *([counts] if has_forward_kl else [])]
        return outputs, [at_eos, *saved]

    def tile_gradient(
        self, models: list[TiledModel], saved: list[Any], grads: Sequence[Tensor | None], scratch: Scratch
    ) -> TileGradient:
        """
        With respect to the student's logits it is `p (log p - log Q - KL)` over the full support, with `p - p_T` where
        the forward KL counts, and `Σ_k c_k (1[v = k] - p)` over the top-k.
        """
        assert grads[0] is not None
        # From the tile back to the output layer: temperature and scale
        scale = grads[0].to(scratch.dtype).unsqueeze(1) * (models[0].factor * models[0].logit_scale)

        def gradient(block: Block, rows: slice, tanh: Tensor | None) -> Tensor:
            at_eos, log_norm, reverse_kl, *rest = (tensor[rows] for tensor in saved)
            grad = _logits(block, rows, scratch, tanh=tanh)
            if self.top_k is None:
                partners = [_logits(block, rows, scratch, index) for index in range(1, len(block.models))]
                target = self.target_(grad, partners)
                log_probs = grad.sub_(log_norm.unsqueeze(1))
                probs = torch.exp(log_probs, out=scratch.take("aux", *grad.shape))
                target.sub_((rest[0] - reverse_kl).unsqueeze(1))
                log_probs.sub_(target).mul_(probs)
                if self.forward_kl_entropy is not None:
                    target.sub_(reverse_kl.unsqueeze(1)).exp_()
                    log_probs.add_(probs.sub_(target).mul_(rest[1].unsqueeze(1)))
            else:
                coefficients, columns = rest
                local, inside = tiles.local_columns(columns, block)
                grad.sub_(log_norm.unsqueeze(1)).exp_().mul_(-reverse_kl.unsqueeze(1))
                grad.scatter_add_(1, local, torch.where(inside, coefficients, 0.0))
            for index, column in tiles.eos_columns(self.eos_ids, block):
                grad[:, column] = at_eos[:, index]
            return grad.mul_(scale[rows])

        return gradient


@dataclass(frozen=True)
class _Support(Kernel):
    """Log-probabilities of the targets under student and teacher, and without gradient both entropies."""

    vocab: int
    eos_ids: tuple[int, ...]
    targets: Tensor

    def reads_partners(self, grads: Sequence[Tensor | None]) -> bool:
        return False

    def forward(self, models: list[TiledModel], scratch: Scratch) -> tuple[Sequence[Tensor | None], list[Any]]:
        settings: dict[str, Any] = {"entropy": True, "eos_ids": self.eos_ids}
        (log_norm, logps, entropy), (_, teacher_logps, teacher_entropy) = (
            tiles.softmax_statistics([model], self.vocab, self.targets, scratch, _logits, **settings)
            for model in models
        )
        return [logps, teacher_logps, teacher_entropy, entropy], [log_norm, logps]

    def tile_gradient(
        self, models: list[TiledModel], saved: list[Any], grads: Sequence[Tensor | None], scratch: Scratch
    ) -> TileGradient:
        """With respect to the student's logits it is `1[target] - p`; the tokens of a stop event share its 1."""
        assert grads[0] is not None
        log_norm, logps = saved
        scale = grads[0].to(scratch.dtype).unsqueeze(1) * (models[0].factor * models[0].logit_scale)

        def gradient(block: Block, rows: slice, tanh: Tensor | None) -> Tensor:
            grad = _logits(block, rows, scratch, tanh=tanh).sub_(log_norm[rows].unsqueeze(1))
            targets = self.targets[rows]
            stops = [(column, grad[:, column].clone()) for _, column in tiles.eos_columns(self.eos_ids, block)]
            local, inside = tiles.local_columns(targets.unsqueeze(1), block)
            grad.exp_().neg_().scatter_add_(1, local, inside.to(grad.dtype))
            for column, log_probs in stops:
                share = torch.where(targets == self.eos_ids[0], (log_probs - logps[rows]).exp(), 0.0)
                grad[:, column] = share - log_probs.exp()
            return grad.mul_(scale[rows])

        return gradient


def _logits(block: Block, rows: slice, scratch: Scratch, index: int = 0, tanh: Tensor | None = None) -> Tensor:
    """One model's logits over the temperature, in a buffer of its own; very negative instead of `-inf`."""
    tile = tiles.logits_tile(block, rows, scratch, index, f"model {index}", tanh=tanh, rounded=False)
    return tile.clamp_(min=NO_MAXIMUM)


class _Statistics:
    """
    Online statistics of the student's logits `s` against those of the target, `q`: softmaxes, entropy, and the KL over
    all columns or the student's top-k of them; on request the target's entropy and the forward KL.
    """

    def __init__(self, count: int, top_k: int | None, scratch: Scratch, has_forward_kl: bool) -> None:
        self.student, self.target = RunningSoftmax(count, scratch), RunningSoftmax(count, scratch)
        self.support = None if top_k is None else RunningTopK(count, top_k, scratch)
        self._gap_sum = torch.zeros_like(self.student.total)  # Σ e^(s - m) ((s - m) - (q - m_q))
        # The same with the roles exchanged
        self._forward_gap_sum = torch.zeros_like(self.student.total) if has_forward_kl else None
        self._scratch = scratch

    def fold_(self, rows: slice, student: Tensor, target: Tensor, first_column: int) -> None:
        """Count a tile, and overwrite it."""
        if self.support is not None:
            self.support.fold(rows, student, first_column, target)
        shift, target_shift = self.student.shift_(rows, student), self.target.shift_(rows, target)
        probs = self._scratch.take("aux", *student.shape)
        torch.exp(target, out=probs)
        if self._forward_gap_sum is None:
            self.target.add_total_(rows, probs, target_shift)
        else:
            other = torch.sub(target, student, out=self._scratch.take("other", *student.shape))
            earlier = self.target.rescaled(rows, self._forward_gap_sum, target_shift, target_shift - shift)
            self._forward_gap_sum[rows] = earlier + other.mul_(probs).sum(dim=1)
            self.target.add_(rows, other.copy_(target), probs, target_shift)
        torch.exp(student, out=probs)
        if self.support is None:
            earlier = self.student.rescaled(rows, self._gap_sum, shift, shift - target_shift)
            self._gap_sum[rows] = earlier + target.neg_().add_(student).mul_(probs).sum(dim=1)
        self.student.add_(rows, student, probs, shift)

    def reverse_kl(self) -> Tensor:
        """Over all columns."""
        return self._gap_sum / self.student.total - self.student.total.log() + self.target.total.log()

    def forward_kl(self) -> Tensor:
        """Over all columns."""
        assert self._forward_gap_sum is not None
        return self._forward_gap_sum / self.target.total - self.target.total.log() + self.student.total.log()

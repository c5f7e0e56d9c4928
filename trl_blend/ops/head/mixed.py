"""Log-probabilities and entropy of a mixed policy from hidden states, without ever building `(N, V)` logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trl_blend.errors import ConfigError
from trl_blend.ops.head import tiles
from trl_blend.ops.head.layer import GatherParameters, LMHead, frozen, no_gather
from trl_blend.ops.head.tiles import LOG_ZERO, Block, Kernel, Scratch, TiledModel, TileGradient
from trl_blend.ops.mixing import SPACES, student_weight, validate_weights


class MixedLogProbs(NamedTuple):
    """
    Result of [`mixed_log_probs`].

    Args:
        logps (`torch.Tensor` of shape `(N,)`):
            `log p_mix(target)` in nats.
        entropy (`torch.Tensor` of shape `(N,)`, *optional*):
            Entropy of `p_mix` in nats.
    """

    logps: Tensor
    entropy: Tensor | None


def mixed_log_probs(
    student: LMHead,
    partners: Sequence[LMHead],
    weights: Sequence[float],
    targets: Tensor,
    *,
    temperature: float = 1.0,
    space: Literal["logits", "probs", "arithmetic"] = "logits",
    compute_entropy: bool = True,
    vocab_size: int | None = None,
    gather_parameters: GatherParameters = no_gather,
) -> MixedLogProbs:
    r"""
    Scores tokens under a student that is mixed with frozen partners, differentiably for the student. Use it where the
    policy that is trained is the mixture that has sampled, with partner weights of typically 0.1 to 0.5.

    `log p_mix(target)` and the entropy of `p_mix`:

    $$
    \text{logits: } p_{mix} = \mathrm{softmax}\Bigl(\tfrac1\tau \sum_m w_m z_m\Bigr), \qquad
    \text{probs: } p_{mix} = \sum_m w_m\,\mathrm{softmax}(z_m / \tau), \qquad
    w_S = 1 - \sum_i w_i
    $$

    "arithmetic" is "logits" with `w_S = 1` and partner weights of any sign, see
    [`~trl_blend.ops.mixing.arithmetic_logits`].

    Per-model biases, scales, softcaps, hidden sizes and vocabulary sizes are allowed. Projections run in the dtype of
    the hidden states (under autocast, in its dtype) as in TRL's `ChunkedLogProbFunction`; sums and statistics in
    float32, or in float64 where hidden states are float64.

    Gradients of both outputs reach `student.hidden`, `student.weight` and `student.bias` (all zero when the partners
    have all the weight). Partner tensors get none, nor do `targets`. Not done here: masking, double backward.

    Mixed logits are the logits of one wider output layer, `[W_S ; W_T] · [w_S h_S ; w_T h_T]` concatenated along the
    hidden axis. That identity is evaluated tile by tile: each model is projected, summed in a buffer of bounded size
    and folded into an online log-sum-exp, so there is no concatenated copy of the weights and no gradient buffer for
    the frozen half. The backward recomputes the tiles. Passes over the vocabulary, one projection per model each:
    logits and arithmetic 1 forward and 1 backward; probs 1 forward (2 with entropy) and 1 backward, which skips the
    partners unless the entropy is differentiated. Models of weight 0 are skipped everywhere.

    Args:
        student ([`LMHead`]):
            Output layer of the student; it defines the vocabulary size `V`.
        partners (`Sequence[LMHead]`):
            Output layers of the partners. Entries past a partner's vocabulary have logit `-inf` for it; entries past
            `V` are dropped before its softmax.
        weights (`Sequence[float]`):
            One weight in `[0, 1]` per partner, at most 1 together; with `space="arithmetic"` any numbers.
        targets (`torch.Tensor` of shape `(N,)`):
            Token ids in `[0, V)`. Replace ignored labels such as -100 first; out-of-range ids give `-inf`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of `p_mix`. Each model's logits are divided by it.
        space (`str`, *optional*, defaults to `"logits"`):
            What is averaged, `"logits"` or `"probs"`, or logits that are added, `"arithmetic"`.
        compute_entropy (`bool`, *optional*, defaults to `True`):
            Whether to compute the entropy.
        vocab_size (`int`, *optional*):
            Rows of the student's output layer that are tokens; the others have no probability, and `V` is this
            number. All of them by default.
        gather_parameters (`Callable`, *optional*):
            Context-manager factory, entered with the weights and biases in use around the forward and again in the
            backward (ZeRO-3: TRL's `maybe_gather_lm_head_ctx`). Does nothing by default.

    Returns:
        [`MixedLogProbs`]: `logps` and `entropy` of shape `(N,)`, in float32 (float64 for float64 hidden states).

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the weights, the temperature, the space or a shape is invalid.
    """
    if space not in SPACES:
        raise ConfigError(f"`space` is {space!r}. Set it to one of {', '.join(map(repr, SPACES))}.")
    checked = validate_weights(weights, space=space)
    if len(checked) != len(partners):
        raise ConfigError(
            f"`weights` has {len(checked)} entries for {len(partners)} partners. Pass one weight per partner."
        )
    if not 0.0 < temperature < math.inf:
        raise ConfigError(f"`temperature` is {temperature}. Set it to a positive number.")
    for head in (student, *partners):
        if head.hidden.dim() != 2 or targets.shape != head.hidden.shape[:1]:
            raise ConfigError(
                f"`hidden` has shape {tuple(head.hidden.shape)} and `targets` has shape {tuple(targets.shape)}. "
                "Flatten them to (N, H) and (N,), with the same tokens for every model."
            )
    heads = [(student, student_weight(checked, space))]
    heads += [(frozen(partner), share) for partner, share in zip(partners, checked, strict=True) if share != 0.0]
    # With one model left all spaces are its own softmax, and the logits path needs one pass fewer
    mixes_logits = space != "probs" or sum(share != 0.0 for _, share in heads) == 1
    models = [tiles.tiled(head, (share if mixes_logits else 1.0) / temperature, share) for head, share in heads]
    with gather_parameters(*tiles.parameters_of(models)):
        kernel = _MixedLogProbs(tiles.vocabulary(student, vocab_size), targets, mixes_logits, compute_entropy)
        logps, entropy = tiles.run(kernel, models, gather_parameters)
    return MixedLogProbs(logps, entropy)


@dataclass(frozen=True)
class _MixedLogProbs(Kernel):
    """The student comes first, also when its weight is 0; no partner's weight is 0."""

    vocab: int
    targets: Tensor
    mixes_logits: bool
    computes_entropy: bool

    def is_differentiable(self, output: int) -> bool:
        return True

    def reads_partners(self, grads: Sequence[Tensor | None]) -> bool:
        # Of mixed probabilities, the student's own distribution is all that the gradient of `logps` needs
        return self.mixes_logits or grads[1] is not None

    def forward(self, models: list[TiledModel], scratch: Scratch) -> tuple[Sequence[Tensor | None], list[Any]]:
        models = [model for model in models if model.share != 0.0]
        if self.mixes_logits:
            log_norm, logps, entropy = self._softmax_statistics(models, scratch, entropy=self.computes_entropy)
            return (logps, entropy), [log_norm, None if entropy is None else -entropy]
        alone = [self._softmax_statistics([model], scratch, entropy=False) for model in models]
        log_norms = [log_norm for log_norm, _, _ in alone]
        terms = torch.stack([math.log(model.share) + logps for model, (_, logps, _) in zip(models, alone)])
        logps = terms.logsumexp(dim=0)
        entropy, cross = None, None
        if self.computes_entropy:
            entropy, cross = _mixed_probs_entropy(models, log_norms, self.vocab, scratch)
        # d log p_mix(target) / d log p_S(target); 0 for a target that no model can produce
        responsibility = torch.where(logps > -math.inf, (terms[0] - logps).exp(), 0.0)
        return (logps, entropy), [responsibility, cross, *log_norms]

    def _softmax_statistics(
        self, models: list[TiledModel], scratch: Scratch, *, entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return tiles.softmax_statistics(models, self.vocab, self.targets, scratch, _mixed_logits, entropy=entropy)

    def tile_gradient(
        self, models: list[TiledModel], saved: list[Any], grads: Sequence[Tensor | None], scratch: Scratch
    ) -> TileGradient:
        """
        With respect to the student's logits it is `a (1[target] - p) - b p (log p_mix - c)`. With logits mixed, `p` is
        `p_mix` and `c = -entropy`. With probabilities mixed, `p` is `p_S` and `c` its negative cross entropy against
        `p_mix`; `a` has the student's share of the target's probability, `b` its weight.
        """
        statistic, center, *log_norms = saved
        # From the tile back to the output layer: temperature, scale and, with logits mixed, the weight
        factor = models[0].factor * models[0].logit_scale
        at_target, at_entropy = (None if grad is None else grad.to(scratch.dtype) * factor for grad in grads)
        at_target = torch.zeros_like(statistic) if at_target is None else at_target
        if self.mixes_logits:
            log_norms = [statistic]
        else:
            at_target = at_target * statistic
            at_entropy = None if at_entropy is None else at_entropy * models[0].share

        def gradient(block: Block, rows: slice, tanh: Tensor | None) -> Tensor:
            if self.mixes_logits or at_entropy is None:
                # Without an entropy gradient, mixed probabilities leave the student alone here: the same code
                grad = _mixed_logits(block, rows, scratch, tanh).sub_(log_norms[0][rows, None]).clamp_(min=LOG_ZERO)
                probs = grad.exp_() if at_entropy is None else torch.exp(grad, out=scratch.take("aux", *grad.shape))
            else:
                grad, log_probs = _mixed_probs(block, log_norms, rows, scratch, tanh)
                probs = log_probs.exp_()
            a = at_target[rows, None]
            if at_entropy is None:
                torch.mul(probs, -a, out=grad)
            else:
                b = at_entropy[rows, None]
                # a + b (log p_mix - c), as b log p_mix + (a - b c)
                grad.mul_(b).add_(a - b * center[rows, None]).mul_(probs).neg_()
            local, inside = tiles.local_columns(self.targets[rows, None], block)
            return grad.scatter_add_(1, local, torch.where(inside, a, 0.0))

        return gradient


def _mixed_logits(block: Block, rows: slice, scratch: Scratch, tanh: Tensor | None = None) -> Tensor:
    """Sum of the models' tiles, in the buffer `"tile"`. `tanh` is that of the first model."""
    tile = scratch.take("tile", rows.stop - rows.start, block.stop - block.start)
    for index, model in enumerate(block.models):
        tiles.project(tile, model, rows, scratch, accumulate=index > 0, tanh=None if index else tanh)
    return tile


def _mixed_probs(
    block: Block, log_norms: Sequence[Tensor], rows: slice, scratch: Scratch, tanh: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    `log p_mix` of one tile where probabilities are mixed, in the buffer `"tile"`, and `log p` of the first model, in
    the buffer `"first"`. `tanh` is that of the first model. Overwrites the buffer `"term"`.
    """
    first = tiles.logits_tile(block, rows, scratch, 0, "first", tanh=tanh).sub_(log_norms[0][rows, None])
    tile = torch.add(first, math.log(block.models[0].share), out=scratch.take("tile", *first.shape))
    for index in range(1, len(block.models)):
        term = tiles.logits_tile(block, rows, scratch, index, "term")
        term.add_(math.log(block.models[index].share) - log_norms[index][rows, None])
        torch.logaddexp(tile, term, out=tile)
    return tile.clamp_(min=LOG_ZERO), first


def _mixed_probs_entropy(
    models: Sequence[TiledModel], log_norms: Sequence[Tensor], vocab: int, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """`-Σ p_mix log p_mix`, and `Σ p log p_mix` for the first model's `p`, each `(N,)`."""
    entropy, cross = torch.zeros_like(log_norms[0]), torch.zeros_like(log_norms[0])
    for block in tiles.vocab_blocks(models, vocab):
        for rows in tiles.token_rows(entropy.shape[0]):
            tile, first = _mixed_probs(block, log_norms, rows, scratch)
            entropy[rows] -= torch.exp(tile, out=scratch.take("term", *tile.shape)).mul_(tile).sum(dim=1)
            cross[rows] += first.exp_().mul_(tile).sum(dim=1)
    return entropy, cross

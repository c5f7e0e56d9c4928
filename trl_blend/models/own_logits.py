"""
Whether log-probabilities computed from hidden states and an output layer are those of the model's own `logits`.

Everything that this package trains on or stores is computed in that way, from rows that are padded or packed. Not
every architecture allows for it: some do more to hidden states or logits, some take padding for positions, or read it.
Before the first number [`check_own_logits`] compares a few tokens: three forward passes of 44 tokens in all (38 where
rows are packed), of which the largest has two rows.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from trl_blend import _compat
from trl_blend.errors import UnsupportedError
from trl_blend.models.limits import context_length, vocabulary_rows
from trl_blend.models.wrappers import evaluation_mode, innermost_model
from trl_blend.ops.head.layer import LMHead
from trl_blend.ops.reduction import at_least_float32


Fused = Callable[[dict[str, Tensor]], Tensor]
"""
From `input_ids` of shape `(B, T)` and `attention_mask` or `position_ids` to log-probabilities of shape `(B, n, V)`:
those of the `n` positions before the last one.
"""

_LENGTH, _AROUND = 8, 6  # tokens of the compared sequence, and of what stands around it
# Root mean square difference, relative to the spread of the log-probabilities
_EXACT, _ROUNDED, _ROUTED = 1e-3, 2e-2, 0.2
_TIMES_NOISE = 3.0
_ROUNDING = 2.0**-9  # of a bfloat16 number


def check_own_logits(
    model: nn.Module,
    argument: str,
    fused: Fused,
    *,
    layout: str = "right_padded",
    vocab_size: int | None = None,
    disable_adapters: bool = False,
) -> None:
    """
    Check that `fused` computes the log-probabilities that the model's own `logits` give, in the layout of the batches.

    The model runs in evaluation mode without gradient; its mode, gradients and the random state are left as they were.
    Under FSDP2, DDP and ZeRO-3 all processes call this together. Where left-padded rows are right only at positions
    that are counted from their first token, and the model does not count them so by itself (learned positions, as in
    GPT-2), it does from here on.

    In float32 on a CPU the tolerance is 1e-3 of the spread of the log-probabilities. In a lower precision, or on an
    accelerator, it is 2e-2 beyond the rounding of the logits; for a layout three times what another batch alone makes,
    if that is more (experts that are routed differently).

    Args:
        model (`nn.Module`):
            Causal language model, PEFT and distributed wrappers included.
        argument (`str`):
            Name of the argument that holds it, for the error message.
        fused (`Callable`):
            How log-probabilities are computed, see [`fused_log_probs`].
        layout (`str`, *optional*, defaults to `"right_padded"`):
            `"right_padded"`, `"left_padded"` (prompts on the left, completions on the right) or `"packed"`.
        vocab_size (`int`, *optional*):
            Number of tokens to choose from, where `fused` runs a model with fewer of them too.
        disable_adapters (`bool`, *optional*, defaults to `False`):
            Whether it is the base of an adapter that is meant.

    Raises:
        [`~trl_blend.errors.UnsupportedError`]: If they differ. The message names the model, what differs and by how
            much.
    """
    inner: Any = innermost_model(extract_model_from_parallel(model, keep_torch_compile=False), argument)
    device = inner.get_input_embeddings().weight.device
    rows = _Rows.of(inner.config, layout, min(vocab_size or sys.maxsize, vocabulary_rows(inner)), device)
    with left_as_it_was(model, device, disable_adapters):
        name = _name(inner, argument)
        logits = _own_logits(model, rows.alone, name)
        compared = _Comparison(logits, name, logits.itemsize < 4 or _is_coarse(inner, device))
        compared.check_alone(rows, _computed(fused, rows.alone, name))
        problem = compared.problem_of(rows, fused(rows.batch))
        if problem is not None and layout == "left_padded":
            counting = _count_positions_from_mask(inner.base_model)
            if counting is not None:
                problem = compared.problem_of(rows, fused(rows.batch))
                if problem is not None:
                    counting.remove()
    if problem is not None:
        raise UnsupportedError(problem)


def check_causal(model: nn.Module, argument: str) -> None:
    """
    Check that what follows a token does not change the model's own log-probabilities up to it: two forward passes of
    22 tokens in all. Without that, one pass over a text does not give the probabilities that it is drawn with.

    Raises:
        [`~trl_blend.errors.UnsupportedError`]: If it does.
    """
    inner: Any = innermost_model(extract_model_from_parallel(model, keep_torch_compile=False), argument)
    device, name = inner.get_input_embeddings().weight.device, _name(inner, argument)
    rows = _Rows.of(inner.config, "right_padded", vocabulary_rows(inner), device)
    longer = {key: value[1:] for key, value in rows.batch.items()}  # without padding
    with left_as_it_was(model, device, False):
        logits = _own_logits(model, rows.alone, name)
        found = at_least_float32(_own_logits(model, longer, name)).log_softmax(-1)
    compared = _Comparison(logits, name, logits.itemsize < 4 or _is_coarse(inner, device))
    if problem := compared.looks_ahead(found[None, :-1], len(found), (0, 0)):
        raise UnsupportedError(problem)


def fused_log_probs(model: nn.Module) -> Fused:
    """
    How a model with TRL's fused head computes log-probabilities: hidden states, then its output layer. Other than in
    training, all of the vocabulary is kept, for the few tokens that are compared.
    """

    def fused(inputs: dict[str, Tensor]) -> Tensor:
        captured: list[Tensor] = []

        def keep(head: LMHead, targets: Tensor, temperature: float, outputs: tuple[str, ...]) -> tuple[Any, ...]:
            captured.append(head_log_probs(head))
            names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
            zeros = torch.zeros(targets.shape, device=targets.device)
            return tuple(zeros if name in ("log_probs", *outputs) else None for name in names)

        with _compat.fused_log_prob_function(keep):
            model(**inputs, labels=inputs["input_ids"], fused_lm_head=True)
        return captured[0].view(inputs["input_ids"].shape[0], -1, captured[0].shape[-1])

    return fused


def head_log_probs(head: LMHead) -> Tensor:
    """Log-probabilities over the whole vocabulary, of shape `(N, V)`, of a few rows."""
    with _compat.gather_lm_head(head.weight, head.bias):
        dtype = head.hidden.dtype
        bias = None if head.bias is None else head.bias.to(dtype)
        logits = nn.functional.linear(head.hidden, head.weight.to(dtype), bias)
    logits = at_least_float32(logits) * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1)


class _Rows(NamedTuple):
    """
    The compared sequence alone, and a batch that holds it twice: where the layout could disturb it, and where only
    another shape, other rows or later tokens could.
    """

    alone: dict[str, Tensor]
    batch: dict[str, Tensor]
    tested: tuple[int, int]  # row and first position
    undisturbed: tuple[int, int]
    layout: str

    @classmethod
    def of(cls, config: Any, layout: str, vocab_size: int, device: torch.device) -> "_Rows":
        text, limit = config.get_text_config(), context_length(config) or _LENGTH + _AROUND
        length = min(_LENGTH, max(limit // 2, 2))
        around = max(min(_AROUND, limit - length), 0)
        ids = _ordinary_ids(config, vocab_size, length + around)
        sequence, others = ids[:length], (ids[length:] or ids)[:around]
        pad = getattr(text, "pad_token_id", None)
        pad = pad if isinstance(pad, int) and 0 <= pad < vocab_size else 0
        left = 0 if layout == "right_padded" else around - around // 3
        if layout == "packed":
            between = others or sequence
            segments = [sequence, between, sequence]
            batch = {
                "input_ids": torch.tensor([[token for segment in segments for token in segment]]),
                "position_ids": torch.cat([torch.arange(len(segment)) for segment in segments])[None],
            }
            tested = (0, length + len(between))
        else:
            right = around - left
            batch = {
                "input_ids": torch.tensor([[pad] * left + sequence + [pad] * right, sequence + others]),
                "attention_mask": torch.tensor([[0] * left + [1] * length + [0] * right, [1] * (length + around)]),
            }
            tested = (0, left)
        alone = torch.tensor([sequence], device=device)
        return cls(
            {"input_ids": alone, "attention_mask": torch.ones_like(alone)},
            {name: tensor.to(device) for name, tensor in batch.items()},
            tested,
            (0, 0) if layout == "packed" else (1, 0),
            layout,
        )


class _Comparison:
    """The model's own log-probabilities of the sequence, and what differs from them by more than rounding."""

    def __init__(self, logits: Tensor, name: str, coarse: bool) -> None:
        logits = at_least_float32(logits)
        self.own, self.magnitude = logits.log_softmax(-1), logits.square().mean().sqrt()
        self.name = name
        self.coarse = coarse
        self.tolerance = _ROUNDED if coarse else _EXACT

    def check_alone(self, rows: _Rows, found: Tensor) -> None:
        if found.shape[-1] != self.own.shape[-1]:
            raise UnsupportedError(
                f"{self.name} has {self.own.shape[-1]} logits per token and an output layer of {found.shape[-1]} "
                "rows: log-probabilities computed from its output layer are not its own. Use another model."
            )
        difference = self._difference(found, rows.alone["input_ids"].shape[1], (0, 0))
        if not difference.relative <= self.tolerance:
            raise UnsupportedError(
                f"{self.name}: log-probabilities computed from its hidden states and output layer differ from those "
                f"of its own logits by up to {difference.nats:.2g} nats: it does more to one of them than scaling and "
                "soft-capping. Use a model of another architecture."
            )

    def problem_of(self, rows: _Rows, found: Tensor) -> str | None:
        """What is wrong with the rows in a batch; `None` if nothing is."""
        width = rows.batch["input_ids"].shape[1]
        if problem := self.looks_ahead(found, width, rows.undisturbed):
            return problem
        noise = self._difference(found, width, rows.undisturbed)
        difference = self._difference(found, width, rows.tested)
        if difference.relative <= max(self.tolerance, _TIMES_NOISE * noise.relative if self.coarse else 0.0):
            return None
        what, remedy = _PROBLEMS[rows.layout]
        return (
            f"{self.name}: log-probabilities of a row {what} differ from those of the row alone by up to "
            f"{difference.nats:.2g} nats. {remedy}"
        )

    def looks_ahead(self, found: Tensor, width: int, place: tuple[int, int]) -> str | None:
        """What is wrong with a row that only later tokens and other rows could disturb; `None` if nothing is."""
        noise = self._difference(found, width, place)
        if noise.relative <= (_ROUTED if self.coarse else self.tolerance):
            return None
        return (
            f"{self.name}: its log-probability of a token depends, by up to {noise.nats:.2g} nats, on what follows "
            "the token or on other rows of the batch. Use a causal language model."
        )

    def _difference(self, found: Tensor, width: int, place: tuple[int, int]) -> "_Difference":
        row, start = place
        first = width - 1 - found.shape[1]
        skipped = max(first - start, 0)
        own = self.own[skipped : min(width - 1 - start, len(self.own))]
        mine = found[row, start + skipped - first :][: len(own)].to(own)
        change = (mine - own).square().mean().sqrt()
        if self.coarse:
            change = (change - _ROUNDING * self.magnitude).clamp(min=0.0)
        spread = (own - own.mean(-1, keepdim=True)).square().mean().sqrt()
        return _Difference(float(change / spread.clamp(min=1e-6)), float((mine - own).abs().max()))


class _Difference(NamedTuple):
    relative: float
    nats: float


_PROBLEMS = {
    "right_padded": ("with padding after it", "Use a causal language model."),
    "left_padded": (
        "with padding before it, as prompts of a batch have it,",
        "Use a model that leaves padding out by its `attention_mask`.",
    ),
    "packed": (
        "packed behind another one",
        "Set `packing=False` and `padding_free=False`: this model, or its `attn_implementation`, does not keep packed "
        "rows apart.",
    ),
}


def _name(inner: Any, argument: str) -> str:
    source = getattr(inner.config, "_name_or_path", None)
    return f"`{argument}` ({type(inner).__name__}{f' of {source}' if source else ''})"


def _own_logits(model: nn.Module, inputs: dict[str, Tensor], name: str) -> Tensor:
    """Logits of one row, of shape `(T, V)`, from the model's own forward."""
    logits = getattr(model(**inputs), "logits", None)
    if logits is None or logits.ndim != 3:
        raise UnsupportedError(
            f"{name} returns no logits of shape `(B, T, V)`, so there is nothing that its log-probabilities could be "
            "computed from. Use a causal language model."
        )
    if logits.isnan().any():
        raise UnsupportedError(
            f"{name}: its logits are not numbers (NaN). Check that its checkpoint is whole, and load it in bfloat16 "
            "or float32."
        )
    return logits[0]


def _computed(fused: Fused, inputs: dict[str, Tensor], name: str) -> Tensor:
    """What `fused` makes of inputs that the model's own forward takes."""
    try:
        return fused(inputs)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"{name} cannot compute log-probabilities from hidden states and output layer, though it has logits "
            f"({type(error).__name__}: {error}). Use a model of another architecture."
        ) from error


def _is_coarse(model: nn.Module, device: torch.device) -> bool:
    """Whether the model computes with less than float32 on a CPU, which gives the same digits in any layout."""
    if device.type != "cpu" or torch.is_autocast_enabled(device.type):
        return True
    return any(not weight.is_floating_point() or weight.itemsize < 4 for weight in model.parameters())


def _ordinary_ids(config: Any, vocab_size: int, count: int) -> list[int]:
    """Different token ids that are no special ones, such as the placeholder of an image."""
    text = config.get_text_config()
    special: set[int] = set()
    for part in (config, text):
        for name, value in part.to_dict().items():
            if name.endswith(("_token_id", "_token_index", "_token_ids")):
                special.update(value if isinstance(value, list) else [value])
    every = range(min(vocab_size, 1000))
    ordinary = [token for token in every if token not in special] or list(every)
    return [ordinary[(7 * index + 3) % len(ordinary)] for index in range(count)]


@contextmanager
def left_as_it_was(model: nn.Module, device: torch.device, disable_adapters: bool = False) -> Iterator[None]:
    """A model in evaluation mode, without gradients; modes and random numbers are afterwards what they were."""
    devices = [device] if device.type not in ("cpu", "mps") else []
    with (
        torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
        torch.no_grad(),
        evaluation_mode(model, disable_adapters=disable_adapters),
    ):
        yield


def _count_positions_from_mask(backbone: nn.Module) -> Any:
    """Let a backbone count positions from the first token of a left-padded row; `None` if it takes no positions."""
    parameters = inspect.signature(backbone.forward).parameters
    if "position_ids" not in parameters:
        return None

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
        if args or ids is None or mask is None or kwargs.get("position_ids") is not None or mask.shape != ids.shape:
            return None  # decoding, for instance, which counts by itself
        return args, {**kwargs, "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}

    return backbone.register_forward_pre_hook(count, with_kwargs=True)

"""
A model in this process: what it draws with transformers, and log-probabilities that it gives to tokens that exist.

For those, hidden states are taken from the backbone and projected in tiles ([`~trl_blend.ops.score_tokens`]), so that
`(B, T, V)` logits are never built.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trl_blend import _compat
from trl_blend.errors import ConfigError, TokenizerMismatchError, UnsupportedError
from trl_blend.generation.recording import DrawnLogProbs
from trl_blend.generation.settings import GENERATION_SETTINGS
from trl_blend.models.limits import context_length, vocabulary_rows
from trl_blend.models.loading import find_config, load_model
from trl_blend.models.output_layer import find_plain_outputs, plain_outputs
from trl_blend.models.own_logits import check_causal, check_own_logits, fused_log_probs, left_as_it_was
from trl_blend.models.wrappers import evaluation_mode, innermost_model
from trl_blend.ops.head.layer import LMHead
from trl_blend.ops.head.scores import TokenLogProbs, score_logits, score_tokens
from trl_blend.ops.policies import log_normalizer
from trl_blend.ops.reduction import at_least_float32
from trl_blend.rollouts.config import RolloutConfig, ScoringConfig
from trl_blend.rollouts.engines.base import (
    OnRows,
    Rollout,
    RowError,
    SamplingSettings,
    TokenScores,
    cut_at_eos,
    load_options,
)


logger = logging.getLogger(__name__)


def score_sequences(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    top_k: int | None = None,
    tokens_per_batch: int = 16384,
    on_rows: OnRows | None = None,
    vocab_size: int | None = None,
    fuses: bool | None = None,
) -> list[TokenScores]:
    """
    Log-probability of every completion token given its prefix: one forward pass, no sampling, no gradient.

    Rows of similar length share a batch, padded on the right, of at most `tokens_per_batch` tokens with the padding
    (always at least one row). The model runs in evaluation mode and is left as it was. Where hidden states and output
    layer do not give the log-probabilities of its own logits ([`~trl_blend.models.own_logits.check_own_logits`]), a
    warning says so, and rows go through its own forward one at a time.

    Args:
        model ([`~transformers.PreTrainedModel`] or `peft.PeftModel`):
            Causal language model.
        prompt_ids (`Sequence[Sequence[int]]`):
            Token ids of the prompts, at least one per row.
        completion_ids (`Sequence[Sequence[int]]`):
            Token ids of the completions, at least one per row.
        top_k (`int`, *optional*):
            Number of token ids to keep at every position, see [`~trl_blend.ops.score_tokens`].
        tokens_per_batch (`int`, *optional*, defaults to `16384`):
            Budget of one forward pass.
        on_rows (`Callable[[int], object]`, *optional*):
            Called after every forward pass with its number of rows.
        vocab_size (`int`, *optional*):
            Ids below it are tokens; the other rows of the model are padding and have no probability. All rows by
            default.
        fuses (`bool`, *optional*):
            What [`can_fuse`] found for the model, where it was asked before.

    Returns:
        `list[TokenScores]`: One per row, in the order given, in float32 (float64 for a float64 model).

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a row is empty or longer than the model's context, or a setting is out
            of range.
        [`~trl_blend.errors.TokenizerMismatchError`]: If a token id is beyond the model's vocabulary.
        [`~trl_blend.errors.UnsupportedError`]: If the model is not causal.
    """
    inner: Any = innermost_model(model, "model")
    _check_rows(inner, prompt_ids, completion_ids, vocab_size)
    if tokens_per_batch < 1:
        raise ConfigError(f"`tokens_per_batch={tokens_per_batch}` must be at least 1.")
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    scores: dict[int, TokenScores] = {}
    with torch.no_grad(), evaluation_mode(inner):
        fuses = can_fuse(inner) if fuses is None else fuses
        with _fused_head(inner) if fuses else nullcontext():
            for batch in length_sorted_batches(lengths, tokens_per_batch if fuses else 1):
                rows = [[*prompt_ids[index], *completion_ids[index]] for index in batch]
                starts = [len(prompt_ids[index]) for index in batch]
                score = _score_batch if fuses else _score_own_logits
                scores.update(zip(batch, score(inner, rows, starts, top_k, vocab_size), strict=True))
                if on_rows is not None:
                    on_rows(len(batch))
    return [scores[index] for index in range(len(lengths))]


def can_fuse(model: Any) -> bool:
    """Whether batches of hidden states and the output layer give the model's own log-probabilities."""
    with _fused_head(model):
        try:
            check_own_logits(model, "model", fused_log_probs(model))
        except UnsupportedError as error:
            check_causal(model, "model")
            logger.warning(
                f"{error} Scores are read from its own logits here, one row at a time: slower, and with all logits of "
                "a row in memory."
            )
            return False
    return True


def length_sorted_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """
    Indices of rows in batches of similar length, longest first, each of at most `tokens_per_batch` padded tokens.

    A row longer than the budget gets a batch of its own.
    """
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * width > tokens_per_batch:
            batches.append([])
            width = lengths[index]
        batches[-1].append(index)
    return batches


def _score_batch(
    model: Any, rows: Sequence[Sequence[int]], starts: Sequence[int], top_k: int | None, vocab_size: int | None
) -> list[TokenScores]:
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
        labels[index, start : len(row)] = ids[index, start : len(row)]
    scored: list[TokenLogProbs] = []

    def score(head: LMHead, targets: Tensor, temperature: float, outputs: tuple[str, ...]) -> tuple[Any, ...]:
        chosen = (labels[:, 1:] != -100).flatten().to(targets.device)
        placeholder = torch.zeros(targets.shape, device=targets.device)
        # TRL hands over all positions, or only the labelled ones (kernels on an accelerator)
        if head.hidden.shape[0] == chosen.numel():
            head, targets = head._replace(hidden=head.hidden[chosen]), targets[chosen]
        gather = _compat.gather_lm_head
        scored.append(score_tokens(head, targets, top_k, vocab_size=vocab_size, gather_parameters=gather))
        return placeholder, None, None, None, None

    device = model.get_input_embeddings().weight.device
    with _compat.fused_log_prob_function(score):
        model(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device), fused_lm_head=True)
    ends = np.cumsum([len(row) - start for row, start in zip(rows, starts, strict=True)])
    split = [np.split(column, ends[:-1]) for column in _columns(scored[0])]
    return [TokenScores(*parts) for parts in zip(*split, strict=True)]


def _score_own_logits(
    model: Any, rows: Sequence[Sequence[int]], starts: Sequence[int], top_k: int | None, vocab_size: int | None
) -> list[TokenScores]:
    """Scores of rows from the model's own forward, one by one and without padding: right for any causal model."""
    device, found = model.get_input_embeddings().weight.device, []
    for row, start in zip(rows, starts, strict=True):
        ids = torch.tensor([row], device=device)
        logits = model(input_ids=ids).logits[0, start - 1 : -1]
        scored = score_logits(at_least_float32(logits), ids[0, start:], top_k, vocab_size=vocab_size)
        found.append(TokenScores(*_columns(scored)))
    return found


def _columns(scored: TokenLogProbs) -> list[np.ndarray]:
    """Those that there are: all of them, or without `top_k` the first."""
    return [column.cpu().numpy() for column in scored if column is not None]


@contextmanager
def _fused_head(model: Any) -> Iterator[None]:
    """TRL's fused head on `model`, taken off on exit: a caller's model is left as it was."""
    own = model.__dict__.get("forward")
    _compat.add_fused_lm_head(model, temperature=1.0, cast_lm_head_to_fp32=False)
    try:
        with plain_outputs(find_plain_outputs([model], "model")):
            yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _check_rows(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    vocab_size: int | None,
) -> None:
    if len(prompt_ids) != len(completion_ids):
        raise ConfigError(
            f"`prompt_ids` has {len(prompt_ids)} rows and `completion_ids` {len(completion_ids)}. Pass one completion "
            "per prompt."
        )
    limit, rows = context_length(model.config), vocabulary_rows(model)
    rows = rows if vocab_size is None else min(rows, vocab_size)
    for index, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        for name, ids in (("prompt_ids", prompt), ("completion_ids", completion)):
            if len(ids) == 0:
                raise ConfigError(f"`{name}[{index}]` is empty. A score needs a prefix and a token: drop the row.")
            if not 0 <= min(ids) <= max(ids) < rows:
                bad = max(ids) if max(ids) >= rows else min(ids)
                raise TokenizerMismatchError(
                    f"`{name}[{index}]` holds token id {bad}, but the model has the {rows} tokens 0 to {rows - 1}. "
                    "Score with a model that shares the tokenizer of the data."
                )
        if limit is not None and len(prompt) + len(completion) > limit:
            raise ConfigError(
                f"Row {index} has {len(prompt)} prompt and {len(completion)} completion tokens, more than the model's "
                f"context of {limit} (`max_position_embeddings`). Drop the row, or use a model with a longer context."
            )


class LocalEngine:
    """
    Draws in batches of left-padded prompts, and scores as [`score_sequences`] does.

    The distribution is the model's own after temperature, top-k, top-p and min-p, in transformers' order, and nothing
    else: what the checkpoint's `generation_config.json` would add (a repetition penalty, suppressed tokens, ...) is
    left out, with a warning that names it. The model runs in evaluation mode and is left as it was, and so is the
    global random state. See [`~trl_blend.rollouts.engines.base.Engine`] for the arguments.

    Raises:
        [`~trl_blend.errors.UnsupportedError`]: If `model` is not a decoder-only model with `generate`.
    """

    def __init__(self, model: str | PreTrainedModel, argument: str, args: RolloutConfig | ScoringConfig) -> None:
        self._source, self._argument, self._args = model, argument, args
        self._options = load_options(args)
        config = find_config(model, argument, **self._options.hub)
        self.max_length = context_length(config)
        self.vocab_size: int | None = vocabulary_rows(config if isinstance(model, str) else model)
        packages = ("transformers", "torch")
        self.description = {"name": "transformers", **{package: version(package) for package in packages}}
        stored = getattr(config, "dtype", None)
        known = self._options.weights != "auto" or stored is None
        self.dtype = self._options.weights if known else str(stored).removeprefix("torch.")

    @property
    def max_batch(self) -> int | None:
        """All of them are one batch."""
        return self._args.batch_size

    @property
    def settings(self) -> dict[str, Any]:
        """The batch decides which random numbers a row gets; a score does not depend on it."""
        return {"batch_size": self._args.batch_size} if isinstance(self._args, RolloutConfig) else {}

    def load(self, device: torch.device | None, sampling: SamplingSettings | None = None) -> None:
        """Load the model, whole on one device."""
        loaded = load_model(self._source, self._argument, self._options, device)
        self.model: Any = innermost_model(loaded, self._argument)
        self._fuses: bool | None = None
        if sampling is None:
            return
        self.sampling = sampling
        self.eos_token_ids = sampling.eos_token_ids
        pad = sampling.pad_token_id
        # Some padding tokens were added without a row of the model
        self.pad_token_id = self.eos_token_ids[0] if pad is None or pad >= vocabulary_rows(self.model) else pad
        ours = {"do_sample", *sampling.to_dict()}
        declared = self.model.generation_config.to_diff_dict()
        left_out = sorted(name for name in declared if name in GENERATION_SETTINGS and name not in ours)
        if left_out:
            logger.warning(
                f"The checkpoint's generation_config.json sets {left_out}, which rollouts leave out: they are drawn "
                "from the model's own distribution after temperature, top-k, top-p and min-p only."
            )

    def score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        top_k: int | None,
        on_rows: OnRows | None = None,
        vocab_size: int | None = None,
    ) -> list[TokenScores]:
        """Scores of the rows, in order, over the first `vocab_size` rows of the vocabulary."""
        if self._fuses is None:
            with torch.no_grad(), evaluation_mode(self.model):
                self._fuses = can_fuse(self.model)
        return score_sequences(
            self.model,
            prompt_ids,
            completion_ids,
            top_k=top_k,
            tokens_per_batch=self._args.tokens_per_batch,
            on_rows=on_rows,
            vocab_size=vocab_size,
            fuses=self._fuses,
        )

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int], on_rows: OnRows | None = None
    ) -> list[Rollout]:
        """One rollout per prompt, in order. All of `prompt_ids` is one batch, seeded with the first of `seeds`."""
        width = max(len(prompt) for prompt in prompt_ids)
        ids = torch.full((len(prompt_ids), width), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompt_ids):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self.model.get_input_embeddings().weight.device
        recorder = _SampledLogProbs(_warpers(self.sampling), self.sampling.vocab_size)
        with left_as_it_was(self.model, device), self._neutral_generation_config() as config:
            torch.manual_seed(seeds[0])
            sequences = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=[recorder],
            )
        tokens = sequences[:, width:].tolist()
        rollout_logps, student_logps = recorder.finish(sequences, width)
        rollouts = []
        for row, completion in enumerate(tokens):
            end, ended = cut_at_eos(completion, self.eos_token_ids)
            rollouts.append(
                Rollout(completion[:end], rollout_logps[row][:end], student_logps[row][:end], truncated=not ended)
            )
        if on_rows is not None:
            on_rows(len(rollouts))
        return rollouts

    @contextmanager
    def _neutral_generation_config(self) -> Iterator[GenerationConfig]:
        # `generate` fills what its argument leaves open from the model's own configuration
        own = self.model.generation_config
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_id=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
        )
        self.model.generation_config = GenerationConfig()
        try:
            yield config
        finally:
            self.model.generation_config = own


def _warpers(sampling: SamplingSettings) -> list[LogitsProcessor]:
    """transformers' own, in its own order."""
    warpers: list[Any] = []
    if sampling.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers


class _SampledLogProbs(LogitsProcessor):
    """
    Applies the warpers, as the last processor of `generate`, and records log-probabilities before and after them.
    Rows of the vocabulary from `vocab_size` on are no tokens: they are taken out before.
    """

    def __init__(self, warpers: Sequence[LogitsProcessor], vocab_size: int | None = None) -> None:
        self._warpers = warpers
        self._vocab_size = vocab_size
        self._drawn = DrawnLogProbs()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._vocab_size is not None and self._vocab_size < scores.shape[-1]:
            scores = scores.clone()
            scores[:, self._vocab_size :] = -math.inf
        best = scores.amax(dim=-1)
        if not best.isfinite().all():
            row = int((~best.isfinite()).nonzero()[0])
            error = RowError(
                f"The student's logits are not numbers ({best[row]}) after {input_ids.shape[1]} tokens with the left "
                "padding, so that no token can be drawn. Check that the checkpoint is whole, and load it with "
                "`dtype='float32'` or `'bfloat16'`."
            )
            error.row = row
            raise error
        warped = scores
        for warper in self._warpers:
            warped = warper(input_ids, warped)
        self._drawn.add(input_ids, [(logits, log_normalizer(logits)) for logits in (warped, scores)])
        return warped

    def finish(self, sequences: Tensor, prompt_length: int) -> tuple[list[list[float]], list[list[float]]]:
        """Log-probabilities of the sampled-from distribution and of the model, one list per row each."""
        sampled, own = self._drawn.finish(sequences, prompt_length).clamp_(max=0.0).tolist()
        return sampled, own

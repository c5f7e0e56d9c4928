"""How completions are drawn and scored: what goes in, what every engine hands back, and which engines there are."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from trl_blend.errors import EngineError
from trl_blend.generation.settings import CUTS, active_settings
from trl_blend.models.loading import LoadOptions
from trl_blend.rollouts.config import RolloutConfig, ScoringConfig
from trl_blend.rollouts.format import LOWEST_LOGP, POSITIVE_TOLERANCE


ENGINES = {
    "transformers": "trl_blend.rollouts.engines.local:LocalEngine",
    "vllm": "trl_blend.rollouts.engines.vllm:VllmEngine",
    "vllm-server": "trl_blend.rollouts.engines.vllm_server:VllmServerEngine",
}
"""Engines by the name that a manifest has for them. A new one is a file with a class, and a line here."""

OnRows = Callable[[int], object]
"""Called with the number of rows that are done."""


class RowError(EngineError):
    """
    An engine cannot draw or score one of its rows.

    Attributes:
        row (`int`, *optional*): Index among the rows that the engine was given.
    """

    row: int | None = None


class Rollout(NamedTuple):
    """
    One completion, with log-probabilities in nats of each of its `T` tokens.

    Args:
        completion_ids (`list[int]`):
            Token ids, with the end-of-sequence token where there is one.
        rollout_logps (`list[float]`):
            Under the distribution that the token was sampled from: after temperature, top-k, top-p and min-p.
        student_logps (`list[float]`):
            Under the same model at temperature 1, over its whole vocabulary.
        truncated (`bool`):
            Whether the length limit ended it: there is no end-of-sequence token.
    """

    completion_ids: list[int]
    rollout_logps: list[float]
    student_logps: list[float]
    truncated: bool


@dataclass(frozen=True)
class TokenScores:
    """
    What a model thinks of one completion: log-probabilities in nats, at temperature 1, over its whole vocabulary.

    Args:
        logps (`numpy.ndarray` of shape `(T,)`):
            Log-probability of every completion token.
        topk_ids (`numpy.ndarray` of shape `(T, K)`, *optional*):
            The `K` most probable tokens, the last one replaced by the sampled token where that is not among them.
        topk_logps (`numpy.ndarray` of shape `(T, K)`, *optional*):
            Their log-probabilities.
        tail_logmass (`numpy.ndarray` of shape `(T,)`, *optional*):
            Logarithm of the probability of all other tokens together.
    """

    logps: np.ndarray
    topk_ids: np.ndarray | None = None
    topk_logps: np.ndarray | None = None
    tail_logmass: np.ndarray | None = None


@dataclass(frozen=True)
class SamplingSettings:
    """
    What is sampled, under the names of a manifest; [`~trl_blend.rollouts.config.RolloutConfig`] describes them.

    Args:
        temperature, top_p, top_k, min_p, max_new_tokens, num_rollouts_per_prompt, seed:
            As in the configuration, where `max_new_tokens` is `max_completion_length`.
        eos_token_ids (`list[int]`):
            Tokens that end a completion.
        pad_token_id (`int`, *optional*):
            Token to pad with; the first of `eos_token_ids` by default.
        vocab_size (`int`, *optional*):
            Ids below it are tokens. The model's rows from there on are padding: they are not drawn, and have no
            part in a log-probability where the engine can leave them out.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float | None
    max_new_tokens: int
    num_rollouts_per_prompt: int
    seed: int
    eos_token_ids: list[int]
    pad_token_id: int | None = None
    vocab_size: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """What a store is continued with."""
        return {name: value for name, value in asdict(self).items() if name not in ("pad_token_id", "vocab_size")}


class Engine(Protocol):
    """
    A model in an engine. `Engine(model, argument, args)` refuses what it cannot do, and loads nothing.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or `peft.PeftModel`):
            The model.
        argument (`str`):
            Name of the argument that holds it, for the error messages.
        args ([`~trl_blend.rollouts.config.RolloutConfig`] or [`~trl_blend.rollouts.config.ScoringConfig`]):
            The configuration.

    Attributes:
        description (`dict[str, str]`): Its name, versions and what it was started with, for the manifest.
        settings (`dict[str, Any]`): What else decides the rows, so that a store has to be continued with it.
        max_length (`int`, *optional*): Most tokens of a prompt and its completion, where that is known.
    """

    description: dict[str, str]
    settings: dict[str, Any]
    max_length: int | None

    def load(self, device: torch.device | None, sampling: SamplingSettings | None = None) -> None:
        """Make ready for scoring, or for drawing as `sampling` says."""
        ...


class RolloutEngine(Engine, Protocol):
    """
    Draws completions.

    Attributes:
        max_batch (`int`, *optional*): Number of rows that it wants at once, `None` for all of a shard.
    """

    max_batch: int | None

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int], on_rows: OnRows | None = None
    ) -> list[Rollout]:
        """One rollout per prompt, in order. The same prompts and seeds give the same rollouts."""
        ...


class ScoringEngine(Engine, Protocol):
    """
    Scores completions that exist.

    Attributes:
        vocab_size (`int`, *optional*): Number of the model's tokens, where that is known.
        dtype (`str`): What it computes in, as far as that is known.
    """

    vocab_size: int | None
    dtype: str

    def score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        top_k: int | None,
        on_rows: OnRows | None = None,
        vocab_size: int | None = None,
    ) -> list[TokenScores]:
        """
        Scores of the rows, in order, over the first `vocab_size` rows of the vocabulary.

        Raises:
            [`RowError`]: If a row cannot be scored.
        """
        ...


def make_engine(model: Any, argument: str, args: RolloutConfig | ScoringConfig) -> Any:
    """The engine that the configuration asks for."""
    module, _, name = ENGINES[args.engine].partition(":")
    return getattr(import_module(module), name)(model, argument, args)


def load_options(args: RolloutConfig | ScoringConfig) -> LoadOptions:
    """How the configuration has the model loaded."""
    return LoadOptions(args.revision, args.dtype, args.load_in_4bit, args.trust_remote_code)


def nucleus_settings(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a manifest's sampling settings that leave tokens out of the distribution."""
    found = active_settings(sampling, CUTS)
    if found.get("top_k") == -1:  # vLLM's word for all tokens
        del found["top_k"]
    return found


def as_logp(value: Any, token: int, position: int) -> float:
    """
    A log-probability as an engine wrote it, at most 0. Rounding above 0 is taken off.

    Raises:
        [`RowError`]: If it is none: missing, not a number, above 0, or what stands for "no number", such as -9999.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not LOWEST_LOGP <= number <= POSITIVE_TOLERANCE:
        raise RowError(
            f"The engine gave {value!r} as the log-probability of token {token} at position {position} of the "
            "completion, which is none: the model gives it no probability or no number (NaN). Check that the "
            "checkpoint is whole, serve it in bfloat16 or float32, use transformers (without a vLLM engine) to see "
            "the model's own number, or drop the row."
        )
    return min(number, 0.0)


def drawn_completion(
    tokens: Sequence[int], values: Sequence[Any], sampling: SamplingSettings
) -> tuple[list[int], list[float], bool]:
    """
    A completion as an engine drew it: its tokens up to the first end-of-sequence token, with it, their
    log-probabilities from what the engine wrote, and whether there is such a token.

    Raises:
        [`RowError`]: With the id and its position, if an id is no token or its value no log-probability.
    """
    end, ended = cut_at_eos(tokens, sampling.eos_token_ids)
    tokens = list(tokens[:end])
    for position, token in enumerate(tokens):
        if sampling.vocab_size is not None and not 0 <= token < sampling.vocab_size:
            raise RowError(
                f"The engine drew id {token} at position {position}, which is no token of the tokenizer (ids 0 to "
                f"{sampling.vocab_size - 1}): a row that only pads the model's embedding. Draw with transformers, "
                "which leaves such rows out, or resize the model (`resize_token_embeddings`)."
            )
    logps = [as_logp(value, token, at) for at, (value, token) in enumerate(zip(values[:end], tokens, strict=True))]
    return tokens, logps, ended


@contextmanager
def about_row(row: int) -> Iterator[None]:
    """Say of an error about a row which one it is."""
    try:
        yield
    except RowError as error:
        error.row = row if error.row is None else error.row
        raise


def row_seed(seed: int, row: int) -> int:
    """Seed of one row of a collection, in `[0, 2^63)`: neighbouring rows and seeds give unrelated numbers."""
    digest = hashlib.sha256(f"{seed}:{row}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def cut_at_eos(tokens: Sequence[int], eos_token_ids: Sequence[int]) -> tuple[int, bool]:
    """Number of tokens up to the first end-of-sequence token, with it, and whether there is one."""
    for position, token in enumerate(tokens):
        if token in eos_token_ids:
            return position + 1, True
    return len(tokens), False

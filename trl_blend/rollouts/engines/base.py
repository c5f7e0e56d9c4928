"""How rollouts are drawn, and what every engine hands back for one of them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from trl_blend.errors import ConfigError
from trl_blend.generation.settings import CUTS, active_settings


OnRows = Callable[[int, int], object]
"""Called with the number of rows that are done, and of their completion tokens."""


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


class RolloutEngine(Protocol):
    """Draws completions. `max_batch` is the number of rows that it wants at once, `None` for all of a shard."""

    max_batch: int | None

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int], on_rows: OnRows | None = None
    ) -> list[Rollout]:
        """One rollout per prompt, in order. The same prompts and seeds give the same rollouts."""
        ...


@dataclass(frozen=True)
class SamplingSettings:
    """
    What is sampled, with the defaults of the paper.

    Args:
        temperature (`float`, *optional*, defaults to `0.7`):
            Sampling temperature, more than 0.
        top_p (`float`, *optional*, defaults to `0.9`):
            Mass of the nucleus, in `(0, 1]`.
        top_k (`int`, *optional*, defaults to `0`):
            Number of most probable tokens to sample from, 0 for all.
        min_p (`float`, *optional*):
            Smallest probability relative to the most probable token, in `[0, 1]`.
        max_new_tokens (`int`, *optional*, defaults to `4096`):
            Length limit of a completion.
        num_rollouts_per_prompt (`int`, *optional*, defaults to `1`):
            Completions of every prompt.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a value is outside its range.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    min_p: float | None = None
    max_new_tokens: int = 4096
    num_rollouts_per_prompt: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < float("inf"):
            raise ConfigError(
                f"`temperature={self.temperature}` must be more than 0: a greedy completion is no sample of the "
                "policy. Use a low temperature such as 0.1."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"`top_p={self.top_p}` must be in (0, 1]. Use 1.0 to sample from all tokens.")
        if self.top_k < 0:
            raise ConfigError(f"`top_k={self.top_k}` must be at least 0. Use 0 to sample from all tokens.")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise ConfigError(f"`min_p={self.min_p}` must be in [0, 1]. Use None to leave it off.")
        for name in ("max_new_tokens", "num_rollouts_per_prompt"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}={getattr(self, name)}` must be at least 1.")

    def to_dict(self) -> dict[str, Any]:
        """Dictionary of JSON values."""
        return asdict(self)


def nucleus_settings(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a manifest's sampling settings that leave tokens out of the distribution."""
    found = active_settings(sampling, CUTS)
    if found.get("top_k") == -1:  # vLLM's word for all tokens
        del found["top_k"]
    return found


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

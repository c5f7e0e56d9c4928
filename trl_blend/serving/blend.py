"""What an engine draws from, as plain data: it fits into a configuration, and into a call to an engine that runs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trl_blend.errors import ConfigError
from trl_blend.generation.rules import (
    BlendRule,
    ChernoffBlend,
    ContrastiveDecoding,
    LogitArithmetic,
    LogitMixing,
    ProbabilityMixing,
    SpeculativeKD,
    TrustRegion,
)
from trl_blend.ops.vocab import EosMap


RULES: dict[str, type[Any]] = {
    rule.__name__: rule
    for rule in (
        LogitMixing,
        ProbabilityMixing,
        TrustRegion,
        SpeculativeKD,
        ChernoffBlend,
        ContrastiveDecoding,
        LogitArithmetic,
    )
}
"""Rules that an engine knows by name."""


@dataclass(frozen=True)
class Partner:
    """
    A model that an engine holds beside the student.

    Args:
        model (`str`):
            Folder or Hub id.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        dtype (`str`, *optional*):
            Such as `"bfloat16"`. `None`: the dtype that the engine has the student in.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the checkpoint.
    """

    model: str
    revision: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Blend:
    """
    What an engine draws from, until it is told otherwise.

    Args:
        rule ([`~trl_blend.generation.rules.BlendRule`], *optional*):
            `None`: the student alone.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature of the requests, 1 for greedy ones. The rule sees logits at this temperature; the
            engine divides by that of the request afterwards, so the two must agree.
        eos ([`~trl_blend.ops.EosMap`], *optional*):
            End-of-sequence tokens to merge into one, in every model.
        vocab_size (`int`, *optional*):
            Ids below it are tokens, and no other is drawn. What one of its models has no row for is never drawn.
        stop_token_ids (`tuple[int, ...]`, *optional*, defaults to `()`):
            Tokens that end a completion. An engine may be one step ahead of the end of a completion; that step is
            left out of the statistics.
        records (`bool`, *optional*, defaults to `False`):
            Whether to sum up the statistics of the rule.
        draft_tokens (`int`, *optional*):
            How many tokens the student drafts. `None`: as many as the engine was started with.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the rule is not one of [`RULES`], or the temperature is not positive.
    """

    rule: BlendRule | None = None
    temperature: float = 1.0
    eos: EosMap | None = None
    vocab_size: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    records: bool = False
    draft_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.rule is not None and type(self.rule) not in RULES.values():
            raise ConfigError(
                f"`rule` is {self.rule!r}, which an engine of vLLM does not know. Use one of {', '.join(RULES)}, or "
                "decode with transformers."
            )
        if not self.temperature > 0.0:
            raise ConfigError(
                f"`temperature={self.temperature}` must be positive. For greedy requests set it to 1, as the models "
                "are blended at temperature 1 there."
            )

    def to_dict(self) -> dict[str, Any]:
        """The blend as JSON holds it."""
        rule: Any = self.rule
        return asdict(self) | {
            "rule": None if rule is None else {"name": type(rule).__name__, **asdict(rule)},
            "eos": None if self.eos is None else self.eos._asdict(),
            "stop_token_ids": list(self.stop_token_ids),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Blend":
        """The blend that [`to_dict`][Blend.to_dict] wrote, also after JSON has made its tuples lists."""
        rule, eos = content["rule"], content["eos"]
        if rule is not None:
            settings = {name: tuple(value) if isinstance(value, list) else value for name, value in rule.items()}
            name = settings.pop("name")
            if name not in RULES:
                raise ConfigError(f"`rule` is {name!r}, which is unknown. Use one of {', '.join(RULES)}.")
            rule = RULES[name](**settings)
        merged = None if eos is None else EosMap(eos["target"], tuple(eos["merged"]))
        stops = tuple(content["stop_token_ids"])
        return cls(**{**content, "rule": rule, "eos": merged, "stop_token_ids": stops})

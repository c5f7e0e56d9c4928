"""Settings of a run: what the parents refuse is an error of ours; access tokens are used, and written nowhere."""

from typing import Any

from trl_blend.errors import ConfigError


class Token(str):
    """
    A token for the client of the Hub, which takes it for the string that it is.

    It is pickled as `None` (`training_args.bin`, which is pushed, is the pickled config), and its `repr` is a mask. So
    it does not reach processes that are spawned with a pickled config: these read `HF_TOKEN`.
    """

    mask = "<TOKEN>"
    # Spelt out: `eos_token` and `pad_token` are settings too
    settings = frozenset({"hub_token", "token", "use_auth_token", "auth_token", "access_token", "hf_token"})

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()

    def __copy__(self) -> "Token":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Token":
        return self

    def __repr__(self) -> str:
        return repr(self.mask)


class TokensUnwritten:
    """
    In front of the TRL class among a config's bases: `hub_token`, and a `token` among arguments for loading a model,
    reach the Hub and no file, report or message. What TRL or transformers refuse of the settings is a [`ConfigError`].
    """

    def __post_init__(self) -> None:
        try:
            super().__post_init__()  # type: ignore[misc]
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error
        guard_tokens(self)

    def to_dict(self) -> dict[str, Any]:
        """Settings as reports and files show them, see [`~transformers.TrainingArguments.to_dict`]."""
        return _masked(super().to_dict())  # type: ignore[misc]


def guard_tokens(args: Any) -> None:
    """Make every token among the settings a [`Token`]. A dict of the caller's is replaced, not changed."""
    for name, value in vars(args).items():
        guarded = _guarded(name, value)
        if guarded is not value:
            setattr(args, name, guarded)


def _guarded(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        inside = {key: _guarded(str(key), item) for key, item in value.items()}
        return inside if any(inside[key] is not item for key, item in value.items()) else value
    return Token(value) if name in Token.settings and type(value) is str else value


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _masked(item) for key, item in value.items()}
    return Token.mask if isinstance(value, Token) else value

"""The models of a store, as its manifest has them: who they are, and what of it a second start has to repeat."""

from typing import Any

from accelerate import PartialState

from trl_blend.errors import ConfigError, StoreError
from trl_blend.models.fingerprint import identify_model
from trl_blend.rollouts.config import RolloutConfig, ScoringConfig
from trl_blend.rollouts.processes import on_main_process


def find(
    state: PartialState, model: Any, argument: str, args: RolloutConfig | ScoringConfig, tokenizer: Any = None
) -> dict[str, Any] | None:
    """
    Identity of a model as a dictionary, `None` if none is asked for. The main process reads the weights once.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If it cannot be had; the message says how to go on without.
    """

    def read() -> dict[str, Any]:
        try:
            return identify_model(model, tokenizer=tokenizer, revision=args.revision).to_dict()
        except (ConfigError, StoreError, OSError) as error:
            raise ConfigError(
                f"The identity of `{argument}={_name(model)!r}` cannot be recorded: {error} To go on without, set "
                "`identify=False` (`--no_identify`); the consistency of the teacher can then not be verified."
            ) from error

    return on_main_process(state, read) if args.identify else None


def settings(role: str, identity: dict[str, Any] | None, model: Any) -> dict[str, Any]:
    """What of a model's identity has to be the same at a second start, as flat settings."""
    name = {f"{role}_name": _name(model)}
    if identity is None:
        return name
    weights, adapter, tokenizer = (identity.get(part) or {} for part in ("weights", "adapter", "tokenizer"))
    parts = {
        f"{role}_weights": weights.get("sha256"),
        f"{role}_adapter": (adapter.get("weights") or {}).get("sha256"),
        f"{role}_tokenizer": tokenizer.get("sha256"),
    }
    return parts if weights else parts | name


def _name(model: Any) -> str:
    return model if isinstance(model, str) else type(model).__name__

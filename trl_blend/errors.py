"""
Errors of `trl_blend`: what is raised, by whom, and when.

Every message names the argument, its value and the remedy. Each class also derives from the builtin a caller would
expect, so `except ValueError` keeps working.

| error | raised by | when |
|---|---|---|
| [`ConfigError`] | a config's `__post_init__`, a trainer's constructor, a rule | a setting is outside its range or contradicts another |
| [`TokenizerMismatchError`] | `models.compatibility` | student and partner do not map the same tokens to the same ids |
| [`StoreError`] | `rollouts.store`, `rollouts.shard`, `rollouts.writer`, `rollouts.checks` | rollouts on disk are half-written, broken, of a newer schema, or do not hold what is asked for; a disk is full |
| [`ConsistencyError`] | `consistency.report` | the teacher of the log-probs is not, or not provably, the teacher of the student's SFT |
| [`EngineError`] | `rollouts.engines`, `collect_rollouts`, `score_rollouts` | a vLLM server cannot be reached, refuses a request, or does not return what is needed; a model gives no number for a token |
| [`HubError`] | a trainer's constructor and `push_to_hub`, `trl-blend export` | the Hub cannot be reached, or refuses the token or the repository |
| [`UnsupportedError`] | a trainer's constructor, `blended_generation` | a combination that this package cannot run correctly |
"""

import difflib
from collections.abc import Iterable


class TrlBlendError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(TrlBlendError, ValueError):
    """A setting is outside its range, or contradicts another one."""


class TokenizerMismatchError(TrlBlendError, ValueError):
    """Two models do not share one token-to-id map, so their logits cannot be combined."""


class StoreError(TrlBlendError, ValueError):
    """A store of rollouts cannot be read or written: half-written, broken, of a newer schema, without what is asked."""


class ConsistencyError(TrlBlendError, ValueError):
    """
    The teacher whose log-probs are stored is not, or not provably, the one the student was fine-tuned on.

    Args:
        message (`str`):
            The findings that failed, each with its remedy.
        report ([`~trl_blend.consistency.check.ConsistencyReport`], *optional*):
            Every finding, kept as attribute `report`.
    """

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class EngineError(TrlBlendError, RuntimeError):
    """What draws or scores rollouts cannot be reached, refuses a request, or gives no number where one is needed."""


class HubError(TrlBlendError, OSError):
    """The Hub cannot be reached, or refuses the token or the repository."""


class UnsupportedError(TrlBlendError, NotImplementedError):
    """A combination of features that would run, but not correctly."""


def nearest(name: str, known: Iterable[str], mark: str = "") -> str:
    """`"; did you mean ...?"` with the most similar known name, or nothing; `model` stands for `model_name_or_path`."""
    spelled = {one: one for one in sorted(known)}
    heads = {one.partition("_name")[0]: one for one in spelled if "_name" in one}
    spelled |= {head.rpartition("_")[2]: one for head, one in heads.items()} | heads
    found = difflib.get_close_matches(name, spelled, n=1, cutoff=0.6)
    return f"; did you mean `{mark}{spelled[found[0]]}`?" if found else ""

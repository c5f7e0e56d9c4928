"""
Errors of `trl_blend`: what is raised, by whom, and when.

Every message names the argument, its value and the remedy. Each class also derives from the builtin a caller would
expect, so `except ValueError` keeps working.

| error | raised by | when |
|---|---|---|
| [`ConfigError`] | a config's `__post_init__`, a trainer's constructor, a rule | a setting is outside its range or contradicts another |
| [`TokenizerMismatchError`] | `teacher.compatibility` | student and partner do not map the same tokens to the same ids |
| [`UnsupportedError`] | a trainer's constructor, `blended_generation` | a combination that this package cannot run correctly |
"""


class TrlBlendError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(TrlBlendError, ValueError):
    """A setting is outside its range, or contradicts another one."""


class TokenizerMismatchError(TrlBlendError, ValueError):
    """Two models do not share one token-to-id map, so their logits cannot be combined."""


class UnsupportedError(TrlBlendError, NotImplementedError):
    """A combination of features that would run, but not correctly."""

"""
Every setting of `generate` that decides which token comes next or where a text ends, with what it does: read this to
know what is refused, dropped or reported as more than temperature and length.

Left out: the length limit and the end-of-sequence token, which every run sets.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from trl_blend.errors import ConfigError


SAMPLES = "says how a token is drawn"
CUTS = "leaves unlikely tokens out of the draw"
RESHAPES = "changes the distribution, also of greedy decoding"
FORBIDS = "makes tokens impossible"
ENDS = "ends sequences"
SEARCHES = "looks for a likely sequence instead of drawing one token after another"


class Setting(NamedTuple):
    """The values with which a setting does nothing, and what it does with any other."""

    neutral: tuple[Any, ...]
    effects: frozenset[str]


def _setting(neutral: Any, *effects: str) -> Setting:
    return Setting((None, neutral), frozenset(effects))


GENERATION_SETTINGS = {
    "do_sample": Setting((True,), frozenset({SAMPLES})),  # left at `None` it is greedy
    "temperature": _setting(1.0, SAMPLES),
    "top_k": _setting(0, CUTS),
    "top_p": _setting(1.0, CUTS),
    "min_p": _setting(0.0, CUTS),
    "top_h": _setting(None, CUTS),
    "typical_p": _setting(1.0, CUTS),
    "epsilon_cutoff": _setting(0.0, CUTS),
    "eta_cutoff": _setting(0.0, CUTS),
    "repetition_penalty": _setting(1.0, RESHAPES),
    "encoder_repetition_penalty": _setting(1.0, RESHAPES),
    "exponential_decay_length_penalty": _setting(None, RESHAPES),
    "guidance_scale": _setting(1.0, RESHAPES),
    "watermarking_config": _setting(None, RESHAPES),
    "sequence_bias": _setting(None, RESHAPES, FORBIDS),
    "no_repeat_ngram_size": _setting(0, RESHAPES, FORBIDS),
    "bad_words_ids": _setting([], FORBIDS),
    "suppress_tokens": _setting([], FORBIDS),
    "begin_suppress_tokens": _setting([], FORBIDS),
    "forced_bos_token_id": _setting(None, FORBIDS),
    "forced_eos_token_id": _setting(None, FORBIDS),
    "min_length": _setting(0, FORBIDS),
    "min_new_tokens": _setting(0, FORBIDS),
    "stop_strings": _setting(None, ENDS),
    "num_beams": _setting(1, SEARCHES),
    "penalty_alpha": _setting(None, SEARCHES),
    "force_words_ids": _setting(None, SEARCHES),
}


# What vLLM has under other names, which it applies to the logits of a blend. Unset or empty they do nothing
AFTER_THE_BLEND = (
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "bad_words",
    "allowed_token_ids",
    "min_tokens",
    "structured_outputs",
)


def names_with(*effects: str) -> set[str]:
    """Names of the settings with one of the effects."""
    return {name for name, setting in GENERATION_SETTINGS.items() if setting.effects & set(effects)}


def without_sampling(generation_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `generate` without those of sampling, for greedy decoding."""
    sampling = names_with(SAMPLES, CUTS)
    return {name: value for name, value in generation_kwargs.items() if name not in sampling}


def active_settings(settings: Mapping[str, Any], *effects: str) -> dict[str, Any]:
    """
    Those of `settings`, such as `vars(generation_config)`, that have one of the effects, such as [`FORBIDS`], with a
    value that is not neutral. Names that are no settings of `generate` are passed over.
    """
    return {
        name: settings[name]
        for name, setting in GENERATION_SETTINGS.items()
        if name in settings and setting.effects & set(effects) and settings[name] not in setting.neutral
    }


def distribution_warpers(args: Any, checkpoint: Any = None) -> dict[str, Any]:
    """
    Sampling settings, by name, that make tokens come from another distribution than the tempered policy over all
    tokens.

    `args` is a configuration with TRL's sampling settings; its `generation_kwargs` override the others. `checkpoint`
    are the settings that come with the student: `generate` takes from there what is `None` in `args`.
    """
    names = names_with(SAMPLES, CUTS, RESHAPES)
    settings = {name: getattr(args, name, None) for name in names} | {"do_sample": True}
    settings |= args.generation_kwargs or {}
    settings |= {name: getattr(checkpoint, name, None) for name in names if settings[name] is None}
    found = active_settings({**settings, "temperature": None}, SAMPLES, CUTS, RESHAPES)
    if settings["temperature"] not in (None, args.temperature):
        found["temperature"] = settings["temperature"]
    return found


def check_one_sequence(generation_kwargs: Mapping[str, Any] | None, count: str) -> None:
    """
    Refuse several sequences per prompt row, which blended decoding does not draw. `count` is the option that sets the
    number of completions.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If beams or returned sequences are more than one.
    """
    for name in ("num_beams", "num_return_sequences"):
        value = (generation_kwargs or {}).get(name)
        if value not in (None, 1):
            raise ConfigError(
                f"`generation_kwargs` has `{name}={value}`, but blended decoding samples one sequence per prompt row. "
                f"Drop `{name}`; the number of completions is `{count}`."
            )

"""Sampling settings with which tokens are not drawn from the full tempered policy."""

from typing import Any


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (None, 0),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "top_h": (None,),
    "repetition_penalty": (None, 1.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "no_repeat_ngram_size": (None, 0),
    "watermarking_config": (None,),
    "sequence_bias": (None,),
    "exponential_decay_length_penalty": (None,),
    "encoder_repetition_penalty": (None, 1.0),
    "guidance_scale": (None, 1.0),
    "do_sample": (True,),
}


def distribution_warpers(args: Any, checkpoint: Any = None) -> dict[str, Any]:
    """
    Sampling settings that make tokens come from another distribution than the tempered policy over all tokens.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration with TRL's sampling settings; `generation_kwargs` override the others.
        checkpoint ([`~transformers.GenerationConfig`], *optional*):
            Settings that come with the student: `generate` takes from there what is `None` in `args`.

    Returns:
        `dict[str, Any]`: The settings that are not neutral, by name.
    """
    neutral = _NEUTRAL | {"temperature": (None, args.temperature)}
    settings = {name: getattr(args, name, None) for name in neutral} | {"do_sample": True}
    settings |= args.generation_kwargs or {}
    found = {}
    for name, values in neutral.items():
        value = getattr(checkpoint, name, None) if settings[name] is None else settings[name]
        if value not in values:
            found[name] = value
    return found

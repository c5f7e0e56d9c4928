"""The temperature-warmup baseline: only the student's sampling is warmed up, the loss keeps its temperature."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trl_blend.schedules import linear


def sampling_temperature(trainer: Any) -> float:
    """Temperature of the student's training rollouts at the current optimizer step."""
    start, steps = trainer.args.temperature_warmup_start, trainer.args.temperature_warmup_steps
    if not steps:
        return trainer.temperature
    return trainer.temperature - linear(trainer.temperature - start, steps)(trainer.state.global_step)


@contextmanager
def warmed_up_sampling(trainer: Any) -> Iterator[None]:
    """Let the parent's rollouts inside the context, by transformers or vLLM, sample at the warmup's temperature."""
    temperature = sampling_temperature(trainer)
    if temperature == trainer.temperature:
        yield
        return
    engine = trainer.vllm_generation if trainer.use_vllm else trainer.generation_config
    saved, saved_kwargs = engine.temperature, trainer.generation_kwargs
    engine.temperature, trainer.generation_kwargs = temperature, {**saved_kwargs, "temperature": temperature}
    try:
        yield
    finally:
        engine.temperature, trainer.generation_kwargs = saved, saved_kwargs

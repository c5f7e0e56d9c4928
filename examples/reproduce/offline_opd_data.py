"""The one-time work of offline distillation in `offline_opd.py`: rollouts of a student and a teacher's scores."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reproduce.jobs import machine
from reproduce.offline_opd_models import models
from testbed.task import MAX_NEW_TOKENS, build_prompt_dataset
from trl_blend import RolloutConfig, RolloutStore, ScoringConfig, collect_rollouts, score_rollouts


BATCH = 64  # rollouts of an optimizer step, and of a batch of `generate`
TOP_K = 16


@dataclass(frozen=True)
class Data:
    """
    One set of scored rollouts.

    Args:
        student, teacher (`str`):
            Fields of [`~reproduce.offline_opd_models.Models`].
        rollouts_per_prompt (`int`, *optional*, defaults to `1`):
            With more rollouts there are as many fewer prompts.
        temperature, top_p (`float`, *optional*, default to `1.0`):
            How the rollouts are drawn. The paper's are 0.7 and 0.9; 1 is what live distillation draws.
    """

    student: str = "early"
    teacher: str = "first"
    rollouts_per_prompt: int = 1
    temperature: float = 1.0
    top_p: float = 1.0

    def folder(self, work: Path, seed: int) -> Path:
        sampling = f"{self.student}-{self.rollouts_per_prompt}-{self.temperature:g}-{self.top_p:g}-seed{seed}"
        return work / "stores" / sampling

    def name(self) -> str:
        return f"{self.student}_{self.teacher}_{self.rollouts_per_prompt}x_{self.temperature:g}_{self.top_p:g}"


def collect(data: Data, work: Path, seed: int, steps: int) -> RolloutStore:
    """Rollouts for `steps` optimizer steps. Returns at once where they are there already."""
    args = RolloutConfig(
        output_dir=data.folder(work, seed) / "rollouts",
        num_rollouts_per_prompt=data.rollouts_per_prompt,
        temperature=data.temperature,
        top_p=data.top_p,
        max_completion_length=MAX_NEW_TOKENS,
        batch_size=BATCH,
        seed=seed,
        dtype="float32",
        disable_tqdm=True,
    )
    prompts = build_prompt_dataset("train", steps * BATCH // data.rollouts_per_prompt, seed)
    return collect_rollouts(str(getattr(models(work), data.student)), prompts, args)


def score(data: Data, rollouts: RolloutStore, work: Path, seed: int, top_k: int | None) -> RolloutStore:
    """The teacher's scores of the rollouts. Returns at once where they are there already."""
    name = f"{data.teacher}-top{top_k}" if top_k else data.teacher
    output_dir = data.folder(work, seed) / name
    args = ScoringConfig(output_dir=output_dir, top_k=top_k, dtype="float32", disable_tqdm=True)
    return score_rollouts(rollouts, str(getattr(models(work), data.teacher)), args)


def make_data(data: Data, work: Path, seed: int, steps: int, with_top_k: bool) -> dict[str, Any]:
    """Collect and score, and return what both cost; with and without the teacher's top tokens where asked for."""
    result: dict[str, Any] = {"data": asdict(data), "seed": seed, "steps": steps, "machine": machine()}
    started = _clocks()
    rollouts = collect(data, work, seed, steps)
    result |= _since(started, "collect") | {"tokens": rollouts.manifest.num_completion_tokens}
    for top_k in (None, TOP_K) if with_top_k else (None,):
        started = _clocks()
        scored = score(data, rollouts, work, seed, top_k)
        result |= _since(started, "score_top_k" if top_k else "score")
        result["bytes_per_token_top_k" if top_k else "bytes_per_token"] = round(scored.bytes_per_token, 2)
    return result


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(started: tuple[float, float], name: str) -> dict[str, float]:
    wall, cpu = _clocks()
    return {f"{name}_seconds": round(wall - started[0], 2), f"{name}_cpu_seconds": round(cpu - started[1], 2)}

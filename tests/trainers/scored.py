"""Scored rollouts of the tiny models, made from full logits with nothing of the package, and trainers on them."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.trainers.runs import EOS_IDS, SETTINGS, locate
from trl_blend import OfflineOPDConfig, OfflineOPDTrainer


NUM_ROWS = 8
TOP_K = 5
TEMPERATURE = 0.7
NOT_SFT = ("num_generations", "max_completion_length")


def offline_config(output_dir: Any, **settings: Any) -> OfflineOPDConfig:
    shared = {name: value for name, value in SETTINGS.items() if name not in NOT_SFT}
    defaults = {"gradient_accumulation_steps": 1, "weight_decay": 0.0, "teacher_consistency": "off"}
    defaults["offline_loss"] = "sampled_token"  # the paper's, whatever the data have
    return OfflineOPDConfig(output_dir=str(output_dir), **{**shared, **defaults, **settings})


def build_offline(
    models: Path,
    output_dir: Any,
    *,
    student: Any = "student",
    train_dataset: Any,
    trainer_kwargs: dict[str, Any] | None = None,
    **settings: Any,
) -> OfflineOPDTrainer:
    """A trainer of the tiny student; the consistency check is off unless a setting says otherwise."""
    return OfflineOPDTrainer(
        model=locate(models, student),
        args=offline_config(output_dir, **settings),
        train_dataset=train_dataset,
        **(trainer_kwargs or {}),
    )


@torch.no_grad()
def logprobs(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """`(len(ids), V)` in float64: row `t` is the distribution of the token after `ids[: t + 1]`."""
    return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def scored_rollouts(
    student: PreTrainedModel, teacher: PreTrainedModel, num_rows: int = NUM_ROWS, seed: int = 0, longest: int = 9
) -> Dataset:
    """
    Rollouts of the student at temperature 0.7, of different lengths, in the columns of a store, with a top-k of 5.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(num_rows):
        prompt = torch.randint(6, 60, (3 + index % 4,), generator=generator).tolist()
        length = 1 + (5 * index + 3) % longest
        completion: list[int] = []
        while len(completion) < length:
            weights = (logprobs(student, prompt + completion)[-1] / TEMPERATURE).softmax(-1)
            completion.append(int(torch.multinomial(weights, 1, generator=generator)))
        rows.append(scored_row(student, teacher, prompt, completion, index))
    return Dataset.from_list(rows)


def scored_row(
    student: PreTrainedModel, teacher: PreTrainedModel, prompt: list[int], completion: list[int], index: int = 0
) -> dict[str, Any]:
    """One row of a store."""
    own, target = (logprobs(model, prompt + completion)[len(prompt) - 1 : -1] for model in (student, teacher))
    tokens = torch.tensor(completion)[:, None]
    ids = target.topk(TOP_K).indices
    missing = ~(ids == tokens).any(-1)
    ids[missing, -1] = tokens[missing, 0]
    tail = target.scatter(-1, ids, -torch.inf).logsumexp(-1)
    tempered = (own / TEMPERATURE).log_softmax(-1)
    return {
        "key": f"{index:032x}",
        "prompt_ids": prompt,
        "completion_ids": completion,
        "rollout_logps": tempered.gather(-1, tokens)[:, 0].tolist(),
        "student_logps": own.gather(-1, tokens)[:, 0].tolist(),
        "truncated": completion[-1] not in EOS_IDS,
        "teacher_logps": target.gather(-1, tokens)[:, 0].tolist(),
        "teacher_topk_ids": ids.tolist(),
        "teacher_topk_logps": target.gather(-1, ids).tolist(),
        "teacher_tail_logmass": tail.tolist(),
    }


def load(models: Path, name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32).eval()

"""
`worker.py` for the offline trainer: what one process of its distributed tests does.

It only produces: `FOLDER/LAUNCH/RANK.pt` holds what every check found on this rank, and the tests compare.
"""

from typing import Any

import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import LoraConfig

from tests.distributed import worker
from tests.distributed.worker import GLOBAL_BATCH, SGD, full_parameters
from tests.tiny import tiny_model
from tests.trainers import scored


NUM_STEPS = 3
# Rows in their order, so that a step has the same rows however many processes share it
SETTINGS: dict[str, Any] = {**SGD, "max_steps": NUM_STEPS, "train_sampling_strategy": "sequential"}
UPDATES: dict[str, dict[str, Any]] = {
    "sequence": {"gradient_accumulation_steps": 2},
    "token": {"loss_aggregation": "token"},
    "padding_free": {"padding_free": True, "gradient_accumulation_steps": 2},
    "top_k": {"offline_loss": "top_k_reverse_kl"},
    "weighted": {"gradient_accumulation_steps": 2},
    "weighted_evaluated": {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2},
    "baseline": {"advantage_baseline": "kl", "importance_correction": "token"},
    # Three shards of different sizes for two processes
    "streamed": {},
}
PEFT_UPDATES: dict[str, dict[str, Any]] = {"peft": {"gradient_accumulation_steps": 2}}


class OfflineWorker(worker.Worker):
    """See [`worker.Worker`]."""

    make = staticmethod(scored.build_offline)

    def offline_update(self, name: str, settings: dict[str, Any]) -> None:
        rows = scored.scored_rollouts(tiny_model(seed=0), tiny_model(seed=1), NUM_STEPS * GLOBAL_BATCH)
        trainer_kwargs: dict[str, Any] = {}
        if name == "peft":
            trainer_kwargs["peft_config"] = LoraConfig(
                r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM"
            )
        if name.startswith("weighted"):
            rows = rows.add_column("row_weight", [(index % 5) / 2 for index in range(len(rows))])
        if name == "weighted_evaluated":
            trainer_kwargs["eval_dataset"] = rows.select(range(8))
        if name == "streamed":
            rows = interleaved(rows)
        trainer = self.build(name, **SETTINGS, **settings, train_dataset=rows, trainer_kwargs=trainer_kwargs)
        before = full_parameters(trainer)
        trainer.train()
        self.found[name] = {
            "before": before,
            "parameters": full_parameters(trainer),
            "log": trainer.state.log_history,
        }

    def run(self) -> None:
        for name, settings in UPDATES.items():
            self.offline_update(name, settings)
        if self.launch != "fsdp2":
            for name, settings in PEFT_UPDATES.items():
                self.offline_update(name, settings)
        torch.save(self.found, self.folder / self.launch / f"{self.rank}.pt")


def interleaved(rows: Dataset) -> IterableDataset:
    parts = [rows.select(range(*bounds)).to_iterable_dataset() for bounds in ((0, 5), (5, 16), (16, len(rows)))]
    stream = concatenate_datasets(parts)
    assert stream.num_shards == 3
    return stream


if __name__ == "__main__":
    worker.main(OfflineWorker, __doc__)

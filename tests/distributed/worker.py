"""
What one process of a distributed test does: the same script alone, in two DDP processes and in two FSDP2 processes.

It only produces: `FOLDER/LAUNCH/RANK.pt` holds what every check found on this rank, and the tests compare. Run alone
it leaves the rollouts of its updates in `FOLDER/rollouts`, and a distributed run replays them, each rank its slice, so
that both take the same steps on the same global batch.
"""

import argparse
import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers.integrations import is_fsdp_enabled

from tests.cpu_fsdp import allow_fsdp_on_cpu
from tests.trainers import runs
from trl_blend.errors import UnsupportedError


GLOBAL_BATCH = 8
# Longer than one chunk of the greedy decode, and odd in each chunk that is split over two ranks
VALIDATION_PROMPTS = tuple(f"{a}+{b}=" for a, b in zip(range(3, 16), range(20, 7, -1), strict=True))
ADAPTIVE = {
    "teacher_weight": 0.5,
    "teacher_weight_schedule": "adaptive",
    "adaptive_num_prompts": len(VALIDATION_PROMPTS),
    "adaptive_success_threshold": 0.6,
    "learning_rate": 0.0,
}
# SGD, because an adaptive optimizer would turn rounding into whole steps where a gradient is nearly zero
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1.0, "max_steps": 3}
UPDATES: dict[str, dict[str, Any]] = {
    "mixed_logits": {**SGD, "teacher_weight": 0.3, "gradient_accumulation_steps": 2},
    "mixed_probs": {**SGD, "teacher_weight": 0.3, "mixing_space": "probs", "loss_type": "grpo"},
    "student": {**SGD, "teacher_weight": 0.3, "objective": "student"},
}
PEFT_UPDATES: dict[str, dict[str, Any]] = {
    "peft_mixed": {**SGD, "teacher_weight": 0.3},
    "peft_student": {**SGD, "teacher_weight": 0.3, "objective": "student"},
}
# With a checkpoint at every step
SAVED = ("mixed_logits", "peft_mixed")
UPDATES["mixed_logits"].update(save_strategy="steps", save_steps=1)
END_TO_END: dict[str, dict[str, Any]] = {
    "sampled_mixed": {"teacher_weight": 0.3, "max_steps": 3},
    "sampled_student": {"teacher_weight": 0.3, "max_steps": 3, "objective": "student"},
}


class Worker:
    """
    Args:
        folder (`Path`):
            Shared folder, with the models of [`tests.trainers.runs`] in `models`.
        launch (`str`):
            `"single"`, `"ddp"` or `"fsdp2"`.
    """

    make = staticmethod(runs.build)

    def __init__(self, folder: Path, launch: str):
        self.folder, self.launch = folder, launch
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.found: dict[str, Any] = {}

    def build(self, name: str, **settings: Any) -> Any:
        rows = GLOBAL_BATCH // self.world_size // settings.get("gradient_accumulation_steps", 1)
        output_dir = self.folder / self.launch / name
        trainer = self.make(self.folder / "models", output_dir, **{"per_device_train_batch_size": rows, **settings})
        accelerator = trainer.accelerator
        assert accelerator.num_processes == self.world_size == (1 if self.launch == "single" else 2)
        assert accelerator.is_fsdp2 == (self.launch == "fsdp2")
        return trainer

    def update(
        self,
        name: str,
        settings: dict[str, Any],
        prepare: Callable[[Any], None] | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        """Train on recorded rollouts (alone: record them) and keep the full parameters and the log."""
        if arguments is None:
            arguments = {"teacher": None, "trainer_kwargs": {"peft_config": lora()}} if "peft" in name else {}
        trainer = self.build(name, **settings, **arguments)
        if prepare is not None:
            prepare(trainer)
        path = self.folder / "rollouts" / f"{name.removesuffix('_around_wrapper')}.pt"
        before = full_parameters(trainer)
        if self.launch == "single":
            batches = record_rollouts(trainer)
        else:
            replay_rollouts(trainer, torch.load(path, weights_only=False))
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        self.found[name] = {"parameters": full_parameters(trainer), "before": before, "log": log}
        self.found[name]["output_dir"] = trainer.args.output_dir
        if name in SAVED:
            trainer.save_model()
        if self.launch == "single":
            torch.save(batches, path)

    def sample(self, name: str, settings: dict[str, Any]) -> None:
        """Train with sampled rollouts and keep the completions, the local statistics, the log and the parameters."""
        trainer = self.build(name, **settings)
        batches, statistics = record_rollouts(trainer), record_statistics(trainer)
        trainer.train()
        self.found[name] = {
            "lengths": [batch["completion_mask"].sum(dim=1).tolist() for batch in batches],
            "completions": [batch["completion_ids"].tolist() for batch in batches],
            "statistics": statistics,
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
            "parameters": full_parameters(trainer),
        }

    def adapt(self) -> None:
        """One adaptive update of the weight by an unchanged student, and the rewards that it comes from."""
        validation = {"eval_dataset": runs.dataset(VALIDATION_PROMPTS)}
        trainer = self.build("adaptive", **ADAPTIVE, trainer_kwargs=validation)
        trainer.train()
        rows = [{"prompt": prompt} for prompt in VALIDATION_PROMPTS]
        self.found["adaptive"] = {
            "weight": trainer.adaptive_weights,
            "rewards": {weight: trainer.greedy_rewards(rows, (weight,)).rewards for weight in (0.0, 0.5, 1.0)},
            "log": [entry for entry in trainer.state.log_history if "adaptive/net_gain" in entry],
        }

    def load_efficiently(self) -> None:
        """A run whose backend loads weights on the first rank only: what the partner and the student ended up with."""
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
        trainer = self.build("efficient_loading", teacher_weight=0.3, learning_rate=0.0)
        assert is_fsdp_enabled(), "transformers no longer looks at this variable: the check checks nothing"
        partner = {name: value.detach().clone() for name, value in tensors(trainer.partners[0]).items()}
        trainer.train()
        self.found["efficient_loading"] = {"partner": partner, "parameters": full_parameters(trainer)}
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"

    def refuse_sharded_base(self) -> None:
        try:
            self.build("peft_refused", teacher=None, teacher_weight=0.3, trainer_kwargs={"peft_config": lora()})
        except UnsupportedError as error:
            self.found["peft_refused"] = str(error)

    def run(self) -> None:
        updates = UPDATES if self.launch == "fsdp2" else {**UPDATES, **PEFT_UPDATES}
        for name, settings in updates.items():
            self.update(name, settings)
        self.adapt()
        if self.launch != "single":
            for name, settings in END_TO_END.items():
                self.sample(name, settings)
        if self.launch == "ddp":
            self.update("mixed_logits_around_wrapper", UPDATES["mixed_logits"], score_around_wrapper)
        if self.launch == "fsdp2":
            self.load_efficiently()
            self.refuse_sharded_base()
        torch.save(self.found, self.folder / self.launch / f"{self.rank}.pt")


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, also those that no checkpoint holds."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def full_parameters(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of the whole parameters, gathered where they are sharded."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    named = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in named}


def record_rollouts(trainer: Any) -> list[dict[str, Any]]:
    """A list that grows by one scored generation batch of this rank per generation."""
    batches: list[dict[str, Any]] = []
    original = trainer._generate_and_score_completions

    def generate(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = original(inputs)
        batches.append(copy.deepcopy(output))
        return output

    trainer._generate_and_score_completions = generate
    return batches


def replay_rollouts(trainer: Any, batches: list[dict[str, Any]]) -> None:
    """Serve this rank's slice of recorded global batches instead of generating."""
    rank, world_size = trainer.accelerator.process_index, trainer.accelerator.num_processes
    upcoming = iter(batches)

    def generate(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = next(upcoming)
        share = len(batch["completion_ids"]) // world_size
        assert share == len(inputs)
        mine = slice(rank * share, (rank + 1) * share)
        scalar = {name for name, value in batch.items() if isinstance(value, torch.Tensor) and value.ndim == 0}
        return {name: value if name in scalar else value[mine] for name, value in batch.items()}

    trainer._generate_and_score_completions = generate


def record_statistics(trainer: Any) -> list[dict[str, tuple[float, int]]]:
    """A list that grows by this rank's sums and counts of the rollout statistics, once per generation."""
    collected: list[dict[str, tuple[float, int]]] = []
    original = trainer._collect_rollout_means

    def collect(record: Any, lengths: list[int]) -> None:
        original(record, lengths)
        values = {**record.statistics, "teacher_logp": record.teacher_logps[0]}
        rows = {name: [row[:n] for row, n in zip(v.tolist(), lengths, strict=True)] for name, v in values.items()}
        collected.append({name: (sum(map(sum, kept)), sum(lengths)) for name, kept in rows.items()})

    trainer._collect_rollout_means = collect
    return collected


def score_around_wrapper(trainer: Any) -> None:
    """The mistake that the update test must see: a forward that bypasses DDP skips its gradient synchronisation."""
    original = trainer._get_per_token_logps_and_entropies

    def score(model: Any, *args: Any, **kwargs: Any) -> Any:
        return original(trainer.accelerator.unwrap_model(model), *args, **kwargs)

    trainer._get_per_token_logps_and_entropies = score


def main(worker: type[Worker], description: str | None) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("launch", choices=("single", "ddp", "fsdp2"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.launch == "fsdp2":
        allow_fsdp_on_cpu()
    worker(given.folder, given.launch).run()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Worker, __doc__)

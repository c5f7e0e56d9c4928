"""
`worker.py` for the distillation trainer: what one process of its distributed tests does.

It only produces: `FOLDER/LAUNCH/RANK.pt` holds what every check found on this rank, and the tests compare.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig

from tests.distributed import worker
from tests.distributed.worker import SGD, full_parameters, record_rollouts
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import runs
from trl_blend.errors import UnsupportedError


TRUST_REGION = {"kl_budget": 0.3, "blend_warmup_steps": 4}
STUDENT = {"rollout_policy": "student"}
OTHER_EOS = [20, 33]
UPDATES: dict[str, dict[str, Any]] = {
    "student": {**SGD, "rollout_policy": "student", "gradient_accumulation_steps": 2, "log_teacher_statistics": True},
    # Also with other end-of-sequence tokens, and a teacher whose vocabulary is padded
    "trust_region": {**SGD, **TRUST_REGION, "log_teacher_statistics": True, "teacher_eos_token_id": OTHER_EOS},
    "veto_top_k": {
        **SGD,
        **TRUST_REGION,
        "gradient_accumulation_steps": 2,
        "kl_support": "student_top_k",
        "distillation_target": "veto",
    },
    "interpolated": {
        **SGD,
        **STUDENT,
        "gradient_accumulation_steps": 2,
        "distillation_target": "interpolated",
        "log_teacher_statistics": True,
    },
    "lora_interpolated": {**SGD, **STUDENT, "distillation_target": "interpolated", "log_teacher_statistics": True},
    "iw_opd": {
        **SGD,
        **TRUST_REGION,
        "gradient_accumulation_steps": 2,
        "distillation_objective": "iw_opd",
        "log_teacher_statistics": True,
    },
    # Positions are chosen among those of a micro-batch of all processes, so there is one per step
    "tip": {**SGD, **STUDENT, "token_selection": "tip", "forward_kl_entropy": 2.2, "log_teacher_statistics": True},
}
PEFT_UPDATES: dict[str, dict[str, Any]] = {
    "peft_trust_region": {**SGD, **TRUST_REGION, "log_teacher_statistics": True},
}
# With evaluation of an odd number of prompts, and a switch to the student's own rollouts after two steps
END_TO_END: dict[str, dict[str, Any]] = {
    "sampled_trust_region": {"kl_budget": 0.3, "blend_warmup_steps": 2},
    "sampled_speculative": {"rollout_policy": "speculative_kd", "blend_warmup_steps": 2},
}
SAMPLING = {
    "max_steps": 3,
    "num_rollouts_per_prompt": 2,
    "per_device_eval_batch_size": 2,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "log_completions": True,
    "num_completions_to_print": 1,
}


def verdict(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids) % 2) for ids in completion_ids]


class OPDWorker(worker.Worker):
    """See [`worker.Worker`]."""

    make = staticmethod(runs.build_opd)

    def opd_update(self, name: str, settings: dict[str, Any], around_wrapper: bool = False) -> None:
        trainer_kwargs: dict[str, Any] = {"reward_funcs": verdict}
        arguments: dict[str, Any] = {"trainer_kwargs": trainer_kwargs}
        if "peft" in name:
            trainer_kwargs["peft_config"] = lora()
            arguments["teacher"] = None
        elif "trust_region" in name:
            trainer_kwargs["processing_class"] = tiny_tokenizer()
            arguments["teacher"] = tiny_model(seed=1, vocab_size=72)
        elif "lora" in name:
            trainer_kwargs["peft_config"] = worker.lora()
        prepare = call_around_wrapper if around_wrapper else widen if name == "tip" else None
        self.update(name, settings, prepare, arguments)

    def opd_sample(self, name: str, settings: dict[str, Any]) -> None:
        """Train with sampled rollouts: completions, prompts, this rank's sums, the log and the parameters."""
        data = {"eval_dataset": runs.dataset(runs.PROMPTS[:5]), "reward_funcs": verdict}
        train_dataset = runs.dataset(tuple(f"{number}+1=" for number in range(12)))
        trainer = self.build(name, **settings, **SAMPLING, train_dataset=train_dataset, trainer_kwargs=data)
        prompts: list[list[str]] = []
        generate, statistics = trainer._generate_and_score_completions, record_statistics(trainer)

        def generating(rows: list[dict[str, Any]]) -> dict[str, Any]:
            if trainer.model.training:
                prompts.append([row["prompt"] for row in rows])
            return generate(rows)

        trainer._generate_and_score_completions = generating
        batches, table_rows = record_rollouts(trainer), record_table_rows(trainer)
        tables = record_tables(trainer)
        trainer.train()
        self.found[name] = {
            "lengths": [batch["completion_mask"].sum(dim=1).tolist() for batch in batches],
            "completions": [batch["completion_ids"].tolist() for batch in batches],
            "prompts": prompts,
            "statistics": statistics,
            "table_rows": table_rows,
            "tables": tables,
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
            "eval_log": [entry for entry in trainer.state.log_history if "eval_loss" in entry],
            "parameters": full_parameters(trainer),
        }

    def run(self) -> None:
        updates = UPDATES if self.launch == "fsdp2" else {**UPDATES, **PEFT_UPDATES}
        for name, settings in updates.items():
            self.opd_update(name, settings)
        if self.launch != "single":
            for name, settings in END_TO_END.items():
                self.opd_sample(name, settings)
        if self.launch == "ddp":
            self.opd_update("trust_region_around_wrapper", UPDATES["trust_region"], around_wrapper=True)
        if self.launch == "fsdp2":
            try:
                self.build("refused", teacher=None, trainer_kwargs={"peft_config": lora()}, **TRUST_REGION)
            except UnsupportedError as error:
                self.found["peft_refused"] = str(error)
        torch.save(self.found, self.folder / self.launch / f"{self.rank}.pt")


def widen(trainer: Any) -> None:
    """Give the second process a column of padding more: rollouts of its own have a length of their own, too."""
    compute_loss = trainer.compute_loss

    def widened(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        right = (0, trainer.accelerator.process_index)
        names = ("completion_ids", "completion_mask")
        padded = {name: torch.nn.functional.pad(inputs[name], right) for name in names}
        return compute_loss(model, {**inputs, **padded}, *args, **kwargs)

    trainer.compute_loss = widened


def record_statistics(trainer: Any) -> list[dict[str, tuple[float, int, float]]]:
    """A list that grows by this rank's sums, counts and maxima of the rollout statistics, once per blended batch."""
    collected: list[dict[str, tuple[float, int, float]]] = []
    original = trainer._diagnostics.collect

    def collect(record: Any, lengths: list[int]) -> None:
        original(record, lengths)
        values = {**record.statistics, "teacher_entropy": record.teacher_entropies[0]}
        sums = {}
        for name, tensor in values.items():
            kept = [value for row, n in zip(tensor.tolist(), lengths, strict=True) for value in row[:n]]
            sums[name] = (sum(kept), len(kept), max(kept))
        collected.append(sums)

    trainer._diagnostics.collect = collect
    return collected


def record_table_rows(trainer: Any) -> list[list[dict[str, Any]]]:
    """
    A list that grows, with each generation batch, by what the completions table should say of this rank's rows, from
    their texts and the recorded tokens alone.
    """
    batches: list[list[dict[str, Any]]] = []
    records: list[Any] = []
    generate, collect = trainer._generate_and_score_completions, trainer._diagnostics.collect

    def collecting(record: Any, lengths: list[int]) -> None:
        records.append((record, lengths))
        collect(record, lengths)

    def generating(rows: list[dict[str, Any]]) -> dict[str, Any]:
        records.clear()
        output = generate(rows)
        texts = trainer.processing_class.batch_decode(output["completion_ids"], skip_special_tokens=True)
        found = [{"prompt": row["prompt"], "completion": text} for row, text in zip(rows, texts, strict=True)]
        for index, one in enumerate(found):
            ids = output["completion_ids"][index][output["completion_mask"][index].bool()].tolist()
            one["verdict"] = verdict([ids])[0]
            for record, lengths in records:
                for name in ("teacher_weight", "replaced_share", "kl_behavior_student"):
                    if name in record.statistics:
                        values = record.statistics[name][index, : lengths[index]].tolist()
                        one[name] = sum(values) / len(values)
        batches.append(found)
        return output

    trainer._generate_and_score_completions, trainer._diagnostics.collect = generating, collecting
    return batches


def record_tables(trainer: Any) -> list[dict[str, list[Any]]]:
    """A list that grows with each completions table that is written: an evaluation's takes the file of its step's."""
    tables: list[dict[str, list[Any]]] = []
    log = trainer.log

    def logging(*args: Any) -> None:
        log(*args)
        if trainer.accelerator.is_main_process:
            file = Path(trainer.args.output_dir, "completions", f"completions_{trainer.state.global_step:05d}.parquet")
            tables.append(pd.read_parquet(file).to_dict(orient="list"))

    trainer.log = logging
    return tables


def lora() -> LoraConfig:
    # Random: an adapter of zeros leaves the student its own base, and the loss without a gradient
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


def call_around_wrapper(trainer: Any) -> None:
    """The mistake that the update test must see: a forward that bypasses DDP skips its gradient synchronisation."""
    trainer._forward_redirection = lambda wrapper, model, method, *args, **kwargs: method(*args, **kwargs)


if __name__ == "__main__":
    worker.main(OPDWorker, __doc__)

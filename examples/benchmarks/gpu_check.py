"""
One check of everything on one GPU, in bfloat16 and in minutes: a few steps of each trainer at real shapes (Qwen3-0.6B
from Qwen3-1.7B, random weights), drawn by transformers and, where it is installed, by vLLM; then a short run on the
test-bed. Nothing is downloaded. Prints peak memory and tokens per second (prompts included), writes them to a file.

```sh
make gpu-check
python examples/benchmarks/gpu_check.py --smoke    # tiny shapes on the CPU: only that the script works
```
"""

import argparse
import gc
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from benchmarks._report import machine
from testbed import task
from trl_blend import (
    LogitMixGRPOConfig,
    LogitMixGRPOTrainer,
    OfflineOPDConfig,
    OfflineOPDTrainer,
    TrustRegionOPDConfig,
    TrustRegionOPDTrainer,
    collect_rollouts,
    score_rollouts,
)


CHECKPOINTS = Path(task.__file__).resolve().parent / "checkpoints"
QWEN3 = {"head_dim": 128, "num_key_value_heads": 8, "num_hidden_layers": 28, "vocab_size": 151_936}
SHAPES = {
    "student": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16},
    "teacher": {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16},
}
TINY = {"head_dim": 16, "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 320, "num_attention_heads": 2}
SMOKE = {name: {**TINY, "hidden_size": 32, "intermediate_size": 64} for name in SHAPES}
STEPS = 3


def varied_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Something that differs within a group: random models get no other."""
    return [float(len(str(completion)) % 7) for completion in completions]


class Check:
    """Runs trainings one after the other and keeps what each has taken."""

    def __init__(self, smoke: bool, scratch: Path):
        self.smoke, self.scratch = smoke, scratch
        self.rows: dict[str, dict[str, float]] = {}
        self.length, self.rollouts = (8, 16) if smoke else (512, 64)
        self.common = {
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": self.rollouts // 8,
            "max_steps": STEPS,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "gradient_checkpointing": True,
            "bf16": not smoke,
            "use_cpu": smoke,
        }

    def run(self, name: str, build: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
        """Train what `build` makes of the common settings; returns the log."""
        print(f"{name} ...", flush=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer = build(self.common | {"output_dir": str(self.scratch / "out")})
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all(abs(entry["loss"]) < float("inf") for entry in log), f"{name}: the loss is not finite: {log}"
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        self.rows[name] = {
            "seconds_per_step": seconds / trainer.state.global_step,
            "tokens_per_second": log[-1]["num_tokens"] / seconds,
            "peak_gib": peak,
            "last_loss": log[-1]["loss"],
        }
        print(json.dumps(self.rows[name]), flush=True)
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
        return log


def make_models(shapes: dict[str, dict[str, int]], scratch: Path) -> None:
    """Random models with the tokenizer of the test-bed, whose ids are the first of the vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "student")
    for name, shape in shapes.items():
        config = Qwen3Config(**shape, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(scratch / name)
        tokenizer.save_pretrained(scratch / name)


def check(smoke: bool, scratch: Path) -> dict[str, Any]:
    """All trainings; returns the results."""
    make_models(SMOKE if smoke else SHAPES, scratch)
    student, teacher = (str(scratch / name) for name in SHAPES)
    checked = Check(smoke, scratch)
    prompts = task.build_prompt_dataset("train", checked.rollouts * STEPS)
    length = {"max_completion_length": checked.length}

    def grpo(common: dict[str, Any], **settings: Any) -> Any:
        args = LogitMixGRPOConfig(**common, **length, num_generations=8, teacher_weight=0.3, **settings)
        return LogitMixGRPOTrainer(student, teacher, varied_reward, args, prompts)

    def opd(common: dict[str, Any], **settings: Any) -> Any:
        args = TrustRegionOPDConfig(**common, **length, kl_budget=0.01, blend_warmup_steps=2 * STEPS, **settings)
        return TrustRegionOPDTrainer(student, teacher, args, prompts)

    def offline(common: dict[str, Any]) -> Any:
        rollouts, scored = (str(scratch / name) for name in ("rollouts", "scored"))
        dtype = "float32" if smoke else "bfloat16"
        collect_rollouts(student, prompts, output_dir=rollouts, **length, temperature=1.0, top_p=1.0, dtype=dtype)
        score_rollouts(rollouts, teacher, output_dir=scored, dtype=dtype)
        args = OfflineOPDConfig(**common, offline_loss="top_k_reverse_kl", teacher_consistency="off")
        return OfflineOPDTrainer(student, args, scored)

    checked.run("grpo, mixed", grpo)
    checked.run("grpo, student objective", lambda common: grpo(common, objective="student"))
    checked.run("trust-region distillation", opd)
    checked.run("offline distillation", offline)
    if importlib.util.find_spec("vllm") is not None and not smoke:
        engine = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
        checked.run("grpo, mixed, vLLM", lambda common: grpo(common, **engine))
        checked.run("trust-region distillation, vLLM", lambda common: opd(common, **engine))
    log = checked.run("grpo on the test-bed", lambda common: on_testbed(common, steps=1 if smoke else 20))
    rewards = [entry["reward"] for entry in log]
    return {"machine": machine(), "rows": checked.rows, "testbed_reward": {"first": rewards[0], "last": rewards[-1]}}


def on_testbed(common: dict[str, Any], steps: int) -> LogitMixGRPOTrainer:
    """The demo's mixture, which learns in 20 steps."""
    settings = {"per_device_train_batch_size": 128, "gradient_accumulation_steps": 1, "max_steps": steps}
    args = LogitMixGRPOConfig(
        **(common | settings),
        num_generations=8,
        max_completion_length=56,
        teacher_weight=0.1,
        learning_rate=3e-5,
        lr_scheduler_type="constant",
    )
    return LogitMixGRPOTrainer(
        str(CHECKPOINTS / "student"),
        str(CHECKPOINTS / "teacher"),
        task.format_and_answer_reward,
        args,
        task.build_prompt_dataset("train", 4000),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        print("There is no GPU here: nothing is measured.")
        return
    with TemporaryDirectory() as scratch:
        results = check(args.smoke, Path(scratch))
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{args.output} is written; rewards on the test-bed {results['testbed_reward']}")


if __name__ == "__main__":
    main()

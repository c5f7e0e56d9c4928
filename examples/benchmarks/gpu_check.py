"""
One check of everything on one GPU, in bfloat16, meant to take less than 8 minutes. Nothing is downloaded; weights are
random. Where vLLM is installed (`pip install -e ".[vllm]"`) its engine comes first, with a student of Qwen3-1.7B's
shape and a teacher of Qwen3-8B's: microseconds per token of the blend, of the blend with drafts, of the student alone
and of the teacher alone, and the number of sequences from which drafts are slower than none. That is the best case:
the weights that vLLM makes up are so much alike that it accepts nearly every draft; the share is printed. Then a few
steps of each trainer (Qwen3-0.6B from Qwen3-1.7B), drawn by transformers and by vLLM, and a short run on the test-bed:
peak memory, tokens per second (with those of the prompts). The file is written after each stage, so that a run cut
short keeps the others.

Never run on a GPU so far, for want of one: neither the times nor the 8 minutes are known. On a CPU all stages of
`--smoke` have run.

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
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable, and the tests' patches of vLLM
    sys.path[:1] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from benchmarks._report import machine
from testbed import task
from trl_blend import (
    LogitMixGRPOConfig,
    LogitMixGRPOTrainer,
    OfflineOPDConfig,
    OfflineOPDTrainer,
    TrustRegion,
    TrustRegionOPDConfig,
    TrustRegionOPDTrainer,
    collect_rollouts,
    score_rollouts,
)
from trl_blend.serving.arguments import engine_arguments
from trl_blend.serving.blend import Blend, Partner


CHECKPOINTS = Path(task.__file__).resolve().parent / "checkpoints"
QWEN3 = {"head_dim": 128, "num_key_value_heads": 8, "num_hidden_layers": 28, "vocab_size": 151_936}
SHAPES = {
    "student": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16},
    "teacher": {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16},
    "large_teacher": {
        **QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "tie_word_embeddings": False,
    },
}
TINY = {"head_dim": 32, "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 320, "num_attention_heads": 2}
SMOKE = {name: {**TINY, "hidden_size": 32, "intermediate_size": 64} for name in SHAPES}
STEPS = 2
# Of the engine: tokens of prompts and completions, sequences at once, drafts, and times that each is measured
TOKENS, SEQUENCES, DRAFTS, REPEATS = 64, (1, 8, 64, 256, 512), 4, 3


def varied_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Something that differs within a group: random models get no other."""
    return [float(len(str(completion)) % 7) for completion in completions]


class Check:
    """Runs the stages one after the other and writes down what each has taken."""

    def __init__(self, smoke: bool, scratch: Path, output: Path):
        self.smoke, self.scratch, self.output = smoke, scratch, output
        self.results: dict[str, Any] = {"machine": machine(), "rows": {}}
        self.length, self.rollouts = (8, 16) if smoke else (256, 64)
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

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Print and write a result."""
        self.results["rows"][name] = row
        print(f"{name}: {json.dumps(row)}", flush=True)
        self.output.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")

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
        row = {
            "seconds_per_step": seconds / trainer.state.global_step,
            "tokens_per_second": log[-1]["num_tokens"] / seconds,
            "peak_gib": peak,
            "last_loss": log[-1]["loss"],
        }
        self.add(name, row)
        if getattr(trainer, "use_vllm", False):
            trainer.engine.llm.llm_engine.engine_core.shutdown()
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
        return log

    def engines(self) -> None:
        """Microseconds per token of engines, one after the other, and from when on drafts are slower than none."""
        student, teacher = (str(self.scratch / name) for name in ("teacher", "large_teacher"))
        blend = Blend(TrustRegion(0.01), records=True)
        drafts = {"draft_model": student, "draft_tokens": DRAFTS}
        arms = {
            "blended": (student, engine_arguments([Partner(teacher)], blend)),
            "blended with drafts": (student, engine_arguments([Partner(teacher)], blend, **drafts)),
            "student alone": (student, {}),
            "teacher alone": (teacher, {}),
        }
        times: dict[str, dict[int, float]] = {}
        for name, (model, arguments) in arms.items():
            times[name], statistics = self.per_token(model, arguments)
            self.add(f"engine, {name}", {"microseconds_per_token": times[name], **statistics})
        slower = [count for count, value in times["blended"].items() if times["blended with drafts"][count] > value]
        self.add(f"engine, {DRAFTS} drafts are slower than none", {"from_sequences": min(slower, default=None)})

    def per_token(self, model: str, arguments: dict[str, Any]) -> tuple[dict[int, float], dict[str, float]]:
        """Median time for a token, of all sequences together, by their number; the share of accepted drafts."""
        from vllm import LLM, SamplingParams

        arguments.pop("sleep_preserve_parameter_names", None)
        sequences, tokens = ((1, 2), 8) if self.smoke else (SEQUENCES, TOKENS)
        common: dict[str, Any] = {"max_model_len": 4 * tokens, "max_num_seqs": sequences[-1], "seed": 0}
        common |= {"dtype": "float32" if self.smoke else "bfloat16", "enforce_eager": self.smoke}
        common |= {"enable_prefix_caching": False, "disable_log_stats": True}
        if not self.smoke:
            common["gpu_memory_utilization"] = 0.8
        engine = LLM(model=model, load_format="dummy", **common, **arguments)
        if "speculative_config" in arguments:
            engine.collective_rpc("lead_drafts")
        params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        times, statistics = {}, {}
        for count in sequences:
            requests = [{"prompt_token_ids": [5 + (row + i) % 250 for i in range(tokens)]} for row in range(count)]
            seconds = []
            for _ in range(1 + REPEATS):  # the first sets things up
                started = time.perf_counter()
                engine.generate(requests, params, use_tqdm=False)
                seconds.append(time.perf_counter() - started)
            times[count] = 1e6 * median(seconds[1:]) / (count * tokens)
        if "speculative_config" in arguments:
            accepted, looked_at, _ = engine.collective_rpc("take_blend_statistics")[0]["draft_acceptance"]
            statistics["draft_acceptance"] = accepted / looked_at
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        return times, statistics


def make_models(shapes: dict[str, dict[str, int]], scratch: Path) -> None:
    """Random models with the tokenizer of the test-bed, whose ids are the first of the vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "student")
    for name, shape in shapes.items():
        config = Qwen3Config(**{"tie_word_embeddings": True, **shape}, eos_token_id=tokenizer.eos_token_id)
        config.architectures = ["Qwen3ForCausalLM"]
        config.save_pretrained(scratch / name)
        tokenizer.save_pretrained(scratch / name)
        if name != "large_teacher":  # only engines hold it, which make up their weights
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(scratch / name)


def check(smoke: bool, scratch: Path, output: Path) -> None:
    """All stages."""
    make_models(SMOKE if smoke else SHAPES, scratch)
    student, teacher = (str(scratch / name) for name in ("student", "teacher"))
    checked = Check(smoke, scratch, output)
    has_vllm = importlib.util.find_spec("vllm") is not None
    if has_vllm:
        if smoke:
            from tests.vllm.conftest import expand_on_the_cpu, keep_weights_on_the_cpu

            expand_on_the_cpu(SimpleNamespace(setattr=setattr))
            keep_weights_on_the_cpu(SimpleNamespace(setattr=setattr))
        checked.engines()
    else:
        print("vLLM is not installed here: its stages are left out.")
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
    if has_vllm:
        engine = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
        engine["vllm_max_model_length"] = 128 + checked.length
        checked.run("grpo, mixed, vLLM", lambda common: grpo(common, **engine))
        checked.run("trust-region distillation, vLLM", lambda common: opd(common, **engine))
    log = checked.run("grpo on the test-bed", lambda common: on_testbed(common, steps=1 if smoke else 20))
    rewards = [entry["reward"] for entry in log]
    checked.add("grpo on the test-bed, reward", {"first": rewards[0], "last": rewards[-1]})


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
        check(args.smoke, Path(scratch), args.output)
    print(f"{args.output} is written")


if __name__ == "__main__":
    main()

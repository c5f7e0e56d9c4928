"""
Train the models of the test-bed from scratch with TRL's `SFTTrainer`, on a CPU:

```sh
python examples/testbed/train.py --model all --output_dir examples/testbed/checkpoints
```
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path


if __name__ == "__main__":  # run as a file: make the package importable, and hide this folder's module names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from datasets import Dataset
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from testbed.evaluate import evaluate
from testbed.task import build_prompt_dataset, build_sft_dataset
from testbed.tokenizer import build_tokenizer


BATCH_SIZE = 64


@dataclass(frozen=True)
class Recipe:
    """
    Architecture and training of one model.

    Args:
        hidden_size, layers, heads, kv_heads, head_dim, ffn_size (`int`):
            Sizes of the Qwen3 architecture; embeddings are tied.
        learning_rate (`float`):
            Peak learning rate of AdamW, after `warmup_steps` and before a cosine decay to 0 at `max_steps`.
        max_steps (`int`):
            Length of the schedule, in steps of 64 sequences.
        stop_at (`float`):
            Training stops at the first validation whose greedy answer rate is at least this; above 1, never.
        boxed_fraction (`float`):
            Share of training completions in the required format (the others end in the bare number).
        eval_every (`int`):
            Steps between validations.
        warmup_steps (`int`):
            Steps of linear warmup.
        seed (`int`):
            Seed of the shipped checkpoint.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    learning_rate: float
    max_steps: int
    stop_at: float = 2.0
    boxed_fraction: float = 1.0
    eval_every: int = 20
    warmup_steps: int = 20
    seed: int = 0


SMALL = {"hidden_size": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn_size": 384}
LARGE = {"hidden_size": 256, "layers": 6, "heads": 8, "kv_heads": 4, "head_dim": 32, "ffn_size": 768}
RECIPES = {
    "student": Recipe(**SMALL, learning_rate=2e-3, max_steps=400, stop_at=0.35, eval_every=5, seed=2),
    "base": Recipe(**SMALL, learning_rate=2e-3, max_steps=400, stop_at=0.60, boxed_fraction=0.08, eval_every=10),
    "teacher": Recipe(**LARGE, learning_rate=1.5e-3, max_steps=350, eval_every=50),
}


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen3ForCausalLM:
    """Build a randomly initialised float32 Qwen3 model for `tokenizer`."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        intermediate_size=recipe.ffn_size,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


class StopOnValidation(TrainerCallback):
    """Decode the validation prompts greedily every `eval_every` steps; stop once the answer rate reaches `stop_at`."""

    def __init__(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, eval_every: int, stop_at: float) -> None:
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.eval_every = eval_every
        self.stop_at = stop_at

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> TrainerControl:
        # Nothing is learnt in the first 60 steps: decoding until then would only cost time.
        if state.global_step % self.eval_every == 0 and state.global_step >= 60:
            result = evaluate(model, self.tokenizer, self.dataset)
            print(f"step {state.global_step}: validation {result}", flush=True)
            control.should_training_stop |= result.answer_rate >= self.stop_at
        return control


def train(name: str, output_dir: str | Path, seed: int | None = None) -> None:
    """
    Train one model of [`RECIPES`] and save it in bfloat16, with its tokenizer, to `output_dir/name`.

    Args:
        name (`"student"`, `"base"` or `"teacher"`):
            Which model.
        output_dir (`str` or `Path`):
            Parent folder of the checkpoint.
        seed (`int`, *optional*):
            Seed of the weights, of the draw of the training prompts, and of their order. Defaults to the seed of the
            shipped checkpoint.
    """
    recipe = RECIPES[name]
    seed = recipe.seed if seed is None else seed
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer, seed)
    path = Path(output_dir) / name
    arguments = SFTConfig(
        output_dir=str(path),
        max_steps=recipe.max_steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps,
        completion_only_loss=True,
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    validation = build_prompt_dataset("validation", 256)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=build_sft_dataset("train", recipe.max_steps * BATCH_SIZE, seed, recipe.boxed_fraction),
        processing_class=tokenizer,
        callbacks=[StopOnValidation(validation, tokenizer, recipe.eval_every, recipe.stop_at)],
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model.config.use_cache = True  # the trainer turned it off
    model.to(torch.bfloat16).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    steps = trainer.state.global_step
    print(f"{name}: {model.num_parameters():,} parameters, {steps} steps, {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="all", choices=[*RECIPES, "all"])
    parser.add_argument("--output_dir", default=str(Path(__file__).resolve().parent / "checkpoints"))
    parser.add_argument("--seed", type=int, help="defaults to the seed of the shipped checkpoint of each model")
    args = parser.parse_args()
    for name in RECIPES if args.model == "all" else [args.model]:
        train(name, args.output_dir, args.seed)


if __name__ == "__main__":
    main()

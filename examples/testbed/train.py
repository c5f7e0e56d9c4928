"""
Train the models of the test-bed from scratch with TRL's `SFTTrainer`, on a CPU:

```sh
python examples/testbed/train.py --model all --output_dir examples/testbed/checkpoints
```
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


if __name__ == "__main__":  # run as a file: make the package importable, and hide this folder's module names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from datasets import Dataset
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from testbed import sorting
from testbed.evaluate import CHECKPOINTS, evaluate, load_checkpoint
from testbed.samples import build_teacher_dataset
from testbed.task import build_sft_dataset
from testbed.tasks import ADDITION, TASKS, Task
from testbed.tokenizer import build_tokenizer
from trl_blend.consistency.provenance import TeacherProvenanceCallback


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
        teacher (`str`, *optional*):
            Checkpoint whose own samples are the training data. By default the data are the reference completions.
        samples (`int`):
            Number of samples of the teacher, one per prompt; a longer training goes through them again.
        digits (`tuple[int, ...]`, *optional*):
            Lengths of the numbers of the sorting task, in training and validation. By default the task is addition.
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
    teacher: str | None = None
    samples: int = 12_800
    digits: tuple[int, ...] | None = None

    @property
    def task(self) -> Task:
        return TASKS[ADDITION if self.digits is None else "sorting"]


SMALL = {"hidden_size": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn_size": 384}
LARGE = {"hidden_size": 256, "layers": 6, "heads": 8, "kv_heads": 4, "head_dim": 32, "ffn_size": 768}
RECIPES = {
    "student": Recipe(**SMALL, learning_rate=2e-3, max_steps=400, stop_at=0.35, eval_every=5, seed=2),
    "base": Recipe(**SMALL, learning_rate=2e-3, max_steps=400, stop_at=0.60, boxed_fraction=0.08, eval_every=10),
    "teacher": Recipe(**LARGE, learning_rate=1.5e-3, max_steps=350, eval_every=50),
    "sft_student": Recipe(
        **SMALL, learning_rate=2e-3, max_steps=400, stop_at=0.35, eval_every=5, seed=2, teacher="teacher"
    ),
    "sort_base": Recipe(**SMALL, learning_rate=2e-3, max_steps=400, eval_every=50, digits=(2, 3, 4)),
    "sort_teacher": Recipe(**SMALL, learning_rate=2e-3, max_steps=600, eval_every=50, digits=(2, 3, 4, 5, 6)),
    "sort_sft_student": Recipe(
        **SMALL,
        learning_rate=2e-3,
        max_steps=400,
        stop_at=0.35,
        eval_every=5,
        seed=2,
        teacher="sort_teacher",
        digits=sorting.DIGITS,
    ),
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
    """Decode the validation prompts greedily every `eval_every` steps; stop at the answer rate `stop_at`."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        self.recipe = recipe
        self.dataset = recipe.task.prompts("validation", 256, **({"digits": recipe.digits} if recipe.digits else {}))
        self.tokenizer = tokenizer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> TrainerControl:
        # Nothing is learnt in the first 60 steps: decoding until then would only cost time.
        if state.global_step % self.recipe.eval_every == 0 and state.global_step >= 60:
            result = evaluate(model, self.tokenizer, self.dataset, max_new_tokens=self.recipe.task.max_new_tokens)
            print(f"step {state.global_step}: validation {result}", flush=True)
            control.should_training_stop |= result.answer_rate >= self.recipe.stop_at
        return control


def build_training_data(recipe: Recipe, seed: int, checkpoints: str | Path = CHECKPOINTS) -> Dataset:
    """
    Return the conversational prompt-completion dataset that a recipe is trained on.

    Args:
        recipe ([`Recipe`]):
            With a `teacher`, the data are that model's own samples; without, the reference completions.
        seed (`int`):
            Seed of the draw of the prompts, and of the sampling.
        checkpoints (`str` or `Path`, *optional*):
            Folder that holds the teacher. Defaults to the shipped checkpoints.
    """
    if recipe.teacher is None:
        rows = recipe.max_steps * BATCH_SIZE
        if recipe.digits is None:
            return build_sft_dataset("train", rows, seed, recipe.boxed_fraction)
        return sorting.build_sft_dataset("train", rows, seed, recipe.digits)
    model, tokenizer = load_checkpoint(Path(checkpoints) / recipe.teacher)
    return build_teacher_dataset(model, tokenizer, recipe.samples, seed, task=recipe.task)


def fit(
    model: PreTrainedModel,
    recipe: Recipe,
    dataset: Dataset,
    path: str | Path,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> int:
    """
    Train a model with [`~trl.SFTTrainer`], save it in bfloat16 with its tokenizer to `path`, return the steps taken.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Float32 model; it is in bfloat16 afterwards.
        recipe ([`Recipe`]):
            Learning rate, schedule and moment of stopping.
        dataset ([`~datasets.Dataset`]):
            Prompts and completions.
        path (`str` or `Path`):
            Folder of the checkpoint.
        seed (`int`):
            Seed of the order of the data.
        callbacks (`Sequence[TrainerCallback]`, *optional*):
            Callbacks of the trainer besides the validation.
    """
    tokenizer = build_tokenizer()
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
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[StopOnValidation(recipe, tokenizer), *callbacks],
    )
    trainer.train()
    model.config.use_cache = True  # the trainer turned it off
    model.to(torch.bfloat16).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return trainer.state.global_step


def train(name: str, output_dir: str | Path, seed: int | None = None) -> None:
    """
    Train one model of [`RECIPES`] and save it in bfloat16, with its tokenizer, to `output_dir/name`.

    Args:
        name (`str`):
            Which model of [`RECIPES`]. `"sft_student"` learns from the samples of the teacher in `output_dir`, or of
            the shipped one where there is none.
        output_dir (`str` or `Path`):
            Parent folder of the checkpoint.
        seed (`int`, *optional*):
            Seed of the weights, of the draw of the training prompts, and of their order. Defaults to the seed of the
            shipped checkpoint.
    """
    recipe = RECIPES[name]
    seed = recipe.seed if seed is None else seed
    path = Path(output_dir) / name
    start = time.perf_counter()
    callbacks, checkpoints = [], CHECKPOINTS
    if recipe.teacher is not None:
        checkpoints = Path(output_dir) if (Path(output_dir) / recipe.teacher).is_dir() else CHECKPOINTS
        # Recorded beside the student: which weights wrote what it was trained on
        callbacks = [TeacherProvenanceCallback(os.path.relpath(checkpoints / recipe.teacher))]
    dataset = build_training_data(recipe, seed, checkpoints)
    model = build_model(recipe, build_tokenizer(), seed)
    steps = fit(model, recipe, dataset, path, seed, callbacks)
    seconds = time.perf_counter() - start
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

"""
Batched evaluation on a task of the test-bed. Without arguments, the shipped checkpoints on addition, greedy and at
temperature 1:

```sh
python examples/testbed/evaluate.py
python examples/testbed/evaluate.py --task sorting
python examples/testbed/evaluate.py --models path/to/checkpoint --n 500
```
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


if __name__ == "__main__":  # run as a file: make the package importable, and hide this folder's module names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from testbed.task import (
    MAX_NEW_TOKENS,
    accuracy_reward,
    answer_reward,
    format_and_answer_reward,
    format_reward,
)
from testbed.tasks import ADDITION, CHECKPOINTS, TASKS


def standard_error(rate: float, n: int) -> float:
    """Return the binomial standard error `sqrt(rate * (1 - rate) / n)`."""
    return math.sqrt(rate * (1.0 - rate) / n)


@dataclass(frozen=True)
class EvalResult:
    r"""
    Rates over `n` prompts, one completion each.

    Args:
        answer_rate (`float`):
            Final number right, boxed or not ([`~testbed.task.answer_reward`]).
        format_rate (`float`):
            Whole completion in the required format, right or wrong ([`~testbed.task.format_reward`]).
        boxed_rate (`float`):
            Last `\boxed{N}` right ([`~testbed.task.accuracy_reward`]).
        reward_rate (`float`):
            Right and in the required format ([`~testbed.task.format_and_answer_reward`]).
        n (`int`):
            Number of prompts.
        completions (`tuple[str, ...]`):
            Decoded completions, in the order of the dataset.
    """

    answer_rate: float
    format_rate: float
    boxed_rate: float
    reward_rate: float
    n: int
    completions: tuple[str, ...]

    @property
    def answer_se(self) -> float:
        return standard_error(self.answer_rate, self.n)

    @property
    def format_se(self) -> float:
        return standard_error(self.format_rate, self.n)

    @property
    def boxed_se(self) -> float:
        return standard_error(self.boxed_rate, self.n)

    @property
    def reward_se(self) -> float:
        return standard_error(self.reward_rate, self.n)

    def __str__(self) -> str:
        names = ("answer", "format", "boxed", "reward")
        rates = (f"{name} {getattr(self, name + '_rate'):.3f}±{getattr(self, name + '_se'):.3f}" for name in names)
        return " ".join(rates) + f" (n={self.n})"


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict[str, str]]],
    batch_size: int = 128,
    max_new_tokens: int = MAX_NEW_TOKENS,
    do_sample: bool = False,
    **generate_kwargs: Any,
) -> list[str]:
    """
    Decode one completion per conversational prompt and return the texts without special tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Its `generate` may be patched, as blended generation does.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a chat template and a padding token. Its padding side is not changed.
        prompts (`list[list[dict[str, str]]]`):
            Conversations, each ending in a user message.
        batch_size (`int`, *optional*, defaults to `128`):
            Prompts per call of `generate`; batches are left-padded.
        max_new_tokens (`int`, *optional*, defaults to `48`):
            Limit on the length of a completion.
        do_sample (`bool`, *optional*, defaults to `False`):
            Sample at temperature 1 (or at the `temperature` given) from the full vocabulary, instead of decoding
            greedily.
    """
    if do_sample:
        generate_kwargs = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **generate_kwargs}
    training = model.training
    model.eval()
    texts: list[str] = []
    try:
        for start in range(0, len(prompts), batch_size):
            inputs = tokenizer.apply_chat_template(
                prompts[start : start + batch_size],
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
                tokenizer_kwargs={"padding_side": "left"},
            )
            inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
            output = model.generate(**inputs, do_sample=do_sample, max_new_tokens=max_new_tokens, **generate_kwargs)
            completion_ids = output[:, inputs["input_ids"].shape[1] :]
            texts.extend(tokenizer.batch_decode(completion_ids, skip_special_tokens=True))
    finally:
        model.train(training)
    return texts


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    batch_size: int = 128,
    max_new_tokens: int = MAX_NEW_TOKENS,
    do_sample: bool = False,
    **generate_kwargs: Any,
) -> EvalResult:
    """
    Decode every prompt of `dataset` once and score it.

    Works unchanged inside `with blended_generation(model, teacher, rule):`, where it measures the blended policy.
    Takes the arguments of [`generate_texts`], and a dataset from [`~testbed.task.build_prompt_dataset`].
    """
    texts = generate_texts(
        model, tokenizer, list(dataset["prompt"]), batch_size, max_new_tokens, do_sample, **generate_kwargs
    )
    answers = list(dataset["answer"])
    n = len(texts)
    return EvalResult(
        answer_rate=sum(answer_reward(texts, answers)) / n,
        format_rate=sum(format_reward(texts)) / n,
        boxed_rate=sum(accuracy_reward(texts, answers)) / n,
        reward_rate=sum(format_and_answer_reward(texts, answers)) / n,
        n=n,
        completions=tuple(texts),
    )


def load_checkpoint(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint in float32, in evaluation mode, with its tokenizer. A bare name means a shipped checkpoint."""
    path = CHECKPOINTS / path if (CHECKPOINTS / path).is_dir() else Path(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["student", "base", "teacher", "sft_student"])
    parser.add_argument("--task", default=ADDITION, choices=TASKS)
    parser.add_argument("--n", type=int, default=500)
    args = parser.parse_args()

    task = TASKS[args.task]
    dataset = task.prompts("test", args.n)
    print(f"{args.n} test prompts, rate ± standard error\n")
    print("| model | decoding | answer | format | boxed answer | answer and format | seconds |")
    print("|---|---|---|---|---|---|---|")
    for path in dict.fromkeys(map(task.model, args.models)):
        model, tokenizer = load_checkpoint(path)
        for do_sample in (False, True):
            torch.manual_seed(0)
            start = time.perf_counter()
            result = evaluate(model, tokenizer, dataset, max_new_tokens=task.max_new_tokens, do_sample=do_sample)
            cells = " | ".join(
                f"{getattr(result, key + '_rate'):.3f} ± {getattr(result, key + '_se'):.3f}"
                for key in ("answer", "format", "boxed", "reward")
            )
            seconds = time.perf_counter() - start
            decoding = "T = 1" if do_sample else "greedy"
            print(f"| {path.name} | {decoding} | {cells} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()

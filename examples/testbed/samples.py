"""The SFT data of distillation: what a teacher itself writes when it is asked the prompts of the test-bed."""

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from testbed.evaluate import generate_texts
from testbed.tasks import ADDITION, TASKS, Task


def build_teacher_dataset(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    seed: int = 0,
    batch_size: int = 512,
    task: Task = TASKS[ADDITION],
) -> Dataset:
    """
    Sample one completion per training prompt, at temperature 1, and return a conversational prompt-completion dataset.

    The samples are kept right or wrong: a student trained on them learns the distribution of the teacher. Only a
    sample that did not end within the length limit is left out, since its end would be invented here.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Teacher.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        n (`int`):
            Number of prompts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw of the prompts and of the sampling. The state of torch's generator is left as it was.
        batch_size (`int`, *optional*, defaults to `512`):
            Prompts per call of `generate`.
        task ([`~testbed.tasks.Task`], *optional*):
            What the prompts are of. Defaults to addition.
    """
    prompts = list(task.prompts("train", n, seed)["prompt"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        texts = generate_texts(model, tokenizer, prompts, batch_size, task.max_new_tokens, do_sample=True)
    ended = [len(tokenizer(text)["input_ids"]) < task.max_new_tokens for text in texts]
    return Dataset.from_dict(
        {
            "prompt": [prompt for prompt, keep in zip(prompts, ended, strict=True) if keep],
            "completion": [
                [{"role": "assistant", "content": text}] for text, keep in zip(texts, ended, strict=True) if keep
            ],
        }
    )

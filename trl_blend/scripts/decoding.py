"""What the scripts share about decoding: batches of prompts on every process, and greedy scores."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from trl import is_conversational
from trl.models import unwrap_model_for_generation

from trl_blend.models.wrappers import evaluation_mode
from trl_blend.trainers.trust_region_opd.rewards import rollout_rewards


_SAMPLING_KEYS = {"do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p"}


def own_share(rows: Sequence[Any], state: Any) -> list[Any]:
    """
    The rows of this process: contiguous and as many on every process, so that sharded models stay in step.

    The last row fills the shares up: concatenated in the order of the processes and cut to `len(rows)`, the shares are
    the rows.
    """
    share = math.ceil(len(rows) / state.num_processes)
    first = state.process_index * share
    return [rows[min(first + offset, len(rows) - 1)] for offset in range(share)]


def tokenize_prompts(tokenizer: Any, prompts: list[Any], chat_template_kwargs: dict[str, Any] | None = None) -> list:
    """Token ids of each prompt, a conversation or a text, without padding."""
    if not is_conversational({"prompt": prompts[0]}):
        return tokenizer(text=prompts)["input_ids"]
    tokenized = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
    )
    return tokenized["input_ids"]


def decode(model: Any, prompt_ids: list[list[int]], settings: GenerationConfig, batch_size: int) -> list[list[int]]:
    """Token ids of one completion per prompt, from left-padded batches, up to and with the first EOS of `settings`."""
    eos, completions = set(settings.eos_token_id), []
    for start in range(0, len(prompt_ids), batch_size):
        batch = prompt_ids[start : start + batch_size]
        width = max(map(len, batch))
        input_ids = torch.tensor([[settings.pad_token_id] * (width - len(ids)) + ids for ids in batch])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch])
        output = model.generate(
            input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
        )
        for ids in output[:, width:].tolist():
            end = next((index for index, token in enumerate(ids) if token in eos), len(ids))
            completions.append(ids[: end + 1])
    return completions


def greedy_rewards(trainer: Any, rows: list[dict[str, Any]], role: str) -> torch.Tensor:
    """
    Decode the prompts of `rows` greedily with the student or the teacher of a [`TrustRegionOPDTrainer`] and reward the
    completions.

    The rows are split over the processes. Nothing is drawn from the random generators, nothing is logged.

    Args:
        trainer ([`~trl_blend.TrustRegionOPDTrainer`]):
            Trainer whose models, prompts' format and reward functions are used. The student must be prepared, as it is
            from `on_train_begin` on: before, FSDP and ZeRO have not yet put its weights in place.
        rows (`list[dict]`):
            Rows of a dataset, the same on every process.
        role (`"student"` or `"teacher"`):
            Model to decode with. Both read the student's chat template.

    Returns:
        `torch.Tensor` of shape `(N, F)`: Reward of each row by each function, NaN where it returned `None`. Equal on
        every process.
    """
    args, accelerator = trainer.args, trainer.accelerator
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    mine = own_share(rows, accelerator)
    prompt_ids = tokenize_prompts(tokenizer, [row["prompt"] for row in mine], args.chat_template_kwargs)
    settings = {key: value for key, value in trainer.generation_kwargs.items() if key not in _SAMPLING_KEYS}
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if role == "teacher":
        teacher = trainer.teacher_model
        eos = {*settings["eos_token_id"], *eos_token_ids(teacher), *(trainer.eos.merged if trainer.eos else ())}
        greedy = GenerationConfig(**settings | {"eos_token_id": sorted(eos)}, do_sample=False, disable_compile=True)
        completion_ids = decode(teacher, prompt_ids, greedy, batch_size)
    else:
        greedy = GenerationConfig(**settings, do_sample=False, disable_compile=True)
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            accelerator,
            gather_deepspeed3_params=args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        ) as student:
            with evaluation_mode(student):
                completion_ids = decode(student, prompt_ids, greedy, batch_size)
    rewards = rollout_rewards(trainer.reward_funcs, mine, completion_ids, tokenizer, trainer.state)
    return accelerator.gather(rewards.to(accelerator.device))[: len(rows)].cpu()


def greedy_completion_rewards(
    trainer: Any, rows: list[dict[str, Any]], reward_funcs: Sequence[Any], max_new_tokens: int
) -> torch.Tensor:
    """
    Decode the prompts of `rows` greedily with the model of a [`~trl.SFTTrainer`] and reward the completions.

    The rows are split over the processes. Nothing is drawn from the random generators, nothing is logged.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer whose model must be prepared, as it is from `on_train_begin` on.
        rows (`list[dict]`):
            Rows of a dataset, the same on every process.
        reward_funcs (`Sequence[Callable]`):
            Reward functions, called as in TRL's GRPO.
        max_new_tokens (`int`):
            Limit on the length of a completion.

    Returns:
        `torch.Tensor` of shape `(N, F)`: Reward of each row by each function, NaN where it returned `None`. Equal on
        every process.
    """
    args, accelerator = trainer.args, trainer.accelerator
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    mine = own_share(rows, accelerator)
    prompt_ids = tokenize_prompts(tokenizer, [row["prompt"] for row in mine])
    ends = {tokenizer.eos_token_id, *eos_token_ids(accelerator.unwrap_model(trainer.model_wrapped))}
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        eos_token_id=sorted(ends),
        disable_compile=True,
    )
    with unwrap_model_for_generation(trainer.model_wrapped, accelerator) as student:
        with evaluation_mode(student):
            completion_ids = decode(student, prompt_ids, settings, args.per_device_train_batch_size)
    rewards = rollout_rewards(reward_funcs, mine, completion_ids, tokenizer, trainer.state)
    return accelerator.gather(rewards.to(accelerator.device))[: len(rows)].cpu()


def eos_token_ids(model: Any) -> list[int]:
    """End-of-sequence tokens that the `generation_config` of a model declares."""
    declared = model.generation_config.eos_token_id
    return [declared] if isinstance(declared, int) else list(declared or [])

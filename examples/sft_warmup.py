"""
The SFT-warmup baseline of trust-region distillation, in two commands: train the student on the teacher's answers to
the prompts that its first steps would draw, then distil on the student's own rollouts.

The test-bed (two CPU cores, no network):

    accelerate launch examples/sft_warmup.py --dataset_name testbed \
        --model_name_or_path examples/testbed/checkpoints/student \
        --teacher_model_name_or_path examples/testbed/checkpoints/teacher --output_dir outputs/sft_warmup \
        --max_steps 15 --per_device_train_batch_size 64 --max_completion_length 56 --learning_rate 5e-5 \
        --lr_scheduler_type constant --seed 0 --report_to none --use_cpu --bf16 false

    accelerate launch examples/trust_region_opd.py --config examples/configs/opd_baselines_testbed.yaml \
        --rollout_policy student --model_name_or_path outputs/sft_warmup --output_dir outputs/sft_warmup_opd

The paper (arXiv 2605.31159, A.2) takes 15, 25 or 50 supervised steps on the prompts of as many steps of distillation,
each answered by the teacher as often as the student would roll it out, with the optimizer of the distillation. The
prompts are those of `trust_region_opd.py` with the same data set, `--seed`, `--num_rollouts_per_prompt` and rollouts
per step (devices x batch x accumulation), in the same order. The second command starts from the first prompt again.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoTokenizer, GenerationConfig, set_seed
from trl import DatasetMixtureConfig, ModelConfig, SFTConfig, SFTTrainer, TrlParser
from trl.trainer.utils import RepeatSampler

from trl_blend.errors import ConfigError
from trl_blend.models.loading import find_tokenizer, load_frozen
from trl_blend.scripts import checks
from trl_blend.scripts.arguments import PromptScriptArguments
from trl_blend.scripts.data import load_prompts
from trl_blend.scripts.running import run, training_begins
from trl_blend.scripts.scoring import tokenize_prompts
from trl_blend.trainers._greedy import decode, eos_token_ids, own_share, pad_token_id


@dataclass
class SFTWarmupScriptArguments(PromptScriptArguments):
    """
    Script arguments of the SFT warmup.

    Args:
        teacher_model_name_or_path (`str`, *optional*):
            Teacher.
        num_rollouts_per_prompt (`int`, *optional*, defaults to `1`):
            Answers of the teacher to each prompt, as in [`~trl_blend.TrustRegionOPDConfig`].
        max_completion_length (`int`, *optional*, defaults to `512`):
            Limit on the length of an answer. A longer one is trained on without its end.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature that the teacher is sampled at, from its full distribution.
        teacher_dtype (`str`, *optional*):
            Dtype of the teacher. Defaults to the student's `dtype`.
    """

    required: ClassVar = checks.SFT_WARMUP

    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Teacher."})
    num_rollouts_per_prompt: int = field(default=1, metadata={"help": "Answers of the teacher to each prompt."})
    max_completion_length: int = field(default=512, metadata={"help": "Limit on the length of an answer."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature that the teacher is sampled at."})
    teacher_dtype: str | None = field(default=None, metadata={"help": "Dtype of the teacher. The student's if unset."})


def prompts_of_first_steps(dataset, steps, rollouts_per_step, rollouts_per_prompt, seed):
    """Rows that [`~trl_blend.TrustRegionOPDTrainer`] draws in its first `steps` steps, in order, one per rollout."""
    if steps < 1 or rollouts_per_step % rollouts_per_prompt:
        raise ConfigError(
            f"`max_steps={steps}` must be positive, and `num_rollouts_per_prompt={rollouts_per_prompt}` must divide "
            f"the {rollouts_per_step} rollouts of a step (devices x batch x accumulation)."
        )
    prompts_per_step = rollouts_per_step // rollouts_per_prompt
    sampler = RepeatSampler(dataset, rollouts_per_prompt, batch_size=prompts_per_step, shuffle=True, seed=seed)
    if not len(sampler):
        raise ConfigError(f"A step draws {prompts_per_step} prompts, but the data set has {len(dataset)}.")
    indices: list[int] = []
    while len(indices) < steps * rollouts_per_step:  # every epoch in another order, like the trainer
        indices.extend(sampler)
    return dataset.select(indices[: steps * rollouts_per_step])


def teacher_answers(prompts, teacher_name, tokenizer, script_args, training_args, dtype):
    """Token ids and labels of prompts with the teacher's answers, sampled by all processes together."""
    state = training_args.distributed_state
    # In full on every process, also under FSDP and ZeRO-3
    teacher = load_frozen(teacher_name, "teacher", dtype=dtype, device_map=None).to(training_args.device)
    own = {tokenizer.eos_token_id, find_tokenizer(teacher_name, "teacher", required=True).eos_token_id}
    settings = GenerationConfig(
        do_sample=True,
        temperature=script_args.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=script_args.max_completion_length,
        pad_token_id=pad_token_id(tokenizer),
        eos_token_id=sorted(own | set(eos_token_ids(teacher))),
    )
    set_seed(training_args.seed + state.process_index)
    prompt_ids = tokenize_prompts(tokenizer, own_share(prompts["prompt"], state))
    batch_size = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    rows = []
    for prompt, answer in zip(prompt_ids, decode(teacher, prompt_ids, settings, batch_size), strict=True):
        if answer[-1] in settings.eos_token_id:  # the student ends with its own token
            answer[-1] = tokenizer.eos_token_id
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    del teacher
    torch.cuda.empty_cache()
    return Dataset.from_list(gather_object(rows)[: len(prompts)])


def main(script_args, training_args, model_args, dataset_args):
    for option in ("use_peft", "load_in_4bit", "load_in_8bit"):
        if getattr(model_args, option):
            raise ConfigError(f"`{option}` is not supported: the second command needs the weights of a whole model.")
    train_dataset, _ = load_prompts(script_args, training_args, model_args, dataset_args)
    batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    per_step, per_prompt = batch * training_args.world_size, script_args.num_rollouts_per_prompt
    prompts = prompts_of_first_steps(train_dataset, training_args.max_steps, per_step, per_prompt, training_args.seed)
    student, teacher = model_args.model_name_or_path, script_args.teacher_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(student, revision=model_args.model_revision)
    dtype = script_args.teacher_dtype or model_args.dtype
    answers = teacher_answers(prompts, teacher, tokenizer, script_args, training_args, dtype)
    # Prompts in the order of the distillation; answers are bounded by `max_completion_length` already
    training_args.train_sampling_strategy, training_args.max_length = "sequential", None
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    trainer = SFTTrainer(model=student, args=training_args, train_dataset=answers, processing_class=tokenizer)
    training_begins()
    trainer.train()
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    trainer.accelerator.end_training()


def make_parser(prog=None):
    return TrlParser((SFTWarmupScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig), prog=prog)


if __name__ == "__main__":
    run(main, make_parser)

"""
Distil a teacher into a student on the student's own rollouts, the first of which the teacher helps to decode, and
print how both do on held-out prompts before and after.

The test-bed (two CPU cores, no network, a few minutes):

    accelerate launch examples/trust_region_opd.py --config examples/configs/trust_region_opd_testbed.yaml

Any Hub ids, with LoRA:

    accelerate launch examples/trust_region_opd.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --teacher_model_name_or_path Qwen/Qwen2.5-7B-Instruct \
        --dataset_name my-org/my-prompts --prompt_column problem --answer_column answer \
        --reward_funcs rewards.boxed_accuracy_reward \
        --kl_budget 0.01 --blend_warmup_steps 50 --use_peft --lora_target_modules all-linear --output_dir out

The baselines of the paper are settings of the same trainer, one flag each (`--rollout_policy`, `--kl_budget_schedule`,
`--temperature_warmup_start`, `--distillation_target`); `--help` lists them. Its SFT warmup is `sft_warmup.py`.
"""

from contextlib import nullcontext
from functools import partial
from itertools import islice

from trl import DatasetMixtureConfig, ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_blend import TrustRegionOPDConfig, TrustRegionOPDTrainer
from trl_blend.scripts.arguments import TrustRegionOPDScriptArguments
from trl_blend.scripts.data import load_prompts, prompts_name
from trl_blend.scripts.rewards import load_rewards
from trl_blend.scripts.running import run
from trl_blend.scripts.scoring import generating_model, greedy_scores, scoring_bar, tokenize_prompts
from trl_blend.scripts.training import finish, train_and_score


def main(script_args, training_args, model_args, dataset_args):
    # Rewards are measured, not trained on; without any there is no table
    reward_names = script_args.reward_funcs or []
    train_dataset, test_dataset = load_prompts(script_args, training_args, model_args, dataset_args)
    rewards = load_rewards(reward_names, train_dataset.column_names)

    common = {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype}
    revision = {"revision": model_args.model_revision}
    training_args.model_init_kwargs = common | revision | (training_args.model_init_kwargs or {})
    # The teacher is not quantized, unless `teacher_model_init_kwargs` says so: that would change the distribution the
    # student is trained to match
    training_args.teacher_model_init_kwargs = common | (training_args.teacher_model_init_kwargs or {})
    trainer = TrustRegionOPDTrainer(
        model=model_args.model_name_or_path,
        teacher_model=training_args.teacher_model_name_or_path,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=test_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    rows = list(islice(test_dataset or [], script_args.num_test_prompts)) if rewards else []
    frozen = {}

    def greedy(model, name):
        prompts = [row["prompt"] for row in rows]
        return greedy_scores(
            model,
            rows,
            tokenize_prompts(trainer.processing_class, prompts, training_args.chat_template_kwargs),
            rewards,
            trainer.processing_class,
            trainer.state,
            accelerator=trainer.accelerator,
            generation_kwargs=trainer.generation_kwargs,
            batch_size=training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps,
            progress=scoring_bar(trainer, name),
        )

    def score():
        if not rows:
            return {}
        if trainer.engine is not None:  # it holds both
            if not frozen:
                frozen["teacher"] = greedy(partial(trainer.decode_greedily, teacher=True), "teacher")
            return {"student": greedy(trainer.decode_greedily, "student"), **frozen}
        if not frozen:
            frozen["teacher"] = greedy(nullcontext(trainer.teacher_model), "teacher")
        student = generating_model(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=training_args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=training_args.gradient_checkpointing_kwargs,
        )
        return {"student": greedy(student, "student"), **frozen}

    scores = train_and_score(trainer, score)
    columns = [name.rpartition(".")[2] for name in reward_names]
    finish(trainer, scores, columns, len(rows), prompts_name(script_args))


def make_parser(prog=None):
    return TrlParser(
        (TrustRegionOPDScriptArguments, TrustRegionOPDConfig, ModelConfig, DatasetMixtureConfig), prog=prog
    )


if __name__ == "__main__":
    run(main, make_parser)

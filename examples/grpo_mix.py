"""
Train a student with GRPO on rollouts that a frozen teacher helps to decode, and print how both do before and after.

The test-bed (two CPU cores, no network, a few minutes):

    accelerate launch examples/grpo_mix.py --config examples/configs/grpo_mix_testbed.yaml

Any Hub ids, with LoRA:

    accelerate launch examples/grpo_mix.py \
        --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct --teacher_model_name_or_path my-org/my-sft-model \
        --dataset_name my-org/my-prompts --prompt_column problem --answer_column answer \
        --reward_funcs rewards.boxed_accuracy_reward \
        --teacher_weight 0.3 --use_peft --lora_target_modules all-linear --output_dir out
"""

from itertools import islice

from trl import DatasetMixtureConfig, TrlParser, get_peft_config, get_quantization_config

from trl_blend import LogitMixGRPOConfig, LogitMixGRPOTrainer
from trl_blend.errors import ConfigError
from trl_blend.scripts.arguments import GRPOMixModelConfig, GRPOMixScriptArguments
from trl_blend.scripts.data import load_prompts, prompts_name
from trl_blend.scripts.rewards import load_rewards
from trl_blend.scripts.running import run
from trl_blend.scripts.scoring import means_and_errors, scoring_bar
from trl_blend.scripts.training import finish, train_and_score


def score_policies(trainer, rows):
    """Greedy rates of student, mixed policy and each teacher: `{policy: [(mean, standard error), ...]}`."""
    weights = tuple(trainer.args.teacher_weight)
    policies = {"student alone": (0.0,) * len(weights)}
    if trainer.args.mixes:
        mixed = trainer.adaptive_weights if trainer.args.teacher_weight_schedule == "adaptive" else weights
        policies[f"mixed, weight {'/'.join(f'{w:.2f}' for w in mixed)}"] = mixed
        # Where logits are added the student is in every mixture
        alone = range(len(weights)) if trainer.args.mixing_space != "arithmetic" else ()
        for index in alone:
            name = "teacher alone" if len(trainer.partners) == 1 else f"teacher {index} alone"
            name = name if trainer.partners else "base alone"
            policies[name] = tuple(float(index == other) for other in range(len(weights)))
    return {
        name: means_and_errors(trainer.greedy_rewards(rows, policy, scoring_bar(trainer, name)).rewards)
        for name, policy in policies.items()
    }


def main(script_args, training_args, model_args, dataset_args):
    reward_funcs, weights = script_args.reward_funcs, training_args.reward_weights
    if weights is not None and len(weights) != len(reward_funcs):
        raise ConfigError(
            f"`reward_weights` has {len(weights)} values for the {len(reward_funcs)} reward(s) {reward_funcs}. Give "
            "one weight per reward; the settings file may hold weights for its own rewards."
        )
    train_dataset, test_dataset = load_prompts(script_args, training_args, model_args, dataset_args)
    rewards = load_rewards(reward_funcs, train_dataset.column_names)

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    trainer = LogitMixGRPOTrainer(
        model=model_args.model_name_or_path,
        teacher_model=training_args.teacher_model_name_or_path,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=test_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    rows = list(islice(test_dataset or [], script_args.num_test_prompts))
    scores = train_and_score(trainer, lambda: score_policies(trainer, rows) if rows else {})
    finish(trainer, scores, trainer.reward_func_names, len(rows), prompts_name(script_args))


def make_parser(prog=None):
    return TrlParser((GRPOMixScriptArguments, LogitMixGRPOConfig, GRPOMixModelConfig, DatasetMixtureConfig), prog=prog)


if __name__ == "__main__":
    run(main, make_parser)

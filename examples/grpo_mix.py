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

import argparse
from dataclasses import dataclass, field

from trl_blend.errors import ConfigError
from trl_blend.scripts.prompts import (
    TESTBED,
    TESTBED_REWARDS,
    PromptScriptArguments,
    check_reward_columns,
    load_prompts,
    load_reward,
    prompts_name,
)
from trl_blend.scripts.running import run


@dataclass
class GRPOMixScriptArguments(PromptScriptArguments):
    """
    Script arguments of the logit-mixing example.

    Args:
        reward_funcs (`list[str]`, *optional*):
            Rewards: `"accuracy_reward"` or `"think_format_reward"` of TRL, or a dotted import path such as
            `"rewards.boxed_accuracy_reward"`. Defaults to the test-bed's, the first of which is trained on.
        num_test_prompts (`int`, *optional*, defaults to `200`):
            See [`PromptScriptArguments`], which has the other arguments.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Rewards: accuracy_reward, think_format_reward, or a dotted import path."},
    )
    num_test_prompts: int = field(
        default=200, metadata={"help": "Prompts of the test split for the before/after table. 0 skips it."}
    )


def evaluate_policies(trainer, rows):
    """Greedy rates of student, mixed policy and each teacher: `{policy: [(mean, standard error), ...]}`."""
    weights = tuple(trainer.args.teacher_weight)
    policies = {"student alone": (0.0,) * len(weights)}
    if trainer.args.mixes:
        mixed = trainer.adaptive_weights if trainer.args.teacher_weight_schedule == "adaptive" else weights
        policies[f"mixed, weight {'/'.join(f'{w:.2f}' for w in mixed)}"] = mixed
        for index in range(len(weights)):
            name = "teacher alone" if len(trainer.partners) == 1 else f"teacher {index} alone"
            name = name if trainer.partners else "base alone"
            policies[name] = tuple(float(index == other) for other in range(len(weights)))
    table = {}
    for name, policy in policies.items():
        rewards = trainer.greedy_rewards(rows, policy).rewards
        errors = rewards.std(dim=0, correction=1) / len(rows) ** 0.5
        table[name] = list(zip(rewards.mean(dim=0).tolist(), errors.tolist(), strict=True))
    return table


def main(script_args, training_args, model_args, dataset_args):
    from trl import get_peft_config, get_quantization_config

    from trl_blend import LogitMixGRPOTrainer
    from trl_blend.scripts.training import finish, train_and_score

    reward_funcs = script_args.reward_funcs or TESTBED_REWARDS
    if not script_args.reward_funcs and training_args.reward_weights is None:
        training_args.reward_weights = [1.0, 0.0, 0.0]
    given = training_args.reward_weights
    if given is not None and len(given) != len(reward_funcs):
        raise ConfigError(
            f"`reward_weights` has {len(given)} values for the {len(reward_funcs)} reward(s) {reward_funcs}. Give one "
            "weight per reward; the settings file may hold weights for its own rewards."
        )
    train_dataset, test_dataset = load_prompts(script_args, dataset_args)
    rewards = [load_reward(name) for name in reward_funcs]
    check_reward_columns(rewards, train_dataset.column_names)

    model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    training_args.model_init_kwargs = model_init_kwargs | (training_args.model_init_kwargs or {})
    teachers = training_args.teacher_model_name_or_path
    if not teachers and not model_args.use_peft:
        teachers = [str(TESTBED / "teacher")]
    trainer = LogitMixGRPOTrainer(
        model=model_args.model_name_or_path or str(TESTBED / "student"),
        teacher_model=teachers,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=test_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    rows = list(test_dataset.select(range(min(script_args.num_test_prompts, len(test_dataset)))))
    scores = train_and_score(trainer, lambda: evaluate_policies(trainer, rows) if rows else {})
    finish(trainer, scores, trainer.reward_func_names, len(rows), prompts_name(script_args, dataset_args))


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from trl_blend import LogitMixGRPOConfig

    dataclass_types = (GRPOMixScriptArguments, LogitMixGRPOConfig, ModelConfig, DatasetMixtureConfig)
    if subparsers is not None:
        return subparsers.add_parser("grpo-mix", help="Run the logit-mixing example", dataclass_types=dataclass_types)
    return TrlParser(dataclass_types, prog=prog)


if __name__ == "__main__":
    run(main, make_parser)

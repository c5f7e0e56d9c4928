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

import argparse
from dataclasses import dataclass, field

from trl_blend.errors import ConfigError
from trl_blend.scripts.prompts import (
    TESTBED,
    TESTBED_REWARDS,
    PromptScriptArguments,
    check_reward_columns,
    is_testbed,
    load_prompts,
    load_reward,
    prompts_name,
)
from trl_blend.scripts.results import means_and_errors
from trl_blend.scripts.running import run


@dataclass
class TrustRegionOPDScriptArguments(PromptScriptArguments):
    """
    Script arguments of the trust-region example.

    Args:
        reward_funcs (`list[str]`, *optional*):
            What to measure, without any effect on training: `"accuracy_reward"` or `"think_format_reward"` of TRL, or
            a dotted import path such as `"rewards.boxed_accuracy_reward"`. Defaults to the test-bed's rewards for its
            prompts, and to none, without a before/after table, for a dataset.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to measure, without effect on training: accuracy_reward, think_format_reward, or a dotted "
            "import path."
        },
    )


def load_rewards(script_args, dataset_args, train_dataset):
    """Reward functions by their names in the table; none where nothing can be measured."""
    default = TESTBED_REWARDS if is_testbed(script_args, dataset_args) else []
    names = script_args.reward_funcs or default
    rewards = {name.rpartition(".")[2]: load_reward(name) for name in names}
    check_reward_columns(list(rewards.values()), train_dataset.column_names)
    return rewards


def find_teacher(script_args, training_args, dataset_args):
    """Name of the teacher: the test-bed's for its prompts, unless another one is given."""
    if training_args.teacher_model_name_or_path:
        return training_args.teacher_model_name_or_path
    if is_testbed(script_args, dataset_args):
        return str(TESTBED / "teacher")
    raise ConfigError(
        "A teacher is required: set `teacher_model_name_or_path`. Without one the teacher would be the student's own "
        "base, from which a new adapter has nothing to learn."
    )


def main(script_args, training_args, model_args, dataset_args):
    from trl import get_peft_config, get_quantization_config

    from trl_blend import TrustRegionOPDTrainer
    from trl_blend.scripts.decoding import greedy_rewards
    from trl_blend.scripts.training import finish, train_and_score

    train_dataset, test_dataset = load_prompts(script_args, dataset_args)
    rewards = load_rewards(script_args, dataset_args, train_dataset)
    teacher = find_teacher(script_args, training_args, dataset_args)

    common = {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype}
    revision = {"revision": model_args.model_revision}
    training_args.model_init_kwargs = common | revision | (training_args.model_init_kwargs or {})
    # The teacher is not quantized, unless `teacher_model_init_kwargs` says so: that would change the distribution the
    # student is trained to match
    training_args.teacher_model_init_kwargs = common | (training_args.teacher_model_init_kwargs or {})
    trainer = TrustRegionOPDTrainer(
        model=model_args.model_name_or_path or str(TESTBED / "student"),
        teacher_model=teacher,
        reward_funcs=list(rewards.values()),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=test_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    rows = list(test_dataset.select(range(min(script_args.num_test_prompts, len(test_dataset))))) if rewards else []

    frozen = {}

    def score():
        if rows and not frozen:
            frozen["teacher"] = means_and_errors(greedy_rewards(trainer, rows, "teacher"))
        return {"student": means_and_errors(greedy_rewards(trainer, rows, "student")), **frozen} if rows else {}

    scores = train_and_score(trainer, score)
    finish(trainer, scores, list(rewards), len(rows), prompts_name(script_args, dataset_args))


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from trl_blend import TrustRegionOPDConfig

    dataclass_types = (TrustRegionOPDScriptArguments, TrustRegionOPDConfig, ModelConfig, DatasetMixtureConfig)
    if subparsers is not None:
        return subparsers.add_parser(
            "trust-region-opd", help="Run the trust-region distillation example", dataclass_types=dataclass_types
        )
    return TrlParser(dataclass_types, prog=prog)


if __name__ == "__main__":
    run(main, make_parser)

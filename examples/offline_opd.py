"""
Distil a teacher into a student from the teacher's log-probabilities of stored rollouts, and print how the student does
on held-out prompts before and after. No teacher is loaded.

The test-bed (two CPU cores, no network): `make demo-offline` runs all four stages. One by one:

    trl-blend rollouts --model_name_or_path my-sft --dataset_name prompts.jsonl --output_dir rollouts
    trl-blend score --teacher_model_name_or_path Qwen/Qwen3-8B --rollouts rollouts --output_dir scored
    trl-blend inspect scored --model_name_or_path my-sft
    accelerate launch examples/offline_opd.py --model_name_or_path my-sft --dataset_name scored --output_dir out

With a table of accuracy, on prompts with reference answers:

    accelerate launch examples/offline_opd.py --model_name_or_path my-sft --dataset_name scored --output_dir out \
        --test_dataset_name my-org/my-prompts --prompt_column problem --answer_column answer \
        --reward_funcs rewards.boxed_accuracy_reward
"""

import argparse
from dataclasses import dataclass, field, replace

from trl_blend.errors import ConfigError
from trl_blend.scripts.prompts import (
    TESTBED_REWARDS,
    PromptScriptArguments,
    check_reward_columns,
    load_prompts,
    load_reward,
)
from trl_blend.scripts.results import means_and_errors
from trl_blend.scripts.running import run


TESTBED_PROMPTS = "testbed"


@dataclass
class OfflineOPDScriptArguments(PromptScriptArguments):
    """
    Script arguments of the offline example.

    Args:
        dataset_name (`str`):
            Scored rollouts: the output of `trl-blend score`, or a dataset repository that holds it.
        dataset_revision (`str`, *optional*):
            Revision of that repository.
        test_dataset_name (`str`, *optional*):
            Prompts of the before/after table: Hub id, local folder, `.json`/`.jsonl` file, or `"testbed"` for the
            additions of `examples/testbed`. Without one there is no table.
        reward_funcs (`list[str]`, *optional*):
            What to measure, without any effect on training: `"accuracy_reward"` or `"think_format_reward"` of TRL, or
            a dotted import path such as `"rewards.boxed_accuracy_reward"`. Defaults to the test-bed's rewards for its
            prompts, and to TRL's `"accuracy_reward"` for others.
        max_new_tokens (`int`, *optional*):
            Limit on the length of a decoded completion. Defaults to that of the rollouts.
        compare_live_steps (`int`, *optional*, defaults to `0`):
            Steps of live distillation to time after training, with `teacher_model_name_or_path` as the teacher and
            the prompts of `test_dataset_name`: TRL's `DistillationTrainer`, and the same with the loss on sampled
            tokens. One process only.
    """

    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the scored rollouts."})
    test_dataset_name: str | None = field(
        default=None, metadata={"help": "Prompts of the before/after table, or `testbed`. None: no table."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to measure, without effect on training: accuracy_reward, think_format_reward, or a dotted "
            "import path."
        },
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Limit on the length of a decoded completion. That of the rollouts if unset."}
    )
    compare_live_steps: int = field(
        default=0, metadata={"help": "Steps of live distillation to time after training. Needs a teacher."}
    )


def load_test(script_args):
    """Training and test prompts of the test data set, and the rewards of the table."""
    from trl import DatasetMixtureConfig

    name = script_args.test_dataset_name
    if not name:
        if script_args.reward_funcs or script_args.compare_live_steps:
            raise ConfigError("`reward_funcs` and `compare_live_steps` need prompts: set `test_dataset_name`.")
        return None, None, {}
    is_testbed = name == TESTBED_PROMPTS
    named = replace(script_args, dataset_name=None if is_testbed else name)
    train, test = load_prompts(named, DatasetMixtureConfig())
    names = script_args.reward_funcs or (TESTBED_REWARDS if is_testbed else ["accuracy_reward"])
    rewards = {name.rpartition(".")[2]: load_reward(name) for name in names}
    check_reward_columns(list(rewards.values()), test.column_names)
    return train, test, rewards


def check_comparison(script_args, training_args):
    """Refuse a comparison that cannot be made, before anything is trained."""
    if not script_args.compare_live_steps:
        return
    if not training_args.teacher_model_name_or_path:
        raise ConfigError("`compare_live_steps` needs a teacher: set `teacher_model_name_or_path`.")
    if training_args.world_size > 1 or training_args.gradient_accumulation_steps > 1:
        raise ConfigError(
            "`compare_live_steps` is for one process without gradient accumulation. Leave it out, or set "
            "`gradient_accumulation_steps=1`."
        )


def main(script_args, training_args, model_args):
    from trl import get_peft_config, get_quantization_config

    from trl_blend import OfflineOPDTrainer, load_scored_rollouts
    from trl_blend.scripts.decoding import greedy_completion_rewards
    from trl_blend.scripts.training import StepTimes, finish, train_and_score

    if not script_args.dataset_name:
        raise ConfigError("Scored rollouts are required: set `dataset_name` to the output of `trl-blend score`.")
    if not model_args.model_name_or_path:
        raise ConfigError("The student that made the rollouts is required: set `model_name_or_path`.")
    check_comparison(script_args, training_args)
    train_prompts, test_prompts, rewards = load_test(script_args)
    scored = load_scored_rollouts(script_args.dataset_name, revision=script_args.dataset_revision)

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    times = StepTimes()
    trainer = OfflineOPDTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=scored,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        callbacks=[times],
    )
    rows = list(test_prompts.select(range(min(script_args.num_test_prompts, len(test_prompts))))) if rewards else []
    length = script_args.max_new_tokens or (scored.manifest.sampling or {}).get("max_new_tokens", 512)

    def score():
        if not rows:
            return {}
        scores = greedy_completion_rewards(trainer, rows, list(rewards.values()), length)
        return {"student": means_and_errors(scores)}

    scores = train_and_score(trainer, score)
    finish(trainer, scores, list(rewards), len(rows), script_args.dataset_name)
    if script_args.compare_live_steps:
        from trl_blend.scripts.live_opd import compare_with_live

        compare_with_live(
            times.seconds, scored, train_prompts, model_args.model_name_or_path, training_args,
            script_args.compare_live_steps, length,
        )  # fmt: skip


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    from trl import ModelConfig, TrlParser

    from trl_blend import OfflineOPDConfig

    dataclass_types = (OfflineOPDScriptArguments, OfflineOPDConfig, ModelConfig)
    if subparsers is not None:
        return subparsers.add_parser(
            "offline-opd", help="Run the offline distillation example", dataclass_types=dataclass_types
        )
    return TrlParser(dataclass_types, prog=prog)


if __name__ == "__main__":
    run(main, make_parser)

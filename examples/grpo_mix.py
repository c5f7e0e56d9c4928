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
import importlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from trl import ScriptArguments


EXAMPLES = Path(__file__).resolve().parent
TESTBED = EXAMPLES / "testbed" / "checkpoints"


@dataclass
class GRPOMixScriptArguments(ScriptArguments):
    """
    Script arguments of the logit-mixing example.

    Args:
        dataset_name (`str`, *optional*):
            Hub id, local folder or `.json`/`.jsonl` file of prompts. Defaults to the additions of `examples/testbed`.
        reward_funcs (`list[str]`, *optional*):
            Rewards: `"accuracy_reward"` or `"think_format_reward"` of TRL, or a dotted import path such as
            `"rewards.boxed_accuracy_reward"`. Defaults to the test-bed's, the first of which is trained on.
        prompt_column (`str`, *optional*):
            Column of plain questions, when the dataset has no conversational `prompt` column.
        answer_column (`str`, *optional*):
            Column of reference answers, renamed to the `solution` that TRL's rewards read.
        system_prompt (`str`, *optional*):
            System message put before each question of `prompt_column`.
        num_test_prompts (`int`, *optional*, defaults to `200`):
            Prompts of the test split for the before/after table. 0 skips it. Without a test split, up to a tenth of
            the data is held out.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Rewards: accuracy_reward, think_format_reward, or a dotted import path."},
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of plain questions, when there is no `prompt` column."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Column of reference answers, renamed to `solution`."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message put before each question of `prompt_column`."}
    )
    num_test_prompts: int = field(
        default=200, metadata={"help": "Prompts of the test split for the before/after table. 0 skips it."}
    )


def load_reward(name):
    """A reward function by the name of one of TRL's, or by its dotted import path."""
    module_name, _, function = name.rpartition(".")
    if not module_name and name not in ("accuracy_reward", "think_format_reward"):
        raise ValueError(
            f"`reward_funcs` has {name!r}. Use accuracy_reward, think_format_reward, or a dotted import path such as "
            "rewards.boxed_accuracy_reward."
        )
    return getattr(importlib.import_module(module_name or "trl.rewards"), function)


def load_prompts(script_args, dataset_args):
    """Train and test prompts; the test-bed's when no dataset is named."""
    from datasets import load_dataset
    from trl import get_dataset

    if not script_args.dataset_name and not dataset_args.datasets:
        from testbed.task import build_prompt_dataset

        num_test = max(script_args.num_test_prompts, 1)
        return build_prompt_dataset("train", 8192), build_prompt_dataset("test", num_test)
    name = script_args.dataset_name or ""
    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
    elif name.endswith((".json", ".jsonl")):
        dataset = load_dataset("json", data_files={script_args.dataset_train_split: name})
    else:
        dataset = load_dataset(name, name=script_args.dataset_config)
    columns = next(iter(dataset.values())).column_names
    for option in ("prompt_column", "answer_column"):
        column = getattr(script_args, option)
        if column and column not in columns:
            raise ValueError(f"`{option}={column}` is not a column of the dataset. It has {', '.join(columns)}.")
    if not script_args.prompt_column and "prompt" not in columns:
        raise ValueError(f"The dataset has no column `prompt` but {', '.join(columns)}. Set `prompt_column`.")
    if script_args.prompt_column:
        system = [{"role": "system", "content": script_args.system_prompt}] if script_args.system_prompt else []
        dataset = dataset.map(
            lambda row: {"prompt": [*system, {"role": "user", "content": row[script_args.prompt_column]}]}
        )
    if script_args.answer_column and script_args.answer_column != "solution":
        if "solution" in columns:
            dataset = dataset.remove_columns("solution")
        dataset = dataset.rename_column(script_args.answer_column, "solution")
    train = dataset[script_args.dataset_train_split]
    if script_args.dataset_test_split in dataset:
        return train, dataset[script_args.dataset_test_split]
    # Without a test split, up to a tenth of the data is held out
    num_test = max(1, min(script_args.num_test_prompts, len(train) // 10))
    held_out = train.train_test_split(test_size=num_test, seed=0)
    return held_out["train"], held_out["test"]


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


def print_table(before, after, names, num_prompts):
    """Before and after, side by side, one row per policy and one column per reward."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Greedy decoding of {num_prompts} held-out prompts: mean ± standard error")
    table.add_column("policy")
    for when in ("before", "after"):
        for name in names:
            table.add_column(f"{name.removesuffix('_reward').replace('_', ' ')}\n{when}", justify="right")
    # The adaptive weight moves, so rows are matched by position
    for (policy, old), (policy_after, new) in zip(before.items(), after.items(), strict=True):
        cells = [f"{mean:.3f} ± {error:.3f}" for mean, error in [*old, *new]]
        table.add_row(policy if policy == policy_after else f"{policy} → {policy_after.rsplit(' ', 1)[1]}", *cells)
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def main(script_args, training_args, model_args, dataset_args):
    from trl import get_peft_config, get_quantization_config

    from trl_blend import LogitMixGRPOTrainer

    sys.path.insert(0, str(EXAMPLES))
    reward_funcs = script_args.reward_funcs or [
        "testbed.task.format_and_answer_reward",
        "testbed.task.answer_reward",
        "testbed.task.format_reward",
    ]
    if not script_args.reward_funcs and training_args.reward_weights is None:
        training_args.reward_weights = [1.0, 0.0, 0.0]
    given = training_args.reward_weights
    if given is not None and len(given) != len(reward_funcs):
        raise ValueError(
            f"`reward_weights` has {len(given)} values for the {len(reward_funcs)} reward(s) {reward_funcs}. Give one "
            "weight per reward; the settings file may hold weights for its own rewards."
        )
    train_dataset, test_dataset = load_prompts(script_args, dataset_args)
    needs_solution = {"accuracy_reward", "rewards.boxed_accuracy_reward"} & set(reward_funcs)
    if needs_solution and "solution" not in train_dataset.column_names:
        raise ValueError(
            f"{', '.join(needs_solution)} reads the column `solution`, which the dataset lacks. Name the column of "
            "reference answers with `answer_column`."
        )

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
        reward_funcs=[load_reward(name) for name in reward_funcs],
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=test_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    rows = list(test_dataset.select(range(min(script_args.num_test_prompts, len(test_dataset)))))
    before = evaluate_policies(trainer, rows) if rows else {}
    # On the command line "true" means the latest checkpoint of `output_dir`
    checkpoint = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(checkpoint).lower() == "true" else checkpoint)
    after = evaluate_policies(trainer, rows) if rows else {}

    trainer.save_model(training_args.output_dir)
    trainer.create_model_card(model_name=Path(training_args.output_dir).name, dataset_name=script_args.dataset_name)
    if trainer.accelerator.is_main_process and rows:
        print_table(before, after, trainer.reward_func_names, len(rows))
        results = {"rewards": trainer.reward_func_names, "prompts": len(rows), "before": before, "after": after}
        path = Path(training_args.output_dir) / "before_after.json"
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from trl_blend import LogitMixGRPOConfig

    dataclass_types = (GRPOMixScriptArguments, LogitMixGRPOConfig, ModelConfig, DatasetMixtureConfig)
    if subparsers is not None:
        return subparsers.add_parser("grpo-mix", help="Run the logit-mixing example", dataclass_types=dataclass_types)
    return TrlParser(dataclass_types, prog=prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())

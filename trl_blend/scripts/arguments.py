"""Arguments of the training scripts, beside those of their configurations."""

from dataclasses import dataclass, field

from trl import ScriptArguments


@dataclass
class PromptScriptArguments(ScriptArguments):
    """Arguments of a script that reads prompts."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts: Hub id, local folder or `.json`/`.jsonl` file. Those of examples/testbed if unset."
        },
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of plain questions, when there is no conversational `prompt` column."}
    )
    answer_column: str | None = field(
        default=None,
        metadata={"help": "Column of reference answers, renamed to the `solution` that TRL's rewards read."},
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message put before each question of `prompt_column`."}
    )
    num_test_prompts: int = field(
        default=300,
        metadata={
            "help": "Prompts of the test split for the before/after table. 0 skips it. Without a test split, up to a "
            "tenth of the data is held out."
        },
    )


@dataclass
class GRPOMixScriptArguments(PromptScriptArguments):
    """Arguments of `examples/grpo_mix.py`."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards: accuracy_reward or think_format_reward of TRL, or a dotted import path such as "
            "rewards.boxed_accuracy_reward. The test-bed's if unset, the first of which is trained on."
        },
    )
    num_test_prompts: int = field(
        default=200, metadata={"help": "Prompts of the test split for the before/after table. 0 skips it."}
    )


@dataclass
class TrustRegionOPDScriptArguments(PromptScriptArguments):
    """Arguments of `examples/trust_region_opd.py`."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to measure, without effect on training: accuracy_reward or think_format_reward of TRL, or a "
            "dotted import path such as rewards.boxed_accuracy_reward. If unset, the test-bed's rewards for its "
            "prompts, and none, without a before/after table, for a dataset."
        },
    )


@dataclass
class OfflineOPDScriptArguments(PromptScriptArguments):
    """Arguments of `examples/offline_opd.py`."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Scored rollouts: the output of `trl-blend score`, or a dataset repository that holds it."},
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of that repository."})
    test_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts of the before/after table: Hub id, local folder, `.json`/`.jsonl` file, or `testbed` for "
            "the additions of examples/testbed. No table if unset."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to measure, without effect on training: accuracy_reward or think_format_reward of TRL, or a "
            "dotted import path such as rewards.boxed_accuracy_reward. If unset, the test-bed's rewards for its "
            "prompts, and accuracy_reward for others."
        },
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Limit on the length of a decoded completion. That of the rollouts if unset."}
    )

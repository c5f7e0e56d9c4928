"""Arguments of the training scripts, beside those of their configurations."""

from dataclasses import dataclass, field

from trl import ScriptArguments


@dataclass
class PromptScriptArguments(ScriptArguments):
    """
    Arguments of a script that reads prompts.

    Args:
        dataset_name (`str`, *optional*):
            Hub id, local folder or `.json`/`.jsonl` file of prompts. Defaults to the additions of `examples/testbed`.
        prompt_column (`str`, *optional*):
            Column of plain questions, when the dataset has no conversational `prompt` column.
        answer_column (`str`, *optional*):
            Column of reference answers, renamed to the `solution` that TRL's rewards read.
        system_prompt (`str`, *optional*):
            System message put before each question of `prompt_column`.
        num_test_prompts (`int`, *optional*, defaults to `300`):
            Prompts of the test split for the before/after table. 0 skips it. Without a test split, up to a tenth of
            the data is held out.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Prompts: Hub id, local folder or JSON-lines file. Those of examples/testbed if unset."},
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
        default=300, metadata={"help": "Prompts of the test split for the before/after table. 0 skips it."}
    )


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


@dataclass
class OfflineOPDScriptArguments(TrustRegionOPDScriptArguments):
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
            As in [`TrustRegionOPDScriptArguments`]. Defaults to the test-bed's rewards for its prompts, and to TRL's
            `"accuracy_reward"` for others.
        max_new_tokens (`int`, *optional*):
            Limit on the length of a decoded completion. Defaults to that of the rollouts.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Scored rollouts: the output of `trl-blend score`, or a dataset repository that holds it."},
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the scored rollouts."})
    test_dataset_name: str | None = field(
        default=None, metadata={"help": "Prompts of the before/after table, or `testbed`. None: no table."}
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Limit on the length of a decoded completion. That of the rollouts if unset."}
    )

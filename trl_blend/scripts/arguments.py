"""Arguments of the training scripts, beside those of their configurations."""

from dataclasses import dataclass, field
from typing import ClassVar

from trl import ModelConfig, ScriptArguments

from trl_blend.scripts import checks


@dataclass
class PromptScriptArguments(ScriptArguments):
    """Arguments of a script that reads prompts."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts: Hub id, local folder, .json, .jsonl, .parquet or .csv file, or `testbed` for the "
            "additions of examples/testbed."
        },
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the questions, text or messages, when there is no `prompt` column."}
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
            "help": "Prompts of the test split for the before/after table. Without a test split, up to a tenth of the "
            "data is held out. 0 skips the table and holds nothing out."
        },
    )


@dataclass
class GRPOMixScriptArguments(PromptScriptArguments):
    """Arguments of `examples/grpo_mix.py`."""

    required: ClassVar = checks.GRPO_MIX

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards: accuracy_reward or think_format_reward of TRL, or a dotted import path such as "
            "rewards.boxed_accuracy_reward."
        },
    )


@dataclass
class GRPOMixModelConfig(ModelConfig):
    """Model arguments of `examples/grpo_mix.py`, where adapters have no dropout unless it is asked for."""

    lora_dropout: float = field(
        default=0.0,
        metadata={"help": "LoRA dropout. Rollouts are drawn without, so that it makes the importance ratio noisy."},
    )


@dataclass
class TrustRegionOPDScriptArguments(PromptScriptArguments):
    """Arguments of `examples/trust_region_opd.py`."""

    required: ClassVar = checks.TRUST_REGION_OPD

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to measure, without effect on training: accuracy_reward or think_format_reward of TRL, or a "
            "dotted import path such as rewards.boxed_accuracy_reward. No before/after table if unset."
        },
    )


@dataclass
class OfflineOPDScriptArguments(PromptScriptArguments):
    """Arguments of `examples/offline_opd.py`."""

    required: ClassVar = checks.OFFLINE_OPD

    dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "Scored rollouts: the output of `trl-blend score`, or a dataset repository that holds it. Several "
            "names, each with the scores of a teacher of its own, are trained on together."
        },
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of that repository."})
    test_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts of the before/after table, as `dataset_name` of the other commands: the test split, or "
            "else the train split. No table if unset."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to measure, without effect on training: accuracy_reward or think_format_reward of TRL, or a "
            "dotted import path such as rewards.boxed_accuracy_reward. Goes with `test_dataset_name`."
        },
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Limit on the length of a decoded completion. That of the rollouts if unset."}
    )

    def __post_init__(self):
        if isinstance(self.dataset_name, str):  # of a settings file
            self.dataset_name = [self.dataset_name]

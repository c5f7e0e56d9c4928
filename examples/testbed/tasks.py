"""The tasks of the test-bed as the studies take them: prompts, limit on length, and checkpoints under common names."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from testbed import sorting, task


CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"


@dataclass(frozen=True)
class Task:
    """
    One task. All are scored with the reward functions of [`~testbed.task`].

    Args:
        prompts (`Callable`):
            `(split, n, seed=0) -> Dataset`.
        max_new_tokens (`int`):
            Limit on the length of a completion.
        about_base (`str`):
            What keeps `base` from rewards, for reports.
        about_distilled (`str`):
            How the rollouts of the student that is distilled are off the task.
        grpo_learning_rate, sft_learning_rate (`float`, *optional*, default to `3e-5` and `5e-5`):
            What its studies train with.
        checkpoints (`dict[str, str]`, *optional*):
            Names of its checkpoints in the test-bed, where they differ: `"base"`, which gets no reward, `"student"`,
            `"sft_student"`, which has learned from samples of the teacher, `"distilled"`, whose rollouts are off the
            task, and `"teacher"`.
    """

    prompts: Callable[..., Dataset]
    max_new_tokens: int
    about_base: str
    about_distilled: str
    grpo_learning_rate: float = 3e-5
    sft_learning_rate: float = 5e-5
    checkpoints: dict[str, str] = field(default_factory=dict)

    def model(self, name: str) -> Path:
        """Folder of a checkpoint, or the path that `name` is."""
        shipped = CHECKPOINTS / self.checkpoints.get(name, name)
        return shipped if shipped.is_dir() else Path(name)


ADDITION = "addition"
_NO_BOX = "adds but hardly ever writes the box"
TASKS = {
    ADDITION: Task(
        task.build_prompt_dataset, task.MAX_NEW_TOKENS, _NO_BOX, _NO_BOX, checkpoints={"distilled": "base"}
    ),
    "sorting": Task(
        sorting.build_prompt_dataset,
        sorting.MAX_NEW_TOKENS,
        "knows the format but has only seen numbers of 2 to 4 digits, while those of the task have 5 or 6",
        "sorts less than half of the numbers greedily and misses the format in 4 of 10 rollouts",
        grpo_learning_rate=1e-4,
        sft_learning_rate=2e-4,
        checkpoints={
            "base": "sort_base",
            "student": "sort_sft_student",
            "sft_student": "sort_sft_student",
            "distilled": "sort_sft_student",
            "teacher": "sort_teacher",
        },
    ),
}

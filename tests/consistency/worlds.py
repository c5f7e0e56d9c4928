"""A consistent set of teacher, student and scored rollouts, and what a test changes about it."""

import shutil
from types import SimpleNamespace

from tests.models.checkpoints import noisy, save_model, scored_columns, write_scored
from tests.tiny import tiny_model
from trl_blend.consistency.provenance import PROVENANCE_FILE, record_teacher


CHECKS = (
    "manifest",
    "provenance",
    "teacher",
    "rollout_student",
    "tokenizer",
    "chat_template",
    "rescored",
    "policy_gap",
    "unlikely_tokens",
    "eos",
    "truncation",
)


def make_world(folder):
    """A teacher, a student that was fine-tuned on it and says so, and the student's rollouts with its scores."""
    teacher_model = tiny_model(seed=2)  # one that ends most of its completions
    student_model = noisy(teacher_model, 0.02)
    teacher, student = save_model(teacher_model, folder / "teacher"), save_model(student_model, folder / "student")
    record_teacher(student, teacher)
    columns = scored_columns(student_model, teacher_model)
    scored = write_scored(folder / "scored", columns, student, teacher)
    return SimpleNamespace(
        teacher=teacher,
        student=student,
        teacher_model=teacher_model,
        student_model=student_model,
        columns=columns,
        scored=scored,
    )


def rewritten(world, folder, **changes):
    """The scored rollouts with other columns (arrays) or other entries of the manifest."""
    columns = {name: changes.pop(name, values) for name, values in world.columns.items()}
    columns = {name: values for name, values in columns.items() if values is not None}
    return write_scored(folder, columns, **{"student": world.student, "teacher": world.teacher, **changes})


def unrecorded(world, folder):
    """The student without its record."""
    shutil.copytree(world.student, folder)
    (folder / PROVENANCE_FILE).unlink()
    return str(folder)


def severities(report):
    return {finding.name: finding.severity for finding in report}

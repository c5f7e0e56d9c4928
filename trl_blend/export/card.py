"""The card of an exported mixed policy that no trainer of this package made."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCardData

from trl_blend._version import __version__
from trl_blend.ops.mixing import student_weight
from trl_blend.reports.cards import example_prompt, model_link, render
from trl_blend.reports.metadata import base_license
from trl_blend.reports.names import shown_name


class Part(NamedTuple):
    """A model of the mixture."""

    name: str  # id or path; empty for a model built in memory
    commit: str | None = None
    is_base: bool = False  # whether it is the student's own base


def write_policy_card(
    folder: Path,
    student: Part,
    references: Sequence[Part],
    weights: Sequence[float],
    space: str,
    *,
    is_adapter: bool,
    has_chat_template: bool,
) -> None:
    """Write `README.md` of an exported mixed policy; the license that the student's own card states is passed on."""
    parts = [student, *(part for part in references if not part.is_base)]
    ids = [shown_name(part.name).hub_id for part in parts]
    metadata = ModelCardData(
        base_model=[name for name in ids if name] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["custom_generate", "trl-blend"],
        **base_license(student.name, student.commit),
    )
    fields = {
        "metadata": metadata.to_yaml(),
        "folder_name": folder.resolve().name,
        "student": _shown(student),
        "student_weight": f"{student_weight(weights, space):g}",
        "references": [(_shown(part), f"{weight:g}") for part, weight in zip(references, weights, strict=True)],
        "space": space,
        "is_adapter": is_adapter,
        "example": example_prompt(has_chat_template),
        "version": __version__,
        "local_names": [part.name for part in parts],
    }
    (folder / "README.md").write_text(render("mixed_policy.md", fields), encoding="utf-8")


def _shown(part: Part) -> str:
    return "the base of that adapter" if part.is_base else model_link(part.name, part.commit)

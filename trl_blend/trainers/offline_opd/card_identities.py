"""Who took part, for the model card: the teacher of the log-probabilities, the student that drew the rollouts."""

from typing import Any

from trl_blend.consistency.provenance import TeacherProvenance
from trl_blend.consistency.report import ConsistencyReport
from trl_blend.models.identity import ModelIdentity
from trl_blend.reports.cards import CardTeacher, model_link
from trl_blend.rollouts.format import Manifest


def card_teacher(manifest: Manifest | None, report: ConsistencyReport | None) -> CardTeacher:
    """
    The teacher of the log-probabilities and what is known of it.

    It is verified where the hash of its weights was recorded with the data and found to be that of the teacher which
    is recorded beside the student.
    """
    if manifest is None or not manifest.teacher:
        return CardTeacher(None, None, None, "unknown", "the data do not record who scored them")
    teacher = ModelIdentity.from_dict(manifest.teacher)
    dtype = (manifest.scoring or {}).get("dtype")
    return CardTeacher(teacher.name, teacher.commit, dtype, *_state(teacher, report))


def _state(teacher: ModelIdentity, report: ConsistencyReport | None) -> tuple[str, str]:
    digest = f"weights {teacher.weights.sha256[:12]}" if teacher.weights else "its weights were not hashed"
    recorded = f"recorded with the data ({digest})"
    if report is None:
        return "stated", f"{recorded}, compared with nothing"
    compared, provenance = report["teacher"].evidence, report["provenance"].evidence.get("how")
    relation, by_weights = compared.get("relation"), compared.get("compared_by") == "weights"
    if relation == "different":
        return "stated", f"{recorded}, and another one than the teacher that the student was fine-tuned on"
    if relation not in ("same", "bfloat16_copy") or not by_weights:
        return "stated", f"{recorded}; its weights could not be compared with those of the student's own teacher"
    if provenance != "recorded":
        return "stated", f"{recorded}; that the student was fine-tuned on it is what the user says"
    copy = ", up to rounding to bfloat16" if relation == "bfloat16_copy" else ""
    return "verified", f"{recorded}, the same as those recorded in the student's fine-tuning{copy}"


def describe(identity: dict[str, Any] | None) -> str:
    """One line about a model, without the folders of this machine."""
    if not identity:
        return "unknown: no identity was recorded"
    model = ModelIdentity.from_dict(identity)
    digests = [f"weights {model.weights.sha256[:12]}" if model.weights else "weights not hashed"]
    if model.adapter is not None:
        digests.append(f"adapter {model.adapter.weights.sha256[:12]}")
    return f"{model_link(model.name, model.commit)}, {', '.join(digests)}"


def named(manifest: Manifest | None, provenance: TeacherProvenance | None) -> list[str | None]:
    """Names that the findings of the check may quote."""
    identities = [manifest.teacher, manifest.student] if manifest else []
    names = [identity.get("name") for identity in identities if identity]
    return [*names, provenance.teacher.name if provenance else None]

"""Checks of who is who: one function per check, each returning one finding."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trl_blend.consistency.provenance import TeacherProvenance, same_model
from trl_blend.consistency.report import Finding, Severity
from trl_blend.models.identity import Comparison, ModelIdentity, compare_identities


HOW_TO_RECORD = (
    "Record it in the fine-tuning with `TeacherProvenanceCallback(teacher)` or afterwards with `trl-blend "
    'record-teacher`, state it with `sft_teacher="…"`, or go on without with `teacher_consistency="warn"`.'
)
HOW_TO_IDENTIFY = (
    "Collect and score with `trl-blend rollouts` and `trl-blend score`, which record who did it, or go on without "
    'with `teacher_consistency="warn"`.'
)
ONE_CHAT_TEMPLATE = (
    "Use one chat template in fine-tuning, collecting and scoring. A teacher that is asked in a format which it does "
    "not know gives other log-probs."
)


@dataclass(frozen=True)
class Identities:
    """
    Who took part, as far as it is known.

    Args:
        student ([`~trl_blend.models.identity.ModelIdentity`], *optional*):
            The model that is to be trained; `None` where only the data are checked.
        has_manifest (`bool`):
            Whether the data have a manifest at all.
        scoring_teacher ([`~trl_blend.models.identity.ModelIdentity`], *optional*):
            Whose log-probs the data hold.
        rollout_student ([`~trl_blend.models.identity.ModelIdentity`], *optional*):
            Who sampled the data.
        recorded, stated ([`~trl_blend.consistency.provenance.TeacherProvenance`], *optional*):
            The teacher of the student's fine-tuning: from the record beside the student, and from the caller.
        routes (`tuple[str, ...]`):
            Routes of the scored rows; of those drawn at random where the store has more than one.
        notes (`dict[str, str]`):
            Per role, how its identity was come by where that is not the plain way; for `record`, why the student can
            have none.
    """

    student: ModelIdentity | None
    has_manifest: bool
    scoring_teacher: ModelIdentity | None = None
    rollout_student: ModelIdentity | None = None
    recorded: TeacherProvenance | None = None
    stated: TeacherProvenance | None = None
    routes: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def provenance(self) -> TeacherProvenance | None:
        """
        The record, where there is one: what is stated does not replace it. Of several teachers that are recorded, the
        one that scored the data comes first.
        """
        found = self.recorded or self.stated
        return found and found.nearest(self.scoring_teacher)


def check_manifest(who: Identities) -> Finding:
    """The data say who sampled and who scored them."""
    roles = {"the student": who.rollout_student, "the teacher": who.scoring_teacher}
    unknown = [role for role, identity in roles.items() if identity is None]
    if not unknown:
        return Finding("manifest", "ok", "The data record who sampled and who scored them.")
    what = "have no manifest" if not who.has_manifest else f"do not record {' and '.join(unknown)}"
    message = f"The data {what}, so that nothing shows whose samples and log-probs they are."
    return Finding("manifest", "missing", message, {"unknown": unknown}, HOW_TO_IDENTIFY)


def check_provenance(who: Identities) -> Finding:
    """The teacher of the student's fine-tuning is recorded or stated, and not one recorded and another stated."""
    if who.provenance is None:
        student = who.student or ModelIdentity()
        reason = who.notes.get("record", "no teacher_provenance.json beside it")
        message = f"Nothing says which teacher {student.describe()} was fine-tuned on: {reason}."
        return Finding("provenance", "missing", message, {"student": student.name}, HOW_TO_RECORD)
    teacher = who.provenance.teacher.describe()
    evidence: dict[str, Any] = {"teacher": teacher, "how": who.provenance.how}
    if who.recorded is None:
        resolved = "compared by its fingerprint" if who.provenance.teacher.weights else "known by its name only"
        message = f"The teacher of the fine-tuning is stated, not verified: {teacher}, {resolved}."
        remedy = (
            "Record it beside the checkpoint with `trl-blend record-teacher`, so that it need not be stated again."
        )
        return Finding("provenance", "info", message, evidence, remedy)
    evidence["created_at"] = who.recorded.created_at
    if who.stated is not None:
        compared = compare_identities(who.provenance.nearest(who.stated.teacher).teacher, who.stated.teacher)
        if compared.relation in ("different", "unknown"):
            stated = who.stated.teacher.describe()
            message = f"`sft_teacher` is {stated}, but the record beside the student names {teacher}."
            evidence |= {"stated": stated, **compared.to_dict()}
            remedy = "Leave `sft_teacher` out, or correct the record with `trl-blend record-teacher --overwrite`."
            return Finding("provenance", "error", message, evidence, remedy)
    number = len(who.recorded.teachers)
    one_of = f", one of {number}" if number > 1 else ""
    return Finding("provenance", "ok", f"The teacher of the fine-tuning is recorded: {teacher}{one_of}.", evidence)


def check_teacher(who: Identities) -> Finding:
    """
    The teacher of the log-probs is the teacher of the fine-tuning: same weights, adapter and configuration. Of several
    it is the one that is recorded for the route of the rows.
    """
    if who.provenance is None or who.scoring_teacher is None:
        lack = "the teacher of the fine-tuning" if who.provenance is None else "the teacher of the log-probs"
        return Finding("teacher", "info", f"Not compared: {lack} is unknown.")
    owners = {route: teacher for teacher, routes in who.provenance.routes_of_teachers for route in routes}
    others = [route for route in who.routes if route in owners and not same_model(owners[route], who.scoring_teacher)]
    of_route = f" of route `{others[0]}`" if others else ""
    found = _compared(
        "teacher",
        ("scoring_teacher", "the teacher of the log-probs", who.scoring_teacher),
        (
            "sft_teacher",
            f"the teacher of the fine-tuning{of_route}",
            owners[others[0]] if others else who.provenance.teacher,
        ),
        who.notes,
        "Score the rollouts with the teacher of the fine-tuning, or fine-tune on samples of the scoring teacher: with "
        "two teachers the gradient is biased, live or offline.",
    )
    number, own = len(who.provenance.teachers), who.provenance.routes_of_teachers[0][1]
    if found.failed or (number == 1 and not own):
        return found
    unrecorded = [route for route in who.routes if route not in owners]
    if who.routes and not unrecorded:
        return replace(found, message=f"{found.message} It is recorded for {_routes(who.routes)}.")
    if unrecorded and own:
        message = f"{found.message} But it is recorded for {_routes(own)}, and not for {_routes(unrecorded)}."
        remedy = (
            f"If they were its own in the fine-tuning, say so: `trl-blend record-teacher --add --route "
            f"{' '.join(unrecorded)}`. Otherwise let their own teacher score them (`trl-blend score --route`)."
        )
        return replace(found, severity="missing", message=message, remedy=remedy)
    if number == 1:
        return found
    whose = "the data have no route" if owners and not who.routes else "which rows were whose is not recorded"
    message = f"{found.message} It is one of {number} teachers of the fine-tuning; {whose}."
    evidence = found.evidence | {"teachers": number, "whose": whose}
    return replace(found, severity="info", message=message, evidence=evidence)


def _routes(names: Sequence[str]) -> str:
    return f"the rows of route {' and '.join(f'`{name}`' for name in names)}"


def check_rollout_student(who: Identities) -> Finding:
    """The model that sampled the data is the one that is to be trained: same weights, adapter and configuration."""
    if who.student is None or who.rollout_student is None:
        return Finding("rollout_student", "info", "Not compared: the student that sampled the data is unknown.")
    return _compared(
        "rollout_student",
        ("student", "the model to be trained", who.student),
        ("rollout_student", "the student that sampled the data", who.rollout_student),
        who.notes,
        "Train the model that sampled the data, or collect rollouts with this one: the data are off-policy from the "
        "start.",
    )


Role = tuple[str, str, ModelIdentity]


def _compared(name: str, first: Role, second: Role, notes: dict[str, str], remedy: str) -> Finding:
    compared = compare_identities(first[2], second[2])
    evidence = {
        first[0]: first[2].describe(),
        second[0]: second[2].describe(),
        **compared.to_dict(),
        "notes": [notes[role] for role in (first[0], second[0]) if role in notes],
    }
    severity, message = _verdict(compared, first, second)
    if evidence["notes"]:
        message += f" ({'; '.join(evidence['notes'])})"
    if compared.relation == "unknown":
        remedy = "Give both as folders or cached Hub ids, so that their fingerprints can be compared."
    return Finding(name, severity, message, evidence, remedy if severity in ("error", "missing") else "")


def _verdict(compared: Comparison, first: Role, second: Role) -> tuple[Severity, str]:
    pair = _capital(f"{first[1]}, {first[2].describe()}, and {second[1]}, {second[2].describe()}")
    if compared.relation == "different":
        return "error", f"{pair}, differ in {', '.join(compared.differences)}."
    if compared.relation == "unknown":
        return "missing", f"{pair}, cannot be compared: not all weights could be hashed, and the names differ."
    if compared.relation == "bfloat16_copy":
        return "info", f"{pair}, have the same weights after rounding: one is a bfloat16 copy of the other."
    if compared.by == "name":
        return "info", f"{pair}, have the same name. Their weights were not compared."
    return "ok", f"{pair}, have the same weights."


def check_tokenizer(who: Identities) -> Finding:
    """
    Student, data and teacher share one tokenizer: vocabulary and merges (else an error); the end-of-sequence token and
    the flags of added tokens (else a warning). Other special tokens, such as padding, may differ.
    """
    known = {role: identity.tokenizer for role, identity in _roles(who) if identity.tokenizer is not None}
    if len(known) < 2:
        return Finding("tokenizer", "info", f"Not compared: only {_listed(known)} of the tokenizers are known.")
    evidence: dict[str, Any] = {role: tokenizer.to_dict() for role, tokenizer in known.items()}
    first, *others = known
    for part in ("vocabulary", "merges"):
        odd = [role for role in others if known[role].parts[part] != known[first].parts[part]]
        if odd:
            sizes = ", ".join(f"{role}: {tokenizer.vocab_size}" for role, tokenizer in known.items())
            message = f"The {part} of {_listed(odd)} differs from that of {first} (number of tokens: {sizes})."
            evidence |= {"part": part, "differs": odd}
            remedy = "Token ids mean the same only with one tokenizer: use the tokenizer that the data were made with."
            return Finding("tokenizer", "error", message, evidence, remedy)
    minor: dict[str, dict[str, Any]] = {
        "end-of-sequence token": {role: tokenizer.eos_token_id for role, tokenizer in known.items()},
        "flags of added tokens": {role: tokenizer.parts["added_tokens"] for role, tokenizer in known.items()},
    }
    for what, values in minor.items():
        odd = [role for role in others if values[role] != values[first]]
        if odd:
            message = f"Same vocabulary, but the {what} of {_listed(odd)} differs from that of {first}."
            evidence |= {"part": what, "differs": odd}
            remedy = "See the finding `eos` for whether it matters for these data."
            return Finding("tokenizer", "warning", message, evidence, remedy)
    return Finding("tokenizer", "ok", f"The tokenizers of {_listed(known)} are the same.", evidence)


def check_chat_template(who: Identities) -> Finding:
    """
    Student, data and teacher share one chat template, or templates that render plain conversations alike. An error
    where they render differently; a warning where only some have one.
    """
    roles = [(role, identity) for role, identity in _roles(who) if identity.tokenizer is not None]
    evidence: dict[str, Any] = {role: identity.chat_template_sha256 for role, identity in roles}
    if len(roles) < 2:
        return Finding("chat_template", "info", f"Not compared: only {_listed(evidence)} of the templates are known.")
    if len(set(evidence.values())) == 1:
        what = "have the same chat template" if roles[0][1].chat_template_sha256 else "have no chat template"
        return Finding("chat_template", "ok", _capital(f"{_listed(evidence)} {what}."), evidence)
    without = [role for role, digest in evidence.items() if digest is None]
    rendered = {identity.chat_rendering_sha256 for _, identity in roles if identity.chat_rendering_sha256}
    if len(rendered) > 1:
        message = f"The chat templates of {_listed(evidence)} differ and render the same conversation differently."
        evidence["rendering"] = {role: identity.chat_rendering_sha256 for role, identity in roles}
        return Finding("chat_template", "error", message, evidence, ONE_CHAT_TEMPLATE)
    if without:
        message = _capital(f"{_listed(without)} has no chat template, the others do.")
        remedy = "Check that the prompts of the data are in the format that the teacher knows."
        return Finding("chat_template", "warning", message, evidence, remedy)
    message = f"The chat templates of {_listed(evidence)} have different texts and render plain conversations alike."
    return Finding("chat_template", "info", message, evidence)


def _roles(who: Identities) -> list[tuple[str, ModelIdentity]]:
    roles = [("student", who.student), ("data", who.rollout_student), ("teacher", who.scoring_teacher)]
    return [(role, identity) for role, identity in roles if identity is not None]


def _listed(names: Any) -> str:
    return ", ".join(names) or "none"


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]

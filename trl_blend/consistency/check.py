"""
Teacher consistency: is the teacher whose log-probs are stored the one that the student was fine-tuned on, are the rows
the student's own, and do the numbers belong to the rows.
"""

import dataclasses
import os
from typing import Any

import numpy as np
import torch

from trl_blend.consistency import identity_checks, score_checks
from trl_blend.consistency.identity_checks import Identities
from trl_blend.consistency.provenance import TeacherProvenance, has_trained_adapter, read_provenance
from trl_blend.consistency.report import ConsistencyReport, Finding
from trl_blend.consistency.rows import SampledRows, sample_rows
from trl_blend.errors import ConfigError, TrlBlendError
from trl_blend.models.fingerprint import identify_model
from trl_blend.models.identity import ModelIdentity
from trl_blend.models.loading import DTYPES, LoadOptions, load_model
from trl_blend.rollouts.format import Manifest
from trl_blend.rollouts.store import RolloutStore, load_scored_rollouts


NUM_STATISTICS_ROWS = 512


def check_teacher_consistency(
    student: Any,
    scored: Any,
    teacher: Any = None,
    *,
    sft_teacher: Any = None,
    processing_class: Any = None,
    revision: str | None = None,
    teacher_revision: str | None = None,
    num_rows: int = 64,
    tolerance: float | None = None,
    tokens_per_batch: int = 16384,
) -> ConsistencyReport:
    """
    Check that scored rollouts fit the student that is to be trained on them, and its teacher.

    Offline distillation follows a biased gradient when the log-probs are those of another teacher than the one whose
    samples the student was fine-tuned on. The checks, each of which gives one finding:

    | finding | what is checked |
    |---|---|
    | `manifest` | the data record who sampled and who scored them |
    | `provenance` | the teacher of the fine-tuning is recorded beside the student, or stated |
    | `teacher` | it is the teacher of the log-probs, of several that of the route: weights, adapter, configuration |
    | `rollout_student` | the student that sampled the data is the one to be trained |
    | `tokenizer`, `chat_template` | student, data and teacher share them |
    | `rescored` | `teacher` gives the stored log-probs, on rows drawn at random |
    | `policy_gap` | log-ratio of student and teacher per token at step 0 |
    | `unlikely_tokens` | share of tokens whose teacher log-prob is below -10 |
    | `eos`, `truncation` | end-of-sequence tokens, and completions without one |

    The statistics are taken over up to 512 rows drawn at random with a fixed seed. They describe tokens that were
    sampled at the rollouts' temperature and top-p: no importance weights are applied.

    Where the data do not say who scored them and `teacher` gives the stored log-probs, `teacher` is taken for it.
    Nothing here has a gradient, and no model is changed.

    What cannot be found out: whether a recorded or stated teacher really produced the fine-tuning data; a model whose
    weights cannot be hashed in memory (see [`~trl_blend.models.fingerprint.identify_model`]) is compared through the
    checkpoint that it was loaded from, and the finding says so.

    Args:
        student (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model to be trained.
        scored (`str`, [`~trl_blend.rollouts.store.RolloutStore`] or [`~datasets.Dataset`]):
            Scored rollouts. A plain dataset has no manifest: only its numbers can be checked.
        teacher (`str` or [`~transformers.PreTrainedModel`], *optional*):
            A live teacher to score some rows again with. Without one the stored scores are taken as they are.
        sft_teacher (`str` or [`~trl_blend.models.identity.ModelIdentity`], *optional*):
            The teacher of the fine-tuning, stated by the user. It is compared by fingerprint where it is a folder or
            in the Hub's cache, else by name; nothing is downloaded for it.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's tokenizer. By default that beside `student`.
        revision, teacher_revision (`str`, *optional*):
            Revisions of `student` and of `teacher`, where they are Hub ids.
        num_rows (`int`, *optional*, defaults to `64`):
            Rows to score again; `0` for none.
        tolerance (`float`, *optional*):
            Bound on the mean absolute difference of re-computed log-probs, in nats per token. By default 1e-3 for
            float32 throughout, 1e-2 where float32 scores are stored in float16, 0.05 where a model ran in less than
            float32, 0.25 for a quantised teacher.
        tokens_per_batch (`int`, *optional*, defaults to `16384`):
            Budget of one forward pass of the live teacher.

    Returns:
        [`~trl_blend.consistency.report.ConsistencyReport`]

    Raises:
        [`~trl_blend.errors.StoreError`]: If `scored` cannot be read or its rows are not valid.
        [`~trl_blend.errors.ConfigError`]: If `student` or `teacher` cannot be read, or a setting is out of range.
    """
    if num_rows < 0:
        raise ConfigError(f"`num_rows={num_rows}` must be at least 0.")
    if tolerance is not None and not tolerance > 0:
        raise ConfigError(f"`tolerance={tolerance}` must be positive.")
    if isinstance(scored, (str, os.PathLike)):
        scored = load_scored_rollouts(scored)
    manifest = scored.manifest if isinstance(scored, RolloutStore) else None
    who = _identities(student, manifest, sft_teacher, processing_class, revision)
    rows = sample_rows(scored, max(num_rows, NUM_STATISTICS_ROWS))
    scored_route = ((manifest.scoring if manifest is not None else None) or {}).get("route")
    who = dataclasses.replace(who, routes=tuple(sorted({scored_route} if scored_route else set(rows.route or ()))))
    rescored = _rescore(teacher, teacher_revision, rows, num_rows, manifest, tolerance, tokens_per_batch)
    if who.scoring_teacher is None and rescored.severity == "ok":
        live = identify_model(teacher, revision=teacher_revision)
        notes = {**who.notes, "scoring_teacher": "not recorded; the live teacher gives the stored log-probs"}
        who = dataclasses.replace(who, scoring_teacher=live, notes=notes)

    return _report(who, rows, manifest, rescored)


def check_store(store: RolloutStore) -> ConsistencyReport:
    """
    The checks that need no model, among what a store of scored rollouts records.

    Raises:
        [`~trl_blend.errors.StoreError`]: If its rows are not valid.
    """
    student, teacher = (
        None if fields is None else ModelIdentity.from_dict(fields)
        for fields in (store.manifest.student, store.manifest.teacher)
    )
    who = Identities(None, has_manifest=True, scoring_teacher=teacher, rollout_student=student)
    return _report(who, sample_rows(store, NUM_STATISTICS_ROWS), store.manifest)


def _report(
    who: Identities, rows: SampledRows, manifest: Manifest | None, rescored: Finding | None = None
) -> ConsistencyReport:
    sampling = manifest.sampling if manifest is not None else None
    student, teacher = who.student or who.rollout_student, who.scoring_teacher
    eos = (sampling or {}).get("eos_token_ids") or (student.eos_token_ids if student is not None else [])
    findings = [identity_checks.check_manifest(who)]
    if who.student is not None:
        findings += [
            identity_checks.check_provenance(who),
            identity_checks.check_teacher(who),
            identity_checks.check_rollout_student(who),
        ]
    findings += [identity_checks.check_tokenizer(who), identity_checks.check_chat_template(who)]
    if rescored is not None:
        findings.append(rescored)
    findings += [
        score_checks.check_policy_gap(rows, sampling),
        score_checks.check_unlikely_tokens(rows),
        score_checks.check_eos(rows, eos, teacher.eos_token_ids if teacher is not None else []),
        score_checks.check_truncation(rows, eos),
    ]
    return ConsistencyReport(findings)


def _identities(
    student: Any, manifest: Manifest | None, sft_teacher: Any, tokenizer: Any, revision: str | None
) -> Identities:
    notes: dict[str, str] = {}
    seen: dict[tuple[str, str | None], ModelIdentity | None] = {}  # a checkpoint named twice is read once

    def read(name: str, commit: str | None) -> ModelIdentity | None:
        if (name, commit) not in seen:
            seen[name, commit] = _identify_locally(name, commit)
        return seen[name, commit]

    def completed(role: str, identity: ModelIdentity) -> ModelIdentity:
        """Weights that were not hashed, from the checkpoint of that name, where it is here."""
        if identity.weights is not None or not identity.name:
            return identity
        found = read(identity.name, identity.commit)
        if found is None or found.weights is None:
            return identity
        notes[role] = f"{identity.unhashed or 'weights not recorded'}: compared is the checkpoint {identity.name}"
        return dataclasses.replace(identity, weights=found.weights, adapter=identity.adapter or found.adapter)

    def of_manifest(role: str, entry: str) -> ModelIdentity | None:
        fields = getattr(manifest, entry, None)
        return completed(role, ModelIdentity.from_dict(fields)) if fields else None

    stated = None
    if sft_teacher is not None:
        found = sft_teacher if isinstance(sft_teacher, ModelIdentity) else read(str(sft_teacher), None)
        identity = found or ModelIdentity(name=str(sft_teacher), unhashed="neither a folder nor in the Hub's cache")
        stated = TeacherProvenance(identity, "stated")
    recorded = read_provenance(student, revision=revision)
    if has_trained_adapter(student):
        notes["record"] = (
            "its adapter is in memory, where nothing says which folder it is from, and a record beside the base is "
            "not that of the adapter. Pass the folder of the adapter instead"
        )
    if recorded is not None:
        # A note says of one teacher how it was compared
        role = "sft_teacher" if not recorded.others else "one of several teachers"
        teacher, *others = (completed(role, one) for one in recorded.teachers)
        recorded = dataclasses.replace(recorded, teacher=teacher, others=tuple(others))
    return Identities(
        student=completed("student", identify_model(student, tokenizer=tokenizer, revision=revision)),
        has_manifest=manifest is not None,
        scoring_teacher=of_manifest("scoring_teacher", "teacher"),
        rollout_student=of_manifest("rollout_student", "student"),
        recorded=recorded,
        stated=stated,
        notes=notes,
    )


def _identify_locally(name: str, commit: str | None) -> ModelIdentity | None:
    """Identity of a checkpoint that is here: with its weights, else without them, else `None`."""
    for hash_weights in (True, False):
        try:
            return identify_model(name, revision=commit, hash_weights=hash_weights, local_files_only=True)
        except (ConfigError, OSError, ValueError):
            continue
    return None


def _rescore(
    teacher: Any,
    revision: str | None,
    rows: SampledRows,
    num_rows: int,
    manifest: Manifest | None,
    tolerance: float | None,
    tokens_per_batch: int,
) -> Finding:
    if teacher is None or num_rows == 0:
        message = "Not re-scored: no live teacher was given." if num_rows else "Not asked for."
        return Finding("rescored", "info", message)
    from trl_blend.rollouts.engines.local import score_sequences

    scoring = manifest.scoring if manifest is not None else None
    model = teacher
    if isinstance(teacher, str):
        dtype = str((scoring or {}).get("dtype"))
        load = LoadOptions(revision, dtype if dtype in DTYPES else "auto", load_in_4bit=dtype == "4bit")
        model = load_model(teacher, "teacher", load, torch.device("cuda") if torch.cuda.is_available() else None)
    chosen = rows.first(num_rows)
    try:
        scores = score_sequences(
            model,
            chosen.prompt_ids,
            chosen.completion_ids,
            tokens_per_batch=tokens_per_batch,
            vocab_size=(scoring or {}).get("vocab_size"),
        )
    except TrlBlendError as error:
        return score_checks.rescoring_failed(error)
    if tolerance is None:
        stored = manifest.logps_dtype if manifest is not None else "float16"
        tolerance = score_checks.rescoring_tolerance(stored, scoring, _dtype_of(model))
    return score_checks.check_rescored(chosen, [np.asarray(score.logps) for score in scores], tolerance)


def _dtype_of(model: Any) -> str:
    for bits in ("4bit", "8bit"):
        if getattr(model, f"is_loaded_in_{bits}", False):
            return bits
    return "8bit" if getattr(model, "is_quantized", False) else str(model.dtype).removeprefix("torch.")

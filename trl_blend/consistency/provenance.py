"""
Which teacher a student was fine-tuned on: `teacher_provenance.json` beside the student's checkpoint.

Offline distillation is biased when the teacher of the log-probs is not the teacher of the SFT stage (teacher
consistency). Months may lie between the two, so the SFT stage writes down whose samples it trains on.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

from transformers import TrainerCallback

from trl_blend._files import write_atomically
from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.models.checkpoints import find_checkpoint
from trl_blend.models.fingerprint import identify_model
from trl_blend.models.identity import ModelIdentity, compare_identities
from trl_blend.models.weights import hashable_state
from trl_blend.models.wrappers import AdapterConfig


PROVENANCE_FILE = "teacher_provenance.json"
SCHEMA_VERSION = 1


Routed: TypeAlias = tuple[ModelIdentity, tuple[str, ...]]
"""A teacher, and the routes of its rows."""


@dataclass(frozen=True)
class TeacherProvenance:
    """
    The teacher whose samples a student was fine-tuned on.

    Args:
        teacher ([`~trl_blend.models.identity.ModelIdentity`]):
            Its identity.
        how (`str`):
            `"recorded"` beside the checkpoint, or `"stated"` by the user of the checkpoint, which nothing verifies.
        created_at (`str`, *optional*, defaults to now):
            ISO 8601, UTC.
        note (`str`):
            Free text.
        others (`tuple[ModelIdentity, ...]`):
            Further teachers, of other rows of the fine-tuning data.
        routes (`tuple[tuple[str, ...], ...]`):
            Of each of the teachers, the routes that its rows have in the column `route`. Empty where none is recorded.
    """

    teacher: ModelIdentity
    how: Literal["recorded", "stated"]
    created_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    note: str = ""
    others: tuple[ModelIdentity, ...] = ()
    routes: tuple[tuple[str, ...], ...] = ()

    @property
    def teachers(self) -> tuple[ModelIdentity, ...]:
        """All of them."""
        return (self.teacher, *self.others)

    @property
    def routes_of_teachers(self) -> list[Routed]:
        """All of them, each with its routes."""
        return list(zip(self.teachers, self.routes or ((),) * len(self.teachers), strict=True))

    def nearest(self, scoring_teacher: ModelIdentity | None) -> "TeacherProvenance":
        """The same record with the teacher first that is `scoring_teacher`, where it is one of them."""
        for index, teacher in enumerate(self.teachers):
            if scoring_teacher is not None and same_model(teacher, scoring_teacher):
                others = (*self.teachers[:index], *self.teachers[index + 1 :])
                routes = self.routes and (self.routes[index], *self.routes[:index], *self.routes[index + 1 :])
                return replace(self, teacher=teacher, others=others, routes=routes)
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TeacherProvenance":
        """
        Raises:
            [`~trl_blend.errors.ConfigError`]: If it was written by a newer release, or not a provenance record.
        """
        version = fields.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"a provenance record of schema_version={version!r}; this release reads {SCHEMA_VERSION}. Update "
                "trl_blend, or record the teacher again."
            )
        teacher, *others = map(ModelIdentity.from_dict, [fields["teacher"], *fields.get("others", [])])
        routes = tuple(tuple(names) for names in fields.get("routes", []))
        return cls(teacher, fields["how"], fields["created_at"], fields.get("note", ""), tuple(others), routes)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `teacher_provenance.json` into a folder, all of it or nothing."""
        path = Path(folder) / PROVENANCE_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TeacherProvenance":
        """
        Raises:
            [`~trl_blend.errors.ConfigError`]: If the file is not a provenance record.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} is not a teacher provenance record ({type(error).__name__}: {error}). Delete it and record "
                "the teacher again with `trl-blend record-teacher`."
            ) from error


def record_teacher(
    checkpoint_folder: str | os.PathLike[str],
    teacher: Any,
    *,
    revision: str | None = None,
    note: str = "",
    overwrite: bool = False,
    add: bool = False,
    route: str | Sequence[str] | None = None,
) -> TeacherProvenance:
    """
    Record the SFT teacher beside a checkpoint, after the training. During it, [`TeacherProvenanceCallback`] does so.

    Args:
        checkpoint_folder (`str` or `os.PathLike`):
            Folder of the student's checkpoint.
        teacher (`str`, [`~transformers.PreTrainedModel`] or [`~trl_blend.models.identity.ModelIdentity`]):
            The model whose samples the student was trained on. The weights that count are those which generated.
        revision (`str`, *optional*):
            Revision of a Hub id.
        note (`str`, *optional*):
            Free text, such as where the samples are.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace the record of another teacher.
        add (`bool`, *optional*, defaults to `False`):
            Whether to keep the teachers that are recorded and add this one: for a student whose fine-tuning data were
            split between teachers, as its rollouts are. The note is of all of them.
        route (`str` or `list[str]`, *optional*):
            Route or routes of the rows that were this teacher's, as they stand in the column `route` of the rollouts:
            these are then compared with this teacher. Of a teacher that is recorded already, they are added to it.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is no such folder, the teacher cannot be read, or another one is
            recorded there, or for the same route.
    """
    folder = Path(checkpoint_folder)
    if not folder.is_dir():
        raise ConfigError(f"checkpoint_folder={str(folder)!r} is not a folder: give the student's checkpoint.")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ConfigError(
            f"checkpoint_folder={str(folder)!r} holds no model (no config.json or adapter_config.json): give the "
            "student's checkpoint."
        )
    if add and overwrite:
        raise ConfigError("`add=True` keeps the recorded teachers and `overwrite=True` replaces them. Choose one.")
    routes = (route,) if isinstance(route, str) else tuple(route or ())
    teachers = [(_identify(teacher, revision), routes)]
    if not overwrite and not add:
        remedy = (
            "`add=True` (`--add`) keeps both, for a student whose data were split between teachers; `overwrite=True` "
            "(`--overwrite`) replaces it"
        )
        _refuse_another(folder, [identity for identity, _ in teachers], remedy)
    if not overwrite and (folder / PROVENANCE_FILE).is_file():
        recorded = TeacherProvenance.load(folder / PROVENANCE_FILE)
        teachers, note = [*recorded.routes_of_teachers, *teachers], note or recorded.note
    return _write(folder, teachers, note)


def same_model(first: ModelIdentity, second: ModelIdentity) -> bool:
    """Whether both are known to be one model, up to rounding to bfloat16."""
    return compare_identities(first, second).relation not in ("different", "unknown")


def _identify(teacher: Any, revision: str | None) -> ModelIdentity:
    return teacher if isinstance(teacher, ModelIdentity) else identify_model(teacher, revision=revision)


def _write(folder: Path, teachers: Sequence[Routed], note: str) -> TeacherProvenance:
    (teacher, *others), routes = zip(*_merged(teachers), strict=True)
    routes = routes if any(routes) else ()
    provenance = TeacherProvenance(teacher, "recorded", note=note, others=tuple(others), routes=routes)
    provenance.save(folder)
    return provenance


def _merged(teachers: Sequence[Routed]) -> list[Routed]:
    """Each teacher once, as it was named last, with all of its routes; a route has one teacher."""
    merged: list[Routed] = []
    for teacher, routes in teachers:
        index = next((i for i, (known, _) in enumerate(merged) if same_model(known, teacher)), len(merged))
        before = [route for _, known in merged[index : index + 1] for route in known]
        merged[index : index + 1] = [(teacher, tuple(dict.fromkeys([*before, *routes])))]
    owners: dict[str, ModelIdentity] = {}
    for teacher, routes in merged:
        for route in routes:
            if route in owners:
                raise ConfigError(
                    f"`route={route!r}` is that of {owners[route].describe()} and of {teacher.describe()}. A row has "
                    "one teacher: name another route, or start the record anew with `overwrite=True` (`--overwrite`)."
                )
            owners[route] = teacher
    return merged


def _refuse_another(folder: Path, identities: Sequence[ModelIdentity], remedy: str) -> None:
    if not (folder / PROVENANCE_FILE).is_file():
        return
    recorded = TeacherProvenance.load(folder / PROVENANCE_FILE).teachers
    pairs = ((one, others) for some, others in ((identities, recorded), (recorded, identities)) for one in some)
    if not all(any(same_model(one, other) for other in others) for one, others in pairs):
        described = [" and ".join(one.describe() for one in teachers) for teachers in (recorded, identities)]
        raise ConfigError(
            f"{folder} records another teacher, {described[0]}; given was {described[1]}. Rows of one teacher, scored "
            f"by another, are not consistent. {remedy}."
        )


def read_provenance(student: Any, *, revision: str | None = None) -> TeacherProvenance | None:
    """
    The record beside a student's checkpoint: a folder or Hub id, or where a model in memory was loaded from. An
    adapter without one has its base model's. `None` where there is none, and for a model that
    [`has_trained_adapter`].

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is a file that is no record, or the name is no model.
    """
    if has_trained_adapter(student):
        return None
    if not isinstance(student, (str, os.PathLike)):
        config = student.config
        return _read_if_here(getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None))
    checkpoint = find_checkpoint(os.fspath(student), revision)
    if (checkpoint.folder / PROVENANCE_FILE).is_file():
        return TeacherProvenance.load(checkpoint.folder / PROVENANCE_FILE)
    if checkpoint.is_adapter:
        adapter = AdapterConfig.of_folder(checkpoint.folder)
        return _read_if_here(adapter.base_name, adapter.base_revision)
    return None


def has_trained_adapter(student: Any) -> bool:
    """
    Whether a student is a model in memory with an adapter that changes something: where the adapter is from is not
    known then, and what is recorded beside the base was written before the adapter was trained.
    """
    if isinstance(student, (str, os.PathLike)):
        return False
    try:
        adapter = AdapterConfig.of_model(student)
    except UnsupportedError:  # several at once
        return True
    return adapter is not None and not adapter.is_neutral(hashable_state(student, adapter, with_base=False)[1])


def _read_if_here(name: str | None, revision: str | None) -> TeacherProvenance | None:
    try:
        find_checkpoint(name or "", revision)
    except ConfigError:
        return None  # a name of another machine is no statement about this one
    return read_provenance(name, revision=revision)


class TeacherProvenanceCallback(TrainerCallback):
    """
    Records the SFT teacher beside the checkpoints of any [`~transformers.Trainer`].

    The identity is computed once, by the main process, before the first step. `teacher_provenance.json` is written
    into `output_dir` when the training begins and when it ends, and into every `checkpoint-N`. What is in `output_dir`
    is what the trainer's `push_to_hub` uploads, so it travels with the model. A folder given to
    `trainer.save_model(folder)` is not known to callbacks: use [`record_teacher`] there.

    Args:
        teacher (`str`, [`~transformers.PreTrainedModel`] or [`~trl_blend.models.identity.ModelIdentity`]):
            The model whose samples the SFT data are; a list of them, where each wrote a part, or a dictionary of them
            by the route of their rows, see [`record_teacher`].
        revision, note (`str`, *optional*):
            See [`record_teacher`].

    Example:

    ```python
    trainer = SFTTrainer(model, args, train_dataset=samples, callbacks=[TeacherProvenanceCallback("Qwen/Qwen3-8B")])
    ```
    """

    def __init__(self, teacher: Any, *, revision: str | None = None, note: str = ""):
        self.teacher = teacher
        self.revision = revision
        self.note = note
        self._teachers: list[Routed] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        pairs: list[tuple[Any, tuple[str, ...]]]
        if isinstance(self.teacher, Mapping):
            pairs = [(one, (route,)) for route, one in self.teacher.items()]
        else:
            pairs = [(one, ()) for one in (self.teacher if isinstance(self.teacher, list | tuple) else [self.teacher])]
        self._teachers = [(_identify(one, self.revision), routes) for one, routes in pairs]
        if state.global_step > 0:
            remedy = "Continue with the same one, or use another output_dir"
            _refuse_another(Path(args.output_dir), [identity for identity, _ in self._teachers], remedy)
        _write(Path(args.output_dir), self._teachers, self.note)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(state, Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(state, Path(args.output_dir))

    def _write(self, state: Any, folder: Path) -> None:
        if state.is_world_process_zero and self._teachers and folder.is_dir():
            _write(folder, self._teachers, self.note)

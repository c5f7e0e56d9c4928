"""The one writer of mixed policies: a folder with a student's files becomes one that transformers decodes mixed."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trl_blend.export import model_files
from trl_blend.export.spec import MixingSpec, ModelSource, file_hashes
from trl_blend.models.checkpoints import Checkpoint
from trl_blend.models.fingerprint import fingerprint_tokenizer


@dataclass(frozen=True)
class Weights:
    """A model that is written into the folder, once: a checkpoint, or a model in memory (see [`save_model`])."""

    checkpoint: Checkpoint | None = None
    model: Any = None
    dtype: str | None = None
    _written: dict[Path, ModelSource] = field(default_factory=dict)

    def write(self, folder: Path) -> ModelSource:
        key = folder.resolve()
        if key not in self._written or not folder.is_dir():
            # The underscore keeps it out of a push; the model may be read from the folder itself
            unfinished = folder.with_name(f"_{folder.name}.partial")
            shutil.rmtree(unfinished, ignore_errors=True)
            self.save(unfinished)
            if folder.is_symlink():  # what it leads to is not ours
                folder.unlink()
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.replace(folder)
            self._written[key] = ModelSource(path=folder.name, files=file_hashes(folder), dtype=self.dtype)
        return self._written[key]

    def save(self, folder: Path) -> None:
        if self.checkpoint is not None:
            model_files.copy_checkpoint(self.checkpoint, folder)
        else:
            model_files.save_model(self.model, folder)


@dataclass(frozen=True)
class Student:
    """The student that is in the folder; `base` is what an adapter is put on, whose configurations then are given."""

    tokenizer: Any
    dtype: str
    config: Any
    generation_config: Any
    base: ModelSource | Weights | None = None


def write_policy(
    folder: Path,
    student: Student,
    references: Sequence[ModelSource | Weights],
    weights: Sequence[float],
    space: str,
    step: int | None = None,
) -> None:
    """
    Let a folder decode a mixed policy that so far holds the files of a student, as `save_pretrained` leaves them.
    References are named, or written to `reference/` (several: `reference_0/`, …). `mixing.json` comes last: without
    it the folder refuses to be decoded.
    """
    if student.base is not None:
        model_files.move_adapter(folder)
        student.config.save_pretrained(folder)
        student.generation_config.save_pretrained(folder)
        model_files.update_config(folder, {"dtype": student.dtype})
    code = folder / model_files.GENERATE_FILE
    code.parent.mkdir(exist_ok=True)
    shutil.copyfile(Path(__file__).parent / model_files.GENERATE_FILE, code)
    model_files.wrap_config(folder)
    names = ["reference"] if len(references) == 1 else [f"reference_{index}" for index in range(len(references))]
    sources = [
        _source(reference, folder / name, student.dtype) for reference, name in zip(references, names, strict=True)
    ]
    adapter = base = None
    if student.base is not None:
        is_reference = any(source.base for source in sources)
        adapter = model_files.ADAPTER_FOLDER
        base = _source(student.base, folder / ("reference" if is_reference else "base"), student.dtype)
    vocabulary = vocabulary_sha256(student.tokenizer)
    MixingSpec(tuple(weights), tuple(sources), space, vocabulary, adapter, base, step).write(folder)


def _source(item: ModelSource | Weights, folder: Path, student_dtype: str) -> ModelSource:
    source = item.write(folder) if isinstance(item, Weights) else item
    return replace(source, dtype=None) if source.dtype == student_dtype else source


def pinned(checkpoint: Checkpoint | None, dtype: str | None = None) -> ModelSource | None:
    """A Hub id with its commit, as `mixing.json` names it; `None` for any other checkpoint."""
    if checkpoint is None or not checkpoint.in_hub or checkpoint.commit is None:
        return None
    return ModelSource(repo_id=checkpoint.name, commit=checkpoint.commit, dtype=dtype)


def vocabulary_sha256(tokenizer: Any) -> str:
    """SHA-256 of the token-to-id map that all models of a mixture share."""
    return fingerprint_tokenizer(tokenizer).parts["vocabulary"]

"""`mixing.json`: which mixture a directory holds. Written here, read by `custom_generate/generate.py` beside it."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from trl_blend._files import sha256_of, write_atomically
from trl_blend._version import __version__
from trl_blend.errors import ConfigError
from trl_blend.ops.mixing import validate_weights


SPEC_FILE = "mixing.json"
SCHEMA_VERSION = 1
SPACES = ("logits", "probs")


@dataclass(frozen=True)
class ModelSource:
    """
    Where a model's weights are: exactly one of `base`, `path` and `repo_id` is set.

    Args:
        base (`bool`, *optional*, defaults to `False`):
            The student's own base, its adapters disabled.
        path (`str`, *optional*):
            Folder, relative to that of `mixing.json`.
        files (`dict[str, str]`, *optional*):
            SHA-256 of every file in `path`.
        repo_id, commit (`str`, *optional*):
            Repository on the Hub and the commit it is pinned to.
        dtype (`str`, *optional*):
            Dtype to load it in, such as `"float32"`. `None`: the student's.
    """

    base: bool = False
    path: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    repo_id: str | None = None
    commit: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.base + (self.path is not None) + (self.repo_id is not None) != 1:
            raise ConfigError(f"{self} is no source of a model: set one of `base`, `path` and `repo_id`.")
        if self.repo_id is not None and not self.commit:
            raise ConfigError(f"`repo_id={self.repo_id!r}` has no `commit`. Pin it, so that it cannot change later.")

    def below(self, prefix: str) -> "ModelSource":
        """The same source, seen from another folder: `prefix` leads from there to the folder that it lies in."""
        return self if self.path is None else replace(self, path=str(PurePosixPath(prefix, PurePath(self.path).name)))


@dataclass(frozen=True)
class MixingSpec:
    """
    A mixed policy.

    Args:
        weights (`tuple[float, ...]`):
            One weight per reference; the student has the rest.
        references (`tuple[ModelSource, ...]`):
            The references.
        space (`str`):
            `"logits"` or `"probs"`: what is averaged.
        tokenizer_sha256 (`str`):
            SHA-256 of the token-to-id map that all models share, see
            [`~trl_blend.models.identity.TokenizerFingerprint`] (`parts["vocabulary"]`).
        adapter (`str`, *optional*):
            Folder of the student's adapter. `None`: the student's full weights are beside `mixing.json`.
        base (`ModelSource`, *optional*):
            What the adapter is put on.
        step (`int`, *optional*):
            Optimizer step of the student's weights.
        trl_blend_version (`str`, *optional*):
            What wrote the file.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a field is outside its range.
    """

    weights: tuple[float, ...]
    references: tuple[ModelSource, ...]
    space: str
    tokenizer_sha256: str
    adapter: str | None = None
    base: ModelSource | None = None
    step: int | None = None
    trl_blend_version: str = __version__

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", validate_weights(self.weights, "teacher_weight"))
        if len(self.weights) != len(self.references):
            raise ConfigError(f"`teacher_weight={list(self.weights)}` for {len(self.references)} reference(s).")
        if self.space not in SPACES:
            raise ConfigError(f"`mixing_space={self.space!r}` is unknown. Choose one of {', '.join(SPACES)}.")
        if (self.adapter is None) != (self.base is None):
            raise ConfigError(f"`adapter={self.adapter!r}` and `base={self.base}` come together or not at all.")

    def below(self, prefix: str) -> "MixingSpec":
        """The same mixture for a `mixing.json` from whose folder `prefix` leads to the references."""
        references = tuple(reference.below(prefix) for reference in self.references)
        return replace(self, references=references, base=self.base and self.base.below(prefix))

    def write(self, folder: Path) -> Path:
        """Write `mixing.json` in one piece: a reader finds the old file or the new one."""
        content = {"schema_version": SCHEMA_VERSION} | asdict(self)
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(folder / SPEC_FILE, text.encode())
        return folder / SPEC_FILE

    @classmethod
    def read(cls, folder: Path) -> "MixingSpec":
        """
        Read `mixing.json`.

        Raises:
            [`~trl_blend.errors.ConfigError`]: If there is none, or it is of another schema.
        """
        path = folder / SPEC_FILE
        if not path.is_file():
            raise ConfigError(
                f"{str(folder)!r} holds no mixed policy: it has no {SPEC_FILE}. An interrupted export leaves none."
            )
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ConfigError(f"{str(path)!r} has `schema_version={version!r}`; this release reads {SCHEMA_VERSION}.")
        content["references"] = tuple(ModelSource(**source) for source in content["references"])
        content["base"] = content["base"] and ModelSource(**content["base"])
        return cls(**content)


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file directly in `folder`."""
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}

"""`mixing.json`: which mixture a folder holds. Written here, read by `custom_generate/generate.py` beside it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trl_blend._files import sha256_of, write_atomically
from trl_blend._version import __version__
from trl_blend.errors import ConfigError
from trl_blend.ops.mixing import SPACES, validate_weights


SPEC_FILE = "mixing.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ModelSource:
    """
    Where a model's weights are: one of `base`, `path` and `repo_id`; in a training checkpoint none of them, for a
    model that was in memory and is nowhere else.
    """

    base: bool = False  # the student's own base, its adapters disabled
    path: str | None = None  # folder, relative to that of `mixing.json`; in a checkpoint, where it was loaded from
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of every file in `path`
    repo_id: str | None = None
    commit: str | None = None  # that `repo_id` is pinned to
    dtype: str | None = None  # to load it in, such as "float32"; `None`: the student's

    def __post_init__(self) -> None:
        if self.base + (self.path is not None) + (self.repo_id is not None) > 1:
            raise ConfigError(f"{self} is no source of a model: set one of `base`, `path` and `repo_id`.")
        if self.repo_id is not None and not self.commit:
            raise ConfigError(f"`repo_id={self.repo_id!r}` has no `commit`. Pin it, so that it cannot change later.")


@dataclass(frozen=True)
class MixingSpec:
    """
    What `mixing.json` says of a mixed policy.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a field is outside its range.
    """

    weights: tuple[float, ...]  # one per reference; the student has the rest, or 1 in arithmetic
    references: tuple[ModelSource, ...]
    space: str  # "logits" or "probs": what is averaged; "arithmetic": logits are added
    tokenizer_sha256: str  # of the token-to-id map that all models share
    adapter: str | None = None  # folder of the student's adapter, "." in a checkpoint; `None`: its weights are here
    base: ModelSource | None = None  # what the adapter is put on
    step: int | None = None  # optimizer step of the student's weights
    trl_blend_version: str = __version__

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", check_mixture(self.weights, len(self.references), self.space))
        if (self.adapter is None) != (self.base is None):
            raise ConfigError(f"`adapter={self.adapter!r}` and `base={self.base}` come together or not at all.")

    def write(self, folder: Path) -> None:
        """Write `mixing.json` in one piece: a reader finds the old file or the new one."""
        content = {"schema_version": SCHEMA_VERSION} | asdict(self)
        write_atomically(folder / SPEC_FILE, (json.dumps(content, indent=2) + "\n").encode())

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


def check_mixture(weights: Sequence[float], num_references: int, space: str) -> tuple[float, ...]:
    """The weights of a mixture, each in its range, one per reference; an error otherwise, or for another space."""
    if space not in SPACES:
        raise ConfigError(f"`mixing_space={space!r}` is unknown. Choose one of {', '.join(SPACES)}.")
    weights = validate_weights(weights, "teacher_weight", space)
    if len(weights) != num_references:
        raise ConfigError(
            f"`teacher_weight={list(weights)}` has {len(weights)} value(s) for {num_references} reference(s). Give "
            "one weight per reference."
        )
    return weights


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file directly in `folder`."""
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}

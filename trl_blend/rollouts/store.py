"""
Reading a store of rollouts: a folder of parquet shards with a manifest, on disk or as a dataset repository on the Hub.

    folder/
      README.md          dataset card; its `data_files` make `load_dataset(folder)` read the shards and nothing else
      manifest.json      see [`~trl_blend.rollouts.format.Manifest`]
      data/part-00000.parquet, ...

A reader holds one shard at a time, however many there are.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from trl_blend.errors import ConfigError, StoreError
from trl_blend.rollouts.card import CARD_NAME
from trl_blend.rollouts.checks import check_rows
from trl_blend.rollouts.folders import describe
from trl_blend.rollouts.format import MANIFEST_NAME, REQUIRED, Manifest
from trl_blend.rollouts.shard import DATA_FOLDER, check_record, read_record, shards_on_disk


_FILES = [MANIFEST_NAME, CARD_NAME, f"{DATA_FOLDER}/part-*.parquet"]
_COMMANDS = {"rollouts": "trl-blend rollouts", "scored_rollouts": "trl-blend score"}


class RolloutStore:
    """
    Rollouts on disk, read only. Open one with [`RolloutStore.open`].

    Attributes:
        folder (`pathlib.Path`):
            Folder of the files; for a store on the Hub, the downloaded copy.
        manifest ([`~trl_blend.rollouts.format.Manifest`]):
            Counts, settings, identities, checksums.
        name (`str`):
            What it was opened by: a path or a repository id.
    """

    def __init__(self, folder: Path, manifest: Manifest, name: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self.name = name

    @classmethod
    def open(
        cls, folder_or_repo: str | os.PathLike[str], revision: str | None = None, verify: bool = False
    ) -> "RolloutStore":
        """
        Open a finished store.

        Args:
            folder_or_repo (`str` or `os.PathLike`):
                Its folder, or the id of a dataset repository on the Hub, which is downloaded.
            revision (`str`, *optional*):
                Branch, tag or commit of the repository.
            verify (`bool`, *optional*, defaults to `False`):
                Whether to read everything and compare all checksums, see [`RolloutStore.verify`]. Otherwise the
                presence and size of each file is checked.

        Raises:
            [`~trl_blend.errors.StoreError`]: If it is neither a folder nor a repository, has no manifest, is of a
                newer schema, is half-written, or a shard is missing or broken.
        """
        folder = Path(folder_or_repo)
        if folder.is_file():
            raise StoreError(
                f"{folder_or_repo} is {describe(folder)}, not a store of rollouts, which is a folder. Pass the "
                "output_dir of `trl-blend rollouts` or `trl-blend score`."
            )
        if not folder.is_dir():
            folder = _download(str(folder_or_repo), revision)
        if not (folder / MANIFEST_NAME).exists() and shards_on_disk(folder):
            raise StoreError(
                f"{folder_or_repo} has shards but no {MANIFEST_NAME}. Run the command that wrote it again: it takes "
                "them up."
            )
        manifest = Manifest.load(folder)
        if not manifest.complete:
            of = "" if manifest.planned_shards is None else f" of {manifest.planned_shards}"
            raise StoreError(
                f"{folder_or_repo} is half-written: {len(shards_on_disk(folder))}{of} shards are there. Run the same "
                f"`{_COMMANDS[manifest.kind]}` command again to write the others; it continues where it stopped."
            )
        store = cls(folder, manifest, str(folder_or_repo))
        for record in manifest.shards:
            check_record(folder, record, checksum=False)
        if verify:
            store.verify()
        return store

    @property
    def kind(self) -> str:
        """`"rollouts"` or `"scored_rollouts"`."""
        return self.manifest.kind

    @property
    def digest(self) -> str:
        """SHA-256 over the checksums of all shards: two stores with the same digest hold the same rows."""
        return hashlib.sha256("\n".join(record["sha256"] for record in self.manifest.shards).encode()).hexdigest()

    @property
    def bytes_per_token(self) -> float:
        """Bytes of all shards, prompts and keys included, per completion token."""
        return self.num_bytes / max(self.manifest.num_completion_tokens, 1)

    @property
    def files(self) -> list[str]:
        """Paths of the shards, in order."""
        return [str(self.folder / record["file"]) for record in self.manifest.shards]

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(int(record["bytes"]) for record in self.manifest.shards)

    def __len__(self) -> int:
        return self.manifest.num_rows

    def __repr__(self) -> str:
        return f"RolloutStore({self.name!r}, kind={self.kind!r}, rows={len(self)}, shards={len(self.manifest.shards)})"

    def dataset(self, streaming: bool = False) -> Any:
        """
        The rows, as `datasets.load_dataset` gives them.

        Args:
            streaming (`bool`, *optional*, defaults to `False`):
                Whether to read the shards while iterating, instead of copying them into the cache of `datasets`.

        Returns:
            [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: One row per completion, in order.
        """
        from datasets import load_dataset

        return load_dataset("parquet", data_files=self.files, split="train", streaming=streaming)

    def iter_shards(self) -> Iterator[tuple[int, pa.Table]]:
        """
        Index and rows of each shard, one at a time. The checksum of each is compared.

        Raises:
            [`~trl_blend.errors.StoreError`]: If a file is missing, broken, or has other columns than the first.
        """
        schema = None
        for index, record in enumerate(self.manifest.shards):
            table = read_record(self.folder, record)
            schema = schema or table.schema
            if table.schema != schema:
                raise StoreError(
                    f"{self.folder / record['file']} has the columns {_types(table.schema)}, the shards before it "
                    f"{_types(schema)}. Write every shard with the same columns."
                )
            yield index, table

    def verify(self) -> None:
        """
        Read everything: the checksum of every file, the number of rows, and every row's content.

        Raises:
            [`~trl_blend.errors.StoreError`]: At the first file or row that is wrong.
        """
        for index, table in self.iter_shards():
            path = self.files[index]
            rows = self.manifest.shards[index]["rows"]
            if table.num_rows != rows:
                raise StoreError(
                    f"{path} has {table.num_rows} rows, the manifest says {rows}. Run the command that wrote the "
                    "store again with `--repair`."
                )
            check_rows(table, required=REQUIRED[self.kind], where=path)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """
        Upload card, shards and manifest to a dataset repository. Shards of an earlier push go away.

        A large store takes several commits, and an upload that was interrupted goes on when called again; until it has
        ended, the repository opens with an error that names what is missing.

        The manifest is uploaded as it is, with the names of models and prompt files as they were given.

        Args:
            repo_id (`str`):
                Repository, such as `"me/my-scored-rollouts"`. It is created if it does not exist.
            private (`bool`, *optional*):
                Whether a new repository is private. Defaults to the organisation's setting.
            token (`str`, *optional*):
                Access token. Defaults to the one saved by `hf auth login`.
            revision (`str`, *optional*):
                Branch, created if it does not exist.
            commit_message (`str`, *optional*):
                Message of the commit.

        Returns:
            `str`: Address of the commit.

        Raises:
            `OSError`, `ValueError`: As `huggingface_hub` raises them. The store stays as it is.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type="dataset", exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=self.folder,
            repo_type="dataset",
            revision=revision,
            commit_message=commit_message or f"Upload {len(self)} {self.kind.replace('_', ' ')}",
            allow_patterns=[MANIFEST_NAME, CARD_NAME, *(record["file"] for record in self.manifest.shards)],
            delete_patterns=[f"{DATA_FOLDER}/part-*.parquet"],
        )
        return str(commit)


def load_rollouts(
    path_or_repo: str | os.PathLike[str], *, revision: str | None = None, verify: bool = False
) -> RolloutStore:
    """
    Open a store of student rollouts that are not scored yet.

    Args:
        path_or_repo (`str` or `os.PathLike`):
            Folder, or dataset repository on the Hub.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        verify (`bool`, *optional*, defaults to `False`):
            Whether to compare all checksums and check every row.

    Returns:
        [`RolloutStore`]: The store.

    Raises:
        [`~trl_blend.errors.StoreError`]: See [`RolloutStore.open`].
    """
    return open_kind(path_or_repo, "rollouts", "path_or_repo", revision, verify)


def load_scored_rollouts(
    path_or_repo: str | os.PathLike[str], *, revision: str | None = None, verify: bool = False
) -> RolloutStore:
    """
    Open a store of rollouts with the teacher's log-probs. Arguments and errors are those of [`load_rollouts`]; a store
    without scores is refused too.
    """
    return open_kind(path_or_repo, "scored_rollouts", "path_or_repo", revision, verify)


def open_kind(store: Any, kind: str, argument: str, revision: str | None = None, verify: bool = False) -> RolloutStore:
    """
    The store behind an argument, which is one or names it, of one of the two kinds.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If it is neither a store nor a name.
        [`~trl_blend.errors.StoreError`]: If it is of the other kind, see [`RolloutStore.open`].
    """
    if isinstance(store, str | os.PathLike):
        store = RolloutStore.open(store, revision)
    if not isinstance(store, RolloutStore):
        raise ConfigError(
            f"`{argument}` is a {type(store).__name__}, not a store of rollouts. Pass its folder, its repository, or "
            f"what `{'load_rollouts' if kind == 'rollouts' else 'load_scored_rollouts'}` opens."
        )
    if store.kind != kind:
        remedy = (
            f"Score them first: `trl-blend score --rollouts {store.name} --teacher_model_name_or_path ...`."
            if kind == "scored_rollouts"
            else "Pass the output of `trl-blend rollouts`, or open it with `load_scored_rollouts`."
        )
        raise StoreError(f"{store.name} is {describe(store.folder)}. {remedy}")
    if verify:
        store.verify()
    return store


def _types(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=_FILES))
    except (HTTPError, HFValidationError, OSError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise StoreError(
            f"{repo_id!r} is not a folder here, and no dataset of that name{at} could be fetched from the Hub "
            f"({type(error).__name__}). Check the path; for a repository, its name, your access to it and the network."
        ) from error

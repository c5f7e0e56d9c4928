"""
One shard of a store: a parquet file that says by itself which settings and which input it was made from.

The footer carries what is needed to recognise a shard that the manifest does not know yet, because the process was
killed between the two. Encoding is deterministic: the same rows give the same bytes, and so the same checksum.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trl_blend._files import sha256_of
from trl_blend.errors import StoreError
from trl_blend.rollouts.format import SCHEMA_VERSION
from trl_blend.rollouts.ragged import num_values


DATA_FOLDER = "data"

_NAME = re.compile(r"part-(\d{5,})\.parquet")
_FOOTER_KEY = b"trl_blend"
# Values in one row group: what a reader that streams has to hold at once
_GROUP_VALUES = 1 << 19


@dataclass(frozen=True)
class Footer:
    """
    What a shard says about itself: the store it belongs to, by the digest of its settings, its place there, the digest
    of what its rows were made from, and counts.
    """

    schema_version: int
    settings_digest: str
    index: int
    input_digest: str
    rows: int
    num_prompt_tokens: int
    num_completion_tokens: int
    num_truncated: int


def shard_file(index: int) -> str:
    """File of a shard, relative to the store's folder."""
    return f"{DATA_FOLDER}/part-{index:05d}.parquet"


def shard_index(file: str) -> int | None:
    """Index of the shard that a file is, by its name; `None` if it is no shard."""
    match = _NAME.fullmatch(file.rsplit("/", 1)[-1])
    return int(match[1]) if match else None


def shards_on_disk(folder: Path) -> dict[int, str]:
    """Index and file of every shard under `folder`, sorted by index. Nothing is opened."""
    try:
        names = os.listdir(folder / DATA_FOLDER)
    except FileNotFoundError:
        return {}
    found = {index: f"{DATA_FOLDER}/{name}" for name in names if (index := shard_index(name)) is not None}
    return dict(sorted(found.items()))


def encode(table: pa.Table, *, settings_digest: str, index: int, input_digest: str) -> tuple[pa.Buffer, Footer]:
    """Bytes of a shard whose rows are a table of [`~trl_blend.rollouts.format.build_table`], and what they say."""
    footer = Footer(
        SCHEMA_VERSION,
        settings_digest,
        index,
        input_digest,
        rows=table.num_rows,
        num_prompt_tokens=num_values(table["prompt_ids"]),
        num_completion_tokens=num_values(table["completion_ids"]),
        num_truncated=pc.sum(table["truncated"]).as_py() or 0,
    )
    total = sum(num_values(column) for column in table.columns)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata({_FOOTER_KEY: json.dumps(asdict(footer))}),
        sink,
        compression="zstd",
        use_dictionary=False,  # log-probs and keys hardly repeat
        write_statistics=False,
        write_page_checksum=True,
        row_group_size=max(1, table.num_rows * _GROUP_VALUES // max(total, 1)),
    )
    return sink.getvalue(), footer


def record_of(file: str, footer: Footer, *, size: int, sha256: str) -> dict[str, Any]:
    """Entry of a shard in the manifest."""
    kept = ("rows", "input_digest", "num_prompt_tokens", "num_completion_tokens", "num_truncated")
    return {"file": file, "bytes": size, "sha256": sha256, **{name: getattr(footer, name) for name in kept}}


def read_footer(folder: Path, file: str) -> Footer:
    """
    What a shard on disk says about itself. Fields that this version does not know are left out.

    Raises:
        [`~trl_blend.errors.StoreError`]: If the file is cut short, broken, or was written by something else.
    """
    try:
        metadata = pq.read_metadata(folder / file)
        content = json.loads((metadata.metadata or {})[_FOOTER_KEY])
        footer = Footer(**{field.name: content[field.name] for field in fields(Footer)})
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise _broken(folder, file, f"its footer cannot be read ({_first_line(error)})") from error
    if footer.rows != metadata.num_rows or footer.index != shard_index(file):
        raise _broken(folder, file, f"its footer says shard {footer.index} with {footer.rows} rows, the file differs")
    return footer


def check_record(folder: Path, record: dict[str, Any], *, checksum: bool) -> None:
    """
    Check that a shard has the size that its entry in the manifest says and, if asked for, the checksum.

    Raises:
        [`~trl_blend.errors.StoreError`]: If the file is missing or differs.
    """
    path = folder / record["file"]
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise _broken(folder, record["file"], "it is missing") from None
    if size != record["bytes"]:
        raise _broken(folder, record["file"], f"it has {size} bytes instead of {record['bytes']}")
    if checksum:
        _compare(folder, record, sha256_of(path))


def read_record(folder: Path, record: dict[str, Any]) -> pa.Table:
    """
    Rows of a shard, its checksum compared with its entry in the manifest.

    Raises:
        [`~trl_blend.errors.StoreError`]: If the file is missing or differs.
    """
    file = record["file"]
    try:
        content = (folder / file).read_bytes()
        _compare(folder, record, hashlib.sha256(content).hexdigest())
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as parquet:
            return parquet.read(use_threads=False)
    except FileNotFoundError:
        raise _broken(folder, file, "it is missing") from None
    except (pa.ArrowException, OSError) as error:
        raise _broken(folder, file, f"it cannot be read ({_first_line(error)})") from error


def _broken(folder: Path, file: str, problem: str) -> StoreError:
    return StoreError(
        f"Shard {folder / file} is broken: {problem}. Run the command that wrote the store again with `--repair`: it "
        "verifies every shard and redoes only those that are bad. A store from the Hub has to be downloaded again."
    )


def _compare(folder: Path, record: dict[str, Any], sha256: str) -> None:
    if sha256 != record["sha256"]:
        raise _broken(
            folder, record["file"], f"its checksum is {sha256[:16]}… and the manifest has {record['sha256'][:16]}…"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"

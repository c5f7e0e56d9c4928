"""
Import of the parquet files of Lightning OPD (arXiv 2604.13010), written by its `prepare_lightning_opd.py`.

Their rows hold the prompt as text and, in `metadata`, the response's token ids with the teacher's log-probs. They say
neither which teacher nor which student, have no rollout log-probs, and lack the response's end-of-sequence token. So
the imported store has no identities, and a consistency check has nothing to compare: state the teacher in the
trainer's configuration if you know it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trl_blend._files import sha256_of
from trl_blend.errors import ConfigError, StoreError
from trl_blend.models.fingerprint import fingerprint_tokenizer
from trl_blend.rollouts.format import Manifest, row_key
from trl_blend.rollouts.store import RolloutStore
from trl_blend.rollouts.writer import ShardWriter


FORMAT = "lightning-opd"


def import_lightning_opd(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_response_len: int = 4096,
    logps_dtype: str = "float16",
    rows_per_shard: int = 256,
    repair: bool = False,
) -> RolloutStore:
    """
    Write a store of scored rollouts from Lightning-OPD files. Killed and started again, it continues.

    Args:
        files (`str`, `os.PathLike` or a sequence of them):
            Parquet files with the columns `prompt` and `metadata` (a struct or its JSON), or a folder of them.
        output_dir (`str` or `os.PathLike`):
            Folder of the store.
        tokenizer (`str` or [`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's tokenizer, or its name: prompts are text there, and are tokenised as the reference does,
            without adding special tokens. Not needed where `prompt` holds token ids.
        max_response_len (`int`, *optional*, defaults to `4096`):
            `--max-response-len` of the preparation: responses of this length were cut, and are marked as truncated.
        logps_dtype (`str`, *optional*, defaults to `"float16"`):
            `"float16"` or `"float32"`.
        rows_per_shard (`int`, *optional*, defaults to `256`):
            Rows of one shard.
        repair (`bool`, *optional*, defaults to `False`):
            Verify all checksums and redo the shards that are bad.

    Returns:
        [`~trl_blend.rollouts.store.RolloutStore`]: The store. The row's sample index in `key` is its number in the
            files. `teacher`, `student`, `sampling` and `scoring` of its manifest are `None`.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there are no files, or no tokenizer for prompts of text.
        [`~trl_blend.errors.StoreError`]: If a column or field is missing, a row is masked in part, or a row is wrong.
    """
    paths = _paths(files)
    if isinstance(tokenizer, str | os.PathLike):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    digests = [sha256_of(path) for path in paths]
    counts = [_num_rows(path) for path in paths]
    fingerprint = None if tokenizer is None else fingerprint_tokenizer(tokenizer)
    manifest = Manifest(
        kind="scored_rollouts",
        settings={
            "format": FORMAT,
            "files": digests,
            "tokenizer": fingerprint and fingerprint.sha256,
            "max_response_len": max_response_len,
            "rows_per_shard": rows_per_shard,
        },
        logps_dtype=logps_dtype,
        planned_shards=sum(-(-count // rows_per_shard) for count in counts),
        source={
            "format": FORMAT,
            "files": [{"file": path.name, "sha256": digest} for path, digest in zip(paths, digests)],
            "tokenizer": fingerprint and fingerprint.to_dict(),
            "teacher_identity": "none: the format does not record it",
            "end_of_sequence": "dropped by the format",
        },
    )
    writer = ShardWriter(output_dir, manifest, repair=repair)
    for index, (path, digest, first_row, batch) in enumerate(_batches(paths, digests, rows_per_shard)):
        input_digest = hashlib.sha256(f"{digest} {first_row} {batch.num_rows}".encode()).hexdigest()
        if not writer.done(index, input_digest):
            rows_before = sum(counts[: paths.index(path)]) + first_row
            writer.write(index, _columns(batch, path, rows_before, tokenizer, max_response_len), input_digest)
            writer.update_manifest()
    writer.update_manifest(complete=True)
    return RolloutStore.open(output_dir)


def _paths(files: Any) -> list[Path]:
    paths = [Path(file) for file in ([files] if isinstance(files, str | os.PathLike) else files)]
    if len(paths) == 1 and paths[0].is_dir():
        paths = sorted(paths[0].glob("*.parquet"))
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise ConfigError(
            f"`files={files!r}` names no parquet files ({missing or 'an empty folder'}). Check the path."
        )
    return paths


def _num_rows(path: Path) -> int:
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{path} is no readable parquet file ({type(error).__name__}). Restore it.") from error
    names = metadata.schema.to_arrow_schema().names
    missing = [name for name in ("prompt", "metadata") if name not in names]
    if missing:
        raise StoreError(f"{path} lacks the columns {missing}, so it is no Lightning-OPD file; it has {names}.")
    return int(metadata.num_rows)


def _batches(paths: list[Path], digests: list[str], rows_per_shard: int) -> Iterator[tuple[Path, str, int, pa.Table]]:
    """`rows_per_shard` rows of one file at a time, with the number of the first one in its file."""
    for path, digest in zip(paths, digests):
        with pq.ParquetFile(path) as parquet:
            first_row, pending = 0, pa.table({})
            for batch in parquet.iter_batches(rows_per_shard, columns=["prompt", "metadata"], use_threads=False):
                # A batch may end early where a row group of the file does
                piece = pa.Table.from_batches([batch])
                pending = pa.concat_tables([pending, piece]) if pending.num_rows else piece
                while pending.num_rows >= rows_per_shard:
                    yield path, digest, first_row, pending.slice(0, rows_per_shard)
                    first_row, pending = first_row + rows_per_shard, pending.slice(rows_per_shard)
            if pending.num_rows:
                yield path, digest, first_row, pending


def _columns(batch: pa.Table, path: Path, rows_before: int, tokenizer: Any, max_response_len: int) -> dict[str, Any]:
    prompts = _prompt_ids(batch["prompt"].to_pylist(), path, tokenizer)
    responses: list[Any] = []
    teacher_logps: list[Any] = []
    for number, row in enumerate(batch["metadata"].to_pylist()):
        entry = json.loads(row) if isinstance(row, str | bytes) else row
        where = f"{path}: row {rows_before + number}"
        fields = entry if isinstance(entry, dict) else {}
        missing = [name for name in ("response_tokens", "teacher_log_probs") if fields.get(name) is None]
        if missing:
            raise StoreError(
                f"{where} lacks {missing} in `metadata`. The file of phase 1 has no log-probs: run "
                "`prepare_lightning_opd.py` with `--compute-teacher-logprobs` and import what that writes."
            )
        mask = entry.get("loss_mask")
        if mask is not None and not all(mask):
            raise StoreError(
                f"{where} masks {sum(not kept for kept in mask)} of its tokens (`loss_mask`): a response in several "
                "turns, which a store of rollouts does not hold. Leave such rows out."
            )
        responses.append(entry["response_tokens"])
        teacher_logps.append(entry["teacher_log_probs"])
    return {
        "key": [row_key(ids, rows_before + number) for number, ids in enumerate(prompts)],
        "prompt_ids": prompts,
        "completion_ids": responses,
        "truncated": [len(ids) >= max_response_len for ids in responses],
        "teacher_logps": teacher_logps,
    }


def _prompt_ids(prompts: list[Any], path: Path, tokenizer: Any) -> list[list[int]]:
    if all(isinstance(prompt, list) and all(isinstance(token, int) for token in prompt) for prompt in prompts):
        return prompts
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise StoreError(f"{path}: column 'prompt' holds neither text nor token ids. Apply the chat template first.")
    if tokenizer is None:
        raise ConfigError(f"{path} holds prompts as text, and `tokenizer=None`. Pass the student's tokenizer.")
    return list(tokenizer(prompts, add_special_tokens=False)["input_ids"])

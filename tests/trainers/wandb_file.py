"""Reads what wandb wrote in offline mode: its Python package can write a `.wandb` file, and no longer read one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2


_HEADER, _BLOCK = 7, 32768
_FULL, _LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """The records of a file: LevelDB's log format behind a header of 7 bytes, a protobuf message in each."""
    data = path.read_bytes()
    assert data.startswith(b":W&B")
    position, message = _HEADER, b""
    while position + 7 <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < 7:  # the rest of a block holds no header
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            message = b""
            yield record


def history(path: Path) -> list[dict[str, Any]]:
    """The rows that `wandb.log` was called with, in order. Nested names are joined by a dot."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def summary(path: Path) -> dict[str, Any]:
    """The run's summary: the last value set of each name."""
    found = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "summary":
            for item in record.summary.update:
                found[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return found

"""What a path leads to, in words: for the error where something else was meant."""

import json
import os
from pathlib import Path


_DATA = {".jsonl", ".json", ".parquet", ".csv", ".arrow", ".txt"}
# The first of them that is there says what the folder is
_MARKS = {
    "mixing.json": "an exported mixed policy",
    "adapter_config.json": "a PEFT adapter",
    "config.json": "a model",
    "dataset_dict.json": "a dataset saved with `save_to_disk`",
    "state.json": "a dataset saved with `save_to_disk`",
    "tokenizer_config.json": "a tokenizer",
    "training_args.bin": "the output of a training",
    "trainer_state.json": "the output of a training",
}
_STORES = {
    "rollouts": "a store of rollouts without teacher log-probabilities",
    "scored_rollouts": "a store of scored rollouts",
}


def store_kind(path: str | os.PathLike[str]) -> str | None:
    """Kind of the store of rollouts in a folder, finished or not; `None` where it is none."""
    try:
        kind = json.loads((Path(path) / "manifest.json").read_bytes())["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kind if kind in _STORES else None


def describe(path: str | os.PathLike[str]) -> str:
    """What there is at a path, such as "a model", in words that follow "is"."""
    path = Path(path)
    if path.is_file():
        return f"a file of data ({path.suffix})" if path.suffix.lower() in _DATA else "a file"
    if not path.is_dir():
        return "neither a file nor a folder"
    if kind := store_kind(path):
        return _STORES[kind]
    names = {entry.name for entry in path.iterdir()}
    for name, words in _MARKS.items():
        if name in names:
            return words
    if any(name.startswith("checkpoint-") for name in names):
        return "the output of a training"
    if any(Path(name).suffix.lower() in _DATA for name in names):
        return "a folder with files of data"
    return "a folder of something else" if names else "an empty folder"

"""Prompts as token ids: where they come from, and one pass over all of them before anything is loaded."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, load_dataset

from trl_blend.errors import ConfigError


_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_prompts(
    prompts: Any, argument: str = "prompts", column: str = "prompt", config: str | None = None, split: str = "train"
) -> Dataset:
    """
    A dataset with a column of prompts.

    Args:
        prompts ([`~datasets.Dataset`], `list` or `str`):
            A dataset; a list of prompts or of dictionaries; a `.json`, `.jsonl`, `.parquet` or `.csv` file; a folder
            or Hub id that `load_dataset` reads.
        argument (`str`, *optional*, defaults to `"prompts"`):
            Name of the argument that holds them, for the error messages.
        column (`str`, *optional*, defaults to `"prompt"`):
            Column of the prompts.
        config (`str`, *optional*):
            Configuration of a dataset on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a dataset that is read by name.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is no such dataset, it is empty, or the column is missing.
    """
    if isinstance(prompts, str | os.PathLike):
        dataset = _read(str(prompts), argument, config, split)
    elif isinstance(prompts, Dataset):
        dataset = prompts
    elif isinstance(prompts, list | tuple):
        rows = [row if isinstance(row, dict) and "role" not in row else {column: row} for row in prompts]
        dataset = Dataset.from_list(rows)
    else:
        raise ConfigError(
            f"`{argument}` is a {type(prompts).__name__}, whose rows cannot be read by their number. Pass one split "
            "of a `Dataset` that is not streamed, a list or a path."
        )
    if column not in dataset.column_names:
        raise ConfigError(
            f"The prompts have no column `{column}`, only {dataset.column_names}. Name the column of the prompts with "
            "`prompt_column`."
        )
    if len(dataset) == 0:
        raise ConfigError(f"`{argument}` is empty. Pass at least one prompt.")
    return dataset


def describe_dataset(prompts: Any) -> str:
    """Where prompts came from, in words, for the manifest."""
    if isinstance(prompts, str | os.PathLike):
        return str(prompts)
    return f"{type(prompts).__name__} of {len(prompts)} rows"


def _read(name: str, argument: str, config: str | None, split: str) -> Dataset:
    kind = _FORMATS.get(Path(name).suffix.lower())
    if kind is not None and not Path(name).is_file():
        raise ConfigError(f"`{argument}={name!r}`: there is no such file. Correct the path.")
    if kind is not None and not Path(name).stat().st_size:
        raise ConfigError(f"`{argument}={name!r}` is empty. Write one prompt per line.")
    try:
        if kind is not None:
            return load_dataset(kind, data_files=name, split=split)
        return load_dataset(name, config, split=split)
    except Exception as error:  # its exceptions are many, and not of one family
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"`{argument}={name!r}` (split {split!r}) cannot be read: {first}") from error


class PromptScan(NamedTuple):
    """
    What one pass over all prompts found.

    Args:
        digests (`list[str]`):
            SHA-256 of the token ids of each shard's prompts.
        digest (`str`):
            SHA-256 of those.
        longest, longest_row (`int`):
            Number of tokens of the longest prompt, and its row.
    """

    digests: list[str]
    digest: str
    longest: int
    longest_row: int


class PromptTokens:
    """
    Token ids of prompts, read in slices: nothing is kept.

    Text is tokenised as it is. Messages go through the chat template, with the generation prompt behind them, or,
    where the last message is the assistant's, as the beginning of its completion.

    Args:
        dataset ([`~datasets.Dataset`]):
            The prompts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the student.
        column (`str`, *optional*, defaults to `"prompt"`):
            Column of the prompts.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of the chat template.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Any,
        column: str = "prompt",
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self._dataset = dataset.select_columns([column])
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self._column = column
        self._template_kwargs = chat_template_kwargs or {}

    def __len__(self) -> int:
        return len(self._dataset)

    def ids(self, start: int, stop: int) -> list[list[int]]:
        """
        Token ids of the prompts `start` to `stop`.

        Raises:
            [`~trl_blend.errors.ConfigError`]: If a prompt is neither text nor messages, or has no tokens.
        """
        rows = self._dataset[start:stop][self._column]
        return [self._encode(prompt, row) for row, prompt in enumerate(rows, start)]

    def scan(self, bounds: Iterable[tuple[int, int]]) -> PromptScan:
        """One pass over all prompts, a shard at a time: `bounds` are those of [`shard_bounds`]."""
        digests, longest, longest_row = [], 0, 0
        for start, stop in bounds:
            shard = self.ids(start, stop)
            digests.append(_digest(shard))
            for row, ids in enumerate(shard, start):
                if len(ids) > longest:
                    longest, longest_row = len(ids), row
        return PromptScan(digests, hashlib.sha256("".join(digests).encode()).hexdigest(), longest, longest_row)

    def _encode(self, prompt: Any, row: int) -> list[int]:
        if isinstance(prompt, str):
            ids = self._tokenizer(prompt)["input_ids"]
        elif isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt):
            ids = self._encode_messages(prompt, row)
        else:
            raise ConfigError(
                f"Row {row} of the prompts is {str(prompt)[:60]!r}, neither text nor a list of messages "
                "(`{'role': ..., 'content': ...}`). Correct the row, or name the right column with `prompt_column`."
            )
        if len(ids) == 0:
            raise ConfigError(f"Row {row} of the prompts has no tokens. Drop the row.")
        return list(ids)

    def _encode_messages(self, messages: list[dict[str, Any]], row: int) -> list[int]:
        continues = messages[-1]["role"] == "assistant"
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                tokenize=True,
                return_dict=True,
                **self._template_kwargs,
            )["input_ids"]
        except Exception as error:  # templates raise what they like
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"The chat template cannot render row {row} of the prompts: {first}") from error


def shard_bounds(rows: int, per_shard: int) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of every shard."""
    for start in range(0, rows, per_shard):
        yield start, min(start + per_shard, rows)


def _digest(rows: Sequence[Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for ids in rows:
        digest.update(np.asarray([len(ids), *ids], dtype="<i8").tobytes())
    return digest.hexdigest()

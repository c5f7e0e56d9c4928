"""Prompts as token ids: where they come from, and one pass over all of them before anything is loaded."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError

from trl_blend.errors import ConfigError
from trl_blend.rollouts.folders import describe, store_kind
from trl_blend.rollouts.format import ROW_COLUMNS


logger = logging.getLogger(__name__)

_PROMPTS_OF_A_STORE = "Its prompts are token ids: pass the prompts that it was collected from."
_NO_DATASETS = {"a model", "a PEFT adapter", "an exported mixed policy", "a tokenizer", "the output of a training"}
# Columns of TRL's conversational format that go into the chat template
_TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_prompts(
    prompts: Any, argument: str = "prompts", column: str = "prompt", config: str | None = None, split: str = "train"
) -> Dataset:
    """
    A dataset with a column of prompts: one as it is; a list of prompts or of dictionaries; the `split` of a `.json`,
    `.jsonl`, `.parquet` or `.csv` file, or of a folder or Hub id that `load_dataset` reads, with its configuration
    `config`. `argument` is the one that holds them, for the messages.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is no such dataset, it is empty, or the column is missing.
    """
    if isinstance(prompts, str | os.PathLike):
        dataset = read_split(str(prompts), argument, config, split)
    elif isinstance(prompts, Dataset):
        dataset = prompts
    elif isinstance(prompts, list | tuple):
        rows = [row if isinstance(row, dict) and "role" not in row else {column: row} for row in prompts]
        try:
            dataset = Dataset.from_list(rows)
        except (TypeError, ValueError) as error:  # of Arrow, for a column of more than one type
            for number, values in enumerate(rows):
                check_prompt(values.get(column), number, column)
            raise ConfigError(f"`{argument}` has columns of more than one type: {error} Correct them.") from error
    elif hasattr(prompts, "manifest"):
        raise ConfigError(f"`{argument}={prompts.name!r}` is {describe(prompts.folder)}. {_PROMPTS_OF_A_STORE}")
    else:
        raise ConfigError(
            f"`{argument}` is a {type(prompts).__name__}, whose rows cannot be read by their number. Pass one split "
            "of a `Dataset` that is not streamed, a list or a path."
        )
    if len(dataset) == 0:
        raise ConfigError(f"`{argument}` is empty. Pass at least one prompt.")
    dataset = dataset.with_format(None)  # plain values, whatever its rows are read as
    check_prompts(dataset, column)
    return dataset


def describe_dataset(prompts: Any) -> str:
    """Where prompts came from, in words, for the manifest."""
    if isinstance(prompts, str | os.PathLike):
        return str(prompts)
    return f"{type(prompts).__name__} of {len(prompts)} rows"


def read_split(name: str, argument: str, config: str | None, split: str | None) -> Any:
    """
    A split of a dataset that is named; with `split=None` all of them, by name. A file has one split, `train`.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If it cannot be read; for a broken file with the line, where that is known.
    """
    path, seen = Path(name), f"`{argument}={name!r}`"
    kind = _FORMATS.get(path.suffix.lower())
    if kind is not None and not path.is_file():
        raise ConfigError(f"{seen}: there is no such file. Correct the path.")
    if kind is not None and not path.stat().st_size:
        raise ConfigError(f"{seen} is empty. Write one prompt per line.")
    if kind is None and path.is_file():
        raise ConfigError(f"{seen} is of no known kind. Its name has to end in {', '.join(_FORMATS)}.")
    if store_kind(path):
        raise ConfigError(f"{seen} is {describe(path)}. {_PROMPTS_OF_A_STORE}")
    if path.is_dir() and describe(path) in _NO_DATASETS:
        raise ConfigError(f"{seen} is {describe(path)}, not a dataset of prompts. Correct the path.")
    if config is not None and path.exists() and not path.is_dir():
        raise ConfigError(f"`dataset_config={config!r}` is of a dataset on the Hub, and {seen} is a file. Drop it.")
    loud = logging.getLogger("datasets")
    level = loud.level
    loud.setLevel(logging.CRITICAL)  # it logs what it then raises
    try:
        found = _load(name, kind, config, split)
    except Exception as error:  # its exceptions are many, and not of one family
        which = f" (split {split!r})" if split not in (None, "train") else ""
        why = _broken_line(path) or _in_words(error)
        raise ConfigError(f"{seen}{which} cannot be read: {why}. Correct it.") from error
    finally:
        loud.setLevel(level)
    if kind == "json" and (why := _broken_line(path, only_encoding=True)):  # found only when such a row is used
        raise ConfigError(f"{seen} cannot be read: {why}. Correct it.")
    return found


def _load(name: str, kind: str | None, config: str | None, split: str | None) -> Any:
    if kind is not None:
        return load_dataset(kind, data_files=name, split=split)
    if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):  # of `save_to_disk`
        found = load_from_disk(name)
        found = DatasetDict(train=found) if isinstance(found, Dataset) else found
        return found if split is None else found[split]
    return load_dataset(name, config, split=split)


def _in_words(error: BaseException) -> str:
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:  # its own text says nothing
        error = error.__cause__
    if isinstance(error, DataFilesNotFoundError | EmptyDatasetError):
        return f"no {', '.join(_FORMATS)} files are there"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    first = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
    return "it has no rows" if "corresponds to no data" in first else first.rstrip(".!")


def _broken_line(path: Path, only_encoding: bool = False) -> str | None:
    """The first line of a JSON file, or of one in a folder, that is none; in words."""
    if path.is_dir():
        files = (file for file in sorted(path.rglob("*.json*")) if file.suffix in (".json", ".jsonl"))
        return next((f"{file.relative_to(path)}, {why}" for file in files if (why := _broken_line(file))), None)
    if path.suffix.lower() not in (".json", ".jsonl"):
        return None
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8")
                if number == 1 and text.lstrip().startswith("[") and not only_encoding:
                    json.loads(path.read_text(encoding="utf-8"))
                    return None
                row = json.loads(text) if text.strip() and not only_encoding else {}
            except UnicodeDecodeError:
                return f"line {number} is not UTF-8"
            except ValueError as error:
                array = text.lstrip().startswith("[") and number == 1
                return f"line {getattr(error, 'lineno', 1) if array else number} is not JSON ({error})"
            if not isinstance(row, dict):
                return f"line {number} is {text.strip()[:40]!r}, no JSON object"
    return None


def check_prompts(dataset: Dataset | IterableDataset, column: str = "prompt", what: str = "the prompts") -> None:
    """
    Check that every row of a dataset has a prompt, text or messages. Of a streamed dataset, the first 100 rows are
    looked at. `what` is the dataset in the messages, such as "`train_dataset`".

    Raises:
        [`~trl_blend.errors.ConfigError`]: If the column is missing, there are no rows, or a prompt is missing, empty
            or of another type. The message names the row, its value and the remedy.
    """
    names = dataset.column_names
    if names is not None and column not in names:
        raise ConfigError(
            f"There is no column `{column}` in {what}, only {names}. Name the column of the prompts with "
            "`prompt_column`."
        )
    if isinstance(dataset, Dataset):
        batches = dataset.select_columns(column).iter(1000)  # without decoding the other columns, such as images
        rows: Iterable[Any] = (row for batch in batches for row in batch[column])
    else:
        rows = (row.get(column) for row in islice(dataset, 100))
    count = 0
    for count, prompt in enumerate(rows, 1):
        check_prompt(prompt, count - 1, column, what)
    if not count:
        raise ConfigError(f"There are no rows in {what}. Pass at least one prompt.")


def check_prompt(prompt: Any, row: int, column: str = "prompt", what: str = "the prompts") -> None:
    """
    Check one prompt, see [`check_prompts`].

    Raises:
        [`~trl_blend.errors.ConfigError`]: If it is missing, empty, or neither text nor messages.
    """
    where = f"Row {row} of {what}"
    if prompt is None or (isinstance(prompt, str | list) and not _has_content(prompt)):
        raise ConfigError(f"{where} has no prompt: column `{column}` is {prompt!r}. Drop the row, or fill it in.")
    if isinstance(prompt, str):
        return
    remedy = f"Correct the row, or name the right column with `prompt_column` (now `{column}`)."
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        raise ConfigError(
            f"{where} is {_shown(prompt)}, neither text nor a list of messages "
            f"(`{{'role': ..., 'content': ...}}`). {remedy}"
        )
    for message in prompt:
        content = message.get("content")
        if not isinstance(message.get("role"), str):
            raise ConfigError(f"{where} has the message {_shown(message)} without a `role`. {remedy}")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            raise ConfigError(f"{where} has the message {_shown(message)}, whose `content` is no text. {remedy}")
        parts = [part.get("type") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
        if other := sorted({str(kind) for kind in parts if kind != "text"}):
            raise ConfigError(
                f"{where} has a message with {', '.join(other)} in its `content`: rollouts are of text only. Drop "
                "the row."
            )


def _has_content(prompt: str | list[Any]) -> bool:
    """Whether there is anything but white space in a text, or in one of the messages."""
    if isinstance(prompt, str):
        return bool(prompt.strip())
    contents = (one.get("content") or one.get("tool_calls") if isinstance(one, dict) else one for one in prompt)
    return any(content.strip() if isinstance(content, str) else content for content in contents)


class PromptScan(NamedTuple):
    """
    What one pass over all prompts found: SHA-256 of the token ids of each shard's prompts, and of those; the number of
    tokens of the longest prompt, and its row.
    """

    digests: list[str]
    digest: str
    longest: int
    longest_row: int


def check_prompt_lengths(scan: PromptScan, length: int, limit: int | None, what: str = "the prompts") -> None:
    """
    Check that the longest prompt and a completion of `max_completion_length`, here `length`, have no more than `limit`
    tokens together; `None` is no limit.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If they have. The message names the row and the length that fits.
    """
    if limit is None or scan.longest + length <= limit:
        return
    remedy = "Drop the longest prompts"
    if scan.longest < limit:
        remedy = f"Set `max_completion_length={limit - scan.longest}` or less, or drop the longest prompts"
    raise ConfigError(
        f"Row {scan.longest_row} of {what} has {scan.longest} tokens. With `max_completion_length={length}` that "
        f"is more than the {limit} tokens that the model takes. {remedy}."
    )


def row_columns(dataset: Dataset, start: int, stop: int) -> dict[str, list[Any]]:
    """
    What the rows `start` to `stop` of a store keep of their prompts, where these have it: `route` and `row_weight`.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a route is no text, or a weight is negative or no finite number.
    """
    names = [name for name in ROW_COLUMNS if name in dataset.column_names]
    columns: dict[str, list[Any]] = dataset.select_columns(names)[start:stop] if names else {}
    for name, values in columns.items():
        for row, value in enumerate(values, start):
            is_number = isinstance(value, int | float) and math.isfinite(value) and value >= 0
            if not (isinstance(value, str) and value if name == "route" else is_number):
                wanted = "the name of a route" if name == "route" else "a finite number of at least 0"
                raise ConfigError(
                    f"Row {row} of the prompts: column `{name}` is {_shown(value)}, not {wanted}. Correct the row, or "
                    "rename the column if it is something else."
                )
    return columns


class PromptTokens:
    """
    Token ids of prompts, read in slices: nothing is kept.

    Messages go through the chat template, with the generation prompt behind them, or, where the last message is the
    assistant's, as the beginning of its completion. As in TRL, the row's columns `tools` (a list, or its JSON) and
    `chat_template_kwargs` go into the template; those of the row come before `template_kwargs`.

    Text is tokenised as it is, with what the tokenizer puts in front of it. What it puts behind a text, such as an
    end-of-sequence token, is left out, for a completion follows; so is a second token for the beginning of the
    sequence. A scan says so, and what else looks unlike a prompt, such as one of `eos_token_ids` at its end, once.
    `tokenizer` may be a processor; `what` is the name of the prompts in the messages.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Any,
        column: str = "prompt",
        template_kwargs: dict[str, Any] | None = None,
        eos_token_ids: Sequence[int] = (),
        what: str = "the prompts",
    ) -> None:
        columns = [column, *(name for name in _TEMPLATE_COLUMNS if name in dataset.column_names)]
        self._dataset = dataset.select_columns(columns)
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self._column, self._what = column, what
        self._template_kwargs = template_kwargs or {}
        self._eos = {self._tokenizer.eos_token_id, *eos_token_ids} - {None}
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        special = {token for token, entry in added.items() if entry.special} | set(self._tokenizer.all_special_ids)
        self._special = special - {self._tokenizer.unk_token_id}
        self._takes_parts = _takes_parts(self._tokenizer)
        self._found: dict[str, list[int]] = {}  # rows by what is odd about them

    def __len__(self) -> int:
        return len(self._dataset)

    def ids(self, start: int, stop: int) -> list[list[int]]:
        """Token ids of the prompts `start` to `stop`; one that is neither text nor messages, or empty, is refused."""
        rows = self._dataset.select(range(start, stop))
        return [self._encode(values, row) for row, values in enumerate(rows, start)]

    def scan(self, bounds: Iterable[tuple[int, int]]) -> PromptScan:
        """One pass over all prompts, a shard at a time: `bounds` are those of [`shard_bounds`]."""
        digests, longest, longest_row = [], 0, 0
        self._found.clear()
        for start, stop in bounds:
            shard = self.ids(start, stop)
            digests.append(_digest(shard))
            for row, ids in enumerate(shard, start):
                if len(ids) > longest:
                    longest, longest_row = len(ids), row
        for message, rows in self._found.items():
            others = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
            logger.warning(f"Row {rows[0]}{others} of {self._what}: {message}")
        return PromptScan(digests, hashlib.sha256("".join(digests).encode()).hexdigest(), longest, longest_row)

    def _encode(self, values: dict[str, Any], row: int) -> list[int]:
        prompt = values[self._column]
        check_prompt(prompt, row, self._column, self._what)
        ids = self._encode_text(values, row) if isinstance(prompt, str) else self._encode_messages(values, row)
        if len(ids) == 0:
            raise ConfigError(f"Row {row} of {self._what} has no tokens. Drop the row.")
        if ids[-1] in self._eos:
            self._note(row, "it ends with an end-of-sequence token, behind which a model was not trained to go on.")
        return ids

    def _encode_text(self, values: dict[str, Any], row: int) -> list[int]:
        text = values[self._column]
        ids = list(self._tokenizer(text)["input_ids"])
        bos = self._tokenizer.bos_token_id
        if ids and (ids[-1] in self._special or ids[:2] == [bos, bos]):
            own = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            first = next((start for start in range(len(ids)) if ids[start : start + len(own)] == own), 0)
            in_front, behind = ids[:first], ids[first + len(own) :]
            if behind:
                tokens = self._tokenizer.convert_ids_to_tokens(behind)
                self._note(row, f"the tokenizer puts {tokens} behind a text, which prompts are left without.")
            if in_front and in_front[-1] == bos == (own or [None])[0]:
                in_front.pop()
                self._note(
                    row, "the text begins with the token that the tokenizer puts in front of it: it is there once."
                )
            ids = in_front + own
        if any(values.get(name) for name in _TEMPLATE_COLUMNS):
            self._note(row, f"{' and '.join(_TEMPLATE_COLUMNS)} are of messages, and have no effect on text.")
        if self._tokenizer.chat_template is not None and self._special.isdisjoint(ids[1:]):
            self._note(
                row,
                "it is text, which is continued as it is, and the tokenizer has a chat template. Write messages "
                "(`[{'role': 'user', 'content': ...}]`) if the student was trained on conversations.",
            )
        return ids

    def _encode_messages(self, values: dict[str, Any], row: int) -> list[int]:
        messages = [
            {**_without_none(message), "content": self._content(message.get("content"))}
            for message in values[self._column]
        ]
        settings = {**self._template_kwargs, **self._of_template(values, "chat_template_kwargs", dict, row)}
        if tools := self._of_template(values, "tools", list, row):
            settings["tools"] = tools
        continues = messages[-1]["role"] == "assistant"
        if continues:
            self._note(row, "it ends with a message of the assistant. Leave that out if it is the answer.")
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                tokenize=True,
                return_dict=True,
                **settings,
            )["input_ids"]
        except Exception as error:  # templates raise what they like
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"The chat template cannot render row {row} of {self._what}: {first}") from error

    def _content(self, content: str | list[Any] | None) -> str | list[Any] | None:
        """The text of a message in the form that the template reads: it leaves out the other, or prints it."""
        if isinstance(content, list) and not self._takes_parts:
            return "\n".join(part if isinstance(part, str) else part.get("text") or "" for part in content)
        return [{"type": "text", "text": content}] if isinstance(content, str) and self._takes_parts else content

    def _of_template(self, values: dict[str, Any], name: str, kind: type, row: int) -> Any:
        """A column of the row that goes into the template, without the gaps that Arrow fills with `None`."""
        value = values.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                pass  # what it is instead is said below
        if not value:
            return kind()
        if not isinstance(value, kind):
            raise ConfigError(
                f"Row {row} of {self._what}: column `{name}` is {_shown(value)}, not a {kind.__name__}. Correct the "
                "row, or drop the column."
            )
        return _without_none(value)

    def _note(self, row: int, message: str) -> None:
        self._found.setdefault(message, []).append(row)


def _takes_parts(tokenizer: Any) -> bool:
    """Whether a chat template reads a text as a list of parts, as many with images do."""
    try:
        return "zebra" not in tokenizer.apply_chat_template([{"role": "user", "content": "zebra"}], tokenize=False)
    except Exception:  # no template, or one that wants more: it is said of the first row
        return False


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def shard_bounds(rows: int, per_shard: int) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of every shard."""
    for start in range(0, rows, per_shard):
        yield start, min(start + per_shard, rows)


def _digest(rows: Sequence[Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for ids in rows:
        digest.update(np.asarray([len(ids), *ids], dtype="<i8").tobytes())
    return digest.hexdigest()

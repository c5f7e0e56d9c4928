"""Names of models and data sets as a published card may show them: without folders of the machine that wrote it."""

import os
import re
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


# Of the Hub's cache: `.../models--org--name/snapshots/commit`
_SNAPSHOT = re.compile(r"(?:models|datasets)--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{7,64})[/\\]?$")
# An absolute path of at least two parts; not the inside of a word, a URL or a relative path
_END = r"\s|,;:()\"'`<>*"
_ABSOLUTE = re.compile(
    rf"(?<![\w/\\:.~-])(?:~|[A-Za-z]:)?[/\\](?:[^{_END}/\\]+[/\\])+(?P<last>[^{_END}/\\]*[^{_END}/\\.])[/\\]?"
)


class ShownName(NamedTuple):
    """
    Args:
        text (`str`): What a card shows, such as `"Qwen/Qwen3-8B"` or the last part of a folder's path.
        hub_id (`str` or `None`): Repository on the Hub, where the name is one.
        commit (`str` or `None`): Commit, where the name gives it.
    """

    text: str
    hub_id: str | None
    commit: str | None


def shown_name(name: str | os.PathLike[str] | None) -> ShownName:
    """
    What a card shows of a name or path.

    A path that is in this machine's Hub cache is the repository it was downloaded from. Anything that exists as a file
    or folder, or cannot be a repository, is shown as its last part.
    """
    name = os.fspath(name) if name else ""
    cached = _SNAPSHOT.search(name)
    if cached:
        hub_id = cached["id"].replace("--", "/")
        return ShownName(hub_id, hub_id, cached["commit"])
    if not name:
        return ShownName("", None, None)
    if _is_repo_id(name) and not os.path.exists(name):
        return ShownName(name, name, None)
    windows = PureWindowsPath(name).name if "\\" in name else ""
    return ShownName(windows or Path(name).name or Path(name).resolve().name, None, None)


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def without_paths(text: str, names: Iterable[str | None] = ()) -> str:
    """
    `text` with every absolute path as [`shown_name`] shows it, and every one of `names`, such as relative folders,
    which nothing in the text marks as paths.
    """
    for name in sorted({name for name in names if name and re.search(r"[/\\]", name)}, key=len, reverse=True):
        text = text.replace(name, shown_name(name).text)
    return _ABSOLUTE.sub(lambda match: match["last"], text)

"""Settings that decide what a step does, kept with each checkpoint so that a resumed run can be compared with it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from trl_blend._files import write_atomically


logger = get_logger(__name__)


def write_settings(path: Path, args: Any, names: Sequence[str], **state: Any) -> None:
    """Write the named settings of `args`, and any further state, as JSON."""
    content = {name: getattr(args, name) for name in names} | state
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, text.encode())


def read_settings(path: Path, args: Any, names: Sequence[str]) -> dict[str, Any] | None:
    """
    Read the file back; warn, with both values, of settings that differ now.

    Returns:
        `dict[str, Any]` or `None`: Content of the file; `None` if there is none, as in a checkpoint of the TRL parent.
    """
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in names:
        if name in content and content[name] != getattr(args, name):
            logger.warning(
                f"Resuming with `{name}={getattr(args, name)!r}`, but the checkpoint was trained with "
                f"`{name}={content[name]!r}`. The value given now is used from here on."
            )
    return content

"""What makes a folder decode a mixture, taken away before another model is saved there: only what is ours."""

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from trl_blend.errors import ConfigError
from trl_blend.export.model_files import ADAPTER_FILES, ADAPTER_FOLDER, AUTO_MAP, BASE_CONFIGS, GENERATE_FILE
from trl_blend.export.spec import SPEC_FILE, MixingSpec


_MARK = "The same file is in every export of `trl_blend`"
_COPIES = re.compile(r"(\.\./)?(reference(_\d+)?|base)")


def take_down(folder: Path) -> MixingSpec | None:
    """
    Remove `mixing.json`, this package's `custom_generate/generate.py` and what leads to it.

    Returns:
        [`MixingSpec`] or `None`: What `mixing.json` said, if there was one that can be read; for [`remove_unnamed`].
    """
    code = folder / GENERATE_FILE
    is_ours = code.is_file() and _MARK in code.read_text(encoding="utf-8", errors="replace")
    if not is_ours and not (folder / SPEC_FILE).is_file():
        return None
    try:
        spec = MixingSpec.read(folder)
    except (ConfigError, ValueError, TypeError, LookupError):
        spec = None
    (folder / SPEC_FILE).unlink(missing_ok=True)
    if is_ours:
        _remove(code.parent, [code.name])
    if spec is None or spec.adapter is None:
        _forget_code(folder / "config.json")
    else:
        _remove(folder, BASE_CONFIGS)
    if spec is not None and spec.adapter == ADAPTER_FOLDER:
        _remove(folder / ADAPTER_FOLDER, ADAPTER_FILES)
    return spec


def remove_unnamed(former: MixingSpec | None, folder: Path) -> None:
    """Remove the copies of models that `former`, once in `folder`, named, unless a `mixing.json` there still does."""
    for source in () if former is None else (*former.references, former.base):
        if source is None or source.path is None or not _COPIES.fullmatch(source.path):
            continue
        target = Path(os.path.normpath(folder.resolve() / source.path))
        named = re.compile(rf'"path":\s*"(\.\./)?{target.name}"')
        specs = [target.parent / SPEC_FILE, *target.parent.glob(f"checkpoint-*/{SPEC_FILE}")]
        if any(named.search(spec.read_text(encoding="utf-8")) for spec in specs if spec.is_file()):
            continue
        if not target.is_symlink():
            _remove(target, source.files)


def clear(folder: Path) -> None:
    """Both: nothing in `folder` mixes any more."""
    remove_unnamed(take_down(folder), folder)


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files of a folder, and the folder if nothing else is in it."""
    for name in names:
        if Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _forget_code(config: Path) -> None:
    """The opposite of [`model_files.point_config_at_code`]."""
    if not config.is_file():
        return
    content = json.loads(config.read_text(encoding="utf-8"))
    kept = {name: value for name, value in content.pop("auto_map", {}).items() if AUTO_MAP.get(name) != value}
    content |= {"auto_map": kept} if kept else {}
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

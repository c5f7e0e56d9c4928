"""What makes a folder decode a mixture, taken away before another model is saved there: only what is ours."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from trl_blend.export.model_files import ADAPTER_FILES, ADAPTER_FOLDER, GENERATE_FILE, unwrap_config
from trl_blend.export.spec import SPEC_FILE, MixingSpec, ModelSource


_MARK = "The same file is in every export of `trl_blend`"
_COPY = re.compile(r"reference(_\d+)?|base")


def clear(folder: Path, keep: Path | None = None) -> None:
    """
    Remove `mixing.json`, the copies that it names, our `generate.py`, and what leads to it in `config.json`. A copy in
    the folder `keep` stays.
    """
    code = folder / GENERATE_FILE
    is_ours = code.is_file() and _MARK in code.read_text(encoding="utf-8", errors="replace")
    for path in [*_copies(folder, keep), *([code] if is_ours else [])]:
        path.unlink(missing_ok=True)
        with suppress(OSError):
            path.parent.rmdir()  # unless something else is in it
    (folder / SPEC_FILE).unlink(missing_ok=True)
    unwrap_config(folder)


def _copies(folder: Path, keep: Path | None) -> Iterator[Path]:
    """Files that came with the `mixing.json` of a folder: copied models, an adapter and the settings of its base."""
    try:
        spec = MixingSpec.read(folder)
    except (ValueError, TypeError, LookupError):  # none, or one that cannot be read
        return
    if spec.adapter == ADAPTER_FOLDER:
        yield from (folder / ADAPTER_FOLDER / name for name in ADAPTER_FILES)
        # Those of the base: with them at the top, an adapter that is saved there would not be found
        yield from (folder / "config.json", folder / "generation_config.json")
    for source in (*spec.references, spec.base or ModelSource()):
        copy = source.path or ""
        if _COPY.fullmatch(copy) and not (folder / copy).is_symlink() and (folder / copy).resolve() != keep:
            yield from (folder / copy / name for name in source.files if name == Path(name).name)

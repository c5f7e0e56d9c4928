"""Dataset card of a store: what the Hub shows, and which files `load_dataset` reads."""

import os
from pathlib import Path
from typing import Any

from trl_blend._files import write_atomically
from trl_blend.rollouts.format import MANIFEST_NAME, Manifest


CARD_NAME = "README.md"

_MARK = "<!-- written by trl_blend; delete this line to keep your own text -->"
_HEADER = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
tags:
- trl_blend
- {kind}
---
"""
_USE = """
```python
from trl_blend import {function}

rollouts = {function}("path-or-repo")  # with the manifest
```

`datasets.load_dataset` opens the shards without it.
"""


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write `README.md`, unless there is one without the mark: then somebody has made it theirs."""
    path = folder / CARD_NAME
    text = _text(manifest)
    if path.exists():
        present = path.read_text(encoding="utf-8")
        if present == text or _MARK not in present:
            return
    write_atomically(path, text.encode())


def _text(manifest: Manifest) -> str:
    scored = manifest.kind == "scored_rollouts"
    state = "" if manifest.complete else " Not complete yet."
    rows = {
        "Student": _name(manifest.student),
        **({"Teacher": _name(manifest.teacher)} if scored else {}),
        "Rows": f"{manifest.num_rows:,}",
        "Completion tokens": f"{manifest.num_completion_tokens:,}",
        "Truncated rows": f"{manifest.num_truncated:,}",
        "Sampling": _settings(manifest.sampling),
        **({"Scoring": _settings(manifest.scoring)} if scored else {}),
        "Engine": _settings(manifest.engine),
        "Log-probs": manifest.logps_dtype,
        "Created": manifest.created_at,
    }
    what = "Student rollouts with the teacher's log-probs" if scored else "Student rollouts"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    about = (
        "Token ids and log-probs (nats), one row per completion. Checksums, settings and identities are in "
        f"`{MANIFEST_NAME}`.{state}"
    )
    return (
        f"{_HEADER.format(kind=manifest.kind)}\n{_MARK}\n\n# {what}\n\n{about}\n\n| | |\n|---|---|\n{table}\n"
        + _USE.format(function="load_scored_rollouts" if scored else "load_rollouts")
    )


def _name(identity: dict[str, Any] | None) -> str:
    name = (identity or {}).get("name")
    if not name:
        return "not recorded"
    # A card is published: no folders of the machine it was written on
    return f"`{os.path.basename(os.path.normpath(name)) if os.path.isabs(name) else name}`"


def _settings(values: dict[str, Any] | None) -> str:
    if not values:
        return "not recorded"
    return ", ".join(f"{name} = {value}" for name, value in values.items() if value is not None)

"""
The oldest releases that `pyproject.toml` allows, as pip constraints: `python tests/lower_bounds.py > constraints.txt`.

What the package runs on, the extras that the tests use included; development tools are taken as they are. Needs only
the standard library, because it runs before anything is installed.
"""

import re
import tomllib
from pathlib import Path


EXTRAS = ("peft", "wandb", "examples")
_BOUND = re.compile(r"(?P<name>[\w-]+)(\[[\w,]+\])?>=(?P<version>[\d.]+)")


def lower_bounds(project: dict) -> dict[str, str]:
    """Lower bound of each dependency."""
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    found = {line: _BOUND.match(line) for line in [*project["dependencies"], *extras]}
    without = [line for line, bound in found.items() if bound is None]
    if without:
        raise SystemExit(f"pyproject.toml gives no lower bound for {without}. Write one, such as 'numpy>=1.26'.")
    return {bound["name"]: bound["version"] for bound in found.values()}


if __name__ == "__main__":
    pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
    for name, version in lower_bounds(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]).items():
        print(f"{name}=={version}")

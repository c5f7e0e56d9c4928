"""
Files that ship with the package: the model card templates, and the examples with the test-bed.

In a wheel they are inside the package; in a checkout (an editable install) they are in folders beside it.
"""

from importlib.resources import files
from pathlib import Path


def _places(folder: str) -> tuple[Path, Path]:
    package_dir = Path(str(files("trl_blend")))
    return package_dir / folder, package_dir.parent / folder


def model_card_template(name: str) -> str:
    """
    Path of a model card template, as `huggingface_hub.ModelCard.from_template` takes it.

    Args:
        name (`str`):
            File name of the template, such as `"logit_mix_grpo.md"`.

    Returns:
        `str`: Absolute path of the template.

    Raises:
        `FileNotFoundError`: If no template has this name; the message lists those that exist.
    """
    directories = _places("model_cards")
    for directory in directories:
        path = directory / name
        if path.parent == directory and path.is_file():
            return str(path)
    # Those with a leading underscore are parts of the others
    found = {path.name for directory in directories if directory.is_dir() for path in directory.glob("[!_]*.md")}
    known = sorted(found)
    raise FileNotFoundError(
        f"no model card template name={name!r}; the package carries {known}. Pass one of these, or reinstall "
        "trl_blend if the list is empty."
    )


def examples_dir() -> Path:
    """
    Folder of the training scripts, with their settings files, the launch configurations and the test-bed.

    Raises:
        `FileNotFoundError`: If the installation lacks it.
    """
    for directory in _places("examples"):
        if (directory / "grpo_mix.py").is_file():
            return directory
    raise FileNotFoundError("The training scripts are missing from this installation. Reinstall trl_blend.")


def shipped_yaml(folder: str) -> dict[str, Path]:
    """
    YAML files of one folder of the examples, by name without suffix.

    Args:
        folder (`str`):
            `"configs"` (settings of the scripts) or `"accelerate_configs"`.
    """
    return {path.stem: path for path in sorted((examples_dir() / folder).glob("*.yaml"))}

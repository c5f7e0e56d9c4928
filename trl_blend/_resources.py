"""Files that ship with the package: the model card templates."""

from importlib.resources import files
from pathlib import Path


def _model_card_dirs() -> tuple[Path, Path]:
    package_dir = Path(str(files("trl_blend")))
    return package_dir / "model_cards", package_dir.parent / "model_cards"


def model_card_template(name: str) -> str:
    """
    Path of a model card template, as `huggingface_hub.ModelCard.from_template` takes it.

    In a wheel the templates are inside the package; in a checkout (an editable install) they are in `model_cards/`
    beside it.

    Args:
        name (`str`):
            File name of the template, such as `"logit_mix_grpo.md"`.

    Returns:
        `str`: Absolute path of the template.

    Raises:
        `FileNotFoundError`: If no template has this name; the message lists those that exist.
    """
    directories = _model_card_dirs()
    for directory in directories:
        path = directory / name
        if path.parent == directory and path.is_file():
            return str(path)
    known = sorted({path.name for directory in directories if directory.is_dir() for path in directory.glob("*.md")})
    raise FileNotFoundError(
        f"no model card template name={name!r}; the package carries {known}. Pass one of these, or reinstall "
        "trl_blend if the list is empty."
    )

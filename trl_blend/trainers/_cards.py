"""Model cards with a section of their own for each method."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from .. import __version__, _compat
from .._resources import model_card_template


@contextmanager
def method_card(template: str, **fields: Any) -> Iterator[str]:
    """
    Path of a card template with the method's fields filled in, for a trainer's `_template_file`.

    A template has two kinds of placeholders: `[[ field ]]` (and `[% if … %]`), filled in here, and TRL's own
    `{{ field }}`, which `create_model_card` fills in afterwards.

    Args:
        template (`str`):
            File name under `model_cards/`.
        **fields:
            Values of the method's placeholders. A missing one is an error.
    """
    environment = Environment(
        variable_start_string="[[",
        variable_end_string="]]",
        block_start_string="[%",
        block_end_string="%]",
        comment_start_string="[#",
        comment_end_string="#]",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    source = Path(model_card_template(template)).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / template
        path.write_text(environment.from_string(source).render(**fields), encoding="utf-8")
        yield str(path)


@contextmanager
def template_in_use(trainer: Any) -> Iterator[None]:
    """Let `create_model_card` of TRL read the trainer's template with its fields filled in."""
    fields = {"config": trainer.args, "version": __version__, **trainer.card_fields()}
    with method_card(trainer._template_name, **fields) as path:
        trainer._template_file = _compat.card_template(path)
        yield

"""The templates of `model_cards/`: their own placeholders `[[ field ]]` are filled in, TRL's `{{ field }}` left."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .._resources import model_card_template
from .card_names import shown_name, without_paths
from .cards import cell, code


_JINJA = re.compile(r"\{\{|\{%|\{#|\}\}|%\}|#\}")


def render(template: str, fields: Mapping[str, Any]) -> str:
    """
    A card template with the method's fields filled in, as `create_model_card` of TRL takes it.

    What is filled in is text to TRL, braces included, and shows no folders of this machine.

    Args:
        template (`str`):
            File name under `model_cards/`.
        fields (`Mapping[str, Any]`):
            Values of the placeholders. A missing one is an error. `local_names`, where given, lists names that
            [`without_paths`] hides in all of them.
    """
    path = Path(model_card_template(template))
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        variable_start_string="[[",
        variable_end_string="]]",
        block_start_string="[%",
        block_end_string="%]",
        comment_start_string="[#",
        comment_end_string="#]",
        undefined=StrictUndefined,
        finalize=_finalizer(fields.get("local_names", ())),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": cell, "code": code, "shown": lambda name: shown_name(name).text}
    return environment.get_template(path.name).render(**fields)


def _finalizer(names: Any) -> Callable[[Any], Any]:
    def finalize(value: Any) -> Any:
        if isinstance(value, StrictUndefined):
            return value
        return _JINJA.sub(lambda match: "{{ '" + match[0] + "' }}", without_paths(str(value), names))

    return finalize

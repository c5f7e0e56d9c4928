"""What every trainer of this package does around its training: callbacks, model card, pushes to the Hub."""

from typing import Any

from . import _cards, _pushing, _reporting


class RunMixin:
    """
    In front of the TRL class among a trainer's bases. A trainer sets `_template_name` and defines `card_fields`.

    The work is done by `_cards` (model cards), `_pushing` (the Hub) and `_reporting` (plot, progress).
    """

    _template_name: str

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        _reporting.add_callbacks(self)

    def card_fields(self) -> dict[str, Any]:
        """Values of the placeholders `[[ … ]]` of this trainer's card template, beside those common to all."""
        return {}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `README.md` from this trainer's template, see [`~transformers.Trainer.create_model_card`]."""
        with _cards.template_in_use(self):
            super().create_model_card(*args, **kwargs)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository, see [`~transformers.Trainer.init_hf_repo`]; what fails says what to do."""
        with _pushing.explained_errors(self):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Save and upload, see [`~transformers.Trainer.push_to_hub`]; what fails says what to do."""
        with _pushing.explained_errors(self):
            return super().push_to_hub(*args, **kwargs)

"""What every trainer of this package does around its training: callbacks, model card, pushes to the Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from trl_blend.export import former_export
from trl_blend.reports.curves import Panel
from trl_blend.trainers import _cards, _pushing, _reporting


class RunMixin:
    """
    In front of the TRL class among a trainer's bases. A trainer sets `_template_name` and `_panels` (what its plot and
    progress bar show, the method's own quantity first), and defines `card_fields`.

    The work is done by `_cards` (model cards), `_pushing` (the Hub) and `_reporting` (plot, progress).
    """

    card_results: Mapping[str, Any] | None = None
    """
    Scores before and after training for the model card, set by whoever measured them: `rewards` (their names),
    `prompts` (number of held-out prompts), `before` and `after` (per policy, a mean and a standard error for each
    reward); optionally `before_step` (optimizer step of `before`, if not 0), `decoding` (`"greedy"`), and for the
    model index `dataset` (id on the Hub), `split` and `policy`, the one that is published.
    """

    mixed_policy_files: Any = None
    """What is saved beside the model to decode it with its teachers, if anything."""

    _template_name: str
    _panels: tuple[Panel, ...]

    def __init__(self, *args: Any, **kwargs: Any):
        _pushing.prepare_repository(kwargs["args"])
        super().__init__(*args, **kwargs)
        _reporting.add_callbacks(self)

    def card_fields(self) -> dict[str, Any]:
        """
        What the model card says of this trainer's method.

        Returns:
            `dict[str, Any]`: For all templates `paper_name`, `paper` (per setting, what the paper does), `settings`
            (values of the run that are not in its configuration), `choices`, `teachers`, `sources` (what the model is
            made from, beside its base), `data_rows`, `data_unit`, `per_step`, `result_metrics` and `curves_text`;
            beside these the placeholders `[[ … ]]` of this trainer's own template.
        """
        raise NotImplementedError

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write `README.md` from this trainer's template, see [`~transformers.Trainer.create_model_card`]. A license or a
        language that somebody has set in the metadata of the present one is kept.
        """
        _cards.write_card(self, super().create_model_card, model_name, dataset_name, tags)

    def write_run_state(self, folder: Path) -> None:
        """Write what a checkpoint of this trainer holds beside its parent's. The main process calls it."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, see [`~transformers.Trainer.save_model`]. What an earlier run mixed there is removed."""
        if self.mixed_policy_files is None and self.args.should_save:
            former_export.clear(Path(output_dir or self.args.output_dir))
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.write_run_state(Path(self._get_output_dir(trial=trial), folder))

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository, see [`~transformers.Trainer.init_hf_repo`]; what fails says what to do."""
        with _pushing.explained_errors(self, kept=""):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Save and upload, see [`~transformers.Trainer.push_to_hub`].

        Raises:
            [`~trl_blend.errors.HubError`]:
                If the upload fails, with what to do. The model is saved in `output_dir` then, and the next push sends
                what is missing.
        """
        _pushing.create_repository_or_save(self, token, private)
        with _pushing.explained_errors(self, token=token):
            pushed = super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        _pushing.report_when_done(self, pushed)
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.should_save and self.args.hub_strategy != HubStrategy.END:
            self.write_run_state(Path(checkpoint_folder))  # before the upload of the folder starts
            _pushing.copy_beside_model(checkpoint_folder, self.args.output_dir)
            if self.mixed_policy_files is None:
                former_export.clear(Path(self.args.output_dir))
        _pushing.report_failed_pushes(self)
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        _pushing.report_failed_pushes(self, is_last=True)

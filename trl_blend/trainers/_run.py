"""What every trainer of this package does around its training: card, checkpoints, pushes to the Hub, callbacks."""

import inspect
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from trl import RichProgressCallback

from trl_blend import _compat
from trl_blend._version import __version__
from trl_blend.consistency.provenance import PROVENANCE_FILE
from trl_blend.errors import HubError
from trl_blend.export import former_export
from trl_blend.reports.curves import progress_text
from trl_blend.trainers._cards import CardMixin
from trl_blend.trainers._settings import guard_tokens


logger = get_logger(__name__)


class RunMixin(CardMixin):
    """
    In front of the TRL class among a trainer's bases. A trainer sets `_template_name` and `_panels` (what its plot and
    progress bar show, the method's own quantity first), and defines `card_fields`.
    """

    mixed_policy_files: Any = None
    """What is saved beside the model to decode it with its teachers, if anything."""

    def __init__(self, *args: Any, **kwargs: Any):
        guard_tokens(kwargs["args"])  # one may have been set since the config was made
        if kwargs["args"].push_to_hub:
            prepare_repository(kwargs["args"])
        super().__init__(*args, **kwargs)
        self.add_callback(MethodProgressCallback(self))
        self.add_callback(CurvesCallback(self))

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

    # Pushes to the Hub

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
        Save and upload, see [`~transformers.Trainer.push_to_hub`]. Where an upload fails, with an error of
        `huggingface_hub`, the model is saved in `output_dir`, and the next push sends what is missing.

        Raises:
            [`~trl_blend.errors.HubError`]: If a repository that `args.push_to_hub` did not announce cannot be created.
                The model is saved in `output_dir` then.
        """
        if self.hub_model_id is None and self.is_world_process_zero():
            try:
                self.init_hf_repo(token=token, private=private)
            except Exception as error:
                self.save_model(_internal_call=True)  # the other processes are saving in the parent's `push_to_hub`
                saved = f"The model is saved in output_dir={self.args.output_dir!r}."
                raise HubError(f"{_refusal(self.args, error)} {saved}") from error
        pushed = super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        if isinstance(pushed, Future):
            pushed.add_done_callback(_warn_if_failed)
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.should_save and self.args.hub_strategy != HubStrategy.END:
            self.write_run_state(Path(checkpoint_folder))  # before the upload of the folder starts
            record = Path(checkpoint_folder, PROVENANCE_FILE)
            if record.is_file():  # goes along with the model, which transformers copies
                shutil.copy(record, self.args.output_dir)
            if self.mixed_policy_files is None:
                former_export.clear(Path(self.args.output_dir))
        self._report_failed_pushes("Training goes on.")
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._report_failed_pushes("Call `trainer.push_to_hub()` to send what is missing.")

    def _report_failed_pushes(self, goes_on: str) -> None:
        """
        Warn, once, of each push that failed in the background.

        transformers keeps the exceptions of these pushes to itself. They are no reason to stop a run: each checkpoint
        is pushed in full, and everything is on the disk.
        """
        pushes = getattr(self, "push_in_progress", None)
        if pushes is None:
            return
        failed = [job for job in pushes.jobs if _error_of(job) is not None]
        pushes.jobs = [job for job in pushes.jobs if job not in failed]
        for job in failed:
            said = _words(_error_of(job))
            logger.warning(f"Step {self.state.global_step}: a push of a checkpoint has failed. {said} {goes_on}")


def prepare_repository(args: Any) -> None:
    """
    Create the repository of a run and see whether it may be written to: before a model is loaded.

    Raises:
        [`~trl_blend.errors.HubError`]: On every process, if the main one is refused.
    """
    refusal, cause = None, None
    if args.process_index == 0:
        try:
            api = HfApi(token=args.hub_token, library_name="trl_blend", library_version=__version__)
            repo_id = api.create_repo(_repository(args), private=args.hub_private_repo, exist_ok=True).repo_id
            _check_write(api, repo_id)
            if args.hub_revision is not None:
                api.model_info(repo_id, revision=args.hub_revision)
        except Exception as error:  # the others wait for the outcome, whatever it is
            refusal, cause = f"{_refusal(args, error)} Nothing has been trained yet.", error
    (refusal,) = broadcast_object_list([refusal])
    if refusal is not None:
        raise HubError(refusal) from cause


def _check_write(api: HfApi, repo_id: str) -> None:
    """The client takes a repository that exists for created, whoever it belongs to."""
    if "write" not in inspect.signature(api.auth_check).parameters:  # an older huggingface_hub
        return
    try:
        api.auth_check(repo_id, write=True)
    except RepositoryNotFoundError:
        raise
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):  # another status: a Hub that has no such check
            raise


def _repository(args: Any) -> str:
    """As [`~transformers.Trainer.init_hf_repo`] names it."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def _refusal(args: Any, error: Exception) -> str:
    return f"`hub_model_id={_repository(args)!r}` cannot be pushed to. {_words(error)}"


def _words(error: BaseException | None) -> str:
    """What the client of the Hub said, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}."


def _error_of(job: Future) -> BaseException | None:
    return job.exception() if job.done() and not job.cancelled() else None


def _warn_if_failed(job: Future) -> None:
    if _error_of(job) is not None:
        logger.warning(f"A push with `blocking=False` has failed. {_words(_error_of(job))}")


class CurvesCallback(TrainerCallback):
    """Draws the run when training ends, early or not."""

    def __init__(self, trainer: RunMixin):
        self.trainer = trainer

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.write_curves()


class MethodProgressCallback(TrainerCallback):
    """Shows the method's quantity, as last logged, on the training bar that another callback draws."""

    def __init__(self, trainer: RunMixin):
        self.trainer = trainer

    def on_log(self, args, state, control, logs=None, **kwargs):
        text = progress_text(logs or {}, self.trainer._panels)
        if not (text and state.is_world_process_zero):
            return
        for callback in self.trainer.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)  # there while training only
            if bar is None:
                continue
            if isinstance(callback, ProgressCallback):
                bar.set_postfix_str(text)
            elif isinstance(callback, RichProgressCallback):
                bar.update(callback.training_task, description=f"[blue]Training[/] {text}")


def default_config(config: type, model: str | PreTrainedModel) -> Any:
    """A config with the defaults, which names its output after the student and the method."""
    name = model if isinstance(model, str) else _compat.get_config_model_id(model.config)
    return config(f"{name.split('/')[-1]}-{config.__name__.removesuffix('Config')}")

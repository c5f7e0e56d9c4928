"""Pushing a run to the Hub: refused early, failed pushes reported, nothing lost."""

import inspect
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from trl_blend._version import __version__
from trl_blend.consistency.provenance import PROVENANCE_FILE
from trl_blend.errors import HubError
from trl_blend.models import hub_errors
from trl_blend.trainers._tokens import guard_tokens


logger = get_logger(__name__)


def prepare_repository(args: Any) -> None:
    """
    With `push_to_hub=True`, create the repository and see whether it may be written to: before a model is loaded.

    Raises:
        [`~trl_blend.errors.HubError`]: On every process, if the main one is refused.
    """
    guard_tokens(args)  # one may have been set since the config was made
    if not args.push_to_hub:
        return
    failure: Exception | None = None
    if args.process_index == 0:
        try:
            push = _push(args, kept="Nothing has been trained yet.")
            with hub_errors.explained_errors(push._replace(again="Start again later, or without `push_to_hub`.")):
                _create(args)
        except Exception as error:  # the others wait for the outcome, whatever it is
            failure = error
    messages = broadcast_object_list([failure and str(failure)])
    if failure is not None:
        raise failure
    if messages[0] is not None:
        raise HubError(messages[0])


def create_repository_or_save(trainer: Any, token: str | None, private: bool | None) -> None:
    """The first step of a push that `args.push_to_hub` did not announce; where it fails, the model is saved."""
    if trainer.hub_model_id is not None or not trainer.is_world_process_zero():
        return
    try:
        trainer.init_hf_repo(token=token, private=private)
    except HubError as error:
        trainer.save_model(_internal_call=True)  # the other processes are saving in the parent's `push_to_hub`
        raise HubError(f"{error} {_saved(trainer.args)}") from error.__cause__


@contextmanager
def explained_errors(trainer: Any, **push: Any) -> Iterator[None]:
    """Raise errors of the Hub's client as [`~trl_blend.errors.HubError`] that say what to do."""
    with hub_errors.explained_errors(_push(trainer.args, trainer.hub_model_id, **push)):
        yield


def report_failed_pushes(trainer: Any, is_last: bool = False) -> None:
    """
    Warn, once, of each push that failed in the background.

    transformers keeps the exceptions of these pushes to itself. They are no reason to stop a run: each checkpoint is
    pushed in full, and everything is on the disk.
    """
    pushes = getattr(trainer, "push_in_progress", None)
    if pushes is None:
        return
    failed = [job for job in pushes.jobs if _error_of(job) is not None]
    pushes.jobs = [job for job in pushes.jobs if job not in failed]
    goes_on = "Call `trainer.push_to_hub()` to send what is missing." if is_last else "Training goes on."
    for message in dict.fromkeys(_explanation(trainer, job) for job in failed):
        logger.warning(f"Step {trainer.state.global_step}: a push of a checkpoint has failed. {message} {goes_on}")


def report_when_done(trainer: Any, job: Any) -> None:
    """Warn if a push that nobody waits for (`blocking=False`) fails."""

    def report(job: Future) -> None:
        if _error_of(job) is not None:
            logger.warning(f"A push with `blocking=False` has failed. {_explanation(trainer, job)}")

    if isinstance(job, Future):
        job.add_done_callback(report)


def copy_beside_model(checkpoint: str, output_dir: str) -> None:
    """Take the record of the SFT teacher from a checkpoint to `output_dir`, as transformers does with the model."""
    source = Path(checkpoint, PROVENANCE_FILE)
    if source.is_file():
        shutil.copy(source, output_dir)


def _push(args: Any, repo_id: str | None = None, token: str | None = None, kept: str | None = None) -> hub_errors.Push:
    kept = _saved(args) if kept is None else kept
    return hub_errors.Push(repo_id or _name(args), "hub_model_id", "hub_token", token or args.hub_token, kept)


def _saved(args: Any) -> str:
    return f"The model is saved in output_dir={args.output_dir!r}."


def _name(args: Any) -> str:
    """As [`~transformers.Trainer.init_hf_repo`] names it."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def _create(args: Any) -> None:
    api = HfApi(token=args.hub_token, library_name="trl_blend", library_version=__version__)
    repo_id = api.create_repo(_name(args), private=args.hub_private_repo, exist_ok=True).repo_id
    _check_write(api, repo_id)
    if args.hub_revision is not None:
        api.model_info(repo_id, revision=args.hub_revision)


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


def _error_of(job: Future) -> BaseException | None:
    return job.exception() if job.done() and not job.cancelled() else None


def _explanation(trainer: Any, job: Future) -> str:
    error = _error_of(job)
    assert error is not None
    explained = hub_errors.explanation(error, _push(trainer.args, trainer.hub_model_id))
    return explained or f"Pushing to {trainer.hub_model_id!r} failed: {type(error).__name__}: {error}."

"""What the client of the Hub complains about, and what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from trl_blend.errors import HubError


_SETTINGS = "https://huggingface.co/settings/tokens"
_LATER = "Push again: files that have arrived are not sent a second time."


class Push(NamedTuple):
    """
    What is pushed where, in the words of the caller's arguments.

    Args:
        repo_id (`str`):
            Name of the repository, as it was given.
        repo_argument, token_argument (`str`):
            Arguments that name the repository and the token.
        token (`str`, *optional*):
            Token that was given; otherwise the client looks for one.
        kept (`str`, *optional*, defaults to `""`):
            Sentence that says where the files are meanwhile.
        again (`str`, *optional*):
            Sentence that says how to go on when the Hub answers again. By default, to push again.
    """

    repo_id: str
    repo_argument: str
    token_argument: str
    token: str | None = None
    kept: str = ""
    again: str = _LATER


@contextmanager
def explained_errors(push: Push) -> Iterator[None]:
    """
    Raise what the client of the Hub raises inside the context as a [`~trl_blend.errors.HubError`] that says what to
    do, with the client's error as its cause. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        message = explanation(error, push)
        if message is None:
            raise
        raise HubError(message) from error


def explanation(error: BaseException, push: Push) -> str | None:
    """One line: what failed, the client's own words, what to do; `None` for an error that is not the client's."""
    if isinstance(error, HubError):
        return None
    cause = _of_client(error)
    if cause is None:
        return None
    words = " ".join(_words(cause).split()).rstrip(".")
    return " ".join(f"Pushing to {push.repo_id!r} failed: {words}. {_advice(cause, push)} {push.kept}".split())


def _of_client(error: BaseException) -> BaseException | None:
    from huggingface_hub import errors

    http_error = errors.HTTPError  # type: ignore[attr-defined]  # of httpx, or of httpx2 in newer versions
    known = (http_error, errors.HFValidationError, errors.LocalTokenNotFoundError, errors.OfflineModeIsEnabled)
    # A thread that uploads wraps what it met; a card is checked with a bare `ValueError`
    while isinstance(error, RuntimeError) and "to the Hub" in str(error) and error.__cause__ is not None:
        error = error.__cause__
    is_card = isinstance(error, ValueError) and str(error).startswith("Invalid metadata in README.md")
    # What `hf_xet`, which uploads where it is installed, makes of a refusal or a fault
    is_network = isinstance(error, ConnectionError | TimeoutError) and not isinstance(error, BrokenPipeError)
    is_network = is_network or type(error).__module__.startswith("hf_xet")
    return error if isinstance(error, known) or is_card or is_network else None


def _words(error: BaseException) -> str:
    """The Hub's message where it sent one: the client's goes on with addresses and request ids."""
    status = _status(error)
    said = getattr(error, "server_message", None)
    text = said or str(error).strip() or type(error).__name__
    return text if status is None or not said else f"{status}, {text}"


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _advice(error: BaseException, push: Push) -> str:
    from huggingface_hub import errors, get_token

    status = _status(error)
    has_token = push.token is not None or get_token() is not None
    may_write = f"a token with write permission ({_SETTINGS})"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "Offline mode is on: unset `HF_HUB_OFFLINE`, or do not push now."
    if isinstance(error, errors.LocalTokenNotFoundError) or (status == 401 and not has_token):
        return f"No token was found: log in with `hf auth login`, or set `HF_TOKEN`, with {may_write}."
    if status == 401:
        return (
            f"The Hub does not accept the token: log in again with `hf auth login --force`, with {may_write}; "
            f"`{push.token_argument}` and the variable `HF_TOKEN` go before the saved login."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"Create the branch first: `hf repos branch create {push.repo_id} <branch>`."
    if status == 403 or isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"Use {may_write} for the owner of this repository, or name a repository of your own with "
            f"`{push.repo_argument}`."
        )
    if isinstance(error, errors.HFValidationError):
        return (
            f"`{push.repo_argument}` must be a name, or an owner and a name as in `me/my-model`, of letters, digits, "
            "'-', '_' and '.', at most 96 characters."
        )
    if status is None and isinstance(error, ValueError):
        return "Correct what the card's first lines say: it comes from the arguments of `push_to_hub`."
    if status in (408, 429) or (status or 0) >= 500:
        return f"The Hub is busy or has a fault (https://status.huggingface.co). {push.again}"
    if status is None:
        return f"Check the network and `HF_ENDPOINT`. {push.again}"
    return f"Check `{push.repo_argument}` and the limits of your account. {push.again}"

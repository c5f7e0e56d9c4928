"""`trl-blend export`: a mixed policy as a folder, or repository, that runs without this package."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl_blend.errors import HubError
from trl_blend.scripts.messages import tell


RENAMED = {
    "student": "model_name_or_path",
    "reference": "teacher_model_name_or_path",
    "student_revision": "model_revision",
    "reference_revision": "teacher_model_revision",
}


def add_command(command: Callable[..., Any]) -> None:
    """Add the command to the command line."""
    add = command(
        "export", run, "write a student and its teacher as one model that transformers decodes", RENAMED
    ).add_argument
    add("--model_name_or_path", required=True, help="student: a model, an adapter or a checkpoint of grpo-mix")
    add(
        "--teacher_model_name_or_path",
        nargs="+",
        metavar="NAME",
        help="teacher(s) that it is decoded with (default: those of the checkpoint, else the adapter's base)",
    )
    add("--teacher_weight", type=float, nargs="+", help="weight of each teacher (default: that of the checkpoint)")
    add("--output_dir", required=True, help="folder to write to")
    spaces = ("logits", "probs", "arithmetic")
    add("--mixing_space", choices=spaces, help="what is mixed (default: the checkpoint's, else logits)")
    add("--model_revision", help="branch, tag or commit of the student on the Hub")
    add("--teacher_model_revision", help="branch, tag or commit of the teacher on the Hub")
    add("--copy_reference", action="store_true", default=None, help="write the teacher's weights too, of a Hub id")
    add("--no_copy_reference", action="store_false", dest="copy_reference", help="only name the teacher")
    add("--trust_remote_code", action="store_true", help="run code that comes with the checkpoints")
    add("--push_to_hub", metavar="REPOSITORY", help="repository to push the folder to")
    add("--private", action="store_true", help="make that repository private if it is new")


def run(push_to_hub: str | None, private: bool, **options: Any) -> int:
    """Export, and push on request."""
    from trl_blend.export.mixed_policy import export_mixed_policy

    arguments = {option: argument for argument, option in RENAMED.items()}
    folder = export_mixed_policy(**{arguments.get(name, name): value for name, value in options.items()})
    tell(f"Mixed policy written to {folder}.")
    if push_to_hub:
        tell(f"Pushed: {_push(folder, push_to_hub, private)}")
    return 0


def _push(folder: Path, repository: str, private: bool) -> str:
    """Push a folder as a model; returns the address of the commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        api = HfApi()
        name = api.create_repo(repository, private=private or None, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload mixed policy"))
    except (HTTPError, HFValidationError, OSError) as error:
        again = f"`hf upload {repository} {shlex.quote(str(folder))}` sends it"
        raise HubError(f"{error} The mixed policy is in {str(folder)!r}: {again}.") from error

"""The commands of offline distillation: `rollouts`, `score`, `inspect` and `record-teacher`."""

import argparse
import json
from collections.abc import Callable, Sequence
from pkgutil import resolve_name
from typing import Any

from trl_blend.cli import options
from trl_blend.errors import ConfigError, TrlBlendError
from trl_blend.scripts import settings
from trl_blend.scripts.messages import EXIT_FAILED, check_options, name_options, say, tell


# Commands whose options are the fields of a configuration: where that is, and the function that takes it
COMMANDS = {
    "rollouts": (
        "trl_blend.rollouts.config:RolloutConfig",
        "trl_blend.rollouts.collect:collect_rollouts",
        "sample completions of a student, with log-probs; resumable",
    ),
    "score": (
        "trl_blend.rollouts.config:ScoringConfig",
        "trl_blend.rollouts.score:score_rollouts",
        "give every token of rollouts a teacher's log-prob; resumable",
    ),
}


def run(name: str, arguments: Sequence[str]) -> int:
    """Run one of [`COMMANDS`]."""
    config, function, summary = COMMANDS[name]
    program, fields = f"trl-blend {name}", options.read_options([config])
    if {"-h", "--help"} & set(arguments):
        print(options.format_help(fields, program, summary))
        return 0
    check_options(arguments, options.spellings(fields) | {"config"}, program)  # before importing TRL
    try:
        parser = settings.make_parser([config], prog=program)
        (args,) = settings.parse_script(parser, arguments, launched=False)
        if args.disable_tqdm:
            _silence_bars()
        store = resolve_name(function)(args=args)
    except TrlBlendError as error:
        raise ConfigError(name_options(str(error), fields, {})) from error
    tell(
        f"{len(store):,} {store.manifest.kind.replace('_', ' ')} with {store.manifest.num_completion_tokens:,} tokens "
        f"in {store.name} ({store.bytes_per_token:.1f} bytes per token). Look at them with `trl-blend inspect "
        f"{store.name}`."
    )
    return 0


def _silence_bars() -> None:
    """The bars of what we are built on; they are not turned back on, for this process is ours."""
    import datasets
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the other commands to the command line."""
    teacher = {"teacher": "teacher_model_name_or_path", "revision": "teacher_model_revision"}
    summary = "say what is in a store, who made it, and whether it is consistent"
    add = command("inspect", _inspect, summary).add_argument
    add("store", help="folder or dataset repository")
    add("--revision", help="revision of the repository")
    add("--model_name_or_path", help="student that is to be trained: compares weights and provenance too")
    add("--model_revision", help="revision of the student on the Hub")
    add("--teacher_model_name_or_path", help="live teacher: scores some rows again")
    add("--teacher_model_revision", help="revision of the teacher on the Hub")
    add("--sft_teacher", help="teacher of the student's fine-tuning, stated by you")
    add("--rescore_num_rows", type=int, default=64, help="rows to score again (default: 64)")
    add("--verify", action="store_true", help="compare every checksum and check every row")
    add("--json", action="store_true", dest="as_json", help="print JSON")

    summary, renamed = "write down whose samples a student was fine-tuned on", {"model": "model_name_or_path"}
    add = command("record-teacher", _record_teacher, summary, renamed | teacher).add_argument
    add("--model_name_or_path", required=True, help="folder of the student's checkpoint")
    add("--teacher_model_name_or_path", required=True, help="teacher whose samples it was fine-tuned on")
    add("--teacher_model_revision", help="revision of the teacher on the Hub")
    add("--note", default="", help="free text, such as where the samples are")
    add("--overwrite", action="store_true", help="replace the record of another teacher")
    add("--add", action="store_true", help="keep the recorded teachers: the data were split between them")
    add("--route", nargs="+", help="what its rows have in the column `route`: they are compared with this teacher")


# What `inspect` compares scored rollouts with
_SCORED_ONLY = ("model_name_or_path", "teacher_model_name_or_path", "sft_teacher")


def _inspect(store: str, as_json: bool, **options: Any) -> int:
    from trl_blend.consistency.inspection import inspect_store

    inspection = inspect_store(store, **options)
    ignored = [name for name in _SCORED_ONLY if options[name] is not None and inspection.report is None]
    if ignored:
        say(f"note: {store} is not scored yet, so {', '.join(f'--{name}' for name in ignored)} was not compared.")
    tell(json.dumps(inspection.to_dict(), indent=2) if as_json else str(inspection))
    return 0 if inspection.ok else EXIT_FAILED


def _record_teacher(
    model_name_or_path: str, teacher_model_name_or_path: str, teacher_model_revision: str | None, **options: Any
) -> int:
    from trl_blend.consistency.provenance import record_teacher

    provenance = record_teacher(
        model_name_or_path, teacher_model_name_or_path, revision=teacher_model_revision, **options
    )
    described = [
        teacher.describe() + (f" (route {', '.join(routes)})" if routes else "")
        for teacher, routes in provenance.routes_of_teachers
    ]
    teachers = " and ".join(described)
    tell(f"Recorded {teachers} as the SFT teacher{'s' if provenance.others else ''} of {model_name_or_path}.")
    return 0

"""
`trl-blend`: the command line of offline distillation.

A command is a table of options and a function that hands them to the Python call of the same name. What a user can get
wrong is said in one line, with exit code 2; nothing heavy is imported before a command runs.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from trl_blend import __version__
from trl_blend.errors import ConfigError, TrlBlendError


EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """One line per error; the options are in `--help`."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"{self.prog}: error: {message} (see `{self.prog} --help`)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        arguments (`Sequence[str]`, *optional*):
            Arguments of the command line, those of this process by default.

    Returns:
        `int`: 0; 1 if `inspect` finds the data inconsistent; 2 for an error of the user; 130 after Ctrl-C.
    """
    try:
        options = vars(
            _build_parser().parse_args(_with_config(list(sys.argv[1:] if arguments is None else arguments)))
        )
        run: Callable[..., int] = options.pop("run")
        options.pop("config", None)
        return run(**options)
    except KeyboardInterrupt:
        _say("Interrupted. What is written is kept: run the same command again to go on.")
        return EXIT_INTERRUPTED
    except (TrlBlendError, FileNotFoundError, PermissionError, NotADirectoryError) as error:
        _say(f"error: {' '.join(str(error).split())}")
        return EXIT_USER_ERROR
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _say(
            "error: Out of memory on the accelerator. Lower --batch_size (rollouts; starts a new store) or "
            f"--tokens_per_batch (scores), or set --dtype bfloat16. ({str(error).splitlines()[0]})"
        )
        return EXIT_USER_ERROR


def _say(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"trl-blend{'' if rank == '0' else f' (process {rank})'}: {message}", file=sys.stderr, flush=True)


def _print(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(message)


def _with_config(arguments: list[str]) -> list[str]:
    """The settings of `--config file.yaml` as options in front of the others, which so override them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    file = parser.parse_known_args(arguments)[0].config
    if file is None:
        return arguments
    import yaml

    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"`--config {file}` is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"`--config {file}` has to hold `option: value` lines.")
    added: list[str] = []
    for name, value in settings.items():
        if value is True:
            added.append(f"--{name}")
        elif value not in (None, False):
            added.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return [*arguments[:1], *added, *arguments[1:]]


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="trl-blend", description="Offline distillation: rollouts, teacher scores, consistency.")
    parser.add_argument("--version", action="version", version=f"trl_blend {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[..., int], summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        added.set_defaults(run=run)
        added.add_argument("--config", metavar="FILE", help="YAML file of options; those on the command line win")
        return added

    _add_rollouts(command("rollouts", _rollouts, "sample completions of a student, with their log-probs; resumable"))
    _add_score(command("score", _score, "give every token of rollouts a teacher's log-prob; resumable"))
    _add_inspect(command("inspect", _inspect, "say what is in a store, who made it, and whether it is consistent"))
    _add_record(command("record-teacher", _record_teacher, "write down whose samples a student was fine-tuned on"))
    return parser


def _add_rollouts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="student: folder or Hub id")
    add("--dataset_name", required=True, help="prompts: .json, .jsonl, .parquet or .csv file, folder, or Hub id")
    add("--output_dir", required=True, help="folder of the store")
    add("--dataset_config", help="configuration of a dataset on the Hub")
    add("--dataset_train_split", default="train", help="split of the dataset (default: train)")
    add("--prompt_column", default="prompt", help="column of the prompts (default: prompt)")
    add("--temperature", type=float, default=0.7, help="sampling temperature (default: 0.7)")
    add("--top_p", type=float, default=0.9, help="mass of the nucleus (default: 0.9)")
    add("--top_k", type=int, default=0, help="number of tokens to sample from, 0 for all (default: 0)")
    add("--min_p", type=float, help="smallest probability relative to the most probable token")
    add("--max_new_tokens", type=int, default=4096, help="length limit of a completion (default: 4096)")
    add("--num_rollouts_per_prompt", type=int, default=1, help="completions per prompt (default: 1)")
    add("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    add(
        "--batch_size",
        type=int,
        default=32,
        help="completions drawn at once by transformers; decides the draws, so a store is continued with the same "
        "one (default: 32)",
    )
    add("--rows_per_shard", type=int, default=256, help="rows of a file, what a kill can cost (default: 256)")
    add("--logps_dtype", default="float16", help="float16 or float32, as stored (default: float16)")
    add("--chat_template_kwargs", type=_json_object, metavar="JSON", help="arguments of the chat template")
    add("--use_vllm", action="store_true", help="sample with a vLLM engine in this process")
    add("--vllm_kwargs", type=_json_object, metavar="JSON", help="arguments of vllm.LLM, '{\"max_model_len\": 8192}'")
    _add_loading(parser, "model_revision")
    _add_running(parser)


def _add_score(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--teacher_model_name_or_path", required=True, help="teacher: folder or Hub id")
    add("--rollouts", required=True, help="output of `trl-blend rollouts`, or a dataset repository")
    add("--output_dir", required=True, help="folder of the new store")
    add("--rollouts_revision", help="revision of the rollouts on the Hub")
    add("--top_k", type=int, help="teacher tokens to keep per position (default: the sampled one only)")
    add("--tokens_per_batch", type=int, default=16384, help="padded tokens of a forward pass (default: 16384)")
    add("--logps_dtype", help="float16 or float32, as stored (default: that of the rollouts)")
    _add_loading(parser, "teacher_model_revision")
    _add_running(parser)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
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


def _add_record(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="folder of the student's checkpoint")
    add("--teacher_model_name_or_path", required=True, help="teacher whose samples it was fine-tuned on")
    add("--teacher_model_revision", help="revision of the teacher on the Hub")
    add("--note", default="", help="free text, such as where the samples are")
    add("--overwrite", action="store_true", help="replace the record of another teacher")


def _add_loading(parser: argparse.ArgumentParser, revision: str) -> None:
    add = parser.add_argument
    add(f"--{revision}", help="branch, tag or commit of the model on the Hub")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32 (default: auto, the checkpoint's)")
    add("--load_in_4bit", action="store_true", help="quantize the weights with bitsandbytes")
    add("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")
    add("--vllm_server_url", metavar="URL", help="use a running vLLM server of the model, such as http://host:8000")
    add("--vllm_concurrency", type=int, default=64, help="requests at once (default: 64)")


def _add_running(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--no_identify", action="store_false", dest="identify", help="do not record which model it is")
    add("--repair", action="store_true", help="verify what is there and redo what is bad")
    add("--quiet", action="store_false", dest="show_progress", help="no progress bar")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _rollouts(
    model_name_or_path: str, dataset_name: str, output_dir: str, dataset_train_split: str, **options: Any
) -> int:
    from trl_blend.teacher.rollouts import collect_rollouts

    store = collect_rollouts(
        model_name_or_path, dataset_name, output_dir, dataset_split=dataset_train_split, **options
    )
    _print(_finished(store, "rollouts"))
    return 0


def _score(teacher_model_name_or_path: str, rollouts: str, output_dir: str, **options: Any) -> int:
    from trl_blend.teacher.scoring import score_rollouts

    store = score_rollouts(rollouts, teacher_model_name_or_path, output_dir, **options)
    _print(_finished(store, "scored rollouts"))
    return 0


def _finished(store: Any, what: str) -> str:
    tokens = store.manifest.num_completion_tokens
    return (
        f"{len(store):,} {what} with {tokens:,} tokens in {store.name} ({store.bytes_per_token:.1f} bytes per token). "
        f"Look at them with `trl-blend inspect {store.name}`."
    )


def _inspect(store: str, as_json: bool, **options: Any) -> int:
    from trl_blend.teacher.inspection import inspect_store

    inspection = inspect_store(store, **options)
    _print(json.dumps(inspection.to_dict(), indent=2) if as_json else str(inspection))
    return 0 if inspection.ok else EXIT_FAILED


def _record_teacher(
    model_name_or_path: str, teacher_model_name_or_path: str, teacher_model_revision: str | None, **options: Any
) -> int:
    from trl_blend.teacher.provenance import record_teacher

    provenance = record_teacher(
        model_name_or_path, teacher_model_name_or_path, revision=teacher_model_revision, **options
    )
    _print(f"Recorded {provenance.teacher.describe()} as the SFT teacher of {model_name_or_path}.")
    return 0

"""The commands of offline distillation: tables of options, and functions that hand them to the Python call."""

import argparse
import json
from collections.abc import Callable
from typing import Any

from trl_blend.scripts.messages import EXIT_FAILED, say, tell


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands to the command line."""
    student = {"model": "model_name_or_path", "revision": "model_revision"}
    teacher = {"teacher": "teacher_model_name_or_path", "revision": "teacher_model_revision"}
    prompts = {"prompts": "dataset_name", "dataset_split": "dataset_train_split"}
    _add_rollouts(
        command("rollouts", _rollouts, "sample completions of a student, with log-probs; resumable", student | prompts)
    )
    _add_score(command("score", _score, "give every token of rollouts a teacher's log-prob; resumable", teacher))
    _add_inspect(command("inspect", _inspect, "say what is in a store, who made it, and whether it is consistent"))
    _add_record(
        command(
            "record-teacher",
            _record_teacher,
            "write down whose samples a student was fine-tuned on",
            {"model": "model_name_or_path"} | teacher,
        )
    )


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
    add("--quiet", action="store_false", dest="show_progress", help="no progress bars")


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
    from trl_blend.rollouts.collect import collect_rollouts

    _silence_bars(not options["show_progress"])
    store = collect_rollouts(
        model_name_or_path, dataset_name, output_dir, dataset_split=dataset_train_split, **options
    )
    tell(_finished(store, "rollouts"))
    return 0


def _score(teacher_model_name_or_path: str, rollouts: str, output_dir: str, **options: Any) -> int:
    from trl_blend.rollouts.score import score_rollouts

    _silence_bars(not options["show_progress"])
    store = score_rollouts(rollouts, teacher_model_name_or_path, output_dir, **options)
    tell(_finished(store, "scored rollouts"))
    return 0


def _silence_bars(quiet: bool) -> None:
    """The bars of what we are built on; they are not turned back on, for this process is ours."""
    if not quiet:
        return
    import datasets
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()


def _finished(store: Any, what: str) -> str:
    tokens = store.manifest.num_completion_tokens
    return (
        f"{len(store):,} {what} with {tokens:,} tokens in {store.name} ({store.bytes_per_token:.1f} bytes per token). "
        f"Look at them with `trl-blend inspect {store.name}`."
    )


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
    tell(f"Recorded {provenance.teacher.describe()} as the SFT teacher of {model_name_or_path}.")
    return 0

"""
Log-probabilities of a teacher for rollouts that exist, computed once. Killed at any point and started again, the
result is the same row for row.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
from accelerate import PartialState
from transformers import PreTrainedModel

from trl_blend.errors import ConfigError, TokenizerMismatchError
from trl_blend.models.loading import LoadOptions, check_not_loaded, find_config, load_model
from trl_blend.rollouts import processes
from trl_blend.rollouts.engines.base import OnRows
from trl_blend.rollouts.engines.local import TokenScores, score_sequences
from trl_blend.rollouts.engines.vllm_server import VllmServer
from trl_blend.rollouts.format import Manifest
from trl_blend.rollouts.progress import Progress
from trl_blend.rollouts.ragged import to_rows
from trl_blend.rollouts.shard import read_record
from trl_blend.rollouts.store import RolloutStore, load_rollouts


class ScoringEngine(Protocol):
    """Scores the rows of a shard, in order."""

    def score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        top_k: int | None,
        on_rows: OnRows,
    ) -> list[TokenScores]: ...


@dataclass
class LocalScoringEngine:
    """
    Scores with a model in this process, see [`~trl_blend.rollouts.engines.local.score_sequences`].

    Args:
        model ([`~transformers.PreTrainedModel`] or `peft.PeftModel`):
            The teacher.
        tokens_per_batch (`int`):
            Budget of one forward pass.
    """

    model: PreTrainedModel
    tokens_per_batch: int

    def score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        top_k: int | None,
        on_rows: OnRows,
    ) -> list[TokenScores]:
        budget = self.tokens_per_batch
        return score_sequences(
            self.model, prompt_ids, completion_ids, top_k=top_k, tokens_per_batch=budget, on_rows=on_rows
        )


def score_rollouts(
    rollouts: str | os.PathLike[str] | RolloutStore,
    teacher: str | PreTrainedModel,
    output_dir: str | os.PathLike[str],
    *,
    top_k: int | None = None,
    tokens_per_batch: int = 16384,
    logps_dtype: str | None = None,
    rollouts_revision: str | None = None,
    teacher_model_revision: str | None = None,
    dtype: str = "auto",
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
    vllm_server_url: str | None = None,
    vllm_concurrency: int = 64,
    identify: bool = True,
    repair: bool = False,
    show_progress: bool = True,
) -> RolloutStore:
    """
    Give every token of a store of rollouts the teacher's log-probability, and write both as a new store.

    Scores are at temperature 1 over the teacher's whole vocabulary, whatever the rollouts were sampled with: that is
    what the loss compares, and vLLM's `prompt_logprobs` ignore temperature anyway. The rows and their order are those
    of the rollouts, shard for shard. The same command started again goes on where it stopped; under
    `accelerate launch` or `torchrun` the shards are split over the processes, each with the whole teacher.

    Args:
        rollouts (`str` or [`~trl_blend.rollouts.store.RolloutStore`]):
            Output of [`~trl_blend.rollouts.collect.collect_rollouts`], or a dataset repository on the Hub.
        teacher (`str`, [`~transformers.PreTrainedModel`] or `peft.PeftModel`):
            The teacher: folder, Hub id or model.
        output_dir (`str` or `os.PathLike`):
            Folder of the new store: new, empty, or begun by the same call.
        top_k (`int`, *optional*):
            Number of teacher tokens to keep at every position, with the mass of the rest; the sampled token is always
            one of them. Only the sampled token is scored by default.
        tokens_per_batch (`int`, *optional*, defaults to `16384`):
            Padded tokens of one forward pass. Changes nothing but rounding, and may change when scoring is continued.
        logps_dtype (`str`, *optional*):
            `"float16"` or `"float32"`, for all log-probabilities of the new store; by default that of the rollouts.
        rollouts_revision (`str`, *optional*):
            Branch, tag or commit of the rollouts on the Hub.
        teacher_model_revision, dtype, load_in_4bit, trust_remote_code:
            How to load the teacher, see [`~trl_blend.models.loading.LoadOptions`].
        vllm_server_url (`str`, *optional*):
            Root URL of a running vLLM server of `teacher`, which then only has to be readable for its identity.
        vllm_concurrency (`int`, *optional*, defaults to `64`):
            Requests at once.
        identify (`bool`, *optional*, defaults to `True`):
            Whether to record which model it is (its weights are read once). Without, the teacher's consistency cannot
            be verified.
        repair (`bool`, *optional*, defaults to `False`):
            Whether to verify what is there and redo what is bad.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether the main process shows a progress bar.

    Returns:
        [`~trl_blend.rollouts.store.RolloutStore`]: The finished store.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a setting is out of range, contradicts another, or differs from those
            that the store was begun with. Raised before the teacher is loaded, as is the next.
        [`~trl_blend.errors.TokenizerMismatchError`]: If the teacher's tokens are known not to be the student's.
        [`~trl_blend.errors.StoreError`]: If a store is broken, being written by another process, or the disk full.
        [`~trl_blend.errors.UnsupportedError`]: If the teacher is no decoder-only language model.
    """
    load = LoadOptions(teacher_model_revision, dtype, load_in_4bit, trust_remote_code)
    check_not_loaded(teacher, "teacher", load)
    source = rollouts if isinstance(rollouts, RolloutStore) else load_rollouts(rollouts, revision=rollouts_revision)
    logps_dtype = source.manifest.logps_dtype if logps_dtype is None else logps_dtype
    processes.check_numbers(logps_dtype, tokens_per_batch=tokens_per_batch, vllm_concurrency=vllm_concurrency)
    if vllm_server_url is not None and load_in_4bit:
        raise ConfigError("`load_in_4bit=True` is for a local teacher. Give vLLM a quantized checkpoint instead.")
    processes.check_output_dir(output_dir, [source.folder])
    # A server reads the teacher's files where it runs
    config = None if vllm_server_url and isinstance(teacher, str) else find_config(teacher, "teacher", **load.hub)
    _check_top_k(top_k, config)
    server = None
    if vllm_server_url is not None:
        server = VllmServer(vllm_server_url, teacher, argument="teacher", concurrency=vllm_concurrency)

    state = processes.processes()
    manifest = _manifest(state, source, teacher, load, server, top_k, logps_dtype, identify)
    manifest.scoring = {"temperature": 1.0, "top_k": top_k, "dtype": _computed_dtype(load, None if server else config)}
    writer = processes.open_writer(state, output_dir, manifest, repair)
    shards = source.manifest.shards
    own = processes.own_shards(state, len(shards))
    todo = [index for index in own if not writer.done(index, shards[index]["sha256"])]
    if todo:
        engine: ScoringEngine
        if server is not None:
            engine = server.scoring_engine()
        else:
            engine = LocalScoringEngine(load_model(teacher, "teacher", load, state.device), tokens_per_batch)
        rows = sum(shards[index]["rows"] for index in own)
        done = rows - sum(shards[index]["rows"] for index in todo)
        with Progress("scores", rows, done, show=show_progress and state.is_main_process) as progress:
            for index in todo:
                columns = _score_shard(engine, read_record(source.folder, shards[index]), top_k, progress)
                writer.write(index, columns, shards[index]["sha256"])
                writer.update_manifest()
    processes.finish(writer, len(shards))
    return RolloutStore.open(output_dir)


def _manifest(
    state: PartialState,
    source: RolloutStore,
    teacher: str | PreTrainedModel,
    load: LoadOptions,
    server: Any,
    top_k: int | None,
    logps_dtype: str,
    identify: bool,
) -> Manifest:
    identity = None
    if identify:
        identity = processes.on_main_process(
            state, lambda: processes.identify(teacher, "teacher", revision=load.revision)
        )
        _check_vocabulary(source.manifest.student, identity)
    engine = server.engine if server else processes.engine_versions("transformers")
    return Manifest(
        kind="scored_rollouts",
        settings={
            **processes.identity_settings("teacher", identity, teacher),
            "rollouts": source.digest,
            "top_k": top_k,
            "engine": engine["name"],
            "dtype": load.weights,
        },
        planned_shards=len(source.manifest.shards),
        logps_dtype=logps_dtype,
        sampling=source.manifest.sampling,
        engine=engine,
        student=source.manifest.student,
        teacher=identity,
        source={**source.manifest.source, "rollouts": source.name, "rollouts_digest": source.digest},
    )


def _score_shard(engine: ScoringEngine, table: pa.Table, top_k: int | None, progress: Progress) -> dict[str, Any]:
    columns = {name: to_rows(table[name]) for name in table.column_names}
    prompts, completions = (columns[name] for name in ("prompt_ids", "completion_ids"))
    scores = engine.score(
        [ids.tolist() for ids in prompts], [ids.tolist() for ids in completions], top_k, progress.update
    )
    columns["teacher_logps"] = [score.logps for score in scores]
    if top_k is not None:
        columns["teacher_topk_ids"] = [score.topk_ids for score in scores]
        columns["teacher_topk_logps"] = [score.topk_logps for score in scores]
        columns["teacher_tail_logmass"] = [score.tail_logmass for score in scores]
    return columns


def _check_top_k(top_k: int | None, config: Any) -> None:
    vocab = None if config is None else config.get_text_config().vocab_size
    if top_k is not None and (top_k < 1 or (vocab is not None and top_k >= vocab)):
        below = f" and less than the teacher's vocabulary size {vocab}" if vocab is not None else ""
        raise ConfigError(f"`top_k={top_k}` must be at least 1{below}. Use None to score the sampled tokens only.")


def _check_vocabulary(student: dict[str, Any] | None, teacher: dict[str, Any]) -> None:
    """Scores of other tokens are worthless, and hours of work: found here rather than when training starts."""
    vocabularies = [
        ((model or {}).get("tokenizer") or {}).get("parts", {}).get("vocabulary") for model in (student, teacher)
    ]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise TokenizerMismatchError(
            f"The tokenizer of `teacher={teacher['name']!r}` is not that of the student that made the rollouts "
            f"({(student or {}).get('name')!r}): they map other tokens to the same ids. Use a teacher of the "
            "student's family; if only added tokens differ, add the same ones to both in the same order."
        )


def _computed_dtype(load: LoadOptions, config: Any) -> str:
    # What a server computes in is its own affair: then there is no `config`
    stored = getattr(config, "dtype", None)
    return str(stored).removeprefix("torch.") if load.weights == "auto" and stored is not None else load.weights

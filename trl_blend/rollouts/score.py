"""
Log-probabilities of a teacher for rollouts that exist, computed once. Killed at any point and started again, the
result is the same row for row.
"""

import os
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedModel

from trl_blend.errors import ConfigError, EngineError, TokenizerMismatchError
from trl_blend.models.limits import num_token_ids
from trl_blend.models.loading import LoadOptions, check_not_loaded, find_tokenizer
from trl_blend.rollouts import identities, processes, ragged
from trl_blend.rollouts.config import ScoringConfig, make_config, passed_or_named
from trl_blend.rollouts.engines.base import OnRows, RowError, ScoringEngine, load_options, make_engine
from trl_blend.rollouts.format import ID_COLUMNS, Manifest
from trl_blend.rollouts.shard import read_record
from trl_blend.rollouts.store import RolloutStore, open_kind


def score_rollouts(
    rollouts: str | os.PathLike[str] | RolloutStore | None = None,
    teacher: str | PreTrainedModel | None = None,
    args: ScoringConfig | str | os.PathLike[str] | None = None,
    **settings: Any,
) -> RolloutStore:
    """
    Give every token of a store of rollouts the teacher's log-probability, and write both as a new store.

    Scores are at temperature 1 over the teacher's whole vocabulary, whatever the rollouts were sampled with: that is
    what the loss compares, and vLLM's `prompt_logprobs` ignore temperature anyway. The rows and their order are those
    of the rollouts, shard for shard; with `route` only those that are this teacher's. The same command started again
    goes on where it stopped; under `accelerate launch` or `torchrun` the shards are split over the processes, each
    with the whole teacher.

    Args:
        rollouts (`str` or [`~trl_blend.rollouts.store.RolloutStore`], *optional*):
            Output of [`~trl_blend.rollouts.collect.collect_rollouts`], or a dataset repository on the Hub. Defaults to
            the one that `args` names.
        teacher (`str`, [`~transformers.PreTrainedModel`] or `peft.PeftModel`, *optional*):
            The teacher: folder, Hub id or model. Defaults to the one that `args` names.
        args ([`~trl_blend.rollouts.config.ScoringConfig`], `str` or `os.PathLike`):
            The configuration, or the folder of the store.
        **settings (`Any`):
            Fields of the configuration, where `args` is a folder.

    Returns:
        [`~trl_blend.rollouts.store.RolloutStore`]: The finished store.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a setting is out of range, contradicts another, or differs from those
            that the store was begun with; a row longer than the teacher's context. Raised before the teacher is
            loaded, as is the next.
        [`~trl_blend.errors.TokenizerMismatchError`]: If the teacher's tokens are known not to be the student's, or a
            row holds an id that is none of its tokens.
        [`~trl_blend.errors.EngineError`]: If the teacher gives no number for a token, or a server cannot be used.
        [`~trl_blend.errors.StoreError`]: If a store is broken, being written by another process, or the disk full.
        [`~trl_blend.errors.UnsupportedError`]: If the teacher is no decoder-only language model.
    """
    args = make_config(ScoringConfig, args, settings)
    rollouts, _ = passed_or_named(rollouts, "rollouts", args, "rollouts")
    teacher, argument = passed_or_named(teacher, "teacher", args, "teacher_model_name_or_path")
    options = load_options(args)
    check_not_loaded(teacher, argument, options)
    source = open_kind(rollouts, "rollouts", "rollouts", args.rollouts_revision)
    processes.check_output_dir(args.output_dir, [source.folder])
    engine: ScoringEngine = make_engine(teacher, argument, args)
    rolled, top_k = source.manifest, args.top_k
    vocab_size = _num_tokens(engine, teacher, argument, options, rolled)
    _check_top_k(top_k, vocab_size)
    state = processes.processes()
    check = partial(_check_rollouts, source, argument, vocab_size, engine.max_length, args.route)
    chosen = {index: rows for index, rows in enumerate(processes.on_main_process(state, check)) if rows}
    planned = list(chosen)  # shards of the rollouts with rows for this teacher
    route = {} if args.route is None else {"route": args.route}
    identity = identities.find(state, teacher, argument, args)
    if identity is not None:
        _check_vocabulary(rolled.student, identity, argument)
    manifest = Manifest(
        kind="scored_rollouts",
        settings={
            **identities.settings("teacher", identity, teacher),
            **engine.settings,
            "rollouts": source.digest,
            "top_k": top_k,
            "engine": engine.description["name"],
            "dtype": options.weights,
            **route,
        },
        planned_shards=len(planned),
        logps_dtype=args.logps_dtype or rolled.logps_dtype,
        sampling=rolled.sampling,
        scoring={"temperature": 1.0, "top_k": top_k, "dtype": engine.dtype, "vocab_size": vocab_size, **route},
        engine=engine.description,
        student=rolled.student,
        teacher=identity,
        source={**rolled.source, "rollouts": source.name, "rollouts_digest": source.digest},
    )

    def score(index: int, on_rows: OnRows) -> dict[str, Any]:
        table, numbers = _of_route(read_record(source.folder, rolled.shards[planned[index]]), args.route)
        columns = {name: ragged.to_rows(table[name]) for name in table.column_names}
        prompts, completions = ([ids.tolist() for ids in columns[name]] for name in ("prompt_ids", "completion_ids"))
        try:
            scores = engine.score(prompts, completions, top_k, on_rows, vocab_size)
        except RowError as error:
            row = error.row or 0
            number = sum(shard["rows"] for shard in rolled.shards[: planned[index]]) + numbers[row]
            raise EngineError(f"Row {number} (key {columns['key'][row]}): {error}") from error
        columns["teacher_logps"] = [score.logps for score in scores]
        if top_k is not None:
            columns["teacher_topk_ids"] = [score.topk_ids for score in scores]
            columns["teacher_topk_logps"] = [score.topk_logps for score in scores]
            columns["teacher_tail_logmass"] = [score.tail_logmass for score in scores]
        return columns

    digests = [rolled.shards[index]["sha256"] for index in planned]
    rows = list(chosen.values())
    load = partial(engine.load, state.device)
    return processes.write_store(state, args, manifest, digests, rows, load, score)


def _num_tokens(
    engine: ScoringEngine, teacher: Any, argument: str, options: LoadOptions, rolled: Manifest
) -> int | None:
    """
    Ids below it are tokens of both models: rows that the teacher has, and ids that its tokenizer and the student's
    have. `None` where none of them is known.
    """
    sampling = rolled.sampling or {}
    found = [engine.vocab_size, sampling.get("vocab_size")]
    tokenizer = find_tokenizer(teacher, argument, **options.hub)
    if tokenizer is not None:
        found.append(num_token_ids(tokenizer, sampling.get("eos_token_ids") or ()))
    return min((size for size in found if size is not None), default=None)


def _of_route(table: pa.Table, route: str | None) -> tuple[pa.Table, NDArray[np.int64]]:
    """The rows of a route, and their numbers in the table."""
    chosen = np.ones(table.num_rows, bool) if route is None else table["route"].to_numpy() == route
    return table.filter(pa.array(chosen)), np.flatnonzero(chosen)


def _check_rollouts(
    source: RolloutStore, argument: str, vocab_size: int | None, max_length: int | None, route: str | None
) -> list[int]:
    """
    Read the rollouts once: a row that the teacher cannot score is found now, and not hours later. Returns the number
    of rows that it is to score, per shard.
    """
    first, counts_of_shards, routes = 0, [], set()
    for _, shard in source.iter_shards():
        if route is not None and "route" not in shard.column_names:
            raise ConfigError(
                f"`route={route!r}` chooses rows by their column `route`, which {source.name} does not have. Collect "
                "from prompts with that column, or leave `route` out."
            )
        table, numbers = _of_route(shard, route)
        counts_of_shards.append(table.num_rows)
        routes |= set(shard["route"].to_pylist()) if route is not None else set()
        lengths = sum(ragged.flatten(table[name])[0] for name in ID_COLUMNS)
        for name in ID_COLUMNS:
            counts, ids = ragged.flatten(table[name])
            bad = (ids < 0) | (ids >= (vocab_size or np.inf))
            if bad.any():
                row = int(np.searchsorted(np.cumsum(counts), np.argmax(bad), side="right"))
                raise TokenizerMismatchError(
                    f"Row {first + numbers[row]} (key {table['key'][row]}) of {source.name} holds id "
                    f"{ids[np.argmax(bad)]} in `{name}`, but the tokens that student and `{argument}` share are 0 to "
                    f"{vocab_size - 1}: the id is of another tokenizer, or of a row that only pads an embedding. Use "
                    "a teacher of the student's family, or collect the rollouts again."
                )
        if max_length is not None and lengths.max(initial=0) > max_length:
            row = int(np.argmax(lengths))
            raise ConfigError(
                f"Row {first + numbers[row]} (key {table['key'][row]}) of {source.name} has {lengths[row]} tokens, "
                f"and `{argument}` takes {max_length}. Use a teacher with a longer context (a server: "
                "`--max-model-len`, one token more is generated), or collect with a smaller `max_completion_length`."
            )
        first += shard.num_rows
    if not sum(counts_of_shards):
        raise ConfigError(f"`route={route!r}` is the route of no row of {source.name}, which has {sorted(routes)}.")
    return counts_of_shards


def _check_top_k(top_k: int | None, vocab_size: int | None) -> None:
    if top_k is not None and vocab_size is not None and top_k >= vocab_size:
        raise ConfigError(
            f"`top_k={top_k}` must be less than the teacher's vocabulary size {vocab_size}. Use 0 to score the "
            "sampled tokens only."
        )


def _check_vocabulary(student: dict[str, Any] | None, teacher: dict[str, Any], argument: str) -> None:
    """Scores of other tokens are worthless, and hours of work: found here rather than when training starts."""
    vocabularies = [
        ((model or {}).get("tokenizer") or {}).get("parts", {}).get("vocabulary") for model in (student, teacher)
    ]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise TokenizerMismatchError(
            f"The tokenizer of `{argument}={teacher['name']!r}` is not that of the student that made the rollouts "
            f"({(student or {}).get('name')!r}): they map other tokens to the same ids. Use a teacher of the "
            "student's family; if only added tokens differ, add the same ones to both in the same order."
        )

"""
Log-probabilities of a teacher for rollouts that exist, computed once. Killed at any point and started again, the
result is the same row for row.
"""

import os
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from trl_blend.errors import ConfigError, TokenizerMismatchError
from trl_blend.models.loading import check_not_loaded
from trl_blend.rollouts import identities, processes
from trl_blend.rollouts.config import ScoringConfig, make_config, passed_or_named
from trl_blend.rollouts.engines.base import OnRows, ScoringEngine, load_options, make_engine
from trl_blend.rollouts.format import Manifest
from trl_blend.rollouts.ragged import to_rows
from trl_blend.rollouts.shard import read_record
from trl_blend.rollouts.store import RolloutStore, load_rollouts


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
    of the rollouts, shard for shard. The same command started again goes on where it stopped; under
    `accelerate launch` or `torchrun` the shards are split over the processes, each with the whole teacher.

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
            that the store was begun with. Raised before the teacher is loaded, as is the next.
        [`~trl_blend.errors.TokenizerMismatchError`]: If the teacher's tokens are known not to be the student's.
        [`~trl_blend.errors.StoreError`]: If a store is broken, being written by another process, or the disk full.
        [`~trl_blend.errors.UnsupportedError`]: If the teacher is no decoder-only language model.
    """
    args = make_config(ScoringConfig, args, settings)
    rollouts, _ = passed_or_named(rollouts, "rollouts", args, "rollouts")
    teacher, argument = passed_or_named(teacher, "teacher", args, "teacher_model_name_or_path")
    options = load_options(args)
    check_not_loaded(teacher, argument, options)
    source = rollouts
    if not isinstance(rollouts, RolloutStore):
        source = load_rollouts(rollouts, revision=args.rollouts_revision)
    processes.check_output_dir(args.output_dir, [source.folder])
    engine: ScoringEngine = make_engine(teacher, argument, args)
    _check_top_k(args.top_k, engine.vocab_size)

    state = processes.processes()
    rolled = source.manifest
    identity = identities.find(state, teacher, argument, args)
    if identity is not None:
        _check_vocabulary(rolled.student, identity, argument)
    manifest = Manifest(
        kind="scored_rollouts",
        settings={
            **identities.settings("teacher", identity, teacher),
            **engine.settings,
            "rollouts": source.digest,
            "top_k": args.top_k,
            "engine": engine.description["name"],
            "dtype": options.weights,
        },
        planned_shards=len(rolled.shards),
        logps_dtype=args.logps_dtype or rolled.logps_dtype,
        sampling=rolled.sampling,
        scoring={"temperature": 1.0, "top_k": args.top_k, "dtype": engine.dtype},
        engine=engine.description,
        student=rolled.student,
        teacher=identity,
        source={**rolled.source, "rollouts": source.name, "rollouts_digest": source.digest},
    )

    def score(index: int, on_rows: OnRows) -> dict[str, Any]:
        table = read_record(source.folder, rolled.shards[index])
        columns = {name: to_rows(table[name]) for name in table.column_names}
        prompts, completions = ([ids.tolist() for ids in columns[name]] for name in ("prompt_ids", "completion_ids"))
        scores = engine.score(prompts, completions, args.top_k, on_rows)
        columns["teacher_logps"] = [score.logps for score in scores]
        if args.top_k is not None:
            columns["teacher_topk_ids"] = [score.topk_ids for score in scores]
            columns["teacher_topk_logps"] = [score.topk_logps for score in scores]
            columns["teacher_tail_logmass"] = [score.tail_logmass for score in scores]
        return columns

    digests = [shard["sha256"] for shard in rolled.shards]
    rows = [shard["rows"] for shard in rolled.shards]
    load = partial(engine.load, state.device)
    return processes.write_store(state, args, manifest, digests, rows, load, score)


def _check_top_k(top_k: int | None, vocab_size: int | None) -> None:
    if top_k is not None and vocab_size is not None and top_k >= vocab_size:
        raise ConfigError(
            f"`top_k={top_k}` must be less than the teacher's vocabulary size {vocab_size}. Use None to score the "
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

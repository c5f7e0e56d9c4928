"""
Collecting rollouts of the student, with the log-probabilities of what was sampled from. Killed at any point and
started again, the result is the same row for row.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_blend.errors import EngineError
from trl_blend.models.limits import num_token_ids
from trl_blend.models.loading import check_not_loaded, find_eos_token_ids, find_tokenizer
from trl_blend.rollouts import identities, processes
from trl_blend.rollouts.config import RolloutConfig, make_config, passed_or_named
from trl_blend.rollouts.engines.base import (
    OnRows,
    Rollout,
    RolloutEngine,
    RowError,
    SamplingSettings,
    load_options,
    make_engine,
    row_seed,
)
from trl_blend.rollouts.format import Manifest, row_key
from trl_blend.rollouts.prompts import (
    PromptTokens,
    check_prompt_lengths,
    describe_dataset,
    load_prompts,
    row_columns,
    shard_bounds,
)
from trl_blend.rollouts.store import RolloutStore


def collect_rollouts(
    model: str | PreTrainedModel | None = None,
    prompts: str | os.PathLike[str] | Dataset | Sequence[Any] | None = None,
    args: RolloutConfig | str | os.PathLike[str] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    **settings: Any,
) -> RolloutStore:
    """
    Sample completions of every prompt and write them as a store of rollouts.

    Every row holds the token ids (never text), the log-probability of each token under the distribution that it was
    sampled from, and under the model at temperature 1. The same command started again goes on where it stopped; under
    `accelerate launch` or `torchrun` the shards are split over the processes. Which rows a shard holds and how they
    are drawn follows from the settings, so that the number of processes and any interruption change nothing.

    Columns `route` (text: which teacher is to score the row) and `row_weight` (how much it counts in training) of the
    prompts are kept.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or `peft.PeftModel`, *optional*):
            The student: folder, Hub id or model. Defaults to the one that `args` names.
        prompts (`str`, [`~datasets.Dataset`] or `list`, *optional*):
            Prompts, text or messages, see [`~trl_blend.rollouts.prompts.load_prompts`]. Defaults to those that `args`
            names.
        args ([`~trl_blend.rollouts.config.RolloutConfig`], `str` or `os.PathLike`):
            The configuration, or the folder of the store.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the student, by default the one beside the model.
        **settings (`Any`):
            Fields of the configuration, where `args` is a folder.

    Returns:
        [`~trl_blend.rollouts.store.RolloutStore`]: The finished store.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a setting is out of range, contradicts another, or differs from those
            that the store was begun with. Raised before the model is loaded.
        [`~trl_blend.errors.EngineError`]: If the model gives no numbers, or a server cannot be used; with the row.
        [`~trl_blend.errors.StoreError`]: If the store is broken, being written by another process, or the disk full.
        [`~trl_blend.errors.UnsupportedError`]: If the model cannot generate.
    """
    args = make_config(RolloutConfig, args, settings)
    model, argument = passed_or_named(model, "model", args, "model_name_or_path")
    prompts, origin = passed_or_named(prompts, "prompts", args, "dataset_name")
    options = load_options(args)
    check_not_loaded(model, argument, options)
    processes.check_output_dir(args.output_dir)
    engine: RolloutEngine = make_engine(model, argument, args)
    tokenizer = processing_class or find_tokenizer(model, argument, required=True, **options.hub)
    dataset = load_prompts(prompts, origin, args.prompt_column, args.dataset_config, args.dataset_train_split)
    eos_token_ids = find_eos_token_ids(model, tokenizer, revision=options.revision)
    source = PromptTokens(dataset, tokenizer, args.prompt_column, args.chat_template_kwargs, eos_token_ids)
    # All samples of a prompt are in one shard
    samples = args.num_rollouts_per_prompt
    bounds = list(shard_bounds(len(source), max(1, args.rows_per_shard // samples)))
    scan = source.scan(bounds)
    digests = [_with_columns(digest, row_columns(dataset, *rows)) for digest, rows in zip(scan.digests, bounds)]
    check_prompt_lengths(scan, args.max_completion_length, engine.max_length)

    state = processes.processes()
    sampling = SamplingSettings(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        max_new_tokens=args.max_completion_length,
        num_rollouts_per_prompt=samples,
        seed=args.seed,
        eos_token_ids=eos_token_ids,
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=num_token_ids(tokenizer, eos_token_ids),
    )
    student = identities.find(state, model, argument, args, tokenizer)
    manifest = Manifest(
        kind="rollouts",
        settings={
            **sampling.to_dict(),
            **identities.settings("student", student, model),
            **engine.settings,
            "engine": engine.description["name"],
            "dtype": options.weights,
            "rows_per_shard": args.rows_per_shard,
            "prompts": scan.digest,
        },
        planned_shards=len(bounds),
        logps_dtype=args.logps_dtype or "float16",
        sampling={**sampling.to_dict(), "vocab_size": sampling.vocab_size},
        engine=engine.description,
        student=student,
        source={
            "prompts": describe_dataset(prompts),
            "num_prompts": len(source),
            "digest": scan.digest,
            "chat_template_kwargs": args.chat_template_kwargs,
        },
    )

    def draw(index: int, on_rows: OnRows) -> dict[str, list[Any]]:
        start, stop = bounds[index]
        prompt_ids = [ids for ids in source.ids(start, stop) for _ in range(samples)]
        seeds = [row_seed(args.seed, start * samples + row) for row in range(len(prompt_ids))]
        try:
            rollouts = _sample(engine, prompt_ids, seeds, on_rows)
        except RowError as error:
            raise EngineError(f"Row {start + (error.row or 0) // samples} of the prompts: {error}") from error
        return {
            "key": [row_key(ids, row % samples) for row, ids in enumerate(prompt_ids)],
            "prompt_ids": prompt_ids,
            **{
                name: [value for value in values for _ in range(samples)]
                for name, values in row_columns(dataset, start, stop).items()
            },
            **{name: [getattr(rollout, name) for rollout in rollouts] for name in Rollout._fields},
        }

    rows = [(stop - start) * samples for start, stop in bounds]
    load = partial(engine.load, state.device, sampling)
    return processes.write_store(state, args, manifest, digests, rows, load, draw)


def _with_columns(digest: str, columns: dict[str, list[Any]]) -> str:
    """Digest of the prompts of a shard, and of what its rows keep of them beside their tokens."""
    return hashlib.sha256(f"{digest}{json.dumps(columns)}".encode()).hexdigest() if columns else digest


def _sample(
    engine: RolloutEngine, prompt_ids: Sequence[list[int]], seeds: Sequence[int], on_rows: OnRows
) -> list[Rollout]:
    """Rollouts of a shard, in order. Prompts of similar length share a batch: less padding."""
    rollouts: dict[int, Rollout] = {}
    order = sorted(range(len(prompt_ids)), key=lambda row: (len(prompt_ids[row]), row))
    size = engine.max_batch or len(order)
    for first in range(0, len(order), size):
        batch = order[first : first + size]
        try:
            drawn = engine.sample([prompt_ids[row] for row in batch], [seeds[row] for row in batch], on_rows)
        except RowError as error:
            error.row = batch[error.row or 0]
            raise
        rollouts.update(zip(batch, drawn, strict=True))
    return [rollouts[row] for row in range(len(prompt_ids))]

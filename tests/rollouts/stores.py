"""Small stores for tests: rows drawn from a seed, so that two writers of the same settings write the same."""

from pathlib import Path

import numpy as np

from trl_blend.rollouts.format import Manifest, row_key
from trl_blend.rollouts.store import RolloutStore
from trl_blend.rollouts.writer import ShardWriter


VOCAB_SIZE = 1000
TOP_K = 4


def random_rows(index=0, rows=5, *, scored=False, top_k=False, length=12, seed=0):
    """Columns of shard `index`: `rows` completions of up to `length` tokens."""
    rng = np.random.default_rng([seed, index])
    prompts = [rng.integers(0, VOCAB_SIZE, rng.integers(1, 6)) for _ in range(rows)]
    completions = [rng.integers(0, VOCAB_SIZE, rng.integers(1, length + 1)) for _ in range(rows)]

    def logps():
        return [-rng.exponential(1.0, len(ids)) for ids in completions]

    columns = {
        "key": [row_key(ids, index * rows + row) for row, ids in enumerate(prompts)],
        "prompt_ids": [ids.tolist() for ids in prompts],
        "completion_ids": [ids.tolist() for ids in completions],
        "rollout_logps": logps(),
        "student_logps": logps(),
        "truncated": [len(ids) == length for ids in completions],
    }
    if scored:
        columns["teacher_logps"] = logps()
    if top_k:
        # Consecutive from a random one on: no token twice, the sampled one last
        steps = np.arange(TOP_K - 1, -1, -1)
        ids = [(sampled[:, None] + steps * rng.integers(1, 9)) % VOCAB_SIZE for sampled in completions]
        columns["teacher_topk_ids"] = ids
        columns["teacher_topk_logps"] = [-1 - rng.exponential(1.0, row.shape) for row in ids]
        columns["teacher_tail_logmass"] = logps()
    return columns


def make_manifest(*, num_shards=None, scored=False, settings=None, **fields):
    kind = "scored_rollouts" if scored else "rollouts"
    settings = {"temperature": 0.7, "seed": 0, **(settings or {})}
    return Manifest(kind=kind, settings=settings, planned_shards=num_shards, **fields)


def write_shards(writer, num_shards, **rows):
    """What a job does: write what is not there, keep the manifest up to date, close it. Returns what was written."""
    written = []
    for index in range(num_shards):
        if not writer.done(index, f"input {index}"):
            writer.write(index, random_rows(index, **rows), f"input {index}")
            written.append(index)
        writer.update_manifest()
    writer.update_manifest(complete=True)
    return written


def write_store(folder, num_shards=3, *, scored=False, repair=False, settings=None, fields=None, **rows):
    """A finished store."""
    manifest = make_manifest(num_shards=num_shards, scored=scored, settings=settings, **(fields or {}))
    write_shards(ShardWriter(folder, manifest, repair=repair), num_shards, scored=scored, **rows)
    return RolloutStore.open(folder)


def contents(folder):
    """Bytes of every shard by name."""
    return {path.name: path.read_bytes() for path in sorted((Path(folder) / "data").iterdir())}

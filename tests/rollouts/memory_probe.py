"""
Peak memory of writing and reading a store, run as a script: python -m tests.rollouts.memory_probe FOLDER SIZE SIZE

Prints the peak of the process (MB) after each size, so that what the larger store adds can be seen.
"""

import json
import resource
import sys
from pathlib import Path

from tests.rollouts.stores import make_manifest, random_rows
from trl_blend.rollouts.store import load_scored_rollouts
from trl_blend.rollouts.summary import summarize
from trl_blend.rollouts.writer import ShardWriter


ROWS_PER_SHARD = 100
MEAN_LENGTH = 200


def write_and_read(folder, num_rows):
    num_shards = num_rows // ROWS_PER_SHARD
    writer = ShardWriter(folder, make_manifest(num_shards=num_shards, scored=True))
    rows = random_rows(rows=ROWS_PER_SHARD, scored=True, length=2 * MEAN_LENGTH)
    for index in range(num_shards):
        writer.write(index, rows, f"input {index}")
        writer.update_manifest()
    writer.update_manifest(complete=True)
    store = load_scored_rollouts(folder, verify=True)
    summary = summarize(store)
    assert summary["num_rows"] == num_rows
    tokens = sum(len(row["completion_ids"]) for _, row in zip(range(num_rows), store.dataset(streaming=True)))
    assert tokens == summary["num_completion_tokens"]
    return summary


def main(folder, *sizes):
    for size in sizes:
        summary = write_and_read(Path(folder) / size, int(size))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            json.dumps(
                {
                    "rows": summary["num_rows"],
                    "tokens": summary["num_completion_tokens"],
                    "store_mb": summary["num_bytes"] / 2**20,
                    "bytes_per_token": summary["bytes_per_token"],
                    "peak_mb": peak,
                }
            )
        )


if __name__ == "__main__":
    main(*sys.argv[1:])

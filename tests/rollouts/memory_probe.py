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
    writer = ShardWriter(folder, make_manifest(num_shards=num_rows // ROWS_PER_SHARD, scored=True))
    rows = random_rows(rows=ROWS_PER_SHARD, scored=True, length=2 * MEAN_LENGTH)
    for index in range(num_rows // ROWS_PER_SHARD):
        writer.write(index, rows, f"input {index}")
        writer.update_manifest()
    writer.update_manifest(complete=True)
    store = load_scored_rollouts(folder, verify=True)
    summary = summarize(store)
    tokens = sum(len(row["completion_ids"]) for row in store.dataset(streaming=True))
    assert (tokens, num_rows) == (summary["num_completion_tokens"], summary["num_rows"])
    return summary


if __name__ == "__main__":
    folder, *sizes = sys.argv[1:]
    for size in sizes:
        summary = write_and_read(Path(folder) / size, int(size))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        wanted = {name: summary[name] for name in ("num_completion_tokens", "bytes_per_token")}
        print(json.dumps({**wanted, "peak_mb": peak}))

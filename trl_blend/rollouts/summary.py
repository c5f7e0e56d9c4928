"""What is in a store of rollouts, in numbers: what `trl-blend inspect` prints."""

from collections import Counter
from typing import Any

import numpy as np

from trl_blend.rollouts.format import TOKEN_COLUMNS, UNLIKELY_LOGP
from trl_blend.rollouts.ragged import flatten
from trl_blend.rollouts.store import RolloutStore


_LEFT_OUT = {"schema_version", "settings", "complete", "planned_shards", "num_truncated", "shards"}


def summarize(store: RolloutStore) -> dict[str, Any]:
    """
    Read a store once, one shard at a time, and count.

    Args:
        store ([`~trl_blend.rollouts.store.RolloutStore`]):
            The store.

    Returns:
        `dict[str, Any]`: JSON values. What the manifest records, without its shards and settings, and
            - `name`, `digest`: what the store was opened by, and the digest over the shards' checksums;
            - `columns`: those on disk;
            - `num_shards`, `num_bytes`: of the shards;
            - `bytes_per_token`: bytes of the shards, ids, prompts and keys included, per completion token;
            - `prompt_length_mean`, `completion_length_mean`, `completion_length_min`, `completion_length_max`: tokens
              per row;
            - `truncated_share`: share of rows that hit the length limit;
            - `rollout_logp_mean`, `student_logp_mean`, `teacher_logp_mean`: mean log-prob per token (nats), `None`
              where the column is absent, as are the next ones;
            - `unlikely_share`: share of tokens whose teacher log-prob is below -10;
            - `top_k`: number of teacher tokens per position;
            - `tail_mass_mean`: mean of the teacher's probability outside the top k.

    Raises:
        [`~trl_blend.errors.StoreError`]: If a shard is missing or broken.
    """
    columns: list[str] = []
    shortest: list[int] = []
    longest: list[int] = []
    top_k = None
    sums: Counter[str] = Counter()  # over all completion tokens
    for _, table in store.iter_shards():
        columns = table.column_names
        lengths, _ = flatten(table["completion_ids"])
        shortest.append(int(lengths.min()))
        longest.append(int(lengths.max()))
        values = {name: flatten(table[name])[1] for name in TOKEN_COLUMNS if name in columns}
        if "teacher_logps" in values:
            values["unlikely"] = values["teacher_logps"] < UNLIKELY_LOGP
        if "teacher_tail_logmass" in values:
            values["tail_mass"] = np.exp(values.pop("teacher_tail_logmass").astype(np.float64))
        if "teacher_topk_ids" in columns:
            top_k = flatten(table["teacher_topk_ids"])[1].shape[1]
        sums.update({name: float(numbers.sum(dtype=np.float64)) for name, numbers in values.items()})
    manifest = store.manifest
    rows, tokens = max(len(store), 1), max(manifest.num_completion_tokens, 1)
    means = {name: total / tokens for name, total in sums.items()}
    return {
        "name": store.name,
        **{name: value for name, value in manifest.to_dict().items() if name not in _LEFT_OUT},
        "digest": store.digest,
        "columns": columns,
        "num_shards": len(manifest.shards),
        "num_bytes": store.num_bytes,
        "bytes_per_token": store.bytes_per_token,
        "prompt_length_mean": manifest.num_prompt_tokens / rows,
        "completion_length_mean": manifest.num_completion_tokens / rows,
        "completion_length_min": min(shortest, default=0),
        "completion_length_max": max(longest, default=0),
        "truncated_share": manifest.num_truncated / rows,
        "rollout_logp_mean": means.get("rollout_logps"),
        "student_logp_mean": means.get("student_logps"),
        "teacher_logp_mean": means.get("teacher_logps"),
        "unlikely_share": means.get("unlikely"),
        "top_k": top_k,
        "tail_mass_mean": means.get("tail_mass"),
    }

"""What is in a store of rollouts, in numbers: what `trl-blend inspect` prints."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trl_blend.rollouts.format import UNLIKELY_LOGP


@dataclass(frozen=True)
class StoreSummary:
    """
    Numbers and descriptions of a store.

    Args:
        name, kind, created_at, package_version, digest, logps_dtype (`str`):
            As in the manifest; `digest` is over the shards' checksums.
        columns (`list[str]`):
            Columns on disk.
        num_shards, num_rows, num_prompt_tokens, num_completion_tokens, num_bytes (`int`):
            Counts; `num_bytes` is that of the shards.
        bytes_per_token (`float`):
            Bytes of the shards, ids, prompts and keys included, per completion token.
        prompt_length_mean, completion_length_mean (`float`):
            Tokens per row.
        completion_length_min, completion_length_max (`int`):
            Shortest and longest completion.
        truncated_share (`float`):
            Share of rows that hit the length limit.
        rollout_logp_mean, student_logp_mean, teacher_logp_mean (`float`, *optional*):
            Mean log-prob per token (nats); `None` where the column is absent.
        unlikely_share (`float`, *optional*):
            Share of tokens whose teacher log-prob is below -10.
        top_k (`int`, *optional*):
            Number of teacher tokens per position.
        tail_mass_mean (`float`, *optional*):
            Mean of the teacher's probability outside the top k.
        sampling, scoring, student, teacher (`dict[str, Any]`, *optional*), engine, source (`dict[str, Any]`):
            As in the manifest.
    """

    name: str
    kind: str
    created_at: str
    package_version: str
    digest: str
    logps_dtype: str
    columns: list[str]
    num_shards: int
    num_rows: int
    num_prompt_tokens: int
    num_completion_tokens: int
    num_bytes: int
    bytes_per_token: float
    prompt_length_mean: float
    completion_length_mean: float
    completion_length_min: int
    completion_length_max: int
    truncated_share: float
    rollout_logp_mean: float | None
    student_logp_mean: float | None
    teacher_logp_mean: float | None
    unlikely_share: float | None
    top_k: int | None
    tail_mass_mean: float | None
    sampling: dict[str, Any] | None
    scoring: dict[str, Any] | None
    student: dict[str, Any] | None
    teacher: dict[str, Any] | None
    engine: dict[str, Any]
    source: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Dictionary of JSON values."""
        return asdict(self)


class _Mean:
    """Sum and count over the shards, in float64."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: NDArray[Any]) -> None:
        self.total += float(values.sum(dtype=np.float64))
        self.count += values.size

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


def summarize(store: Any) -> StoreSummary:
    """
    Read a store once, one shard at a time, and count.

    Args:
        store ([`~trl_blend.rollouts.store.RolloutStore`]):
            The store.

    Raises:
        [`~trl_blend.errors.StoreError`]: If a shard is missing or broken.
    """
    means = {
        name: _Mean() for name in ("rollout_logps", "student_logps", "teacher_logps", "unlikely", "tail", "truncated")
    }
    columns: list[str] = []
    lengths: list[int] = []
    top_k = None
    for _, table in store.iter_shards():
        columns = table.column_names
        in_shard = pc.min_max(pc.list_value_length(table["completion_ids"])).as_py().values()
        lengths = [min([*lengths, *in_shard]), max([*lengths, *in_shard])]
        means["truncated"].add(table["truncated"].to_numpy())
        for name in ("rollout_logps", "student_logps", "teacher_logps"):
            if name in columns:
                means[name].add(_values(table, name))
        if "teacher_logps" in columns:
            means["unlikely"].add(_values(table, "teacher_logps") < UNLIKELY_LOGP)
        if "teacher_tail_logmass" in columns:
            means["tail"].add(np.exp(_values(table, "teacher_tail_logmass").astype(np.float64)))
        if "teacher_topk_ids" in columns:
            top_k = len(table["teacher_topk_ids"][0][0])
    manifest, rows = store.manifest, max(len(store), 1)
    num_bytes = sum(int(record["bytes"]) for record in manifest.shards)
    return StoreSummary(
        name=store.name,
        kind=store.kind,
        created_at=manifest.created_at,
        package_version=manifest.package_version,
        digest=store.digest,
        logps_dtype=manifest.logps_dtype,
        columns=columns,
        num_shards=len(manifest.shards),
        num_rows=len(store),
        num_prompt_tokens=manifest.num_prompt_tokens,
        num_completion_tokens=manifest.num_completion_tokens,
        num_bytes=num_bytes,
        bytes_per_token=store.bytes_per_token,
        prompt_length_mean=manifest.num_prompt_tokens / rows,
        completion_length_mean=manifest.num_completion_tokens / rows,
        completion_length_min=min(lengths, default=0),
        completion_length_max=max(lengths, default=0),
        truncated_share=means["truncated"].value or 0.0,
        rollout_logp_mean=means["rollout_logps"].value,
        student_logp_mean=means["student_logps"].value,
        teacher_logp_mean=means["teacher_logps"].value,
        unlikely_share=means["unlikely"].value,
        top_k=top_k,
        tail_mass_mean=means["tail"].value,
        sampling=manifest.sampling,
        scoring=manifest.scoring,
        student=manifest.student,
        teacher=manifest.teacher,
        engine=manifest.engine,
        source=manifest.source,
    )


def _values(table: pa.Table, name: str) -> NDArray[Any]:
    return np.asarray(pc.list_flatten(table[name]).to_numpy())

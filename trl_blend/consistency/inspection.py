"""What `trl-blend inspect` says about a store: what is in it, who made it, and whether it is consistent."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from trl_blend.consistency.report import ConsistencyReport
from trl_blend.errors import ConfigError
from trl_blend.models.identity import ModelIdentity
from trl_blend.rollouts.store import RolloutStore
from trl_blend.rollouts.summary import summarize


HOW_TO_CHECK_MORE = (
    "Compared is what the store records. Give `--model_name_or_path STUDENT` to compare weights and the recorded SFT "
    "teacher of the student too, and `--teacher_model_name_or_path TEACHER` to score some rows again."
)


@dataclass(frozen=True)
class Inspection:
    """
    Args:
        summary (`dict[str, Any]`):
            Numbers, see [`~trl_blend.rollouts.summary.summarize`].
        report ([`~trl_blend.consistency.report.ConsistencyReport`], *optional*):
            Findings; `None` for rollouts without scores.
        hint (`str`):
            What else could be checked, and how.
    """

    summary: dict[str, Any]
    report: ConsistencyReport | None
    hint: str

    @property
    def ok(self) -> bool:
        """Whether no finding failed."""
        return self.report is None or self.report.ok

    def to_dict(self) -> dict[str, Any]:
        """A JSON value."""
        report = None if self.report is None else self.report.to_dict()
        return {"summary": self.summary, "consistency": report}

    def __str__(self) -> str:
        lines = [f"{name:<12} {text}" for name, text in _describe(self.summary) if text]
        if self.report is not None:
            lines += ["", "Consistency", str(self.report)]
        return "\n".join([*lines, *(["", self.hint] if self.hint else [])])


def inspect_store(
    store: str | RolloutStore,
    *,
    revision: str | None = None,
    model_name_or_path: Any = None,
    model_revision: str | None = None,
    teacher_model_name_or_path: Any = None,
    teacher_model_revision: str | None = None,
    sft_teacher: str | None = None,
    rescore_num_rows: int = 64,
    verify: bool = False,
) -> Inspection:
    """
    Summary of a store and the findings about it: what `trl-blend inspect` prints, whose options are the arguments.
    Without a model, only what the store itself shows is checked.

    Raises:
        [`~trl_blend.errors.StoreError`]: If the store cannot be read, or `verify` finds it broken.
        [`~trl_blend.errors.ConfigError`]: If a model cannot be read, or the student is needed and not known.
    """
    opened = store if isinstance(store, RolloutStore) else RolloutStore.open(store, revision=revision)
    if verify:
        opened.verify()
    summary = summarize(opened)
    if opened.kind != "scored_rollouts":
        return Inspection(summary, None, f"Score it with `trl-blend score --rollouts {opened.name}`.")
    from trl_blend.consistency.check import check_store, check_teacher_consistency  # models: slow to import

    student = model_name_or_path
    if student is None and teacher_model_name_or_path is not None:
        student = (opened.manifest.student or {}).get("name")
        if student is None:
            raise ConfigError(
                f"{opened.name} does not record the student that sampled it. Give `model_name_or_path` beside "
                f"`teacher_model_name_or_path={teacher_model_name_or_path!r}`."
            )
    if student is None:
        return Inspection(summary, check_store(opened), HOW_TO_CHECK_MORE)
    report = check_teacher_consistency(
        student,
        opened,
        teacher_model_name_or_path,
        sft_teacher=sft_teacher,
        revision=model_revision,
        teacher_revision=teacher_model_revision,
        num_rows=rescore_num_rows,
    )
    return Inspection(summary, report, "")


def _describe(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of a name and a text; an empty text is left out."""
    s = SimpleNamespace(**summary)
    means = [
        f"{role} {mean:.4f}"
        for role, mean in (
            ("teacher", s.teacher_logp_mean),
            ("student", s.student_logp_mean),
            ("sampled from", s.rollout_logp_mean),
        )
        if mean is not None
    ]
    unlikely = "" if s.unlikely_share is None else f"; {s.unlikely_share:.2%} of the tokens below -10 for the teacher"
    top_k = (
        ""
        if s.top_k is None
        else f"{s.top_k} teacher tokens per position, mean mass of the rest {s.tail_mass_mean:.2e}"
    )
    engine = " ".join([s.engine.get("name", "unknown"), *(f"{k} {v}" for k, v in s.engine.items() if k != "name")])
    return [
        ("store", f"{s.name}: {s.kind.replace('_', ' ')}, made {s.created_at} by trl_blend {s.package_version}"),
        ("rows", f"{s.num_rows:,} in {s.num_shards:,} shards"),
        (
            "tokens",
            f"{s.num_prompt_tokens:,} of prompts ({s.prompt_length_mean:.1f} per row), {s.num_completion_tokens:,} of "
            f"completions (mean {s.completion_length_mean:.1f}, {s.completion_length_min} to "
            f"{s.completion_length_max}), {s.truncated_share:.2%} of the rows truncated",
        ),
        ("size", f"{s.num_bytes:,} bytes, {s.bytes_per_token:.2f} per completion token; log-probs in {s.logps_dtype}"),
        ("log-probs", f"mean per token (nats): {', '.join(means)}{unlikely}" if means else ""),
        ("top-k", top_k),
        ("sampling", _flat(s.sampling)),
        ("scoring", _flat(s.scoring)),
        ("engine", engine),
        ("source", _flat(s.source)),
        ("student", _identity(s.student)),
        ("teacher", _identity(s.teacher) if s.kind == "scored_rollouts" else ""),
        ("digest", s.digest),
    ]


def _flat(values: dict[str, Any] | None) -> str:
    """`name=value` of what fits in a line; the manifest has the rest."""
    return ", ".join(
        f"{name}={value}"
        for name, value in (values or {}).items()
        if not (
            value is None
            or isinstance(value, dict)
            or (isinstance(value, list) and value and isinstance(value[0], dict))
        )
    )


def _identity(fields: dict[str, Any] | None) -> str:
    if fields is None:
        return "not recorded"
    identity = ModelIdentity.from_dict(fields)
    tokenizer = "none" if identity.tokenizer is None else identity.tokenizer.sha256[:12]
    template = "none" if identity.chat_template_sha256 is None else identity.chat_template_sha256[:12]
    return f"{identity.describe()}, tokenizer {tokenizer}, chat template {template}, eos {identity.eos_token_ids}"

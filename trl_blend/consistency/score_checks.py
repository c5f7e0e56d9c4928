"""
Checks of the numbers that are stored: one function per check, each returning one finding.

The bounds are ours; no paper states them. They are meant to let every sound set of scores through and to be an order
of magnitude below what the mistakes that they look for do.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from trl_blend.consistency.report import Finding, Severity
from trl_blend.consistency.rows import SampledRows
from trl_blend.errors import UnsupportedError
from trl_blend.rollouts.engines.base import nucleus_settings
from trl_blend.rollouts.format import UNLIKELY_LOGP


# Mean absolute difference per token between stored and re-computed log-probs
TOLERANCE_FLOAT32 = 1e-3
TOLERANCE_FLOAT16 = 1e-2  # float16 keeps 11 bits: 4e-3 at -8
TOLERANCE_REDUCED = 0.05  # bfloat16 forward passes in batches of other shapes
TOLERANCE_QUANTIZED = 0.25
ROW_FACTOR = 5.0  # how much more a single row may differ than the mean
BIAS_FACTOR = 0.5  # rounding has no direction, another temperature has

MAX_GAP = 0.5  # nats per token
MAX_UNLIKELY_SHARE = 0.01
MIN_EOS_LOGP = -5.0
MAX_TRUNCATED_SHARE = 0.5
_NUM_WORST_ROWS = 5

REMEDIES = {
    "rescored": "Score the rollouts again with this teacher at temperature 1 (`trl-blend score`), or give the teacher "
    "that scored them. If a few rows differ and most do not, scores have been moved between rows.",
    "policy_gap": "A student that was fine-tuned on samples of this teacher starts closer. Check the teacher, the "
    "chat template of the prompts, and that the fine-tuning has converged.",
    "unlikely_tokens": "Look at those tokens: another chat template, another tokenizer or another teacher than that "
    "of the fine-tuning make them.",
    "eos": "Keep the EOS token in the completions and mark cut ones in `truncated`; `trl-blend rollouts` does both. "
    "Otherwise the student never learns to stop.",
}


def rescoring_tolerance(logps_dtype: str, scoring: dict[str, Any] | None, live_dtype: str) -> float:
    """
    Bound on the mean absolute difference, in nats, by the coarsest of: how the scores are stored, the dtype that they
    were computed in (the manifest's settings of scoring), the dtype of the live teacher (`"4bit"` or `"8bit"` where it
    is quantised).
    """
    scored_dtype = str((scoring or {}).get("dtype"))
    if any(bits in dtype for dtype in (scored_dtype, live_dtype) for bits in ("4bit", "8bit")):
        return TOLERANCE_QUANTIZED
    if {scored_dtype, live_dtype} != {"float32"}:
        return TOLERANCE_REDUCED
    return TOLERANCE_FLOAT32 if logps_dtype == "float32" else TOLERANCE_FLOAT16


def check_rescored(rows: SampledRows, live_logps: Sequence[np.ndarray], tolerance: float) -> Finding:
    r"""
    Stored log-probs of the teacher against those that the live teacher gives to the same tokens now.

    With \\( d_t \\) the stored minus the live log-prob: an error where the mean of \\( |d_t| \\) is above `tolerance`,
    where the mean of \\( d_t \\) is above half of it either way (scores at another temperature), or where the mean of
    \\( |d_t| \\) of one row is above five times it (scores that belong to another row). `live_logps` are of shape
    `(T,)` per row, `tolerance` is in nats.
    """
    pairs = zip(rows.teacher_logps, live_logps, strict=True)
    differences = [stored.astype(np.float64) - live for stored, live in pairs]
    together = np.concatenate(differences)
    per_row = np.array([np.abs(difference).mean() for difference in differences])
    mean, bias = float(np.abs(together).mean()), float(together.mean())
    num_bad = int((per_row > ROW_FACTOR * tolerance).sum())
    worst = np.argsort(-per_row)[:_NUM_WORST_ROWS]
    evidence = {
        "num_rows": len(rows),
        "num_tokens": len(together),
        "mean_absolute_difference": mean,
        "mean_difference": bias,
        "max_absolute_difference": float(np.abs(together).max()),
        "tolerance": tolerance,
        "num_rows_beyond": num_bad,
        "worst_rows": [
            {
                "row": rows.names[index],
                "mean_absolute_difference": float(per_row[index]),
                "num_tokens": len(differences[index]),
            }
            for index in worst
        ],
    }
    measured = f"{mean:.2g} nats per token on average over {len(rows)} rows, tolerance {tolerance:g}"
    if mean <= tolerance and abs(bias) <= BIAS_FACTOR * tolerance and num_bad == 0:
        return Finding("rescored", "ok", f"The live teacher gives the stored log-probs ({measured}).", evidence)
    listed = ", ".join(f"{rows.names[index]} ({per_row[index]:.2g})" for index in worst)
    message = (
        f"The live teacher does not give the stored log-probs: they differ by {measured}, mean difference "
        f"{bias:+.2g}; {num_bad} rows are beyond {ROW_FACTOR * tolerance:g}. Worst rows: {listed}."
    )
    return Finding("rescored", "error", message, evidence, REMEDIES["rescored"])


def rescoring_failed(error: Exception) -> Finding:
    """The finding where the live teacher could not score the rows: an error where they do not fit it (ids, length)."""
    severity: Severity = "warning" if isinstance(error, UnsupportedError) else "error"
    message = f"The live teacher cannot score the stored rows: {error}"
    remedy = "Give the teacher that scored the rollouts, or leave re-scoring out."
    return Finding("rescored", severity, message, {"error": type(error).__name__}, remedy)


def check_policy_gap(rows: SampledRows, sampling: dict[str, Any] | None) -> Finding:
    r"""
    Mean of \\( \log p_\theta(y_t) - \log p_T(y_t) \\) over the stored tokens, both at temperature 1: how far the
    student is from the teacher at step 0. A warning above 0.5 nats per token.

    It estimates the per-token reverse KL without bias only where the tokens were sampled at temperature 1 without
    top-k, top-p and min-p. No importance weights are applied: sharper sampling visits probable tokens more often, so
    the number then describes the tokens that are trained on, not the student's distribution. `sampling` are the
    manifest's settings of sampling.
    """
    plain = _is_plain_sampling(sampling)
    student, source = rows.student_logps, "student_logps"
    if student is None and plain:
        student, source = rows.rollout_logps, "rollout_logps"
    if student is None:
        message = "Not measured: the rows have no `student_logps`, and `rollout_logps` are not those of temperature 1."
        return Finding("policy_gap", "info", message, remedy="Collect with `trl-blend rollouts`, which stores them.")
    gaps = [own.astype(np.float64) - other for own, other in zip(student, rows.teacher_logps, strict=True)]
    together, per_row = np.concatenate(gaps), np.array([gap.mean() for gap in gaps])
    mean = float(together.mean())
    evidence = {
        "num_rows": len(rows),
        "num_tokens": len(together),
        "mean_gap": mean,
        # Of the rows: tokens of one completion are not independent
        "standard_error": float(per_row.std(ddof=1) / np.sqrt(len(rows))) if len(rows) > 1 else None,
        "student_logps": source,
        "is_reverse_kl": plain,
        "bound": MAX_GAP,
    }
    what = "Sampled reverse KL" if plain else "Mean log-ratio"
    where = "at temperature 1" if plain else "on the tokens that were sampled"
    message = f"{what} of student to teacher {where}, step 0: {mean:.3g} nats per token"
    if mean <= MAX_GAP:
        return Finding("policy_gap", "ok", f"{message}.", evidence)
    message += f", above {MAX_GAP:g}: the student is far from this teacher."
    return Finding("policy_gap", "warning", message, evidence, REMEDIES["policy_gap"])


def _is_plain_sampling(sampling: dict[str, Any] | None) -> bool:
    return sampling is not None and sampling.get("temperature") == 1.0 and not nucleus_settings(sampling)


def check_unlikely_tokens(rows: SampledRows) -> Finding:
    """Share of stored tokens to which the teacher gives a log-prob below -10. A warning above 1 %."""
    together = np.concatenate(rows.teacher_logps).astype(np.float64)
    share = float((together < UNLIKELY_LOGP).mean())
    evidence = {
        "num_tokens": len(together),
        "share": share,
        "min_logp": float(together.min()),
        "mean_logp": float(together.mean()),
        "bound": MAX_UNLIKELY_SHARE,
    }
    message = f"{share:.2%} of the tokens have a teacher log-prob below {UNLIKELY_LOGP:g}"
    if share <= MAX_UNLIKELY_SHARE:
        return Finding("unlikely_tokens", "ok", f"{message}.", evidence)
    message += f" (more than {MAX_UNLIKELY_SHARE:.0%}). They dominate the gradient."
    return Finding("unlikely_tokens", "warning", message, evidence, REMEDIES["unlikely_tokens"])


def check_eos(rows: SampledRows, eos_token_ids: Collection[int], teacher_eos_token_ids: Collection[int]) -> Finding:
    """
    Every completion ends in an end-of-sequence token of the student unless it is marked as truncated (else an error),
    no truncated one does (a warning), and the teacher expects that token there: mean log-prob of at least -5 (else a
    warning: a teacher that ends its turns with another token, one of `teacher_eos_token_ids`).
    """
    if not eos_token_ids:
        return Finding("eos", "info", "Not checked: neither the data nor the student names an end-of-sequence id.", {})
    ends = np.array([ids[-1] in eos_token_ids for ids in rows.completion_ids])
    truncated = np.array(rows.truncated) if rows.truncated is not None else ~ends
    unended, ended = ~ends & ~truncated, ends & truncated
    logps = np.array([logps[-1] for logps, end in zip(rows.teacher_logps, ends, strict=True) if end], np.float64)
    evidence: dict[str, Any] = {
        "eos_token_ids": sorted(eos_token_ids),
        "teacher_eos_token_ids": sorted(teacher_eos_token_ids),
        "num_rows": len(rows),
        "num_without_eos": int(unended.sum()),
        "num_truncated_with_eos": int(ended.sum()),
        "mean_teacher_logp": float(logps.mean()) if len(logps) else None,
        "bound": MIN_EOS_LOGP,
    }
    if unended.any():
        evidence["rows"] = [rows.names[index] for index in np.flatnonzero(unended)[:_NUM_WORST_ROWS]]
        message = (
            f"{unended.sum()} of {len(rows)} completions are not marked as truncated and do not end in an "
            f"end-of-sequence id {sorted(eos_token_ids)} of the student: {', '.join(evidence['rows'])}."
        )
        return Finding("eos", "error", message, evidence, REMEDIES["eos"])
    if len(logps) and logps.mean() < MIN_EOS_LOGP:
        used = sorted({ids[-1] for ids, end in zip(rows.completion_ids, ends, strict=True) if end})
        why, remedy = _why_the_teacher_goes_on(used, teacher_eos_token_ids)
        message = (
            f"The teacher gives the end-of-sequence tokens {used} a mean log-prob of {logps.mean():.1f}: {why}, and "
            "training would teach the student not to stop."
        )
        return Finding("eos", "warning", message, evidence, remedy)
    if ended.any():
        message = f"{ended.sum()} of {len(rows)} completions are marked as truncated but end in an end-of-sequence id."
        return Finding("eos", "warning", message, evidence, "Mark as truncated only what was cut.")
    return Finding("eos", "ok", "Every completion ends in an end-of-sequence token or is marked as cut.", evidence)


def _why_the_teacher_goes_on(used: Collection[int], teacher_eos: Collection[int]) -> tuple[str, str]:
    """Why a teacher finds the ends of completions unlikely, and the remedy."""
    if not teacher_eos:
        return (
            "the tokens that it ends with itself are not recorded, and may be others",
            "See which token the teacher ends with: student and teacher need the same one.",
        )
    if set(used) & set(teacher_eos):
        return (
            "it ends with the same token, but would not end there",
            "Look at the completions, and whether teacher and student are asked in the same chat template: for the "
            "teacher these are not the end of an answer.",
        )
    return (
        f"it ends with another token ({sorted(teacher_eos)})",
        "Let student and teacher end with the same token: set the student's `eos_token` before its fine-tuning.",
    )


def check_truncation(rows: SampledRows, eos_token_ids: Collection[int]) -> Finding:
    """Share of completions that the length limit cut. A warning above one half: endings are hardly ever trained on."""
    cut = rows.truncated
    if cut is None and not eos_token_ids:
        return Finding("truncation", "info", "Not measured: the rows do not say which completions were cut.")
    if cut is None:
        cut = [ids[-1] not in eos_token_ids for ids in rows.completion_ids]
    share = float(np.mean(cut))
    evidence = {"num_rows": len(rows), "share": share, "bound": MAX_TRUNCATED_SHARE}
    message = f"{share:.1%} of the completions were cut by the length limit"
    if share <= MAX_TRUNCATED_SHARE:
        return Finding("truncation", "ok", f"{message}.", evidence)
    message += ": most endings are not in the data."
    return Finding("truncation", "warning", message, evidence, "Collect with a larger `max_completion_length`.")

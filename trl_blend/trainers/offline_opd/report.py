"""What an [`OfflineOPDTrainer`] run shows: its plot, and its card beside what the paper's authors do."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from trl_blend.consistency.provenance import TeacherProvenance
from trl_blend.consistency.report import ConsistencyReport
from trl_blend.models.identity import ModelIdentity
from trl_blend.reports.cards import CardTeacher, PaperValue, model_link
from trl_blend.reports.curves import NATS, Curve, Panel
from trl_blend.rollouts.format import Manifest
from trl_blend.rollouts.store import RolloutStore
from trl_blend.trainers import _cards
from trl_blend.trainers._record import RunParts
from trl_blend.trainers.offline_opd.config import OfflineOPDConfig


PANELS = (
    Panel("Drift: KL(student ‖ its start)", (Curve("offline/drift_kl", progress="drift"),), NATS),
    Panel("Reverse KL(student ‖ teacher)", (Curve("offline/reverse_kl", progress="reverse_kl"),), NATS),
    Panel("Loss", (Curve("loss"),), "loss"),
    Panel("Divergence over the teacher's top k", (Curve("offline/divergence"),), NATS),
    Panel("Advantage", (Curve("offline/advantage"),), "mean, " + NATS),
    Panel("Spread of the advantage", (Curve("offline/advantage_std"),), "std, " + NATS),
    Panel("Importance ratio", (Curve("offline/importance_ratio"),), "mean of student / rollouts"),
    Panel("Tokens unlikely for the teacher", (Curve("offline/unlikely_share"),), "share below $e^{-10}$"),
    Panel("Entropy", (Curve("entropy"),), NATS),
)


def why_this_loss(config: OfflineOPDConfig) -> str:
    """Why `offline_loss="auto"` took the loss of a run."""
    return f"the data {'have' if config.uses_top_k else 'lack'} the teacher's most probable tokens"


def run_parts(config: OfflineOPDConfig, teacher: str, loss_was_chosen: bool) -> RunParts:
    """What a run is made of, in words."""
    ratio = ", with the ratio to the policy of the rollouts" if config.importance_correction == "token" else ""
    ratio += ", with the KL baseline" if config.advantage_baseline == "kl" else ""
    ratio += f", reward extrapolation {config.reward_extrapolation:g}" if config.reward_extrapolation != 1.0 else ""
    chosen = f" (chosen: {why_this_loss(config)})" if loss_was_chosen else ""
    return RunParts(teacher, "", f"loss {config.offline_loss}{ratio}{chosen}", "the student alone")


_CODE = "code"
TRAINING = {
    "offline_loss": PaperValue("loss", ("sampled_token",), _CODE),
    "importance_correction": PaperValue("ratio to the policy of the rollouts", ("none",), _CODE),
    "advantage_baseline": PaperValue("baseline of the advantage", ("none",), _CODE),
    "reward_extrapolation": PaperValue("reward extrapolation", (1.0,), _CODE),
    "loss_aggregation": PaperValue("mean of the loss", ("sequence",), _CODE, text="per completion, then over them"),
    "learning_rate": PaperValue("learning rate", (2e-6,), _CODE),
    "learning_rate_schedule": PaperValue("learning-rate schedule", ("constant",), _CODE),
    "adam_betas": PaperValue("betas of Adam", ((0.9, 0.98),), _CODE, text="0.9, 0.98"),
    "weight_decay": PaperValue("weight decay", (0.1,), _CODE),
    "max_grad_norm": PaperValue("gradient clipping", (1.0,), _CODE),
    "rows_per_step": PaperValue("rollouts per step", (256,), _CODE),
    "steps": PaperValue("steps", source=_CODE, text="about 150"),
}
ROLLOUTS = {
    "num_rollouts_per_prompt": PaperValue("rollouts per prompt", (1,), _CODE),
    "rollout_temperature": PaperValue("temperature of the rollouts", (0.7,), _CODE),
    "rollout_top_p": PaperValue("top-p of the rollouts", (0.9,), _CODE),
    "rollout_length": PaperValue("length of the rollouts", (4096,), _CODE),
}


def rollout_settings(sampling: dict[str, Any] | None) -> dict[str, Any]:
    """The settings of [`ROLLOUTS`] in a run, from the manifest of its data; empty where they are not recorded."""
    names = {
        "num_rollouts_per_prompt": "num_rollouts_per_prompt",
        "rollout_temperature": "temperature",
        "rollout_top_p": "top_p",
        "rollout_length": "max_new_tokens",
    }
    return {ours: sampling[theirs] for ours, theirs in names.items() if theirs in sampling} if sampling else {}


def paper_values(sampling: dict[str, Any] | None) -> dict[str, PaperValue]:
    """What the authors do for the loss, and for the rollouts as far as those of the run are known."""
    known = rollout_settings(sampling)
    return TRAINING | {name: value for name, value in ROLLOUTS.items() if name in known}


def choices(config: OfflineOPDConfig) -> list[str]:
    """What goes beyond the method, chosen here."""
    found = []
    if config.importance_correction == "token":
        found.append(
            "The ratio to the policy of the rollouts is a choice of `trl_blend`: the paper leaves it out "
            '(`importance_correction="none"`).'
        )
    if config.uses_top_k:
        found.append(
            "The loss over the teacher's stored top-k tokens, with one event for all other tokens, is a choice of "
            '`trl_blend`: the paper has the sampled token only (`offline_loss="sampled_token"`).'
        )
    if config.advantage_baseline == "kl":
        found.append(
            "The baseline of the advantage is taken over the teacher's stored top-k tokens, with one event for all "
            "other tokens: the paper takes the whole vocabulary, or the student's own top k."
        )
    if config.max_policy_drift is not None:
        what = "ends" if config.policy_drift_action == "stop" else "warns about"
        found.append(
            f"A bound of {config.max_policy_drift:g} nats per token on the drift from the policy of the rollouts, "
            f"which {what} the training."
        )
    return found


def example_prompt(tokenizer: Any, prompt_ids: list[int]) -> str | list[dict[str, str]] | None:
    """
    A prompt from its token ids: the message of its user, where it is what the chat template makes of one; its text,
    where there is no template.
    """
    text = tokenizer.decode(prompt_ids)
    if tokenizer.chat_template is None:
        return _cards.shortened(tokenizer.decode(prompt_ids, skip_special_tokens=True)) or None
    marker = "MARKER"
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": marker}], tokenize=False, add_generation_prompt=True
        )
        before, after = (
            tokenizer.decode(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in rendered.split(marker)
        )
    except Exception:  # a template raises what it likes; the example is only an example
        return None
    if not (text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after)):
        return None
    content = text[len(before) : len(text) - len(after)]
    return [{"role": "user", "content": _cards.shortened(content)}]


def card_fields(
    config: OfflineOPDConfig,
    *,
    loss_was_chosen: bool,
    stores: Sequence[RolloutStore],
    reports: Sequence[ConsistencyReport],
    report: ConsistencyReport | None,
    provenance: TeacherProvenance | None,
    num_rows: int | None,
    log_history: list[dict[str, Any]],
    has_weights: bool = False,
) -> dict[str, Any]:
    """Fields of `model_cards/offline_opd.md`, see [`~trl_blend.trainers._run.RunMixin.card_fields`]."""
    manifests = [store.manifest for store in stores]
    sampling = _common([manifest.sampling or {} for manifest in manifests])
    teachers = [
        card_teacher(manifest, one)
        for manifest, one in zip_longest(manifests or [None], reports[: len(manifests) or 1])
    ]
    rollouts = _cards.rows_per_step(config)
    identities = [identity for manifest in manifests for identity in (manifest.teacher, manifest.student)]
    names = [identity.get("name") for identity in identities if identity]
    students = dict.fromkeys(describe(manifest.student) for manifest in manifests) or [describe(None)]
    return {
        "paper_name": "Lightning OPD",
        "paper": paper_values(sampling),
        "settings": rollout_settings(sampling),
        "choices": choices(config),
        "teachers": teachers,
        "data_rows": sum(manifest.num_rows for manifest in manifests) if manifests else num_rows,
        "data_unit": "rollouts",
        "per_step": per_step(rollouts, num_rows, config),
        "result_metrics": r"(?:.+_)?(loss|offline/reverse_kl)",
        "curves_text": "Drift from the policy of the rollouts and other metrics against the optimizer step",
        "chosen": why_this_loss(config) if loss_was_chosen else "",
        "manifests": manifests,
        "student": "; ".join(students),
        "report": report,
        "has_weights": has_weights,
        "drift": [entry for entry in log_history if "offline/drift_kl" in entry],
        # What the findings of the check may quote
        "named": [
            *names,
            *(store.name for store in stores),
            *(teacher.name for teacher in (provenance.teachers if provenance else ())),
            config.teacher_model_name_or_path,
            config.sft_teacher,
        ],
    }


def _common(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What several dictionaries have in common."""
    first, *others = settings or [{}]
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def per_step(rollouts: int, num_rows: int | None, config: OfflineOPDConfig) -> str:
    """Rows whose gradients make up a step: no more than there are, and fewer in the last one of an epoch."""
    what = "packed rows of rollouts" if config.packing else "rollouts"
    if num_rows is None or num_rows % rollouts == 0 or config.dataloader_drop_last:
        return f"{rollouts:,} {what}"
    if num_rows < rollouts:
        return f"{num_rows:,} {what}, all that there are"
    return f"{rollouts:,} {what}, {num_rows % rollouts:,} in the last step of an epoch"


def card_teacher(manifest: Manifest | None, report: ConsistencyReport | None) -> CardTeacher:
    """The teacher of the scores; verified where its recorded weights are those of the SFT teacher."""
    if manifest is None or not manifest.teacher:
        return CardTeacher(None, None, None, "unknown", "the data do not record who scored them")
    teacher = ModelIdentity.from_dict(manifest.teacher)
    dtype = (manifest.scoring or {}).get("dtype")
    return CardTeacher(teacher.name, teacher.commit, dtype, *_state(teacher, report))


def _state(teacher: ModelIdentity, report: ConsistencyReport | None) -> tuple[str, str]:
    digest = f"weights {teacher.weights.sha256[:12]}" if teacher.weights else "its weights were not hashed"
    recorded = f"recorded with the data ({digest})"
    if report is None:
        return "stated", f"{recorded}, compared with nothing"
    compared, provenance = report["teacher"].evidence, report["provenance"].evidence.get("how")
    relation, by_weights = compared.get("relation"), compared.get("compared_by") == "weights"
    if relation == "different":
        return "stated", f"{recorded}, and another one than the teacher that the student was fine-tuned on"
    if relation not in ("same", "bfloat16_copy") or not by_weights:
        return "stated", f"{recorded}; its weights could not be compared with those of the student's own teacher"
    if provenance != "recorded":
        return "stated", f"{recorded}; that the student was fine-tuned on it is what the user says"
    if number := compared.get("teachers"):
        one_of = f"one of the {number} recorded in the student's fine-tuning"
        return "stated", f"{recorded}, {one_of}; {compared['whose']}"
    copy = ", up to rounding to bfloat16" if relation == "bfloat16_copy" else ""
    return "verified", f"{recorded}, the same as those recorded in the student's fine-tuning{copy}"


def describe(identity: dict[str, Any] | None) -> str:
    """One line about a model, without the folders of this machine."""
    if not identity:
        return "unknown: no identity was recorded"
    model = ModelIdentity.from_dict(identity)
    digests = [f"weights {model.weights.sha256[:12]}" if model.weights else "weights not hashed"]
    if model.adapter is not None:
        digests.append(f"adapter {model.adapter.weights.sha256[:12]}")
    return f"{model_link(model.name, model.commit)}, {', '.join(digests)}"

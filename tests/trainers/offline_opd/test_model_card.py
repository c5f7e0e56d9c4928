"""The README.md that is written beside a checkpoint."""

import json
import shutil

import pytest

from tests.trainers import runs
from tests.trainers.card_reading import metadata_of, rows_of, run_of, settings_of, tables_of, write_card
from tests.trainers.runs import PROMPTS
from trl_blend import load_scored_rollouts
from trl_blend.consistency.provenance import PROVENANCE_FILE


DRIFT = "drift from the policy of the rollouts, first and last log"
# What the tiny runs differ in whatever else is set, from the authors' code
COMMON = {
    "learning rate": ("0.005", "2e-06 (code)"),
    "weight decay": ("0", "0.1 (code)"),
    "gradient clipping": ("0", "1 (code)"),
    "rollouts per step": ("8", "256 (code)"),
    "steps": ("0", "about 150 (code)"),
}
IDENTITY = "identity of the teacher"


def checks_of(card):
    return {name: (result, finding) for name, result, finding in tables_of(card)["Teacher consistency"][1:]}


def test_card(build_on_store, folder):
    trainer = build_on_store(max_steps=2)
    record = runs.train(trainer)
    card = write_card(trainer)
    assert str(folder) not in card  # findings quote paths
    manifest = json.loads((folder / "scored_teacher" / "manifest.json").read_text())
    digest, student = (manifest[role]["weights"]["sha256"][:12] for role in ("teacher", "student"))
    rows, run = rows_of(card), run_of(card)
    assert run["teacher"] == "`teacher` (a local model), float32"
    assert run[IDENTITY] == (
        f"**verified**: recorded with the data (weights {digest}), the same as those recorded in the student's "
        "fine-tuning"
    )
    assert (
        run["data"] == f"{len(PROMPTS)} rollouts of a dataset that was not named" and run["per step"] == "8 rollouts"
    )
    assert rows["student that drew the rollouts"] == f"`student` (a local model), weights {student}"
    assert "temperature 0.7, top_p 0.9" in rows["sampling"]
    assert rows["rollouts"].startswith(f"8 rows, {manifest['num_completion_tokens']} tokens, ")
    assert rows["scored with"] == "transformers, temperature 1.0, dtype float32"
    drift = record.logged("offline/drift_kl")
    assert rows[DRIFT] == f"{drift[0]:.2g}, {drift[1]:.2g} nats per token" and len(drift) == 2
    assert [name for name, _ in checks_of(card).items()] == [finding.name for finding in trainer.consistency_report]
    for finding in trainer.consistency_report:
        assert checks_of(card)[finding.name][0] == finding.severity
    assert "the same weights" in checks_of(card)["teacher"][1]
    assert "offline-opd" in metadata_of(card)["tags"]
    for text in ("wu2026lightning", "arXiv:2604.13010", "huggingface.co/papers/2604.13010", "deployed alone"):
        assert text in card
    sampled = {"length of the rollouts": ("8", "4096 (code)"), "steps": ("2", "about 150 (code)")}
    assert settings_of(card) == COMMON | sampled
    same = ("rollouts per prompt (1)", "temperature of the rollouts (0.7)", "top-p of the rollouts (0.9)")
    assert all(text in card for text in same)


def test_the_settings_of_the_paper(build_offline):
    settings = {"learning_rate": 2e-6, "weight_decay": 0.1, "max_grad_norm": 1.0, "gradient_accumulation_steps": 32}
    card = write_card(build_offline(**settings))
    assert settings_of(card) == {"steps": COMMON["steps"]} and "Choices of `trl_blend`" not in card


def test_settings_beside_the_paper(build_offline):
    settings = {"importance_correction": "token", "importance_cap": 2.0, "loss_aggregation": "token"}
    other = {"adam_beta1": 0.8, "lr_scheduler_type": "linear", "warmup_steps": 3, "max_policy_drift": 0.5}
    card = write_card(build_offline(**settings, **other))
    assert settings_of(card) == COMMON | {
        "ratio to the policy of the rollouts": ("token", "none (code)"),
        "mean of the loss": ("token", "per completion, then over them (code)"),
        "learning-rate schedule": ("linear, 3 warmup steps", "constant (code)"),
        "betas of Adam": ("0.8, 0.98", "0.9, 0.98 (code)"),
    }
    assert "The ratio to the policy of the rollouts is a choice of `trl_blend`" in card
    assert "A bound of 0.5 nats per token on the drift" in card and "warns about" in card
    assert rows_of(card)["ratio to the policy of the rollouts"] == "per token, at most 2.0"


def test_other_advantages_cite_their_papers(build_offline):
    card = write_card(build_offline(advantage_baseline="kl"))
    assert settings_of(card) == COMMON | {"baseline of the advantage": ("kl", "none (code)")}
    assert "arXiv:2605.07865" in card and "arXiv:2602.12125" not in card and "wu2026lightning" in card
    assert "The baseline of the advantage is taken over the teacher's stored top-k tokens" in card
    card = write_card(build_offline(reward_extrapolation=1.25))
    assert settings_of(card) == COMMON | {"reward extrapolation": ("1.25", "1 (code)")}
    assert "arXiv:2602.12125" in card and "arXiv:2605.07865" not in card
    assert rows_of(card)["reward extrapolation"].startswith("1.25, as in [G-OPD]")


def test_weighted_rows(build_offline, rows):
    cards = [write_card(build_offline(train_dataset=d)) for d in (rows, rows.add_column("row_weight", [2.0] * 8))]
    shown = [rows_of(card).get("weights of the rows") for card in cards]
    assert shown == [None, "mean of the loss weighted with the column `row_weight` of the data"]


def test_rows_without_a_manifest(build_offline):
    card = write_card(build_offline(offline_loss="top_k_reverse_kl"))
    assert rows_of(card)["student that drew the rollouts"] == "unknown: no identity was recorded"
    assert rows_of(card)["rollouts"] == "rows without a manifest: where they came from is not recorded"
    assert run_of(card)["teacher"] == "a model without a name"
    assert run_of(card)[IDENTITY] == "**unknown**: the data do not record who scored them"
    assert "The loss over the teacher's stored top-k tokens" in card
    assert settings_of(card)["loss"] == ("top_k_reverse_kl", "sampled_token (code)")


def test_a_stated_teacher_is_called_stated(build_on_store, folder):
    card = write_card(build_on_store(student="unrecorded", sft_teacher=str(folder / "teacher")))
    assert run_of(card)[IDENTITY].startswith("**stated**: recorded with the data (weights ")
    assert run_of(card)[IDENTITY].endswith("that the student was fine-tuned on it is what the user says")
    assert "The teacher of the fine-tuning stage, `teacher`, was stated by the user, not verified." in card
    assert str(folder) not in card


def test_a_relative_path_in_the_record_beside_the_student(build_on_store, folder, tmp_path):
    shutil.copytree(folder / "student", tmp_path / "student")
    path = tmp_path / "student" / PROVENANCE_FILE
    record = json.loads(path.read_text())
    record["teacher"]["name"] = "runs/of/mine/the_teacher"
    path.write_text(json.dumps(record))
    card = write_card(build_on_store(student=tmp_path / "student"))
    assert "of/mine" not in card and "the_teacher (weights" in checks_of(card)["provenance"][1]


def test_another_teacher(build_on_store):
    card = write_card(build_on_store(store="scored_second", teacher_consistency="warn"))
    assert run_of(card)[IDENTITY].startswith("**stated**: ")
    assert "another one than the teacher that the student was fine-tuned on" in run_of(card)[IDENTITY]
    assert "**not everything held, and training went on as asked**" in card
    assert checks_of(card)["teacher"][0] == "error"


def test_nothing_checked(build_on_store):
    card = write_card(build_on_store(teacher_consistency="off"))
    assert run_of(card)[IDENTITY].endswith("compared with nothing")
    assert run_of(card)[IDENTITY].startswith("**stated**")
    assert 'Not checked (`teacher_consistency="off"`)' in card and "Teacher consistency" not in tables_of(card)


def test_missing_provenance(build_on_store):
    card = write_card(build_on_store(student="unrecorded", teacher_consistency="warn"))
    assert run_of(card)[IDENTITY].startswith("**stated**")
    assert "could not be compared with those of the student's own teacher" in run_of(card)[IDENTITY]


@pytest.mark.parametrize("eval_strategy", ["no", "steps"])
def test_evaluation(build_on_store, folder, eval_strategy):
    stores = {"own": str(folder / "scored_teacher"), "other": str(folder / "scored_second")}
    settings = {"eval_strategy": eval_strategy, "eval_steps": 2, "max_steps": 2}
    trainer = build_on_store(**settings, trainer_kwargs={"eval_dataset": stores})
    trainer.train()
    card = write_card(trainer)
    if eval_strategy == "no":
        assert "## Results" not in card
        return
    header, *rows = tables_of(card)["Results"]
    assert header == ["metric", "step 2"]
    expected = {}
    for name in stores:
        (entry,) = [entry for entry in trainer.state.log_history if f"eval_{name}_loss" in entry]
        expected |= {f"{name}_loss": entry[f"eval_{name}_loss"]}
        expected |= {f"{name}_offline/reverse_kl": entry[f"eval_{name}_offline/reverse_kl"]}
    assert {name: value for name, value in rows} == {name: f"{value:.4g}" for name, value in expected.items()}
    assert len(set(expected.values())) == 4


def test_a_store_that_is_streamed(build_on_store, folder):
    store = load_scored_rollouts(folder / "scored_teacher")
    card = write_card(build_on_store(train_dataset=store, stream_rollouts=True, max_steps=2))
    assert run_of(card)["data"].startswith(f"{len(PROMPTS)} rollouts of")

"""The README.md that is written beside a checkpoint."""

import pytest
from peft import LoraConfig

from tests.tiny import tiny_model
from tests.trainers import runs
from tests.trainers.card_reading import code_of, metadata_of, read_card, rows_of, run_of, settings_of, write_card
from trl_blend._version import __version__


BASELINE = "This run uses a baseline of that paper instead of its method"
KL_ROW = "realised KL to the student, first and last logged blended step"
WEIGHT_ROW = "teacher weight solved for, mean, same steps"
# What the tiny runs differ in whatever else is set, from Table 2 of the paper
COMMON = {
    "rollouts per prompt": ("1", "4 (Table 2)"),
    "prompts per step": ("8", "64 (Table 2)"),
    "completion length": ("8", "7168 (Table 2)"),
    "learning rate": ("0.005", "1e-05 (Table 2)"),
    "learning-rate schedule": ("constant", "constant after a cosine warmup of 15 steps (Table 2)"),
    "weight decay": ("0", "0.01 (Table 2)"),
    "gradient clipping": ("0", "1 (Table 2)"),
    "length of the training": ("1 step", "1 epoch (Table 2)"),
}
FULL = {"tokens of the divergence": ("full", "student_top_k (Table 2)")}


def check(card):
    assert {"trust-region-opd"} <= set(metadata_of(card)["tags"])
    assert "pipeline(" in code_of(card)[1]
    for text in ("plyusov2026trust", "arXiv:2605.31159", "huggingface.co/papers/2605.31159"):
        assert text in card, text
    assert f"trl_blend: {__version__}" in card and "deployed alone, without the teacher" in card
    return card


def card_of(trainer):
    return check(write_card(trainer))


def test_trust_region(build_opd):
    settings = {"kl_budget": 0.05, "kl_budget_schedule": "cosine", "blend_warmup_steps": 3, "temperature": 0.7}
    trainer = build_opd(max_steps=4, num_rollouts_per_prompt=4, save_strategy="steps", save_steps=4, **settings)
    record = runs.train(trainer)
    card = check(read_card(trainer))
    rows, run = rows_of(card), run_of(card)
    assert run["teacher"] == "`teacher` (a local model), float32"
    assert run["identity of the teacher"].startswith("**stated**: loaded for this run under this name")
    assert run["data"] == f"{len(runs.PROMPTS)} prompts of a dataset that was not named"
    assert run["per step"] == "8 rollouts: 2 prompts with 4 each"
    expected = {
        "training rollouts": "trust_region",
        "KL budget at step 0 (nats per token)": "0.05",
        "schedule of the budget": "cosine to 0 in 3 steps",
        "divergence": "reverse KL, all tokens",
        "target": "the teacher",
        "end-of-sequence tokens": "compared as they are",
    }
    assert {name: rows[name] for name in expected} == expected
    realised, weights = record.logged("blend/kl_behavior_student"), record.logged("blend/teacher_weight/mean")
    assert len(realised) == 3
    assert rows[KL_ROW] == f"{realised[0]:.2g}, {realised[2]:.2g} nats per token"
    assert rows[WEIGHT_ROW] == f"{weights[0]:.2g}, {weights[2]:.2g}"
    assert BASELINE not in card and "jang2026stable" not in card and "xu2025speculative" not in card
    changed = {"prompts per step": ("2", "64 (Table 2)"), "length of the training": ("4 steps", "1 epoch (Table 2)")}
    own = {
        "schedule of the budget": ("cosine", "linear or constant (Appendix A)"),
        "steps until the budget is 0": ("3", "15, 25 or 50 (swept, Appendix A)"),
        "temperature": ("0.7", "1 (Table 2)"),
    }
    expected = FULL | COMMON | changed | own
    del expected["rollouts per prompt"]
    assert settings_of(card) == expected
    assert "The cosine schedule of the budget: the paper's is linear." in card


def test_the_settings_of_the_paper(build_opd):
    """Table 2 as it is, but for what a tiny run cannot have."""
    settings = {
        "kl_budget": 0.02,
        "blend_warmup_steps": 25,
        "num_rollouts_per_prompt": 4,
        "kl_support": "student_top_k",
    }
    optimizer = {"learning_rate": 1e-5, "weight_decay": 0.01, "max_grad_norm": 1.0, "max_steps": -1}
    batch = {"gradient_accumulation_steps": 32, "max_completion_length": 7168, "num_train_epochs": 1}
    batch["train_dataset"] = runs.dataset(runs.PROMPTS * 8)
    card = card_of(build_opd(**settings, **optimizer, **batch))
    assert settings_of(card) == {"learning-rate schedule": COMMON["learning-rate schedule"]}
    assert "Choices of `trl_blend`" not in card
    card = card_of(
        build_opd(**settings, **optimizer, **batch, kl_top_k=8, kl_budget_schedule="constant", adam_beta2=0.9)
    )
    assert settings_of(card) == {
        "learning-rate schedule": COMMON["learning-rate schedule"],
        "tokens of the divergence per prefix": ("8", "16 (Table 2)"),
        "steps of blended rollouts": ("25", "the whole run (Appendix A.2)"),
        "betas of Adam": ("0.9, 0.9", "0.9, 0.999 (Table 2)"),
    }


def test_fixed_budget(build_opd):
    card = card_of(build_opd(kl_budget=0.03, kl_budget_schedule="constant"))
    assert rows_of(card)["schedule of the budget"] == "constant" and KL_ROW not in card and BASELINE in card
    sweep = "0.001, 0.005, 0.01, 0.02 or 0.05 (swept, Appendix A)"
    assert settings_of(card) == {"KL budget at step 0": ("0.03", sweep)} | FULL | COMMON
    card = card_of(build_opd(kl_budget=0.02, kl_budget_schedule="constant", blend_warmup_steps=7))
    assert rows_of(card)["schedule of the budget"] == "constant for 7 steps"


def test_switched_off(build_opd):
    for settings in ({"kl_budget": 0.0}, {"rollout_policy": "fixed_weight", "teacher_weight": 0.0}):
        card = card_of(build_opd(**settings))
        policy = settings.get("rollout_policy", "trust_region")
        assert rows_of(card)["training rollouts"] == f"{policy}, switched off"


def test_fixed_weight(build_opd):
    trainer = build_opd(rollout_policy="fixed_weight", teacher_weight=0.3, blend_warmup_steps=5)
    record = runs.train(trainer)
    card = card_of(trainer)
    rows = rows_of(card)
    assert rows["training rollouts"] == "fixed_weight" and rows["teacher weight"] == "0.3 for 5 steps"
    (realised,) = record.logged("blend/kl_behavior_student")
    assert rows[KL_ROW] == f"{realised:.2g}, {realised:.2g} nats per token" and WEIGHT_ROW not in rows
    assert BASELINE in card and "The teacher weight is a choice of `trl_blend` or of its user" in card
    assert "KL budget" not in card and settings_of(card)["teacher weight"] == ("0.3", "not given")


def test_speculative_kd(build_opd):
    card = card_of(build_opd(rollout_policy="speculative_kd", skd_top_k=20, skd_teacher_temperature=0.6))
    rows = rows_of(card)
    assert rows["training rollouts"] == "speculative_kd"
    assert rows["teacher top-k, teacher temperature"] == "20, 0.6"
    assert BASELINE in card and "xu2025speculative" in card and "KL budget" not in card
    assert settings_of(card) == {"teacher top-k": ("20", "15, 25 or 50 (swept, Appendix A.2)")} | FULL | COMMON


def test_student(build_opd):
    card = card_of(build_opd(rollout_policy="student", beta=0.5))
    rows = rows_of(card)
    assert rows["training rollouts"] == "student" and BASELINE in card
    assert rows["divergence"] == "generalised Jensen-Shannon, beta 0.5, all tokens"
    assert settings_of(card)["divergence"] == ("generalised Jensen-Shannon, beta 0.5", "reverse KL (Table 2)")
    assert "sampling temperature" not in rows and "KL budget" not in card


def test_temperature_warmup(build_opd):
    settings = {"temperature_warmup_start": 0.8, "temperature_warmup_steps": 10}
    card = card_of(build_opd(rollout_policy="student", **settings))
    assert rows_of(card)["sampling temperature"] == "from 0.8 to 1.0 in 10 steps"
    assert settings_of(card)["steps of the temperature warmup"] == ("10", "15 or 25 (Appendix A.2)")
    assert "sampling temperature at step 0 (0.8)" in card


@pytest.mark.parametrize("policy", ["student", "trust_region"])
def test_veto_and_top_k(build_opd, policy):
    settings = {"distillation_target": "veto", "veto_weight_start": 0.6, "kl_support": "student_top_k", "kl_top_k": 8}
    card = card_of(build_opd(rollout_policy=policy, **settings))
    rows = rows_of(card)
    assert rows["target"] == "Veto, student exponent 0.6 to 0 in 50 steps"
    assert rows["divergence"] == "reverse KL, the student's 8 most probable tokens"
    assert settings_of(card)["steps of the Veto exponent"] == ("50", "not given")
    assert "jang2026stable" in card and (BASELINE in card) == (policy == "student")
    combined = "This run combines its rollouts with the target of one of its baselines."
    assert (combined in card) == (policy == "trust_region")
    assert "The number of steps of the Veto exponent is a choice of `trl_blend` or of its user" in card


LOSSES = {
    "interpolated": (
        {"distillation_target": "interpolated", "target_weight": 0.3},
        ("target", "the student at step 0 and the teacher, mixed log-linearly with weight 0.3 of the teacher"),
        ("hubotter2026reinforcement",),
    ),
    "beyond": (
        {"distillation_target": "interpolated", "target_weight": 1.5},
        ("target", "the student at step 0 and the teacher, mixed log-linearly with weight 1.5 of the teacher"),
        ("hubotter2026reinforcement", "yang2026learning"),
    ),
    "tip": (
        {"token_selection": "tip"},
        (
            "token positions of the loss",
            "student's entropy from its 0.5 quantile on; of the others, divergence from its 0.9 quantile on",
        ),
        ("xu2026tip",),
    ),
    "uncertain": (
        {"forward_kl_entropy": 0.8},
        ("forward KL", "added where the teacher's entropy is above 0.8 nats"),
        ("jin2026entropy",),
    ),
    "iw_opd": (
        {"distillation_objective": "iw_opd"},
        ("divergence", "reverse KL, sampled tokens, with the weights of IW-OPD, gamma 0.5"),
        ("xie2026position",),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_the_paper_does_not_have(build_opd, name):
    settings, (row, value), cited = LOSSES[name]
    card = card_of(build_opd(rollout_policy="student", **settings))
    assert rows_of(card)[row] == value
    assert "The loss of this run is not the paper's" in card and BASELINE not in card
    assert card.count("the paper has no such loss.") == 1
    every = {key for _, _, keys in LOSSES.values() for key in keys}
    assert {key for key in every if key in card} == set(cited)


def test_merged_eos(build_opd):
    card = card_of(build_opd(teacher_eos_token_id=[20, 33]))
    assert rows_of(card)["end-of-sequence tokens"] == "merged into id 1 (20, 30, 40, 50, 33)"
    assert "Merging the end-of-sequence tokens of both models in both models is a choice of `trl_blend`" in card


def test_other_teachers(build_opd):
    assert run_of(card_of(build_opd(teacher=tiny_model(seed=1))))["teacher"] == "a model without a name, float32"
    peft_config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    card = card_of(build_opd(teacher=None, trainer_kwargs={"peft_config": peft_config}))
    assert run_of(card)["teacher"] == "`student` (a local model), float32"
    assert "with the adapters disabled" in run_of(card)["identity of the teacher"]
    assert run_of(card)["trained weights"] == "LoRA on all linear layers, rank 8, alpha 8, float32"
    assert metadata_of(card)["library_name"] == "peft" and "`peft` has to be installed" in card

"""The README.md that is written beside a checkpoint."""

import ast
import re

import pytest
import yaml
from peft import LoraConfig

from tests.tiny import tiny_model
from tests.trainers import runs
from trl_blend import __version__


def card_of(trainer) -> str:
    trainer.create_model_card(model_name="tiny")
    with open(f"{trainer.args.output_dir}/README.md", encoding="utf-8") as file:
        return file.read()


def rows_of(card: str) -> dict[str, str]:
    """The rows of the card's table, and that it is one table."""
    lines = card.splitlines()
    start = lines.index("|---|---|")
    end = next(index for index in range(start, len(lines)) if not lines[index].startswith("|"))
    rows = dict(re.fullmatch(r"\| (.+?) \| (.+?) \|", line).groups() for line in lines[start + 1 : end])
    assert len(rows) == end - start - 1 and not any(line.startswith("|") for line in lines[end:])
    return rows


def assert_complete(card):
    # A double brace of BibTeX is followed by text, a placeholder by a space
    assert not re.search(r"\[\[|\[%|\[#|\{\{ |\{%|%\}", card)
    assert "None" not in card.split("---", 2)[2]
    metadata = yaml.safe_load(card.split("---")[1])
    assert {"trl", "trl-blend", "trust-region-opd"} <= set(metadata["tags"])
    assert metadata["library_name"] == "transformers"
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    ast.parse(code)
    for text in ("plyusov2026trust", "arXiv:2605.31159", "huggingface.co/papers/2605.31159", "vonwerra2020trl"):
        assert text in card, text
    assert f"trl_blend: {__version__}" in card and "deployed alone, without the teacher" in card


BASELINE = "This run uses a baseline of that paper instead of its method"
KL_ROW = "realised KL to the student, first and last logged blended step"
WEIGHT_ROW = "teacher weight solved for, mean, same steps"


def test_trust_region(build_opd, models):
    settings = {"kl_budget": 0.05, "kl_budget_schedule": "cosine", "blend_warmup_steps": 3, "temperature": 0.7}
    trainer = build_opd(max_steps=4, num_rollouts_per_prompt=4, save_strategy="steps", save_steps=4, **settings)
    record = runs.train(trainer)
    with open(f"{trainer.args.output_dir}/README.md", encoding="utf-8") as file:
        card = file.read()
    assert_complete(card)
    rows = rows_of(card)
    expected = {
        "teacher (frozen)": str(models / "teacher"),
        "training rollouts": "trust_region",
        "KL budget at step 0 (nats per token)": "0.05",
        "schedule of the budget": "cosine to 0 in 3 steps",
        "divergence": "reverse KL, all tokens",
        "target": "the teacher",
        "end-of-sequence tokens": "compared as they are",
        "rollouts per prompt, temperature": "4, 0.7",
        "learning rate, schedule": "0.005, constant",
    }
    assert {name: rows[name] for name in expected} == expected
    realised, weights = record.logged("blend/kl_behavior_student"), record.logged("blend/teacher_weight/mean")
    assert len(realised) == 3
    assert rows[KL_ROW] == f"{realised[0]:.2g}, {realised[2]:.2g} nats per token"
    assert rows[WEIGHT_ROW] == f"{weights[0]:.2g}, {weights[2]:.2g}"
    assert BASELINE not in card and "a choice of `trl_blend`" not in card
    assert "jang2026stable" not in card and "xu2025speculative" not in card


def test_fixed_budget(build_opd):
    card = card_of(build_opd(kl_budget=0.02, kl_budget_schedule="constant"))
    assert_complete(card)
    assert rows_of(card)["schedule of the budget"] == "constant" and KL_ROW not in card
    card = card_of(build_opd(kl_budget=0.02, kl_budget_schedule="constant", blend_warmup_steps=7))
    assert rows_of(card)["schedule of the budget"] == "constant for 7 steps"


def test_switched_off(build_opd):
    for settings in ({"kl_budget": 0.0}, {"rollout_policy": "fixed_weight", "teacher_weight": 0.0}):
        card = card_of(build_opd(**settings))
        assert_complete(card)
        policy = settings.get("rollout_policy", "trust_region")
        assert rows_of(card)["training rollouts"] == f"{policy}, switched off"


def test_fixed_weight(build_opd):
    trainer = build_opd(rollout_policy="fixed_weight", teacher_weight=0.3, blend_warmup_steps=5)
    record = runs.train(trainer)
    card = card_of(trainer)
    assert_complete(card)
    rows = rows_of(card)
    assert rows["training rollouts"] == "fixed_weight" and rows["teacher weight"] == "0.3 for 5 steps"
    (realised,) = record.logged("blend/kl_behavior_student")
    assert rows[KL_ROW] == f"{realised:.2g}, {realised:.2g} nats per token" and WEIGHT_ROW not in rows
    assert BASELINE in card and "The teacher weight is a choice of `trl_blend` or of its user" in card
    assert "KL budget" not in card


def test_speculative_kd(build_opd):
    card = card_of(build_opd(rollout_policy="speculative_kd", skd_top_k=25, skd_teacher_temperature=0.6))
    assert_complete(card)
    rows = rows_of(card)
    assert rows["training rollouts"] == "speculative_kd"
    assert rows["teacher top-k, teacher temperature"] == "25, 0.6"
    assert BASELINE in card and "xu2025speculative" in card and "KL budget" not in card


def test_student(build_opd):
    card = card_of(build_opd(rollout_policy="student", beta=0.5))
    assert_complete(card)
    rows = rows_of(card)
    assert rows["training rollouts"] == "student" and BASELINE in card
    assert rows["divergence"] == "generalised Jensen-Shannon, beta 0.5, all tokens"
    assert "sampling temperature" not in rows and "KL budget" not in card


def test_temperature_warmup(build_opd):
    settings = {"temperature_warmup_start": 0.8, "temperature_warmup_steps": 15}
    card = card_of(build_opd(rollout_policy="student", **settings))
    assert_complete(card)
    assert rows_of(card)["sampling temperature"] == "from 0.8 to 1.0 in 15 steps"


@pytest.mark.parametrize("policy", ["student", "trust_region"])
def test_veto_and_top_k(build_opd, policy):
    settings = {"distillation_target": "veto", "veto_weight_start": 0.6, "kl_support": "student_top_k", "kl_top_k": 8}
    card = card_of(build_opd(rollout_policy=policy, **settings))
    assert_complete(card)
    rows = rows_of(card)
    assert rows["target"] == "Veto, student exponent 0.6 to 0 in 50 steps"
    assert rows["divergence"] == "reverse KL, the student's 8 most probable tokens"
    assert "jang2026stable" in card and (BASELINE in card) == (policy == "student")
    combined = "This run combines its rollouts with the target of one of its baselines."
    assert (combined in card) == (policy == "trust_region")
    assert "The number of steps of the Veto exponent is a choice of `trl_blend` or of its user" in card


def test_merged_eos(build_opd):
    card = card_of(build_opd(teacher_eos_token_id=[20, 33]))
    assert_complete(card)
    assert rows_of(card)["end-of-sequence tokens"] == "merged into id 1 (20, 30, 40, 50, 33)"
    assert "Merging the end-of-sequence tokens of both models in both models is a choice of `trl_blend`" in card


def test_other_teachers(build_opd):
    assert rows_of(card_of(build_opd(teacher=tiny_model(seed=1))))["teacher (frozen)"] == "an unnamed model"
    peft_config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    card = card_of(build_opd(teacher=None, trainer_kwargs={"peft_config": peft_config}))
    assert_complete(card)
    assert rows_of(card)["teacher (frozen)"] == "the student's base, adapters disabled"

"""The README.md that is written beside a checkpoint."""

import ast
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from tests.tiny import tiny_model
from tests.trainers import runs
from tests.trainers.card_reading import (
    code_of,
    metadata_of,
    read_card,
    rows_of,
    run_of,
    settings_of,
    tables_of,
    write_card,
)
from trl_blend._version import __version__


NOTICE = "Decoded alone, this model is not the policy whose reward was maximised"
UNKNOWN = "not known to us"


def names_used(card):
    return {node.id for node in ast.walk(code_of(card)[0]) if isinstance(node, ast.Name)}


def test_mixed(build, models):
    settings = {"teacher_weight_schedule": "cosine", "teacher_weight_decay_steps": 4, "temperature": 0.7}
    trainer = build(teacher_weight=0.4, max_steps=2, save_strategy="steps", save_steps=2, **settings)
    trainer.train()
    card = read_card(trainer)
    rows, run = rows_of(card), run_of(card)
    assert run["teacher"] == "`teacher` (a local model), float32"
    stated = "**stated**: loaded for this run under this name, its weights were not hashed"
    assert run["identity of the teacher"] == stated
    assert run["started from"] == "`student` (a local model)" and run["trained weights"] == "all, float32"
    assert run["per step"] == "8 rollouts: 2 prompts with 4 each" and run["seed"] == "42"
    tokens = trainer.state.num_input_tokens_seen
    assert run["length"] == f"2 of 2 optimizer steps, 0.5 epochs, {tokens} tokens" and tokens > 0
    assert run["data"] == f"{len(runs.PROMPTS)} prompts of a dataset that was not named"
    assert rows["teacher weight at step 0"] == "0.4"
    assert rows["schedule"] == "cosine to 0 in 4 steps"
    assert float(rows["weight at the end"]) == pytest.approx(0.2)
    assert rows["mixing space"] == "logits"
    assert rows["objective"] == "mixed"
    assert rows["loss type, ratio level"] == f"{trainer.args.loss_type}, token"
    assert rows["rewards (weight)"] == "`reward` (1)"
    assert NOTICE in card
    assert "arXiv:2605.20555" in card and "gan2026complementing" in card and "huggingface.co/papers/2605.20555" in card
    assert "zhang2026logitfusion" not in card and "deepseek" not in card.lower()
    assert f"trl_blend: {__version__}" in card and "PEFT" not in card
    assert {"custom_generate", "logit-mix-grpo"} <= set(metadata_of(card)["tags"])


def test_student(build):
    settings = {"teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 10}
    card = write_card(
        build(objective="student", teacher_weight=0.5, mixing_space="probs", is_clip_max=2.5, **settings)
    )
    rows = rows_of(card)
    assert run_of(card)["teacher"] == "`teacher` (a local model), float32"
    assert rows["schedule"] == "linear to 0 in 10 steps"
    assert rows["mixing space"] == "probs"
    assert rows["objective"] == "student, importance ratio clipping `floor` at 2.5"
    assert "The floor under the importance ratio of rewarded tokens" in card
    assert NOTICE not in card and "trust_remote_code" not in card and "pipeline" in names_used(card)
    assert "deployed alone" in card and "custom_generate" not in card
    assert "zhang2026logitfusion" in card and "Logit fusion" in card
    assert "2605.20555" not in card and "gan2026" not in card


def test_arithmetic(build):
    settings = {"teacher": ["teacher", "second"], "teacher_weight": [1.0, -0.7], "mixing_space": "arithmetic"}
    trainer = build(**settings)
    card = write_card(trainer)
    rows = rows_of(card)
    assert rows["mixing space"] == "arithmetic" and rows["weight at the end"] == "1, -0.7"
    assert settings_of(card)["mixing space"] == ("arithmetic", "logits (Section 2)")
    assert "z_S + Σ w_i z_i" in card and "liu2021dexperts" in card and "liu2024tuning" in card and NOTICE in card
    assert "Training on a sum of logits" in card
    assert "liu2021dexperts" not in write_card(build())


@pytest.mark.parametrize("mode", ["ppo", "none"])
def test_student_without_a_cap(build, mode):
    card = write_card(build(objective="student", is_clip_mode=mode))
    assert rows_of(card)["objective"] == f"student, importance ratio clipping `{mode}`"
    assert settings_of(card)["clipping of token-level ratios"] == (mode, "max (code)")
    assert "cap of the importance ratio" not in card
    assert "The constant teacher weight with an objective on the student" in card


def test_settings_beside_logit_averaging(build):
    """Written out from the paper: logits, no KL, one update per batch; its numbers are not in our copy."""
    card = write_card(build(teacher_weight=0.4, beta=0.1, num_iterations=2, mixing_space="probs"))
    assert settings_of(card) == {
        "mixing space": ("probs", "logits (Section 2)"),
        "teacher weight": ("0.4", UNKNOWN),
        "KL coefficient": ("0.1", "0 (Section 2)"),
        "updates per rollout batch": ("2", "1 (Algorithm 1)"),
        "rollouts per prompt": ("4", UNKNOWN),
        "prompts per step": ("2", UNKNOWN),
        "learning rate": ("0.005", UNKNOWN),
        "temperature": ("1", UNKNOWN),
    }
    assert "The same in both: schedule of the teacher weight (constant)." in card
    assert "the paper's fixed weight was not known to us" in card


def test_settings_beside_logit_fusion(build):
    """Written out from the authors' code: 0.5 to 0 in 1000 steps, LoRA everywhere, 1e-5, 8 rollouts, cap 3."""
    settings = {"teacher_weight": 0.5, "teacher_weight_schedule": "cosine", "teacher_weight_decay_steps": 1000}
    theirs = {"learning_rate": 1e-5, "num_generations": 8, "temperature": 1.0, "is_clip_max": 3.0, "beta": 0.0}
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    student = {"objective": "student", "is_clip_mode": "max", "trainer_kwargs": {"peft_config": lora}}
    card = write_card(build(**student, **settings, **theirs))
    assert settings_of(card) == {"prompts per step": ("1", UNKNOWN)}
    settings["teacher_weight_decay_steps"] = 100
    theirs |= {"learning_rate": 2e-5, "num_generations": 4, "temperature": 0.9, "is_clip_max": 2.0}
    student["trainer_kwargs"] = {"peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])}
    assert settings_of(write_card(build(**student, **settings, **theirs))) == {
        "steps until the weight is 0": ("100", "1000 (code)"),
        "trained weights": ("LoRA on q_proj, v_proj", "LoRA on all linear layers (code)"),
        "learning rate": ("2e-05", "1e-05 (code)"),
        "rollouts per prompt": ("4", "8 (code)"),
        "temperature": ("0.9", "1 (code)"),
        "prompts per step": ("2", UNKNOWN),
        "cap of the importance ratio": ("2", "3 (code)"),
    }


def test_several_teachers(build):
    card = write_card(build(teacher=["teacher", "second"], teacher_weight=[0.2, 0.1]))
    run = run_of(card)
    assert run["teacher 1"] == "`teacher` (a local model), float32"
    assert run["teacher 2"] == "`second` (a local model), float32" and "identity of the teacher 2" in run
    assert rows_of(card)["teacher weight at step 0"] == "0.2, 0.1"
    assert settings_of(card)["teacher weight"] == ("0.2, 0.1", UNKNOWN)


def test_the_base_of_the_student(build):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, lora_alpha=16)
    card = write_card(build(teacher=None, trainer_kwargs={"peft_config": lora}))
    run = run_of(card)
    assert run["teacher"] == "`student` (a local model), float32"
    assert "the base that the adapters are trained on" in run["identity of the teacher"]
    assert run["trained weights"] == "LoRA on q_proj, rank 4, alpha 16, float32"
    assert NOTICE in card and "`peft` has to be installed" in card and "- PEFT: " in card
    assert metadata_of(card)["library_name"] == "transformers"  # its adapter is in a subfolder


def test_an_unnamed_teacher(build):
    run = run_of(write_card(build(teacher=tiny_model(seed=1))))
    assert run["teacher"] == "a model without a name, float32"
    assert run["identity of the teacher"].startswith("**unknown**: it was passed as a model in memory")


def test_without_a_teacher(build):
    card = write_card(build(teacher_weight=0.0))
    assert "teacher" not in run_of(card) and NOTICE not in card and "Choices of `trl_blend`" not in card
    assert "pipeline" in names_used(card)


def test_a_weight_that_has_decayed(build):
    settings = {"teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 1}
    trainer = build(teacher_weight=0.5, **settings)
    assert NOTICE in write_card(trainer)
    trainer.train()
    card = write_card(trainer)
    assert NOTICE not in card and "weight has reached 0" in card
    assert "trust_remote_code" not in card and rows_of(card)["weight at the end"] == "0"


def test_adaptive(build):
    settings = {"teacher_weight_schedule": "adaptive", "trainer_kwargs": {"eval_dataset": runs.dataset()}}
    trainer = build(teacher_weight=0.5, **settings)
    trainer.adaptive_weights = (0.25,)
    card = write_card(trainer)
    rows = rows_of(card)
    assert rows["schedule"] == "adaptive"
    assert (rows["teacher weight at step 0"], rows["weight at the end"]) == ("0.5", "0.25")
    found = settings_of(card)
    assert found["scale of the adaptive weight"] == ("5", UNKNOWN)
    assert found["offset of the adaptive weight"] == ("0.1", UNKNOWN)
    assert found["validation prompts of the weight"] == ("64", UNKNOWN)
    assert "Scale, offset and number of validation prompts of the adaptive weight" in card


def test_evaluations_of_both_policies(build):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_policy": "both", "max_steps": 3}
    trainer = build(trainer_kwargs={"eval_dataset": runs.dataset()}, **settings)
    measured = Measured()
    trainer.add_callback(measured)
    assert "## Results" not in write_card(trainer)
    trainer.train()
    header, *rows = tables_of(write_card(trainer))["Results"]
    assert header == ["metric", "step 1", "step 3"]
    names = [f"{policy}/{name}" for policy in ("mixed", "student") for name in ("rewards/reward/mean", "reward")]
    assert sorted(row[0] for row in rows) == sorted(names)
    first, _, last = measured.metrics
    for name, before, after in rows:
        assert (before, after) == (f"{first[f'eval_{name}']:.4g}", f"{last[f'eval_{name}']:.4g}")
    assert len({row[1] for row in rows}) > 1


class Measured(TrainerCallback):
    """What `evaluate` returned, in order."""

    def __init__(self):
        self.metrics = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.metrics.append(dict(metrics))


@pytest.mark.parametrize("adapter", [False, True])
def test_the_code_of_the_card_decodes_the_mixture(build, tmp_path, monkeypatch, capsys, adapter):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "What is 123 + 456?"}]] * 8})
    peft = {"peft_config": lora if adapter else None}
    trainer = build(teacher_weight=0.6, trainer_kwargs=peft, train_dataset=rows)
    trainer.save_model()
    _, code = code_of(write_card(trainer))
    assert "trl_blend" not in code and "apply_chat_template" in code
    code = code.replace('"tiny"', repr(trainer.args.output_dir)).replace("max_new_tokens=256", "max_new_tokens=8")
    names = {}
    exec(code, names)
    prompt = names["inputs"]["input_ids"]
    ids = prompt.clone()
    with torch.no_grad():
        for _ in range(8):
            teacher = trainer.partners[0](ids).logits[:, -1]
            student = trainer.model(ids).logits[:, -1]
            ids = torch.cat([ids, (0.4 * student + 0.6 * teacher).argmax(-1, keepdim=True)], dim=1)
            if ids[0, -1].item() in runs.EOS_IDS:
                break
    assert names["output"].tolist() == ids.tolist()
    assert capsys.readouterr().out.splitlines()[-1] == trainer.processing_class.decode(
        ids[0, prompt.shape[1] :], skip_special_tokens=True
    )

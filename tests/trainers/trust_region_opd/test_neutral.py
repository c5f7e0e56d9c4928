"""Where the student decodes alone and the loss is the plain reverse KL, the trainer is `trl.DistillationTrainer`."""

import logging

import pytest
from peft import LoraConfig

from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import runs
from trl_blend.trainers.trust_region_opd import trainer as module


def lora(**settings):
    # Random rather than zero: otherwise the student is its own base at the first step
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **settings)


def with_dropout():
    student = tiny_model(seed=0, attention_dropout=0.3)
    student.generation_config.eos_token_id = list(runs.EOS_IDS)
    return {"student": student, "trainer_kwargs": {"processing_class": tiny_tokenizer()}}


SETTINGS = {
    "plain": lambda: {"max_steps": 3},
    "accumulation": lambda: {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2},
    "beta": lambda: {"beta": 0.5, "temperature": 0.8, "max_steps": 2},
    "peft": lambda: {"trainer_kwargs": {"peft_config": lora(lora_dropout=0.1)}, "max_steps": 2},
    "dropout": lambda: {**with_dropout(), "max_steps": 2},
}


@pytest.fixture
def never_blends(monkeypatch):
    """Blended decoding is not entered, nor is this package's own divergence."""

    def fail(*args, **kwargs):
        raise AssertionError("a neutral run went through this package's own code")

    monkeypatch.setattr(module, "blended_generation", fail)
    monkeypatch.setattr(module, "reverse_kl", fail)


@pytest.fixture(scope="module")
def parents(models, tmp_path_factory):
    """TRL's own run for each of the settings."""
    return {
        name: runs.train(
            runs.build_opd(models, tmp_path_factory.mktemp(name), parent=True, max_grad_norm=1.0, **settings())
        )
        for name, settings in SETTINGS.items()
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_student_rollouts_are_those_of_trl(build_opd, parents, never_blends, name):
    ours = build_opd(rollout_policy="student", max_grad_norm=1.0, **SETTINGS[name]())
    runs.assert_same_run(runs.train(ours), parents[name])


@pytest.mark.parametrize(
    "settings",
    [{"kl_budget": 0.0}, {"rollout_policy": "fixed_weight", "teacher_weight": 0.0}],
    ids=lambda settings: next(iter(settings)),
)
def test_a_level_of_zero_is_trl(build_opd, parents, never_blends, settings):
    runs.assert_same_run(runs.train(build_opd(max_grad_norm=1.0, **settings, **SETTINGS["plain"]())), parents["plain"])


def test_diagnostics_leave_the_run_as_it_is(build_opd, parents, never_blends):
    ours = build_opd(
        rollout_policy="student",
        log_teacher_statistics=True,
        max_grad_norm=1.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=2,
        trainer_kwargs={"reward_funcs": [runs.reward]},
    )
    runs.assert_same_run(runs.train(ours), parents["accumulation"])


DIFFERENT = {
    "rollouts": {"kl_budget": 0.05, "blend_warmup_steps": 5},
    "support": {"rollout_policy": "student", "kl_support": "student_top_k"},
    "target": {"rollout_policy": "student", "distillation_target": "veto"},
    "temperature": {"rollout_policy": "student", "temperature_warmup_start": 0.8},
    "repeats": {"rollout_policy": "student", "num_rollouts_per_prompt": 4},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_settings_are_not_trl(build_opd, parents, name):
    """The comparison above can fail."""
    ours = runs.train(build_opd(max_grad_norm=1.0, max_steps=3, **DIFFERENT[name]))
    with pytest.raises(AssertionError):
        runs.assert_same_run(ours, parents["plain"])


def test_the_losses_of_both_kernels_agree(build_opd, parents):
    """This package's reverse KL on the whole vocabulary, at Veto weight 0, is TRL's."""
    ours = build_opd(
        rollout_policy="student",
        distillation_target="veto",
        veto_weight_start=0.0,
        max_grad_norm=1.0,
        **SETTINGS["plain"](),
    )
    record = runs.train(ours)
    assert ours.uses_own_divergence
    assert record.losses == pytest.approx(parents["plain"].losses, rel=1e-4)
    assert record.losses != parents["plain"].losses
    assert record.logged("blend/reverse_kl") == pytest.approx(record.losses, rel=1e-5)
    runs.assert_close_tensors(record.gradients[0], parents["plain"].gradients[0], relative=1e-4)


# After the warmup

# Steps of one epoch: TRL's sampler starts over with the first order of the prompts when it resumes in a later one
IN_ONE_EPOCH = {"per_device_train_batch_size": 2, "max_steps": 4}


@pytest.fixture(scope="module")
def interrupted(models, tmp_path_factory):
    """TRL's own run of four steps, with a checkpoint after two."""
    folder = tmp_path_factory.mktemp("interrupted")
    settings = {**IN_ONE_EPOCH, "save_strategy": "steps", "save_steps": 2}
    return runs.train(runs.build_opd(models, folder, parent=True, **settings))


WARMUPS = {
    "linear": {"kl_budget": 0.05},
    "cosine": {"kl_budget": 0.05, "kl_budget_schedule": "cosine"},
    "constant": {"kl_budget": 0.05, "kl_budget_schedule": "constant"},
    "fixed_weight": {"rollout_policy": "fixed_weight"},
    "speculative_kd": {"rollout_policy": "speculative_kd"},
}


@pytest.mark.parametrize("name", WARMUPS)
def test_after_the_warmup_it_is_trl_again(build_opd, interrupted, never_blends, name):
    ours = build_opd(blend_warmup_steps=2, **IN_ONE_EPOCH, **WARMUPS[name])
    checkpoint = f"{interrupted.trainer.args.output_dir}/checkpoint-2"
    resumed = runs.train(ours, resume_from_checkpoint=checkpoint)
    assert resumed.losses == interrupted.losses[2:]
    for gradients, expected in zip(resumed.gradients, interrupted.gradients[2:], strict=True):
        runs.assert_same_tensors(gradients, expected)
    runs.assert_same_tensors(runs.snapshot(ours.model), runs.snapshot(interrupted.trainer.model))


@pytest.mark.parametrize("name", WARMUPS)
def test_the_switch_is_made_and_said_once(build_opd, monkeypatch, caplog, name):
    calls, blend = [], module.blended_generation

    def counting(*args, **kwargs):
        calls.append(trainer.state.global_step)
        return blend(*args, **kwargs)

    monkeypatch.setattr(module, "blended_generation", counting)
    trainer = build_opd(blend_warmup_steps=2, max_steps=4, **WARMUPS[name])
    with caplog.at_level(logging.WARNING):
        record = runs.train(trainer)
    assert calls == [0, 1]
    (message,) = [text for text in caplog.messages if "warmup of" in text]
    assert "Step 2:" in message and "transformers" in message
    assert f"`rollout_policy='{trainer.args.rollout_policy}'`" in message
    assert len(record.logged("blend/kl_behavior_student")) == 2


@pytest.mark.parametrize("settings", [{"rollout_policy": "student"}, {"kl_budget": 0.0}], ids=str)
def test_a_run_that_never_blends_says_nothing(build_opd, caplog, settings):
    with caplog.at_level(logging.WARNING):
        build_opd(max_steps=2, **settings).train()
    assert "warmup of" not in caplog.text

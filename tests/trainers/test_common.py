"""
What every trainer promises, with a row for each of them: neutral settings are the TRL parent, a resumed run is the
uninterrupted one, the base of a LoRA student is a teacher like any other, and a failure leaves nothing behind.
"""

import functools
import gc
import itertools
import logging

import pytest
import torch
import trl.trainer.distillation_trainer as trl_distillation
import trl.trainer.utils as trl_utils
from peft import LoraConfig
from transformers import Qwen3ForCausalLM, TrainerCallback

from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import forced, runs, scored
from trl_blend import LogitMixGRPOTrainer
from trl_blend.trainers.logit_mix_grpo import trainer as grpo_module
from trl_blend.trainers.trust_region_opd import trainer as opd_module


@pytest.fixture(scope="module")
def many_rows(models):
    """Scored rollouts for an epoch of four steps."""
    return scored.scored_rollouts(scored.load(models, "student"), scored.load(models, "teacher"), num_rows=16, seed=1)


@pytest.fixture(scope="module")
def make(make, many_rows):
    own = {"offline": {"train_dataset": many_rows}}
    return lambda kind, **settings: make(kind, **{**own.get(kind, {}), **settings})


@pytest.fixture(scope="module")
def parent_run(make):
    """`parent_run(kind, name)`: TRL's own run with the settings of that name, made once."""
    return functools.cache(
        lambda kind, name: runs.train(make(kind, parent=True, max_grad_norm=1.0, **PARENTS[kind][name]()))
    )


def lora(**settings):
    # Random rather than zero: otherwise the student is its own base at the first step
    defaults = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "init_lora_weights": False}
    return LoraConfig(**{**defaults, "target_modules": "all-linear", **settings})


def with_lora(**settings):
    return {"trainer_kwargs": {"peft_config": lora(**settings)}}


def with_dropout():
    student = tiny_model(seed=0, attention_dropout=0.3)
    student.generation_config.eos_token_id = list(runs.EOS_IDS)
    return {"student": student, "trainer_kwargs": {"processing_class": tiny_tokenizer()}, "max_steps": 2}


def untimed(metrics):
    return {name: value for name, value in metrics.items() if "second" not in name and "time" not in name}


# -------------------- the parent

REUSE = {  # several optimizer steps per generation batch, and two passes over it
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 6,
}
ACCUMULATION = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}
PARENTS = {
    "grpo": {
        "plain": lambda: {"max_steps": 3},
        "reuse": lambda: REUSE,
        "beta": lambda: {"beta": 0.1, "max_steps": 2},
    },
    "opd": {
        "plain": lambda: {"max_steps": 3},
        "accumulation": lambda: ACCUMULATION,
        "beta": lambda: {"beta": 0.5, "temperature": 0.8, "max_steps": 2},
        "peft": lambda: {**with_lora(lora_dropout=0.1), "max_steps": 2},
        "dropout": with_dropout,
    },
}
STUDENT = {"rollout_policy": "student"}
MEASURED = {**STUDENT, "log_teacher_statistics": True, "trainer_kwargs": {"reward_funcs": [runs.reward]}}
NEUTRAL = [
    ("grpo", "plain", {"objective": "mixed"}),
    ("grpo", "reuse", {"objective": "mixed", "teacher": None}),
    ("grpo", "beta", {"objective": "mixed"}),
    ("grpo", "plain", {"objective": "student", "teacher": None}),
    ("grpo", "reuse", {"objective": "student"}),
    ("grpo", "beta", {"objective": "student"}),
    *(("opd", name, STUDENT) for name in PARENTS["opd"]),
    ("opd", "plain", {"kl_budget": 0.0}),
    ("opd", "plain", {"rollout_policy": "fixed_weight", "teacher_weight": 0.0}),
    ("opd", "accumulation", MEASURED),
]


@pytest.fixture
def never_blends(monkeypatch):
    """Blended decoding is not entered, nor is this package's own loss."""

    def fail(*args, **kwargs):
        raise AssertionError("a neutral run went through this package's own code")

    for module, name in itertools.product((grpo_module, opd_module), ("blended_generation",)):
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(grpo_module, "MixedForward", fail)
    monkeypatch.setattr(opd_module, "reverse_kl", fail)


@pytest.mark.parametrize(("kind", "name", "settings"), NEUTRAL)
def test_neutral_settings_are_the_parent(make, parent_run, never_blends, kind, name, settings):
    weight = {"teacher_weight": 0.0} if kind == "grpo" else {}
    trainer = make(kind, max_grad_norm=1.0, **{**weight, **PARENTS[kind][name](), **settings})
    runs.assert_same_run(runs.train(trainer), parent_run(kind, name))
    assert kind != "grpo" or trainer.partners == []


OTHER = [
    ("grpo", {"teacher_weight": 0.05}),
    ("opd", {"kl_budget": 0.05, "blend_warmup_steps": 5}),
]


@pytest.mark.parametrize(("kind", "settings"), OTHER)
def test_other_settings_are_not_the_parent(make, parent_run, kind, settings):
    """The comparison above can fail."""
    ours = runs.train(make(kind, max_grad_norm=1.0, max_steps=3, **settings))
    with pytest.raises(AssertionError):
        runs.assert_same_run(ours, parent_run(kind, "plain"))


DECAY = {"teacher_weight": 0.5, "teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 2}
WARMUP = {"blend_warmup_steps": 2}
OVER = [
    ("grpo", {**DECAY, "objective": "mixed"}, "mixing/teacher_weight", 0.0),
    ("grpo", {**DECAY, "objective": "student"}, "mixing/teacher_weight", 0.0),
    ("opd", {**WARMUP, "kl_budget": 0.05}, "blend/kl_budget", 0.0),
    ("opd", {**WARMUP, "rollout_policy": "fixed_weight"}, None, None),
    ("opd", {**WARMUP, "rollout_policy": "speculative_kd"}, None, None),
    ("opd", {**STUDENT, "temperature_warmup_start": 0.7, "temperature_warmup_steps": 2}, "blend/temperature", 1.0),
]
# Steps of one epoch: TRL's sampler starts over with the first order of the prompts when it resumes in a later one
FOUR_STEPS = {"grpo": {"max_steps": 4}, "opd": {"per_device_train_batch_size": 2, "max_steps": 4}}


@pytest.fixture(scope="module")
def interrupted(make):
    """TRL's own run of four steps, with a checkpoint after two."""
    save = {"save_strategy": "steps", "save_steps": 2}
    return functools.cache(lambda kind: runs.train(make(kind, parent=True, **FOUR_STEPS[kind], **save)))


@pytest.mark.parametrize(("kind", "settings", "metric", "value"), OVER)
def test_once_the_schedule_is_over_it_is_the_parent_again(
    make, interrupted, never_blends, kind, settings, metric, value
):
    expected = interrupted(kind)
    ours = make(kind, **FOUR_STEPS[kind], **settings)
    assert len(ours.partners) == 1
    resumed = runs.train(ours, resume_from_checkpoint=f"{expected.trainer.args.output_dir}/checkpoint-2")
    assert resumed.losses == expected.losses[2:]
    for gradients, others in zip(resumed.gradients, expected.gradients[2:], strict=True):
        runs.assert_same_tensors(gradients, others)
    runs.assert_same_tensors(runs.snapshot(ours.model), runs.snapshot(expected.trainer.model))
    assert metric is None or resumed.logged(metric) == [value, value]


EVALUATED = [("grpo", {"teacher_weight": 0.0}), ("opd", {"kl_budget": 0.5, "blend_warmup_steps": 9})]


@pytest.mark.parametrize(("kind", "settings"), EVALUATED)
def test_evaluation_of_the_student_alone_is_the_parents(make, kind, settings):
    data = {"trainer_kwargs": {"eval_dataset": runs.dataset()}}
    ours, parent = (untimed(make(kind, **data, **one).evaluate()) for one in (settings, {"parent": True}))
    assert {name: ours[name] for name in parent} == parent and any(parent.values())


# -------------------- checkpoints


def parity(completion_ids, **kwargs):
    return [float(sum(ids) % 2) for ids in completion_ids]


LINEAR = {"teacher_weight": 0.4, "teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 5}
# That of the schedule which waits for the reward: `logit_mix_grpo/test_reward_weight.py`
SCHEDULES = {
    "linear": LINEAR,
    "adaptive": {
        "teacher_weight": 0.4,
        "teacher_weight_schedule": "adaptive",
        "adaptive_offset": 0.0,
        "adaptive_num_prompts": 4,
    },
}
GRPO = {
    "max_steps": 4,
    "learning_rate": 2e-3,
    "reward_funcs": parity,
    "trainer_kwargs": {"eval_dataset": runs.dataset(("3*3=", "10-1=", "why?", "zz"))},
}
# Two micro-batches per step, in one epoch
OPD = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 4}
OFFLINE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
TRUST_REGION = {"kl_budget": 0.3, "blend_warmup_steps": 4}
SPECULATIVE = {"rollout_policy": "speculative_kd", "blend_warmup_steps": 3, "num_rollouts_per_prompt": 2}
# The checkpoint lies between two generation batches of two optimizer steps each
PEFT_REUSE = {**GRPO, **LINEAR, "objective": "student", "num_iterations": 2, "teacher": None, **with_lora()}
PACKED = {**OFFLINE, "packing": True, "max_length": 24, "per_device_train_batch_size": 1}
VETO = {**STUDENT, "distillation_target": "veto", "veto_warmup_steps": 4}
COLD = {**STUDENT, "temperature_warmup_start": 0.5, "temperature_warmup_steps": 4}
# And a metric that moves after the checkpoint
RESUMED = [
    *(
        ("grpo", {**GRPO, **schedule, **objective}, "mixing/teacher_weight")
        for objective in ({"objective": "mixed"}, {"objective": "student", "is_clip_mode": "max"})
        for schedule in SCHEDULES.values()
    ),
    ("grpo", PEFT_REUSE, None),
    ("opd", {**OPD, **TRUST_REGION}, "blend/kl_budget"),
    ("opd", {**OPD, **SPECULATIVE}, None),
    ("opd", {**OPD, **COLD}, "blend/temperature"),
    ("opd", {**OPD, **VETO}, "blend/veto_weight"),
    ("opd", {**OPD, **STUDENT, "token_selection": "tip", "forward_kl_entropy": 2.2}, "blend/reverse_kl"),
    ("opd", {**OPD, **TRUST_REGION, "distillation_objective": "iw_opd"}, "blend/iw_opd_weight"),
    ("offline", OFFLINE, "offline/drift_kl"),
    ("offline", PACKED, "offline/drift_kl"),
]
EXACT = {
    "grpo": ("mixing/teacher_weight", "mixing/kl_behavior_student", "num_tokens"),
    "opd": ("blend/kl_budget", "blend/kl_behavior_student", "blend/temperature", "blend/veto_weight", "num_tokens"),
    "offline": ("offline/advantage", "offline/drift_kl"),  # the parent starts counting tokens again
}


@pytest.mark.parametrize(("kind", "settings", "moving"), RESUMED)
def test_resumed_is_uninterrupted(make, kind, settings, moving):
    whole = runs.train(make(kind, save_strategy="steps", save_steps=2, **settings))
    checkpoint = f"{whole.trainer.args.output_dir}/checkpoint-2"
    resumed = runs.train(make(kind, **settings), resume_from_checkpoint=checkpoint)
    assert resumed.losses == whole.losses[-len(resumed.losses) :] and any(resumed.losses)
    assert len(whole.gradients) == 4
    for gradients, expected in zip(resumed.gradients, whole.gradients[2:], strict=True):
        runs.assert_same_tensors(gradients, expected)
    runs.assert_same_tensors(runs.snapshot(resumed.trainer.model), runs.snapshot(whole.trainer.model))
    for name in EXACT[kind]:  # the log of a resumed run starts with that of the checkpoint
        assert resumed.logged(name) == whole.logged(name)
    if moving:
        values = whole.logged(moving)
        assert len(values) == 4 and len(set(values[1:])) > 1, "nothing moves after the checkpoint: nothing is tested"


FIRST = {"grpo": {**GRPO, **LINEAR}, "opd": {**OPD, **TRUST_REGION}}
RUNNING = {
    "grpo": ("mixing/teacher_weight", lambda args: args.weights_at(1)[0]),
    "opd": ("blend/kl_budget", lambda args: args.rule_at(1).kl_budget),
}


# What was, and what is
CHANGED = {
    "grpo": {
        "teacher_weight": ([0.4], [0.2]),
        "teacher_weight_schedule": ("linear", "cosine"),
        "mixing_space": ("logits", "probs"),
        "teacher_weight_decay_steps": (5, 9),
    },
    "opd": {
        "kl_budget": (0.3, 0.2),
        "kl_budget_schedule": ("linear", "cosine"),
        "blend_warmup_steps": (4, 9),
        "kl_support": ("full", "student_top_k"),
        "distillation_target": ("teacher", "veto"),
        "num_rollouts_per_prompt": (1, 2),
        "temperature": (1.0, 0.9),
    },
}


@pytest.mark.parametrize("kind", CHANGED)
def test_other_settings_are_a_warning_with_both_values(make, caplog, kind):
    first = make(kind, **{**FIRST[kind], "max_steps": 1, "save_strategy": "steps", "save_steps": 1})
    first.train()
    changed = {name: value for name, (_, value) in CHANGED[kind].items()}
    trainer = make(kind, **{**FIRST[kind], "max_steps": 2, **changed})
    with caplog.at_level(logging.WARNING):
        record = runs.train(trainer, resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-1")
    (message,) = [text for text in caplog.messages if "Resuming with" in text]
    assert "checkpoint-1: `" in message
    for name, (was, value) in CHANGED[kind].items():
        assert f"`{name}={was!r}`, now `{name}={value!r}`" in message
    metric, expected = RUNNING[kind]
    assert record.logged(metric)[-1] == expected(trainer.args)  # what is given now is what runs


# -------------------- a LoRA student, whose own base is the teacher

TWO_UPDATES = {"teacher_weight": 0.4, "num_iterations": 2, "max_steps": 2, "learning_rate": 1e-3}
ACCUMULATED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
OPD_LORA = {**ACCUMULATED, "max_steps": 2, "learning_rate": 1e-3, "log_teacher_statistics": True}
TOP_K = {"kl_support": "student_top_k", "distillation_target": "veto"}
LORA = [
    ("grpo", {**TWO_UPDATES, "objective": "mixed"}),
    ("grpo", {**TWO_UPDATES, "objective": "mixed", "mixing_space": "probs"}),
    ("grpo", {**TWO_UPDATES, "objective": "student"}),
    ("grpo", {**TWO_UPDATES, "teacher_weight": -0.4, "mixing_space": "arithmetic"}),
    ("opd", {**OPD_LORA, **TRUST_REGION}),
    ("opd", {**OPD_LORA, **STUDENT}),
    ("opd", {**OPD_LORA, **TRUST_REGION, **TOP_K}),
]
SAME = ("mixing/kl_behavior_student", "mixing/teacher_logp", "blend/kl_behavior_student", "blend/teacher_weight/mean")
SAME += ("blend/teacher_logp", "blend/teacher_entropy", "blend/student_logp")


@pytest.mark.parametrize(("kind", "settings"), LORA)
def test_the_base_as_teacher_equals_a_copy_of_it(make, kind, settings):
    own, copy = (runs.train(make(kind, teacher=one, **with_lora(), **settings)) for one in (None, "student"))
    assert own.trainer.partners == [] and len(copy.trainer.partners) == 1
    for call, other in zip(own.calls, copy.calls, strict=True):
        assert torch.equal(call.inputs["completion_ids"], other.inputs["completion_ids"])
    assert own.losses == pytest.approx(copy.losses, abs=1e-6) and any(abs(loss) > 0.01 for loss in own.losses)
    for gradients, others in zip(own.gradients, copy.gradients, strict=True):
        runs.assert_close_tensors(gradients, others, relative=1e-4)
    for name in SAME:
        assert own.logged(name) == pytest.approx(copy.logged(name), rel=1e-5)
    if kind == "grpo":
        assert own.logged("mixing/kl_behavior_student")[0] > 0.05
    else:
        assert own.logged("blend/teacher_logp")[0] != pytest.approx(own.logged("blend/student_logp")[0], abs=0.05)


def live_models():
    gc.collect()
    return sum(type(module) is Qwen3ForCausalLM for module in gc.get_objects())


@pytest.mark.parametrize("kind", ["grpo", "opd"])
def test_there_is_no_second_copy(make, kind):
    before, counts = live_models(), []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            counts.append(live_models())

    trainer = make(kind, teacher=None, **with_lora())
    trainer.add_callback(Count())
    counts.append(live_models())
    trainer.train()
    assert counts == [before + 1] * 2 and trainer.partners == []
    base = sum(parameter.numel() for parameter in tiny_model(seed=0).parameters())
    adapter = sum(p.numel() for name, p in trainer.model.named_parameters() if "lora" in name)
    assert sum(parameter.numel() for parameter in trainer.model.parameters()) == base + adapter
    assert kind == "grpo" or not list(trainer.teacher_model.parameters())


BETAS = ({"beta": 0.0}, {"beta": 0.1, "use_bias_correction_kl": False})
ADAPTERS = [("grpo", {**TWO_UPDATES, "objective": o, **beta}) for o in ("mixed", "student") for beta in BETAS]
ADAPTERS += [("opd", {**OPD_LORA, **TRUST_REGION})]


@pytest.mark.parametrize(("kind", "settings"), ADAPTERS)
def test_only_the_adapter_is_trained_and_stays_trainable(make, kind, settings):
    trainer = make(kind, teacher=None, **with_lora(), **settings)
    before = {name: parameter.requires_grad for name, parameter in trainer.model.named_parameters()}
    initial = runs.snapshot(trainer.model)
    assert {name for name, trainable in before.items() if trainable} == {name for name in before if "lora" in name}
    record = runs.train(trainer)
    assert {name: parameter.requires_grad for name, parameter in trainer.model.named_parameters()} == before
    final = runs.snapshot(trainer.model)
    moved = {name for name in final if not torch.equal(final[name], initial[name])}
    assert moved == {name for name, trainable in before.items() if trainable}
    assert all(gradients.keys() == moved for gradients in record.gradients)
    layers = [module for module in trainer.model.modules() if hasattr(module, "_disable_adapters")]
    assert trainer.model.active_adapter == "default" and layers
    assert not any(layer._disable_adapters for layer in layers)


# -------------------- failures


class Failure(Exception):
    pass


def fail_once(monkeypatch, target, name, after=0):
    """Let the call number `after` of `target.name` raise, and later ones pass."""
    original, calls = getattr(target, name), []

    def failing(*args, **kwargs):
        calls.append(None)
        if len(calls) == after + 1:
            raise Failure
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, failing)


def fail_in_the_forward_with_gradient(trainer):
    original = trainer.model.model.forward

    def failing(*args, **kwargs):
        if torch.is_grad_enabled():
            trainer.model.model.forward = original
            raise Failure
        return original(*args, **kwargs)

    trainer.model.model.forward = failing


def state(trainer):
    """What a step changes for its own length."""
    names = ("_generating", "_recording", "epsilon_low", "epsilon_high", "use_vllm", "log_completions")
    own = {name: getattr(trainer, name, None) for name in names}
    if isinstance(trainer, LogitMixGRPOTrainer):  # the other one keeps the rule of its step
        own["_rule"] = trainer._rule
    settings = (dict(trainer.generation_kwargs), trainer.generation_config.to_dict())
    return own, settings, getattr(trainer.args, "delta", None)


FAILING = {
    "mixed": ("grpo", {"objective": "mixed", "teacher_weight": 0.4}),
    "student": ("grpo", {"objective": "student", "teacher_weight": 0.4}),
    "trust region": ("opd", TRUST_REGION),
    "own loss": ("opd", {**TRUST_REGION, "kl_support": "student_top_k"}),
    "temperature": ("opd", {**STUDENT, "temperature_warmup_start": 0.5}),
}


@pytest.fixture(scope="module")
def undisturbed(make):
    """Losses of the same run without a failure."""
    return functools.cache(lambda name: runs.train(make(FAILING[name][0], max_steps=2, **FAILING[name][1])).losses)


# Only the loss of two of them is another one
WHERE = [(name, "loss") for name in FAILING]
WHERE += itertools.product(("mixed", "trust region", "temperature"), ("teacher", "student", "reward"))


@pytest.mark.parametrize(("name", "where"), WHERE)
def test_training_goes_on_after_a_failure(make, undisturbed, monkeypatch, name, where):
    kind, settings = FAILING[name]
    if where == "reward" and kind == "opd":
        settings = {**settings, "trainer_kwargs": {"reward_funcs": runs.reward}}
    expected = undisturbed(name)
    trainer = make(kind, max_steps=2, **settings)
    patched = (trl_utils._ChunkedLogProbFunction, trl_distillation._chunked_divergence_loss)
    clean, sampler = state(trainer), trl_distillation.RepeatSampler
    # While decoding: the first forwards of a run compare its logits with the models' own
    if where == "teacher":
        fail_once(monkeypatch, trainer.partners[0].model, "forward", after=0 if name == "temperature" else 12)
    elif where == "student":
        fail_once(monkeypatch, trainer.model.model, "forward", after=12)
    elif where == "reward":
        fail_once(monkeypatch, trainer, "_calculate_rewards" if kind == "grpo" else "_reward")
    else:
        fail_in_the_forward_with_gradient(trainer)
    with pytest.raises(Failure):
        trainer.train()
    assert "generate" not in vars(trainer.model) and "generate_batch" not in vars(trainer.model)
    assert state(trainer) == clean and trl_distillation.RepeatSampler is sampler
    assert patched == (trl_utils._ChunkedLogProbFunction, trl_distillation._chunked_divergence_loss)
    # Both this trainer and the next one of the process can train
    assert len(runs.train(trainer).losses) == 2
    assert runs.train(make(kind, max_steps=2, **FAILING[name][1])).losses == expected


FAILED = [
    ("grpo", {"teacher_weight": 0.4}, "mixing/teacher_logp"),
    ("opd", {"kl_budget": 0.3, "kl_budget_schedule": "constant"}, "blend/teacher_logp"),
]


@pytest.mark.parametrize(("kind", "settings", "metric"), FAILED)
def test_statistics_of_a_failed_generation_do_not_reach_the_next_one(make, kind, settings, metric):
    """The rollouts of a step that failed after decoding are not part of the next step's means."""
    trainer = make(kind, **settings)
    original = trainer._generate_single_turn

    def generate(*args, **kwargs):
        original(*args, **kwargs)
        trainer._generate_single_turn = original
        raise Failure

    trainer._generate_single_turn = generate
    with pytest.raises(Failure):
        trainer.train()
    record = runs.train(trainer)
    (call,) = record.calls
    values = [value for row in forced.logps(forced.frozen(1), [], [], call.inputs) for value in row]
    assert record.logged(metric) == [pytest.approx(sum(values) / len(values), abs=1e-3)]

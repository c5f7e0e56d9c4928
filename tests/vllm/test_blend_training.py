"""Training on rollouts that an engine draws from the blend: loss, statistics and weights are as with transformers."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_model
from transformers import AutoModelForCausalLM

from testbed import task
from tests.vllm.conftest import expand_on_the_cpu
from tests.vllm.engines import passes, teacher_forced, worst_error
from trl_blend import (
    LogitArithmetic,
    LogitMixGRPOConfig,
    LogitMixGRPOTrainer,
    LogitMixing,
    TrustRegion,
    TrustRegionOPDConfig,
    TrustRegionOPDTrainer,
)
from trl_blend.errors import EngineError
from trl_blend.ops.trust_region import acceptance_bound
from trl_blend.serving.blend import Blend
from trl_blend.trainers import _engine


pytestmark = pytest.mark.vllm

CHECKPOINTS = Path(task.__file__).resolve().parent / "checkpoints"
STUDENT, TEACHER = str(CHECKPOINTS / "student"), str(CHECKPOINTS / "teacher")
TOLERANCE = 5e-5


def settings(folder, **given):
    return {
        "output_dir": str(folder),
        "learning_rate": 1e-3,  # large, so that old weights would give other tokens
        "per_device_train_batch_size": 16,
        "max_completion_length": task.MAX_NEW_TOKENS,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 128,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 3,
        **given,
    }


def grpo(folder, model=STUDENT, teacher=TEACHER, trainer=None, **given):
    args = LogitMixGRPOConfig(**settings(folder, **{"num_generations": 4, "teacher_weight": 0.3, **given}))
    return LogitMixGRPOTrainer(
        model=model,
        teacher_model=teacher,
        reward_funcs=task.format_and_answer_reward,
        args=args,
        train_dataset=task.build_prompt_dataset("train", 64),
        **(trainer or {}),
    )


def opd(folder, teacher=TEACHER, **given):
    args = TrustRegionOPDConfig(**settings(folder, **{"kl_budget": 0.05, "blend_warmup_steps": 2, **given}))
    dataset = task.build_prompt_dataset("train", 64)
    return TrustRegionOPDTrainer(model=STUDENT, teacher_model=teacher, args=args, train_dataset=dataset)


def tower(trainer, name):
    (found,) = trainer.engine.llm.apply_model(lambda model: getattr(model, name))
    return found


def tensors(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def held_out(trainer, count=16):
    return trainer._tokenize_prompts([row["prompt"] for row in task.build_prompt_dataset("test", count)])[0]


def draw(trainer, rule):
    """`(prompt, completion, log-probabilities)` of held-out prompts, with the weights of now."""
    prompt_ids = held_out(trainer)
    trainer._last_loaded_step, trainer._rule = -1, rule
    if isinstance(trainer, LogitMixGRPOTrainer):
        completion_ids, logps = trainer._generate_single_turn(prompt_ids, None, {}, 1)
    else:
        completion_ids = trainer._generate_single_turn(prompt_ids, None, {})
        logps = [None] * len(completion_ids)
    trainer._rule = None
    return list(zip(prompt_ids, map(list, completion_ids), logps, strict=True))


def assert_engine_has_the_weights_of(trainer, model):
    """The engine's greedy tokens are those of the student that training ended with."""
    with _engine.greedy(trainer.engine):
        rows = draw(trainer, None)
    for prompt, ids, _ in rows:
        tokens = torch.tensor([[*prompt, *ids]])
        with torch.no_grad():
            assert ids == model(tokens).logits[0, len(prompt) - 1 : -1].argmax(dim=-1).tolist()


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def saved_student(trainer, folder):
    trainer.save_model(str(folder))
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype="float32").eval()
    load_model(model, folder / "model.safetensors")
    return model


@pytest.fixture
def teacher():
    return AutoModelForCausalLM.from_pretrained(TEACHER, dtype="float32").eval()


# Settings of a mixture, and its rule
MIXTURES = {
    "logits": ({}, LogitMixing(0.3)),
    "arithmetic": ({"mixing_space": "arithmetic", "teacher_weight": 0.5}, LogitArithmetic(1.0, (0.5,))),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_weights_reach_the_student_and_nothing_else(cpu_engine, teacher, tmp_path, mixture):
    given, rule = MIXTURES[mixture]
    trainer = grpo(tmp_path / "run", max_steps=10, **given)
    before = tensors(tower(trainer, "partner_0"))
    start = tensors(tower(trainer, "student"))
    trainer.train()
    after = tensors(tower(trainer, "partner_0"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    student = saved_student(trainer, tmp_path / "saved")
    assert_engine_has_the_weights_of(trainer, student)
    moved = tensors(tower(trainer, "student"))
    assert any(not torch.equal(start[name], moved[name]) for name in start)
    # The correction compares the mixture of the engine with that of the trainer
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-3
    assert all(abs(value - 1) < 1e-3 for value in logged(trainer, "sampling/importance_sampling_ratio/mean"))
    # What is recorded is log μ of the last weights
    rows = draw(trainer, rule)
    assert worst_error([student, teacher], Blend(rule), rows) < TOLERANCE


def step_of(trainer, rollouts=None):
    """Loss, gradients and rollouts of the first step; the rollouts given are used instead of drawing any."""
    found = {}
    generate, compute = trainer._generate_single_turn, trainer.compute_loss

    def generate_or_repeat(*args, **kwargs):
        found["rollouts"] = generate(*args, **kwargs) if rollouts is None else rollouts
        return found["rollouts"]

    def compute_and_keep(*args, **kwargs):
        loss = compute(*args, **kwargs)
        found["loss"] = loss.detach()
        return loss

    class Stop(Exception):
        pass

    def keep_gradients(*args, **kwargs):
        parameters = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
        found["gradients"] = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
        raise Stop

    trainer._generate_single_turn, trainer.compute_loss = generate_or_repeat, compute_and_keep
    trainer.create_optimizer()
    trainer.optimizer.step = keep_gradients
    trainer.args.max_grad_norm = 0.0
    with pytest.raises(Stop):
        trainer.train()
    return found


def assert_same_step(one, other):
    torch.testing.assert_close(one["loss"], other["loss"], atol=1e-5, rtol=1e-5)
    assert one["gradients"].keys() == other["gradients"].keys()
    largest = max(gradient.abs().max() for gradient in other["gradients"].values())
    assert largest > 1e-3
    for name, gradient in other["gradients"].items():
        torch.testing.assert_close(one["gradients"][name], gradient, atol=1e-5 * max(largest.item(), 1.0), rtol=1e-4)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("objective", ["mixed", "student"])
def test_the_loss_of_given_rollouts(cpu_engine, tmp_path, objective, mixture):
    given = {"objective": objective, **MIXTURES[mixture][0]}
    engine = step_of(grpo(tmp_path / "engine", **given))
    plain = step_of(grpo(tmp_path / "plain", **given, use_vllm=False), engine["rollouts"])
    assert_same_step(engine, plain)


def test_the_loss_of_given_rollouts_opd(cpu_engine, tmp_path):
    engine = step_of(opd(tmp_path / "engine"))
    assert_same_step(engine, step_of(opd(tmp_path / "plain", use_vllm=False), engine["rollouts"]))


def test_trust_region_with_its_warmup(cpu_engine, tmp_path):
    trainer = opd(tmp_path / "run", max_steps=4, log_completions=False)
    before = tensors(tower(trainer, "partner_0"))
    calls = []
    handle = tower(trainer, "partner_0").register_forward_hook(lambda *_: calls.append(trainer.state.global_step))
    trainer.train()
    handle.remove()
    assert set(calls) == {0, 1}  # the teacher does not run once the warmup is over
    after = tensors(tower(trainer, "partner_0"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert logged(trainer, "blend/kl_budget") == [0.05, 0.025, 0.0, 0.0]
    for step, budget in enumerate([0.05, 0.025]):
        assert logged(trainer, "blend/kl_behavior_student")[step] <= budget * 1.001
        assert (
            0.0
            < logged(trainer, "blend/teacher_weight/mean")[step]
            <= logged(trainer, "blend/teacher_weight/max")[step]
            <= 1.0
        )
    assert len(logged(trainer, "blend/teacher_logp")) == 2 and len(logged(trainer, "blend/teacher_entropy")) == 2
    assert_engine_has_the_weights_of(trainer, saved_student(trainer, tmp_path / "saved"))


def observed(trainer):
    """By step: the rule that the engine draws with, the weights of its student, and what it draws."""
    found, generate = {}, trainer.engine.generate

    def generate_and_keep(*args, **kwargs):
        drawn = generate(*args, **kwargs)
        (told,) = trainer.engine.llm.collective_rpc("describe_blend")
        found[trainer.state.global_step] = told["blend"], tensors(tower(trainer, "student")), drawn
        return drawn

    trainer.engine.generate = generate_and_keep
    return found


@pytest.mark.parametrize(
    ("make", "given", "rules"),
    [
        (
            grpo,
            {"teacher_weight": 0.5, "teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 4},
            [LogitMixing((weight,)) for weight in (0.5, 0.375, 0.25, 0.125)],
        ),
        (opd, {"kl_budget": 0.5, "blend_warmup_steps": 4}, [TrustRegion(size) for size in (0.5, 0.375, 0.25, 0.125)]),
    ],
)
def test_resumed_in_mid_schedule_is_uninterrupted(cpu_engine, tmp_path, make, given, rules):
    whole = make(tmp_path / "whole", max_steps=4, save_strategy="steps", save_steps=2, **given)
    expected = observed(whole)
    whole.train()
    whole.engine.llm.llm_engine.engine_core.shutdown()  # another is started
    resumed = make(tmp_path / "resumed", max_steps=4, **given)
    found = observed(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert list(expected) == [0, 1, 2, 3] and list(found) == [2, 3]
    for step, (blend, weights, drawn) in expected.items():
        assert Blend.from_dict(blend).rule == rules[step]
        assert step == 0 or any(not torch.equal(weights[name], one) for name, one in expected[0][1].items())
        if step in found:
            assert found[step][0] == blend and found[step][2] == drawn
            assert all(torch.equal(found[step][1][name], one) for name, one in weights.items())
    assert logged(resumed, "loss") == logged(whole, "loss")  # that of the checkpoint first
    student, other = (one.accelerator.unwrap_model(one.model) for one in (resumed, whole))
    assert all(torch.equal(one, tensors(other)[name]) for name, one in tensors(student).items())


def test_statistics_are_those_of_the_rollouts(cpu_engine, teacher, tmp_path):
    trainer, drawn = opd(tmp_path / "run", max_steps=1, learning_rate=0.0), []
    generate = trainer._generate_single_turn

    def generate_and_keep(prompt_ids, *args, **kwargs):
        drawn.extend(zip(prompt_ids, generate(prompt_ids, *args, **kwargs), strict=True))
        return [ids for _, ids in drawn]

    trainer._generate_single_turn = generate_and_keep
    trainer.train()
    student = AutoModelForCausalLM.from_pretrained(STUDENT, dtype="float32").eval()
    blend = Blend(TrustRegion(0.05))
    rows = [teacher_forced([student, teacher], blend, prompt, list(ids)) for prompt, ids in drawn]
    expected = {
        name: torch.cat([step.statistics[name] for _, step, _ in rows]).mean().item()
        for name in ("teacher_weight", "teacher_feasible", "kl_behavior_student", "kl_behavior_teacher")
    }
    teachers = torch.cat([partner[0].log_softmax(-1) for _, _, partner in rows])
    expected["teacher_logp"] = (torch.cat([policy.exp() for policy, _, _ in rows]) * teachers).sum(-1).mean().item()
    expected["teacher_entropy"] = -(teachers.exp() * teachers).sum(-1).mean().item()
    expected["teacher_weight/mean"] = expected.pop("teacher_weight")
    for name, value in expected.items():
        assert logged(trainer, f"blend/{name}") == [pytest.approx(value, rel=2e-3, abs=1e-5)], name


def test_a_student_with_adapters_and_its_own_base(cpu_engine, tmp_path):
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    trainer = grpo(tmp_path / "run", teacher=None, trainer={"peft_config": adapter}, max_steps=2)
    base = AutoModelForCausalLM.from_pretrained(STUDENT, dtype="float32").eval()
    trainer.train()
    student = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)).merge_and_unload().eval()
    rows = draw(trainer, LogitMixing(0.3))
    assert worst_error([student, base], Blend(LogitMixing(0.3)), rows) < TOLERANCE
    assert worst_error([base, base], Blend(LogitMixing(0.3)), rows) > 100 * TOLERANCE


def test_a_teacher_in_memory_is_sent_as_it_is(cpu_engine, teacher, tmp_path):
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.5)
    trainer = grpo(tmp_path / "run", teacher=teacher, max_steps=1)
    trainer.train()
    student = trainer.accelerator.unwrap_model(trainer.model).eval()
    rows = draw(trainer, LogitMixing(0.3))
    assert worst_error([student, teacher], Blend(LogitMixing(0.3)), rows) < TOLERANCE


def test_greedy_decodes_and_evaluation_are_the_engines(cpu_engine, tmp_path):
    dataset = task.build_prompt_dataset("test", 16)
    trainer = grpo(
        tmp_path / "engine",
        teacher_weight_schedule="adaptive",
        adaptive_num_prompts=16,
        eval_policy="both",
        per_device_eval_batch_size=16,
        num_generations_eval=1,
        max_steps=1,
        trainer={"eval_dataset": dataset},
    )
    plain = grpo(tmp_path / "plain", use_vllm=False)
    for weights in [(0.0,), (0.3,), (1.0,)]:
        one, other = trainer.greedy_rewards(list(dataset), weights), plain.greedy_rewards(list(dataset), weights)
        assert torch.equal(one.rewards, other.rewards) and one.num_tokens == other.num_tokens
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_mixed/reward", "eval_student/reward"} <= metrics.keys()
    assert 0.0 < logged(trainer, "adaptive/next_teacher_weight")[0] < 1.0


def test_greedy_decodes_without_a_teacher_are_those_of_the_engine_of_the_parent(cpu_engine, tmp_path):
    rows = list(task.build_prompt_dataset("test", 8))
    alone, plain = grpo(tmp_path / "engine", teacher_weight=0.0), grpo(tmp_path / "plain", use_vllm=False)
    assert alone.engine is None and alone.use_vllm
    one, other = alone.greedy_rewards(rows, (0.0,)), plain.greedy_rewards(rows, (0.0,))
    assert torch.equal(one.rewards, other.rewards) and one.num_tokens == other.num_tokens


def assert_the_draft_model_is_the_student(trainer):
    (draft,) = trainer.engine.llm.collective_rpc(lambda worker: tensors(worker.get_draft_model()))
    student = tensors(tower(trainer, "student"))
    assert draft.keys() == student.keys() and all(torch.equal(draft[name], student[name]) for name in student)


@pytest.mark.parametrize("adapters", [False, True])
def test_drafts_follow_the_weights(cpu_engine, monkeypatch, teacher, tmp_path, adapters):
    expand_on_the_cpu(monkeypatch)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    trainer = grpo(tmp_path / "run", vllm_draft_tokens=4, trainer={"peft_config": lora} if adapters else {})
    trainer.train()
    student = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)).eval()
    student = student.merge_and_unload() if adapters else student
    rows = draw(trainer, LogitMixing(0.3))
    assert worst_error([student, teacher], Blend(LogitMixing(0.3)), rows) < TOLERANCE
    assert_the_draft_model_is_the_student(trainer)
    assert len(logged(trainer, "mixing/passes_per_token")) == 3
    assert max(logged(trainer, "mixing/passes_per_token")) < 0.6
    assert 0.5 < min(logged(trainer, "mixing/draft_acceptance"))
    # The correction compares the mixture of the engine with that of the trainer
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-3
    if not adapters:
        assert_engine_has_the_weights_of(trainer, saved_student(trainer, tmp_path / "saved"))


@pytest.mark.parametrize("drafts", [4, "auto"])
def test_drafts_inside_the_trust_region(cpu_engine, monkeypatch, tmp_path, drafts):
    expand_on_the_cpu(monkeypatch)
    trainer, numbers = opd(tmp_path / "run", max_steps=3, vllm_draft_tokens=drafts), []
    tell = trainer.engine._tell
    trainer.engine._tell = lambda: (tell(), numbers.append(trainer.engine.blend.draft_tokens))
    trainer.train()
    assert numbers == {4: [4, 4, 0], "auto": [6, 8, 0]}[drafts]  # from the bound, then from what was accepted
    acceptance, bound = (logged(trainer, f"blend/draft_acceptance{name}") for name in ("", "_bound"))
    assert bound == [pytest.approx(acceptance_bound(budget)) for budget in (0.05, 0.025)]
    assert len(acceptance) == 2 and all(one > other for one, other in zip(acceptance, bound))
    assert max(logged(trainer, "blend/passes_per_token")) < 0.35
    assert_the_draft_model_is_the_student(trainer)
    with passes(trainer.engine.llm) as counts:  # of the student alone, after the warmup
        assert_engine_has_the_weights_of(trainer, saved_student(trainer, tmp_path / "saved"))
    assert counts["student"] > 10 and counts["teacher"] == counts["drafts"] == 0


def test_an_engine_without_memory(cpu_engine, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")
    with pytest.raises(EngineError, match="not enough memory for the weights and caches of 2 models"):
        grpo(tmp_path / "run")


def test_two_processes(tmp_path):
    """Each has an engine of its own, which holds the student after the steps that both have taken together."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tests.vllm.two_processes"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, *launch, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'examples'}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("divergences 2") == 1 and done.stdout.count("error") == 2

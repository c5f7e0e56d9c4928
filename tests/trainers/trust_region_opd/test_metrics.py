"""What is logged of the teacher's support and of rewards, against a recomputation from full logits."""

import itertools
import math

import pytest
import torch
from datasets import Dataset

from tests.trainers import forced, runs
from tests.trainers.trust_region_opd import policies
from tests.trainers.trust_region_opd.policies import mean
from trl_blend.errors import ConfigError
from trl_blend.trainers.trust_region_opd.diagnostics import auroc
from trl_blend.trainers.trust_region_opd.rewards import rollout_rewards


STUDENT = {"rollout_policy": "student"}
BLEND = {"kl_budget": 0.3, "kl_budget_schedule": "constant"}
ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def verdict(completion_ids, **kwargs):
    """Right, wrong, or unknown."""
    return [None if sum(ids) % 5 == 0 else float(sum(ids) % 2) for ids in completion_ids]


def support(call, temperature=1.0, eos=None):
    """Statistics of the tokens of a recorded loss, as lists, and the support score of each row."""
    student, teacher = forced.student_at(call.parameters), forced.frozen(1)
    rows = [policies.logprob_rows(model, call.inputs, temperature, eos) for model in (student, teacher)]
    tokens = policies.emitted(call.inputs)
    if eos is not None:
        tokens = [eos[0] if token in eos[1] else token for token in tokens]
    logps = [[row[token] for row, token in zip(model, tokens, strict=True)] for model in rows]
    entropy = [-math.fsum(math.exp(v) * v for v in row if v > -math.inf) for row in rows[1]]
    gaps = iter([t - s for s, t in zip(*logps, strict=True)])
    scores = [mean(list(itertools.islice(gaps, len(row)))) for row in forced.tokens(call.inputs)]
    return {"student_logp": logps[0], "teacher_logp": logps[1], "teacher_entropy": entropy}, scores


def brute_force_auroc(scores, right):
    """Share of (right, wrong) pairs where the right one scores higher, ties as one half."""
    pairs = [(s, t) for s, a in zip(scores, right) if a == 1 for t, b in zip(scores, right) if b == 0]
    return sum(1.0 if s > t else 0.5 if s == t else 0.0 for s, t in pairs) / len(pairs)


# AUROC


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_the_share_of_ordered_pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (40,), generator=generator).double()  # with many ties
    right = torch.randint(0, 2, (40,), generator=generator).float()
    assert auroc(scores, right) == pytest.approx(brute_force_auroc(scores.tolist(), right.tolist()))


def test_auroc_by_hand():
    assert auroc(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.0, 0.0, 1.0, 1.0])) == 1.0
    assert auroc(torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.0, 0.0, 1.0, 1.0])) == 0.0
    assert auroc(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.0, 1.0, 1.0])) == 0.5
    assert auroc(torch.tensor([1.0, 2.0, 1.5, 1.5]), torch.tensor([0.0, 1.0, 1.0, 0.0])) == 0.875


def test_auroc_of_one_class_is_undefined():
    for right in (torch.zeros(3), torch.ones(3), torch.full((3,), math.nan)):
        assert math.isnan(auroc(torch.tensor([0.1, 0.2, 0.3]), right))


def test_auroc_leaves_out_what_is_unknown():
    scores, right = torch.tensor([0.1, 0.2, 0.3, math.nan]), torch.tensor([0.0, 1.0, math.nan, 0.0])
    assert auroc(scores, right) == 1.0


# Statistics of the teacher


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize(("temperature", "eos"), [(1.0, None), (1.3, [20, 33])])
def test_teacher_statistics_are_means_over_the_tokens_of_a_step(build_opd, accumulated, temperature, eos):
    """Over the tokens of all micro-batches, not a mean of their means."""
    settings = {**STUDENT, "log_teacher_statistics": True, "temperature": temperature, "teacher_eos_token_id": eos}
    record = runs.train(build_opd(max_steps=2, seed=1, **settings, **(ACCUMULATED if accumulated else {})))
    pair = None if eos is None else policies.eos_pair(eos)
    size = len(record.calls) // 2
    steps = [record.calls[:size], record.calls[size:]]
    found = [[support(call, temperature, pair)[0] for call in calls] for calls in steps]
    for name in ("student_logp", "teacher_logp", "teacher_entropy"):
        expected = [mean([value for one in step for value in one[name]]) for step in found]
        assert record.logged(f"blend/{name}") == pytest.approx(expected, rel=1e-4), name
    if accumulated:
        of_means = [mean([mean(one["teacher_logp"]) for one in step]) for step in found]
        assert record.logged("blend/teacher_logp") != pytest.approx(of_means, rel=5e-4)


def test_statistics_of_several_steps_are_means_over_their_tokens(build_opd):
    settings = {**STUDENT, **ACCUMULATED, "kl_support": "student_top_k", "log_teacher_statistics": True}
    record = runs.train(build_opd(max_steps=2, logging_steps=2, **settings))
    values = [value for call in record.calls for value in support(call)[0]["teacher_logp"]]
    assert record.logged("blend/teacher_logp") == [pytest.approx(mean(values), rel=1e-4)]


@pytest.mark.parametrize("settings", [STUDENT, BLEND], ids=["student", "blended"])
def test_what_is_measured_without_asking(build_opd, settings):
    record = runs.train(build_opd(**settings))
    blended = settings is BLEND
    assert bool(record.logged("blend/teacher_logp")) == bool(record.logged("blend/teacher_entropy")) == blended
    assert record.logged("blend/student_logp") == [] and record.logged("blend/auroc") == []
    assert bool(record.logged("blend/kl_behavior_student")) == blended
    for name in ("rollout_seconds", "rollout_tokens_per_second", "loss_seconds", "loss_tokens_per_second"):
        (value,) = record.logged(f"blend/{name}")
        assert value > 0.0
    tokens = len(policies.emitted(record.calls[0].inputs))
    for name in ("rollout", "loss"):
        seconds, rate = record.logged(f"blend/{name}_seconds"), record.logged(f"blend/{name}_tokens_per_second")
        assert seconds[0] * rate[0] == pytest.approx(tokens)


def test_statistics_of_blended_rollouts_are_measured_once(build_opd):
    """While decoding, or in the loss with its temperature and end-of-sequence token: the same numbers."""
    plain, measured = (
        runs.train(build_opd(log_teacher_statistics=flag, **BLEND, **ACCUMULATED)) for flag in (False, True)
    )
    for name in ("teacher_logp", "teacher_entropy"):
        (value,) = plain.logged(f"blend/{name}")
        assert measured.logged(f"blend/{name}") == [pytest.approx(value, rel=1e-4)]
    runs.assert_same_run(measured, plain)


# Rewards


def test_rewards_have_no_effect(build_opd):
    def noisy(completion_ids, **kwargs):
        return [1e6 * len(ids) for ids in completion_ids]

    plain = runs.train(build_opd(max_steps=2, **ACCUMULATED, **BLEND))
    rewarded = runs.train(
        build_opd(max_steps=2, trainer_kwargs={"reward_funcs": [noisy, verdict]}, **ACCUMULATED, **BLEND)
    )
    runs.assert_same_run(rewarded, plain)
    assert rewarded.logged("rewards/noisy/mean")[0] > 1e6


def test_reward_means_leave_out_what_is_none(build_opd):
    def nothing(completion_ids, **kwargs):
        return [None] * len(completion_ids)

    functions = [verdict, nothing, runs.reward]
    record = runs.train(build_opd(max_steps=3, trainer_kwargs={"reward_funcs": functions}, **STUDENT))
    unknown = 0
    for step, call in enumerate(record.calls):
        rows = forced.tokens(call.inputs)
        known = [value for value in verdict(rows) if value is not None]
        unknown += len(rows) - len(known)
        assert record.logged("rewards/verdict/mean")[step] == pytest.approx(mean(known))
        assert record.logged("rewards/reward/mean")[step] == pytest.approx(mean(runs.reward(rows)))
    assert unknown > 0, "every reward is known: this would test nothing"
    assert [entry["rewards/nothing/mean"] for entry in record.trainer.state.log_history[:3]] == [None] * 3


def test_rewards_see_columns_and_conversations(build_opd):
    seen = []

    def judge(prompts, completions, completion_ids, answer, trainer_state, **kwargs):
        kwargs["log_extra"]("name", [1] * len(prompts)), kwargs["log_metric"]("name", 1.0)  # GRPO's, without effect
        seen.append((prompts, completions, completion_ids, answer, trainer_state.global_step, kwargs))
        return [0.0] * len(prompts)

    prompts = [[{"role": "user", "content": text}] for text in runs.PROMPTS]
    data = Dataset.from_dict({"prompt": prompts, "answer": [str(index) for index in range(8)]})
    trainer = build_opd(train_dataset=data, max_steps=2, trainer_kwargs={"reward_funcs": judge}, **STUDENT)
    rollouts = runs.record_opd_rollouts(trainer)
    trainer.train()
    answers = dict(zip(runs.PROMPTS, data["answer"]))
    for step, (asked, completions, completion_ids, answer, at, rest) in enumerate(seen):
        assert at == step and set(rest) == {"log_extra", "log_metric"}
        assert completion_ids == forced.tokens(rollouts[step].inputs)
        assert answer == [answers[prompt[0]["content"]] for prompt in asked]
        texts = trainer.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        assert completions == [[{"role": "assistant", "content": text}] for text in texts]


def test_scores_of_plain_prompts_are_of_texts(models):
    from transformers import AutoTokenizer

    def judge(completions, **kwargs):
        return [float(len(text)) for text in completions]

    tokenizer = AutoTokenizer.from_pretrained(models / "student")
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    rewards = rollout_rewards([judge, lambda **kwargs: [None, 2]], rows, [[16, 17, 1], [18]], tokenizer, None)
    assert rewards[:, 0].tolist() == [2.0, 1.0]
    assert math.isnan(rewards[0, 1]) and rewards[1, 1] == 2.0


def test_one_reward_per_rollout(build_opd):
    def short(completions, **kwargs):
        return [1.0]

    trainer = build_opd(trainer_kwargs={"reward_funcs": short}, **STUDENT)
    with pytest.raises(ConfigError, match="short returned 1 rewards for 8 rollouts"):
        trainer.train()


# AUROC of a run


@pytest.mark.parametrize("settings", [STUDENT, BLEND], ids=["student", "blended"])
@pytest.mark.parametrize("logging_steps", [1, 2])
def test_auroc_is_over_all_rollouts_since_the_last_log(build_opd, settings, logging_steps):
    """In an epoch that ends with prompts to spare, and with verdicts that travel through shuffling and splitting."""
    train_dataset = runs.dataset(tuple(f"{n}+7=" for n in range(17)))
    record = runs.train(
        build_opd(
            max_steps=2,
            logging_steps=logging_steps,
            train_dataset=train_dataset,
            trainer_kwargs={"reward_funcs": verdict},
            **ACCUMULATED,
            **settings,
        )
    )
    calls = [(support(call)[1], verdict(forced.tokens(call.inputs))) for call in record.calls]
    expected = []
    for start in range(0, len(calls), 4 * logging_steps):
        part = calls[start : start + 4 * logging_steps]
        scores, right = ([value for one in part for value in one[index]] for index in range(2))
        expected.append(brute_force_auroc(scores, right))
    assert record.logged("blend/auroc") == pytest.approx(expected, abs=1e-6)
    assert any(0.0 < value < 1.0 for value in expected)


def test_auroc_of_one_class_is_absent(build_opd):
    def right(completion_ids, **kwargs):
        return [1.0] * len(completion_ids)

    record = runs.train(build_opd(trainer_kwargs={"reward_funcs": right}, **STUDENT))
    assert record.logged("rewards/right/mean") == [1.0] and record.logged("blend/auroc") == []


def test_the_threshold_decides_what_is_right(build_opd):
    settings = {"trainer_kwargs": {"reward_funcs": runs.reward}, **STUDENT}
    assert runs.train(build_opd(**settings)).logged("blend/auroc") == []  # never 1
    record = runs.train(build_opd(success_threshold=3 / 7, **settings))
    (call,) = record.calls
    right = [float(value >= 3 / 7) for value in runs.reward(forced.tokens(call.inputs))]
    assert record.logged("blend/auroc") == [pytest.approx(brute_force_auroc(support(call)[1], right), abs=1e-6)]


# Evaluation


@pytest.mark.parametrize("settings", [STUDENT, {**BLEND, "kl_support": "student_top_k"}], ids=["student", "blended"])
def test_evaluation_has_the_statistics_of_the_student(build_opd, settings):
    # 6 prompts in batches of 4: the last one is short, and not filled with others
    data = runs.dataset(runs.PROMPTS[:6])
    trainer = build_opd(
        per_device_eval_batch_size=4, trainer_kwargs={"eval_dataset": data, "reward_funcs": verdict}, **settings
    )
    record = runs.Record(trainer)
    metrics = trainer.evaluate()
    assert [len(call.inputs["completion_ids"]) for call in record.calls] == [4, 2]
    found = [support(call) for call in record.calls]
    for name in ("student_logp", "teacher_logp", "teacher_entropy"):
        values = [value for one, _ in found for value in one[name]]
        assert metrics[f"eval_blend/{name}"] == pytest.approx(mean(values), rel=1e-4), name
    scores = [score for _, rows in found for score in rows]
    right = [value for call in record.calls for value in verdict(forced.tokens(call.inputs))]
    assert metrics["eval_blend/auroc"] == pytest.approx(brute_force_auroc(scores, right), abs=1e-6)
    means = [mean([value for value in right[part] if value is not None]) for part in (slice(4), slice(4, 6))]
    assert metrics["eval_rewards/verdict/mean"] == pytest.approx(mean(means))
    assert metrics["eval_blend/loss_seconds"] > 0.0
    assert ("eval_blend/reverse_kl" in metrics) == trainer.uses_own_divergence
    assert "eval_blend/kl_budget" not in metrics and "eval_blend/kl_behavior_student" not in metrics


def test_evaluation_between_steps_leaves_the_training_metrics_alone(build_opd):
    settings = {**BLEND, **ACCUMULATED, "max_steps": 2, "log_teacher_statistics": True}
    plain = runs.train(build_opd(**settings))
    data = {"eval_dataset": runs.dataset(runs.PROMPTS[:4])}
    trainer = build_opd(eval_strategy="steps", eval_steps=1, trainer_kwargs=data, **settings)
    rollouts = runs.record_opd_rollouts(trainer)
    trainer.train()
    # Evaluated rollouts are the student's own, also in mid-warmup
    assert [bool(rollout.records) for rollout in rollouts] == [True, False, True, False]
    first = [entry for entry in trainer.state.log_history if "loss" in entry][0]
    for name in ("blend/kl_behavior_student", "blend/teacher_logp", "blend/student_logp"):
        assert first[name] == plain.logged(name)[0]
    assert len([entry for entry in trainer.state.log_history if "eval_blend/teacher_logp" in entry]) == 2


def test_the_target_is_evaluated_as_the_teacher(build_opd):
    """Veto's exponent belongs to training: the evaluated divergence is that from the teacher."""
    data = {"eval_dataset": runs.dataset()}
    veto = {"distillation_target": "veto", "veto_weight_start": 0.8}
    metrics = [build_opd(**STUDENT, **extra, trainer_kwargs=data).evaluate() for extra in ({}, veto)]
    for name in ("eval_loss", "eval_blend/teacher_logp", "eval_blend/student_logp"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-5)
    record = runs.train(build_opd(max_steps=2, **STUDENT, **veto, veto_warmup_steps=4))
    assert record.logged("blend/veto_weight") == pytest.approx([0.8, 0.6])

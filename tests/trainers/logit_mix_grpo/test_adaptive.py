"""The adaptive teacher weight: Algorithm 2 of the logit-averaging paper."""

import logging
import math

import pytest
import torch
from transformers import TrainerCallback

from tests import reference
from tests.tiny import tiny_tokenizer
from tests.trainers import forced, runs
from trl_blend.trainers.logit_mix_grpo.adaptive import adaptive_weight, net_gain


VALIDATION = ("3*3=", "10-1=", "why?", "zz", "5 5 5", "a=b", "(1)", "x-y")


def parity(completion_ids, **kwargs):
    return [float(sum(ids) % 2) for ids in completion_ids]


def build_adaptive(build, **settings):
    defaults = {
        "teacher_weight": 0.5,
        "teacher_weight_schedule": "adaptive",
        "adaptive_scale": 4.0,
        "adaptive_offset": -0.05,
        "adaptive_num_prompts": 6,
        "learning_rate": 2e-3,
        "reward_funcs": parity,
        "trainer_kwargs": {"eval_dataset": runs.dataset(VALIDATION)},
    }
    return build(**{**defaults, **settings})


@pytest.mark.parametrize(
    ("mixed", "student"),
    [([1, 1, 0, 0, 1], [0, 1, 1, 0, 0]), ([0, 0], [1, 1]), ([1], [1]), ([1, 0, 1, 1], [0, 0, 0, 1])],
)
def test_net_gain_and_weight_equal_the_reference(mixed, student):
    mixed, student = [bool(m) for m in mixed], [bool(s) for s in student]
    gain = net_gain(mixed, student)
    expected_gain, expected_weight = reference.adaptive_weight(mixed, student, 4.0, 0.1)
    assert gain.net_gain == pytest.approx(expected_gain)
    assert adaptive_weight(gain.net_gain, 4.0, 0.1) == pytest.approx(expected_weight)
    assert gain.mixed_accuracy == sum(mixed) / len(mixed)
    assert gain.student_accuracy == sum(student) / len(student)


def test_the_weight_stays_finite_at_extreme_scales():
    assert adaptive_weight(-1.0, 1e4, 0.0) == pytest.approx(0.0)
    assert adaptive_weight(1.0, 1e4, 0.0) == pytest.approx(1.0)


def test_net_gain_needs_the_same_prompts():
    with pytest.raises(ValueError):
        net_gain([True], [True, False])


class AfterStep(TrainerCallback):
    """The trained weights and the adaptive weight after every step, once every other callback has run."""

    def __init__(self, trainer):
        self.trainer, self.steps = trainer, []
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append((runs.snapshot(model), self.trainer.adaptive_weights))


def right(parameters, weight, space="logits"):
    """Whether each validation prompt is answered right, decoded independently."""
    student, partners = forced.student_at(parameters).requires_grad_(False), [forced.frozen(1)] if weight else []
    tokenizer = tiny_tokenizer()
    completions = [
        forced.greedy(
            student,
            partners,
            [weight] * len(partners),
            tokenizer(prompt)["input_ids"],
            runs.EOS_IDS,
            runs.MAX_LENGTH,
            space,
        )
        for prompt in VALIDATION[:6]
    ]
    return [value >= 1.0 for value in parity(completions)], sum(map(len, completions))


@pytest.mark.parametrize("space", ["logits", "probs"])
@pytest.mark.parametrize("objective", ["mixed", "student"])
def test_the_weight_follows_the_net_gain_of_an_independent_decode(build, objective, space):
    trainer = build_adaptive(build, max_steps=3, objective=objective, mixing_space=space)
    after = AfterStep(trainer)
    record = runs.train(trainer)
    weight, gains = 0.5, []
    for step, (parameters, adapted) in enumerate(after.steps):
        (mixed, mixed_tokens), (student, student_tokens) = right(parameters, weight, space), right(parameters, 0.0)
        gain, weight = reference.adaptive_weight(mixed, student, 4.0, -0.05)
        gains.append(gain)
        assert adapted == pytest.approx((weight,))
        assert record.logged("adaptive/net_gain")[step] == pytest.approx(gain)
        assert record.logged("adaptive/mixed_accuracy")[step] == pytest.approx(sum(mixed) / 6)
        assert record.logged("adaptive/student_accuracy")[step] == pytest.approx(sum(student) / 6)
        assert record.logged("adaptive/next_teacher_weight")[step] == pytest.approx(weight)
        assert record.logged("adaptive/decoded_tokens")[step] == mixed_tokens + student_tokens
        assert record.logged("adaptive/seconds")[step] > 0
    assert any(gains), "the two policies always do equally well here, which tests nothing"
    # The weight of a step is the one that the step before it left
    assert record.logged("mixing/teacher_weight") == pytest.approx([0.5, *(w for _, (w,) in after.steps[:-1])])


def test_the_threshold_and_the_reward_weights_decide_what_is_right(build):
    """Rewards of 1 and 0 with weights 0.5 and 2: right means above the threshold after weighting."""

    def always(completion_ids, **kwargs):
        return [1.0] * len(completion_ids)

    for threshold, accuracy in ((2.5, None), (2.0, 1.0), (3.0, 0.0)):
        settings = {"reward_funcs": [parity, always], "reward_weights": [0.5, 2.0]}
        record = runs.train(build_adaptive(build, adaptive_success_threshold=threshold, **settings))
        logged = record.logged("adaptive/student_accuracy")[0]
        assert 0.0 < logged < 1.0 if accuracy is None else logged == accuracy


def test_weights_that_sum_to_one_reach_a_threshold_of_one(build):
    """In float32, .15 + .65 + .2 is a little less than 1."""

    def first(completion_ids, **kwargs):
        return [1.0] * len(completion_ids)

    def second(completion_ids, **kwargs):
        return [1.0] * len(completion_ids)

    def third(completion_ids, **kwargs):
        return [1.0] * len(completion_ids)

    settings = {"reward_funcs": [first, second, third], "reward_weights": [0.15, 0.65, 0.2]}
    assert runs.train(build_adaptive(build, **settings)).logged("adaptive/student_accuracy") == [1.0]


def test_the_interval(build):
    trainer = build_adaptive(build, max_steps=5, adaptive_interval=2)
    after = AfterStep(trainer)
    record = runs.train(trainer)
    weights = [weight for _, (weight,) in after.steps]
    assert weights[0] == 0.5 != weights[1] and weights[1] == weights[2] and weights[3] == weights[4]
    assert len(record.logged("adaptive/net_gain")) == 2


def test_the_decodes_leave_the_run_as_it_is(build):
    """With a weight that the updates cannot move, the run is that of a constant weight: nothing else was touched."""
    frozen = {"adaptive_scale": 1e-300, "adaptive_offset": 0.0, "max_steps": 3}
    adaptive = runs.train(build_adaptive(build, **frozen))
    constant = runs.train(build(teacher_weight=0.5, max_steps=3, learning_rate=2e-3, reward_funcs=parity))
    assert adaptive.losses == constant.losses
    runs.assert_same_tensors(runs.snapshot(adaptive.trainer.model), runs.snapshot(constant.trainer.model))
    for name in ("num_tokens", "reward", "completions/mean_length", "mixing/kl_behavior_student", "entropy"):
        assert adaptive.logged(name) == constant.logged(name) != []
    assert adaptive.trainer.state.num_input_tokens_seen == constant.trainer.state.num_input_tokens_seen > 0


def test_a_start_at_zero_can_leave_it(build):
    record = runs.train(build_adaptive(build, teacher_weight=0.0, max_steps=2))
    weights = record.logged("mixing/teacher_weight")
    # No difference between the policies at weight 0: the net gain is 0
    assert weights == pytest.approx([0.0, 1 / (1 + math.exp(4.0 * -0.05))])
    assert torch.isfinite(torch.tensor(record.losses)).all()


def test_the_bound_holds_and_a_starving_student_is_reported_once(build, caplog):
    """A student that solves nothing, a mixture that solves everything: unbounded, the weight runs towards 1."""

    class Rewards:
        __name__ = "of_the_mixture"

        def __call__(self, completion_ids, **kwargs):
            return [float(self.trainer._rule is not None)] * len(completion_ids)

    found = {}
    for bound in (1.0, 0.5):
        rewards = Rewards()
        trainer = build_adaptive(build, max_steps=2, reward_funcs=rewards, adaptive_max_weight=bound)
        rewards.trainer = trainer
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found[bound] = runs.train(trainer).logged("adaptive/next_teacher_weight")
        said = [record.getMessage() for record in caplog.records if "adaptive_max_weight" in record.getMessage()]
        assert len(said) == (1 if bound == 1.0 else 0)
    assert found == {1.0: pytest.approx([1 / (1 + math.exp(-4.0 * 1.05))] * 2), 0.5: [0.5, 0.5]}

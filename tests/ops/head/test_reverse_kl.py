"""Values, gradients and limits of `reverse_kl` and `support_statistics` against the float64 reference."""

import math

import pytest
import torch

from tests import reference, reference_divergences
from tests.ops.head.heads import (
    expected_reverse_kl,
    expected_support,
    gradients,
    leaves,
    logit_rows,
    random_head,
    with_leaves,
)
from trl_blend.errors import ConfigError
from trl_blend.ops import EosMap, LMHead, mixed_log_probs, reverse_kl, support_statistics


N, V = 5, 11
# Ids of three different tiles, one more that no model has
EOS = EosMap(9, (1, 6, 40))
FULL, TOP = {"top_k": None}, {"top_k": 4}
every_support = pytest.mark.parametrize("support", [FULL, TOP], ids=["full", "top-k"])
with_and_without_eos = pytest.mark.parametrize("eos", [None, EOS], ids=["", "eos"])

# name -> options of the student (with vocabulary), options of the teacher (with hidden size and vocabulary), arguments
CASES = {
    "plain": ((V, {}), (4, V, {}), {}),
    "cold, bias": ((V, {"bias": True}), (6, V, {"bias": True}), {"temperature": 0.7}),
    "hot, scale": ((V, {"logit_scale": 0.6}), (3, V, {"logit_scale": 1.7}), {"temperature": 1.3}),
    "softcap": ((V, {"softcap": 1.5}), (3, V, {"softcap": 2.5}), {"temperature": 0.7}),
    "all options": (
        (V, {"bias": True, "logit_scale": 0.6, "softcap": 1.5}),
        (6, V, {"bias": True, "logit_scale": 1.2, "softcap": 2.0}),
        {"temperature": 1.3},
    ),
    "larger teacher vocabulary": ((V, {"bias": True}), (3, V + 6, {"bias": True}), {}),
    "larger student vocabulary": ((V + 6, {"bias": True, "softcap": 2.0}), (3, V, {}), {"temperature": 1.3}),
    "vocabulary size": ((V + 6, {"bias": True}), (3, V + 2, {"bias": True}), {"vocab_size": V, "temperature": 0.7}),
}


def build(case, requires_grad=True, tokens=N, dtype=torch.float64):
    (vocab, options), (hidden, teacher_vocab, teacher_options), arguments = CASES[case]
    student = random_head(tokens, 4, vocab, requires_grad=requires_grad, dtype=dtype, **options)
    teacher = random_head(tokens, hidden, teacher_vocab, dtype=dtype, **teacher_options)
    return student, teacher, arguments


def assert_matches(student, teacher, arguments):
    result = reverse_kl(student, teacher, **arguments)
    expected = expected_reverse_kl(student, teacher, **arguments)
    torch.testing.assert_close(tuple(result)[:3], expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(len(result.loss), dtype=torch.float64)
    grads = gradients([result.loss], leaves(student), [direction])
    wanted = gradients(expected[:1], leaves(student), [direction])
    torch.testing.assert_close(grads, wanted, rtol=1e-11, atol=1e-12)
    return result, grads


@with_and_without_eos
@pytest.mark.parametrize("veto_weight", [0.0, 0.4])
@every_support
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_match_the_reference(case, support, veto_weight, eos, tiles):
    student, teacher, arguments = build(case)
    result, grads = assert_matches(student, teacher, {**arguments, **support, "veto_weight": veto_weight, "eos": eos})
    assert result.loss.dtype == torch.float64
    assert all(grad.abs().max() > 1e-3 for grad in grads)
    assert not result.student_entropy.requires_grad
    assert not result.reverse_kl.requires_grad


@with_and_without_eos
@pytest.mark.parametrize("veto_weight", [0.0, 0.4])
@pytest.mark.parametrize("top_k", [None, 4])
def test_gradient_is_that_of_finite_differences_with_constant_stop_gradients(top_k, veto_weight, eos, small_tiles):
    """Autograd of the reference is not involved: two values of the loss, with everything under `sg` held fixed."""
    student, teacher, arguments = build("all options")
    arguments = {**arguments, "top_k": top_k, "veto_weight": veto_weight, "eos": eos}
    direction = torch.randn(N, dtype=torch.float64)
    grads = gradients([reverse_kl(student, teacher, **arguments).loss], leaves(student), [direction])
    frozen, teacher_rows = logit_rows(student, V), logit_rows(teacher, V)
    options = {**arguments, "eos": None if eos is None else (eos.target, list(eos.merged))}

    def loss(head):
        rows = zip(logit_rows(head, V), teacher_rows, frozen, direction)
        return sum(d * reference_divergences.reverse_kl_loss(s, t, f, **options)[0] for s, t, f, d in rows).item()

    step = 1e-5
    with torch.no_grad():
        for name, grad in zip(("hidden", "weight", "bias"), grads):
            tensor = getattr(student, name)
            along = torch.randn_like(tensor)
            above, below = (loss(student._replace(**{name: tensor + sign * step * along})) for sign in (1, -1))
            assert (above - below) / (2 * step) == pytest.approx((grad * along).sum().item(), rel=1e-7, abs=1e-8)


@with_and_without_eos
def test_gradcheck_of_the_full_support(eos, small_tiles):
    """Veto and the top-k have stop-gradients, which numeric differentiation through them would miss."""
    student, teacher, arguments = build("all options", tokens=2)

    def loss(hidden, weight, bias):
        return reverse_kl(
            student._replace(hidden=hidden, weight=weight, bias=bias), teacher, eos=eos, **arguments
        ).loss

    assert torch.autograd.gradcheck(loss, leaves(student))


@with_and_without_eos
@pytest.mark.parametrize("veto_weight", [0.0, 0.4])
def test_the_largest_support_is_the_full_one(veto_weight, eos, small_tiles):
    """Its loss value is another one, its gradient and its statistic are the same; merged columns have no weight."""
    student, teacher, _ = build("plain")
    full, top = (reverse_kl(student, teacher, veto_weight=veto_weight, top_k=k, eos=eos) for k in (None, V))
    torch.testing.assert_close(top.reverse_kl, full.loss.detach(), rtol=1e-12, atol=1e-13)
    direction = torch.randn(N, dtype=torch.float64)
    torch.testing.assert_close(
        gradients([top.loss], leaves(student), [direction]),
        gradients([full.loss], leaves(student), [direction]),
        rtol=1e-11,
        atol=1e-13,
    )


def test_the_top_k_loss_does_not_reward_leaving_the_support():
    """
    A teacher that agrees with the student inside the support but puts more mass outside. Descent on the truncated sum
    takes mass off the support even where the student has too little there; ours only where it has too much.
    """
    support = [0, 1, 2]
    outside = torch.tensor([-1.0, -1.5, -1.2, -2.0], dtype=torch.float64)
    inside = torch.tensor([1.0, 0.8, 0.6], dtype=torch.float64)
    for shift, sign in ((-0.5, 1.0), (0.5, -1.0)):  # of the teacher's logits inside: less, or more mass there
        student = torch.cat([inside, outside]).requires_grad_()
        teacher = torch.cat([inside + shift, outside])
        eye = torch.eye(7, dtype=torch.float64)
        loss = reverse_kl(LMHead(student[None], eye), LMHead(teacher[None], eye), top_k=3).loss
        (grad,) = torch.autograd.grad(loss.sum(), student)
        assert torch.sign(grad[support].sum()) == sign
        truncated = reference_divergences.truncated_sum(student, teacher, support)
        (grad,) = torch.autograd.grad(truncated, student)
        assert grad[support].sum() > 0


@pytest.mark.parametrize("support", [FULL, {"top_k": 2}], ids=["full", "top-k"])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 2), (1, 9), (4, 2)])
@pytest.mark.parametrize("eos", [None, EosMap(1, (0,))], ids=["", "eos"])
def test_smallest_shapes(tokens, vocab, support, eos):
    student = random_head(tokens, 3, vocab, requires_grad=True)
    teacher = random_head(tokens, 1, vocab)
    result, grads = assert_matches(student, teacher, {**support, "eos": eos, "veto_weight": 0.3})
    if vocab == 2 and eos:  # the only event left is certain
        torch.testing.assert_close(result.reverse_kl, torch.zeros(tokens, dtype=torch.float64))
        assert all(grad.abs().max() < 1e-12 for grad in grads)


@every_support
@with_and_without_eos
def test_identical_models_have_no_divergence(support, eos):
    student = random_head(N, 4, V, bias=True, requires_grad=True)
    teacher = LMHead(*(tensor.detach().clone() for tensor in student[:3]))
    result = reverse_kl(student, teacher, eos=eos, **support)
    torch.testing.assert_close(result.reverse_kl, torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-13)
    for grad in torch.autograd.grad(result.loss.sum(), leaves(student)):
        assert grad.abs().max() < 1e-12
    # Towards Veto's target it pays to be less certain than the teacher: Q ∝ p^1.4 is not p
    assert (reverse_kl(student, teacher, eos=eos, veto_weight=0.4).reverse_kl > 1e-3).all()


def test_models_that_differ_in_the_eos_token_only():
    """The teacher stops with token 1 where the student stops with token 9: no difference once that is one event."""
    student = random_head(N, 4, V, bias=True, requires_grad=True)
    swapped = list(range(V))
    swapped[1], swapped[9] = 9, 1
    teacher = LMHead(student.hidden.detach(), student.weight.detach()[swapped], student.bias.detach()[swapped])
    assert (reverse_kl(student, teacher).loss > 1e-3).any()
    for support in (FULL, TOP):
        result = reverse_kl(student, teacher, eos=EosMap(9, (1,)), **support)
        torch.testing.assert_close(result.reverse_kl, torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-13)
        for grad in torch.autograd.grad(result.loss.sum(), leaves(student)):
            assert grad.abs().max() < 1e-12


@every_support
def test_an_eos_map_with_nothing_to_merge_changes_nothing(support):
    student, teacher = random_head(N, 4, V), random_head(N, 3, V)
    plain = reverse_kl(student, teacher, **support)
    torch.testing.assert_close(
        tuple(reverse_kl(student, teacher, eos=EosMap(9, (V,)), **support)), tuple(plain), rtol=0, atol=0
    )


@pytest.mark.parametrize("support", [FULL, {"top_k": V}], ids=["full", "top-k"])
@with_and_without_eos
def test_tokens_excluded_by_infinite_biases(support, eos, small_tiles):
    """A whole tile in both models, in the student alone, and in the teacher alone: the last is huge but not NaN."""
    student, teacher = random_head(N, 4, V, bias=True), random_head(N, 5, V, bias=True)
    student.bias[[0, 1, 2, 3, 8, 10]] = -math.inf
    teacher.bias[[0, 1, 2, 3]] = -math.inf
    for tensor in leaves(student):
        tensor.requires_grad_()
    result = reverse_kl(student, teacher, eos=eos, **support)
    if support is FULL:
        expected = expected_reverse_kl(student, teacher, eos=eos)
        torch.testing.assert_close(tuple(result)[:3], expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(result.loss.sum(), leaves(student))
    assert all(torch.isfinite(tensor).all() for tensor in (*result[:3], *grads))
    assert (grads[2][[0, 2, 3, 8, 10]] == 0).all()
    teacher.bias[5] = -math.inf
    result = reverse_kl(student, teacher, eos=eos, **support)
    grads = torch.autograd.grad(result.loss.sum(), leaves(student))
    assert (result.reverse_kl > 1e20).all()
    assert all(torch.isfinite(tensor).all() for tensor in (*result[:3], *grads))


# ---------------------------------------------------------------- towards a mixture of reference and teacher


def build_three(case):
    student, teacher, arguments = build(case)
    _, options = CASES[case][0]
    return student, teacher, random_head(N, 5, student.weight.shape[0], **options), arguments


@with_and_without_eos
@pytest.mark.parametrize("target_weight", [0.0, 0.3, 1.8])
@every_support
@pytest.mark.parametrize("case", CASES)
def test_an_interpolated_target_matches_the_reference(case, support, target_weight, eos, tiles):
    student, teacher, reference, arguments = build_three(case)
    arguments = {**arguments, **support, "reference": reference, "target_weight": target_weight, "eos": eos}
    result, grads = assert_matches(student, teacher, arguments)
    assert all(grad.abs().max() > 1e-3 for grad in grads)
    other = expected_reverse_kl(student, teacher, **{**arguments, "reference": None})
    assert not torch.allclose(result.reverse_kl, other[2])


@with_and_without_eos
@every_support
def test_an_interpolated_veto_target_matches_the_reference(support, eos, small_tiles):
    student, teacher, reference, arguments = build_three("all options")
    arguments = {**arguments, **support, "reference": reference, "target_weight": 0.3, "veto_weight": 0.4, "eos": eos}
    assert_matches(student, teacher, arguments)


@with_and_without_eos
@every_support
def test_all_weight_on_the_teacher_is_the_teacher_bit_for_bit(support, eos):
    student, teacher, reference, arguments = build_three("all options")
    values = []
    for target in ({}, {"reference": reference, "target_weight": 1.0}):
        result = reverse_kl(student, teacher, eos=eos, **arguments, **support, **target)
        values.append([*result[:3], *gradients([result.loss], leaves(student), [torch.ones(N)])])
    assert all(torch.equal(one, other) for one, other in zip(*values, strict=True))


@with_and_without_eos
@every_support
def test_no_weight_on_the_teacher_leaves_the_reference_alone(support, eos):
    """A student that is the reference has no loss and no gradient, whatever the teacher excludes."""
    student, teacher = random_head(N, 4, V, bias=True, requires_grad=True), random_head(N, 5, V, bias=True)
    teacher.bias[[2, 6]] = -math.inf
    reference = with_leaves(student, lambda tensor: tensor.detach().clone())
    result = reverse_kl(student, teacher, reference=reference, target_weight=0.0, eos=eos, **support)
    assert (result.reverse_kl == 0).all()
    for grad in torch.autograd.grad(result.loss.sum(), leaves(student)):
        assert grad.abs().max() < 1e-14


def test_the_mixture_of_two_heads_is_one_head_on_concatenated_features():
    student, teacher, reference, _ = build_three("plain")
    joined = LMHead(
        torch.cat([0.3 * teacher.hidden, 0.7 * reference.hidden], dim=1).detach(),
        torch.cat([teacher.weight, reference.weight], dim=1).detach(),
    )
    mixed = reverse_kl(student, teacher, reference=reference, target_weight=0.3)
    torch.testing.assert_close(mixed.loss, reverse_kl(student, joined).loss, rtol=1e-12, atol=1e-12)


def test_above_one_it_is_reward_extrapolation():
    """`E_{p_S}[λ (log p_T - log p_ref) - (log p_S - log p_ref)]` is `-KL(p_S‖Q)` up to what no student changes."""
    weight = 2.5
    student, teacher, reference, _ = build_three("plain")
    other, *_ = build_three("plain")

    def reward(head):
        values = []
        for rows in zip(*(logit_rows(one, V) for one in (head, teacher, reference)), strict=True):
            s, t, r = (reference_divergences.canonical_logprobs(row, 1.0, None) for row in rows)
            values.append((s.exp() * (weight * (t - r) - (s - r))).sum())
        return torch.stack(values)

    loss, others = (
        reverse_kl(head, teacher, reference=reference, target_weight=weight).loss for head in (student, other)
    )
    torch.testing.assert_close(loss - others, reward(other) - reward(student), rtol=1e-11, atol=1e-11)
    found, wanted = (gradients([value], leaves(student), [torch.ones(N)]) for value in (loss, -reward(student)))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("target_weight", [0.4, 1.8])
@with_and_without_eos
def test_tokens_that_the_reference_excludes(target_weight, eos, small_tiles):
    """Student and reference are one architecture: what one excludes, the other does. A whole tile, and one token."""
    student, teacher, reference = (random_head(N, 4, V, bias=True) for _ in range(3))
    for head in (student, reference):
        head.bias[[0, 1, 2, 3, 8]] = -math.inf
    for tensor in leaves(student):
        tensor.requires_grad_()
    _, grads = assert_matches(student, teacher, {"reference": reference, "target_weight": target_weight, "eos": eos})
    assert (grads[2][[0, 2, 3, 8]] == 0).all()


# ---------------------------------------------------------------- the forward KL of uncertain teachers

# Below, among and above the entropies of the rows
ENTROPIES = [0.0, 1.2, 9.0]


def has_forward_kl(teacher, entropy, temperature=1.0, eos=None, vocab=V):
    pair = None if eos is None else (eos.target, list(eos.merged))
    rows = [reference_divergences.canonical_logprobs(row, temperature, pair) for row in logit_rows(teacher, vocab)]
    return [reference.entropy(row).item() > entropy for row in rows]


@with_and_without_eos
@pytest.mark.parametrize("entropy", ENTROPIES)
@pytest.mark.parametrize("case", CASES)
def test_the_forward_kl_matches_the_reference(case, entropy, eos, tiles):
    student, teacher, arguments = build(case)
    result, grads = assert_matches(student, teacher, {**arguments, "forward_kl_entropy": entropy, "eos": eos})
    assert result.has_forward_kl.tolist() == has_forward_kl(teacher, entropy, arguments.get("temperature", 1.0), eos)
    assert not result.has_forward_kl.requires_grad
    plain = reverse_kl(student, teacher, **arguments, eos=eos)
    torch.testing.assert_close(result.reverse_kl, plain.reverse_kl, rtol=1e-13, atol=1e-13)
    assert torch.equal(result.loss > plain.loss, result.has_forward_kl)
    assert plain.has_forward_kl is None


def test_the_thresholds_above_sort_the_teachers():
    teacher = random_head(40, 4, V)
    assert [set(has_forward_kl(teacher, entropy)) for entropy in ENTROPIES] == [{True}, {False, True}, {False}]


def test_no_teacher_is_uncertain_enough(small_tiles):
    student, teacher, arguments = build("all options")
    values = []
    for entropy in (None, math.log(V)):
        result = reverse_kl(student, teacher, eos=EOS, forward_kl_entropy=entropy, **arguments)
        values.append((result.loss, gradients([result.loss], leaves(student), [torch.ones(N)])))
    torch.testing.assert_close(*values, rtol=1e-13, atol=1e-13)


@with_and_without_eos
def test_gradcheck_of_the_forward_kl(eos, small_tiles):
    student, teacher, arguments = build("all options", tokens=2)

    def loss(hidden, weight, bias):
        head = student._replace(hidden=hidden, weight=weight, bias=bias)
        return reverse_kl(head, teacher, eos=eos, forward_kl_entropy=0.0, **arguments).loss

    assert torch.autograd.gradcheck(loss, leaves(student))


@with_and_without_eos
def test_the_forward_kl_where_a_model_excludes_tokens(eos, small_tiles):
    student, teacher = random_head(N, 4, V, bias=True), random_head(N, 5, V, bias=True)
    student.bias[[0, 1, 2, 3]] = -math.inf
    teacher.bias[[0, 1, 2, 3, 8, 10]] = -math.inf
    student.bias.requires_grad_()
    result = reverse_kl(student, teacher, eos=eos, forward_kl_entropy=0.0)
    (grad,) = torch.autograd.grad(result.loss.sum(), student.bias)
    assert result.loss.isfinite().all() and grad.isfinite().all() and (grad[[0, 2, 3]] == 0).all()


# ---------------------------------------------------------------- support_statistics


@with_and_without_eos
@pytest.mark.parametrize("case", CASES)
def test_support_statistics_match_the_reference(case, eos, tiles):
    """Every id once, EOS ids among them: each of those has the probability of the whole stop event."""
    student, teacher, arguments = build(case, tokens=V)
    targets = torch.arange(V)
    result = support_statistics(student, teacher, targets, eos=eos, **arguments)
    wanted = expected_support(student, teacher, targets, eos=eos, **arguments)
    torch.testing.assert_close(tuple(result), wanted, rtol=1e-12, atol=1e-12)
    direction = torch.randn(V, dtype=torch.float64)
    grads, expected = (gradients([one], leaves(student), [direction]) for one in (result.student_logps, wanted[0]))
    torch.testing.assert_close(grads, expected, rtol=1e-11, atol=1e-12)
    assert not any(value.requires_grad for value in result[1:])


def test_support_statistics_agree_with_mixed_log_probs():
    student, teacher, targets = random_head(N, 4, V), random_head(N, 3, V), torch.randint(0, V, (N,))
    result = support_statistics(student, teacher, targets)
    alone = mixed_log_probs(teacher, [], [], targets)
    torch.testing.assert_close((result.teacher_logps, result.teacher_entropy), tuple(alone))
    own = mixed_log_probs(student, [], [], targets)
    torch.testing.assert_close((result.student_logps, result.student_entropy), tuple(own))


@pytest.mark.parametrize("target", [-100, -1, V, 99])
def test_targets_outside_the_vocabulary_have_probability_0(target, small_tiles):
    result = support_statistics(random_head(1, 4, V), random_head(1, 4, V + 5), torch.tensor([target]), eos=EOS)
    assert result.student_logps.item() == result.teacher_logps.item() == -math.inf
    # but 40 is a stop token, though neither model has it
    result = support_statistics(random_head(1, 4, V), random_head(1, 4, V + 5), torch.tensor([40]), eos=EOS)
    assert math.isfinite(result.student_logps.item())


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"veto_weight": 1.0}, "`veto_weight` is 1.0. Set it to at least 0 and below 1"),
        ({"veto_weight": -0.1}, "`veto_weight` is -0.1"),
        ({"veto_weight": math.nan}, "`veto_weight` is nan"),
        ({"target_weight": -0.1, "reference": random_head(N, 4, V)}, "`target_weight` is -0.1"),
        ({"target_weight": math.inf, "reference": random_head(N, 4, V)}, "`target_weight` is inf"),
        ({"target_weight": 0.5}, "`target_weight` is 0.5, which needs a `reference`"),
        ({"target_weight": 0.5, "reference": random_head(N, 4, V - 1)}, f"`reference` has {V - 1} logits, but {V} "),
        ({"target_weight": 0.5, "reference": random_head(N - 1, 4, V)}, r"student and \(4, 4\) in the reference"),
        ({"forward_kl_entropy": 1.0, "top_k": 3}, "`forward_kl_entropy` is 1.0, which is defined for the whole"),
        ({"forward_kl_entropy": 1.0, "veto_weight": 0.1}, "`forward_kl_entropy` is 1.0"),
        (
            {"forward_kl_entropy": 1.0, "target_weight": 0.5, "reference": random_head(N, 4, V)},
            "`forward_kl_entropy` is 1.0",
        ),
        ({"top_k": V + 1}, f"`top_k` is {V + 1} and the vocabulary has {V} entries"),
        ({"top_k": V, "vocab_size": V - 1}, f"`top_k` is {V} and the vocabulary has {V - 1} entries"),
        ({"top_k": 0}, "`top_k` is 0"),
        ({"temperature": 0.0}, "`temperature` is 0.0. Set it to a positive number"),
        ({"temperature": math.nan}, "`temperature` is nan"),
        ({"vocab_size": V + 1}, f"`vocab_size` is {V + 1}, but the student has {V} logits and the teacher {V + 2}"),
        ({"vocab_size": 0}, "`vocab_size` is 0"),
        ({"eos": EosMap(V, (1,))}, f"EOS id is {V} but the vocabulary has {V} entries"),
        ({"teacher": random_head(N - 1, 4, V)}, r"shape \(5, 4\) in the student and \(4, 4\) in the teacher"),
        ({"student": LMHead(torch.zeros(1, N, 4), torch.zeros(V, 4))}, r"shape \(1, 5, 4\) in the student"),
    ],
)
def test_invalid_arguments_are_refused(changes, message):
    arguments = {"student": random_head(N, 4, V), "teacher": random_head(N, 4, V + 2), **changes}
    with pytest.raises(ConfigError, match=message):
        reverse_kl(**arguments)
    if not {"veto_weight", "top_k", "target_weight"} & set(changes):
        with pytest.raises(ConfigError):
            support_statistics(**arguments, targets=torch.zeros(N, dtype=torch.long))


def test_targets_of_another_length_are_refused():
    with pytest.raises(ConfigError, match=r"`targets` has shape \(4,\) and `hidden` has shape \(5, 4\)"):
        support_statistics(random_head(N, 4, V), random_head(N, 4, V), torch.zeros(N - 1, dtype=torch.long))

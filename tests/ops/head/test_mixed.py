"""Values, gradients and limits of `mixed_log_probs` against the float64 reference."""

import math

import pytest
import torch

from tests.ops.head.heads import expected_log_probs, gradients, leaves, random_head
from trl_blend.errors import ConfigError
from trl_blend.ops import LMHead, mix_probs, mixed_log_probs


SPACES = ["logits", "probs"]
EVERY_SPACE = [*SPACES, "arithmetic"]
N, V = 7, 11

# name -> options of the student, options of the partners (with hidden size and vocabulary), weights, temperature
CASES = {
    "one partner": ({}, [(5, V, {})], [0.3], 1.0),
    "temperature": ({}, [(5, V, {})], [0.3], 0.7),
    "bias": ({"bias": True}, [(5, V, {"bias": True})], [0.4], 1.3),
    "partner bias only": ({}, [(5, V, {"bias": True})], [0.4], 1.0),
    "scale": ({"logit_scale": 0.6}, [(5, V, {"logit_scale": 1.7})], [0.4], 0.9),
    "softcap": ({"softcap": 1.5}, [(5, V, {"softcap": 2.5})], [0.4], 0.9),
    "student softcap only": ({"softcap": 1.5}, [(5, V, {})], [0.4], 1.0),
    "partner softcap only": ({}, [(5, V, {"softcap": 1.5})], [0.4], 1.0),
    "all options": (
        {"bias": True, "logit_scale": 0.6, "softcap": 1.5},
        [(3, V, {"bias": True, "logit_scale": 1.2, "softcap": 2.0}), (6, V, {"bias": True, "logit_scale": 0.5})],
        [0.25, 0.35],
        1.4,
    ),
    "three partners": ({}, [(5, V, {}), (2, V, {}), (8, V, {})], [0.1, 0.2, 0.3], 1.0),
    "larger partner vocabulary": ({}, [(5, V + 4, {"bias": True})], [0.3], 0.8),
    "smaller partner vocabulary": ({"bias": True}, [(5, V - 3, {"bias": True, "softcap": 2.0})], [0.3], 0.8),
    "both vocabularies": ({}, [(5, V - 5, {}), (4, V + 5, {})], [0.3, 0.3], 1.0),
    "weight 0": ({"bias": True, "softcap": 2.0}, [(5, V, {})], [0.0], 0.8),
    "one of two at 0": ({}, [(5, V, {}), (3, V, {})], [0.0, 0.4], 1.0),
    "weight 1": ({}, [(5, V, {"bias": True})], [1.0], 0.8),
    "partners have everything": ({}, [(5, V, {}), (3, V, {})], [0.7, 0.3], 1.0),
    "no partner": ({"logit_scale": 0.0625}, [], [], 1.0),
}
# Weights that only arithmetic takes
SIGNED = {
    "proxy tuning": ({}, [(5, V, {}), (3, V, {})], [1.0, -1.0], 0.8),
    "away from one": ({"softcap": 2.0}, [(5, V, {"bias": True})], [-0.4], 1.0),
    "above 1, all options": (
        {"bias": True, "logit_scale": 0.6, "softcap": 1.5},
        [(3, V, {"bias": True, "logit_scale": 1.2, "softcap": 2.0}), (6, V, {"bias": True, "logit_scale": 0.5})],
        [-0.7, 1.6],
        1.4,
    ),
    "away from other vocabularies": ({"bias": True}, [(5, V - 3, {"bias": True}), (4, V + 5, {})], [-0.5, -0.3], 0.8),
}


def build(case, requires_grad=True, dtype=torch.float64):
    options, partner_options, weights, temperature = {**CASES, **SIGNED}[case]
    student = random_head(N, 4, V, requires_grad=requires_grad, dtype=dtype, **options)
    partners = [random_head(N, size, vocab, dtype=dtype, **kwargs) for size, vocab, kwargs in partner_options]
    # Ids that every partner knows; the others have their own test
    targets = torch.randint(0, min([V, *(p.weight.shape[0] for p in partners)]), (N,))
    return student, partners, weights, targets, temperature


@pytest.mark.parametrize(
    ("space", "case"),
    [*((space, case) for space in SPACES for case in CASES), *(("arithmetic", case) for case in SIGNED)],
)
def test_values_and_gradients_match_the_reference(case, space, tiles):
    student, partners, weights, targets, temperature = build(case)
    logps, entropy = mixed_log_probs(student, partners, weights, targets, temperature=temperature, space=space)
    expected = expected_log_probs(student, partners, weights, targets, temperature, space)
    torch.testing.assert_close((logps, entropy), expected, rtol=1e-12, atol=1e-12)
    assert logps.dtype == torch.float64

    first, second = torch.randn(N, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    tensors = leaves(student)
    trained = any(output.requires_grad for output in expected)
    for outputs, directions in [((0,), (first,)), ((1,), (second,)), ((0, 1), (first, second))]:
        grads = gradients([(logps, entropy)[i] for i in outputs], tensors, directions)
        wanted = [0 * tensor for tensor in tensors]
        if trained:
            wanted = gradients([expected[i] for i in outputs], tensors, directions)
        torch.testing.assert_close(grads, wanted, rtol=1e-11, atol=1e-12, check_dtype=False)
        assert trained == any(grad.abs().max() > 1e-3 for grad in grads)


@pytest.mark.parametrize("space", EVERY_SPACE)
def test_gradcheck(space, small_tiles):
    case = "above 1, all options" if space == "arithmetic" else "all options"
    student, partners, weights, targets, temperature = build(case)

    def score(hidden, weight, bias):
        head = student._replace(hidden=hidden, weight=weight, bias=bias)
        return tuple(mixed_log_probs(head, partners, weights, targets, temperature=temperature, space=space))

    assert torch.autograd.gradcheck(score, leaves(student))


@pytest.mark.parametrize("space", EVERY_SPACE)
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 2), (1, 9), (5, 2)])
def test_smallest_shapes(space, tokens, vocab):
    student, partner = random_head(tokens, 3, vocab, requires_grad=True), random_head(tokens, 1, vocab)
    targets = torch.randint(0, vocab, (tokens,))
    result = mixed_log_probs(student, [partner], [0.6], targets, space=space)
    expected = expected_log_probs(student, [partner], [0.6], targets, space=space)
    torch.testing.assert_close(tuple(result), expected, rtol=1e-12, atol=1e-12)
    ones = [torch.ones(tokens, dtype=torch.float64)] * 2
    wanted = gradients(expected, leaves(student), ones)
    torch.testing.assert_close(gradients(result, leaves(student), ones), wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("space", SPACES)
def test_a_model_of_weight_0_takes_no_part(space):
    """Its tensors may hold anything, NaN included, and the spaces coincide."""
    student, teacher = random_head(N, 4, V, requires_grad=True), random_head(N, 5, V)
    broken = LMHead(torch.full((N, 4), math.nan).double(), torch.full((V, 4), math.nan).double())
    targets = torch.randint(0, V, (N,))
    torch.testing.assert_close(
        tuple(mixed_log_probs(student, [broken], [0.0], targets, space=space)),
        tuple(mixed_log_probs(student, [], [], targets)),
        rtol=0,
        atol=0,
    )
    broken.hidden.requires_grad_()
    broken.weight.requires_grad_()
    # Rounding slack on either side of 1
    for weights in ([1.0, 0.0], [0.7, 0.3 - 5e-10], [0.7, 0.3 + 5e-10]):
        result = mixed_log_probs(broken, [teacher, teacher], weights, targets, space=space)
        expected = tuple(mixed_log_probs(teacher, [], [], targets))
        torch.testing.assert_close(tuple(result), expected, rtol=1e-8, atol=1e-8)
        for grad in torch.autograd.grad(result.logps.sum() + result.entropy.sum(), broken[:2]):
            assert (grad == 0).all()


def test_arithmetic_is_logit_mixing_at_another_temperature():
    """`(z_S + w z_T) / τ` is `(1 - v) z_S + v z_T` with `v = w / (1 + w)`, at `τ / (1 + w)`; gradients too."""
    student, partner = random_head(N, 4, V, requires_grad=True), random_head(N, 5, V)
    targets, directions = torch.randint(0, V, (N,)), torch.randn(2, N, dtype=torch.float64)
    added = mixed_log_probs(student, [partner], [0.6], targets, temperature=0.9, space="arithmetic")
    mixed = mixed_log_probs(student, [partner], [0.6 / 1.6], targets, temperature=0.9 / 1.6)
    torch.testing.assert_close(tuple(added), tuple(mixed), rtol=1e-12, atol=1e-12)
    grads, wanted = (gradients(out, leaves(student), directions) for out in (added, mixed))
    torch.testing.assert_close(grads, wanted, rtol=1e-11, atol=1e-12)


def test_equal_partners_of_opposite_weights_leave_the_student():
    student, partner = random_head(N, 4, V, requires_grad=True), random_head(N, 5, V, bias=True)
    targets, directions = torch.randint(0, V, (N,)), torch.randn(2, N, dtype=torch.float64)
    added = mixed_log_probs(student, [partner, partner], [1.7, -1.7], targets, temperature=0.7, space="arithmetic")
    alone = mixed_log_probs(student, [], [], targets, temperature=0.7)
    torch.testing.assert_close(tuple(added), tuple(alone), rtol=1e-12, atol=1e-12)
    grads, wanted = (gradients(out, leaves(student), directions) for out in (added, alone))
    torch.testing.assert_close(grads, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("space", "weight"), [("logits", 0.3), ("probs", 0.3), ("arithmetic", -0.3)])
def test_tokens_excluded_by_infinite_biases(space, weight, small_tiles):
    """The student excludes tokens 0-3, a whole tile, and 9; the partner excludes 8 and 9."""
    student, partner = random_head(N, 4, V, bias=True), random_head(N, 5, V, bias=True)
    student.bias[[0, 1, 2, 3, 9]] = -math.inf
    partner.bias[[8, 9]] = -math.inf
    for tensor in leaves(student):
        tensor.requires_grad_()
    targets = torch.tensor([4, 5, 6, 7, 10, 4, 5])
    result = mixed_log_probs(student, [partner], [weight], targets, space=space)
    expected = expected_log_probs(student, [partner], [weight], targets, space=space)
    torch.testing.assert_close(tuple(result), expected, rtol=1e-12, atol=1e-12)
    directions = torch.randn(2, N, dtype=torch.float64)
    grads, wanted = (gradients(out, leaves(student), directions) for out in (result, expected))
    torch.testing.assert_close(grads, wanted, rtol=1e-11, atol=1e-12)
    for grad in grads[1:]:
        assert (grad[[0, 1, 2, 3, 9]] == 0).all()


def test_target_outside_the_partner_vocabulary():
    """Mixed logits exclude it; mixed probabilities give it the student's share."""
    student, partner = random_head(1, 4, V, requires_grad=True), random_head(1, 5, V - 2)
    targets = torch.tensor([V - 1])
    for settings in ({"weights": [0.3]}, {"weights": [-0.3], "space": "arithmetic"}):
        excluded = mixed_log_probs(student, [partner], targets=targets, **settings)
        assert excluded.logps.item() == -math.inf
        assert all(torch.isfinite(g).all() for g in gradients([excluded.entropy], leaves(student), [torch.ones(1)]))
    shared = mixed_log_probs(student, [partner], [0.3], targets, space="probs").logps
    alone = mixed_log_probs(student, [], [], targets).logps
    torch.testing.assert_close(shared, alone + math.log(0.7), rtol=1e-12, atol=0)


@pytest.mark.parametrize("target", [-100, -1, V, V + 5])
@pytest.mark.parametrize("space", SPACES)
def test_targets_outside_the_vocabulary_have_probability_0(space, target, small_tiles):
    student, partner = random_head(2, 4, V, requires_grad=True), random_head(2, 5, V + 9)
    result = mixed_log_probs(student, [partner], [0.3], torch.tensor([target, 1]), space=space)
    assert result.logps[0].item() == -math.inf
    assert torch.isfinite(result.logps[1])
    # Masking the row away, as a caller does, leaves a finite gradient
    result.logps.masked_fill(torch.tensor([True, False]), 0.0).sum().backward()
    assert torch.isfinite(student.hidden.grad).all()
    assert (student.hidden.grad[0] == 0).all()


def test_probs_space_is_exact_for_improbable_targets():
    """`log p` of about -400 in float32, where the probability itself underflows to 0."""
    student, partner = (random_head(1, 2, 5, dtype=torch.float32) for _ in range(2))
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, -400.0])
    student, partner = student._replace(bias=bias), partner._replace(bias=bias - 3)
    target = torch.tensor([4])
    logps = mixed_log_probs(student, [partner], [0.5], target, space="probs").logps
    rows = [(head.hidden @ head.weight.T + head.bias).double() for head in (student, partner)]
    torch.testing.assert_close(logps.double(), mix_probs(rows[0], rows[1:], [0.5])[:, 4], rtol=1e-6, atol=0)


@pytest.mark.parametrize("space", SPACES)
def test_entropy_is_optional(space):
    student, partners, weights, targets, temperature = build("all options")
    with_entropy = mixed_log_probs(student, partners, weights, targets, temperature=temperature, space=space)
    without = mixed_log_probs(
        student, partners, weights, targets, temperature=temperature, space=space, compute_entropy=False
    )
    assert without.entropy is None
    torch.testing.assert_close(without.logps, with_entropy.logps, rtol=1e-13, atol=1e-13)
    ones = [torch.ones(N)]
    wanted = gradients([with_entropy.logps], leaves(student), ones)
    torch.testing.assert_close(gradients([without.logps], leaves(student), ones), wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [1.5]}, r"`weights\[0\]` is 1.5"),
        ({"weights": [0.1, 0.2]}, "2 entries for 1 partners"),
        ({"temperature": 0.0}, "`temperature` is 0.0. Set it to a positive number"),
        ({"temperature": math.nan}, "`temperature` is nan"),
        ({"weights": [math.inf], "space": "arithmetic"}, r"`weights\[0\]` is inf. Set it to a finite number"),
        ({"space": "logit"}, "`space` is 'logit'. Set it to one of 'logits', 'probs', 'arithmetic'"),
        ({"targets": torch.zeros(N + 1, dtype=torch.long)}, r"`targets` has shape \(8,\). Flatten"),
        ({"partners": [random_head(N - 1, 4, V)]}, r"`hidden` has shape \(6, 4\)"),
        ({"student": LMHead(torch.zeros(1, N, 4), torch.zeros(V, 4))}, r"`hidden` has shape \(1, 7, 4\)"),
    ],
)
def test_invalid_arguments_are_refused(changes, message):
    arguments = {
        "student": random_head(N, 4, V),
        "partners": [random_head(N, 4, V)],
        "weights": [0.3],
        "targets": torch.zeros(N, dtype=torch.long),
    }
    with pytest.raises(ConfigError, match=message):
        mixed_log_probs(**{**arguments, **changes})

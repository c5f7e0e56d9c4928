"""What the solver takes, refuses and reports besides the weight; `test_trust_region.py` tests the weight itself."""

import math

import pytest
import torch

from tests import reference_trust_region as reference
from tests.ops.test_trust_region import BUDGETS, INF, PAIRS, RTOL, draw
from trl_blend.errors import ConfigError
from trl_blend.ops import TrustRegionSolution, solve_trust_region
from trl_blend.ops.trust_region import solve_with_statistics


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_input_types(dtype):
    student, teacher = draw(4, 100).to(dtype), draw(4, 100, seed=1).to(dtype)
    solution = solve_trust_region(student, teacher, 0.02)
    assert solution.weight.dtype == solution.kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert solution.feasible.dtype == torch.bool and solution.iterations.dtype == torch.int32
    for s, t, weight in zip(student.tolist(), teacher.tolist(), solution.weight.tolist(), strict=True):
        assert weight == pytest.approx(reference.largest_weight(s, t, 0.02), rel=RTOL)
    mixed = solve_trust_region(student, teacher.double(), 0.02)
    assert mixed.weight.dtype == torch.float64


def test_float64_goes_to_float64_tolerance():
    student, teacher = draw(4, 30).double(), draw(4, 30, seed=1).double()
    solution = solve_trust_region(student, teacher, 1e-10, rtol=1e-6)
    for s, t, weight in zip(student.tolist(), teacher.tolist(), solution.weight.tolist(), strict=True):
        assert reference.path_kl(s, t, weight) == pytest.approx(1e-10, rel=1e-5)


def test_tiny_budgets_in_float64():
    """There the KL is `w² Var / 2`, where a difference of logarithms of numbers near 1 would have lost its digits."""
    student, teacher = draw(4, 30).double(), draw(4, 30, seed=1).double()
    solution = solve_trust_region(student, teacher, 1e-14, rtol=1e-4)
    for s, t, weight in zip(student.tolist(), teacher.tolist(), solution.weight.tolist(), strict=True):
        variance = reference.path_slope(s, t, 1e-12) / 1e-12
        assert weight == pytest.approx(math.sqrt(2e-14 / variance), rel=1e-4)


def test_inputs_are_left_alone_and_nothing_has_a_gradient():
    for make in PAIRS.values():
        student, teacher = make()
        student.requires_grad_(), teacher.requires_grad_()
        before = student.detach().clone(), teacher.detach().clone()
        solution = solve_trust_region(student, teacher, torch.tensor(0.03, requires_grad=True))
        assert isinstance(solution, TrustRegionSolution)
        assert not any(column.requires_grad for column in solution)
        assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@pytest.mark.parametrize("max_iterations", [0, 1, 2, 3])
def test_the_budget_is_kept_however_few_the_iterations(max_iterations):
    stopped = 0
    for make in PAIRS.values():
        student, teacher = make()
        for budget in BUDGETS:
            solution = solve_trust_region(student, teacher, budget, max_iterations=max_iterations)
            stopped += int((solution.weight == 0).sum())
            for s, t, weight in zip(student.tolist(), teacher.tolist(), solution.weight.tolist(), strict=True):
                assert reference.path_kl(s, t, weight) <= budget * (1 + RTOL)
    assert stopped > 0


def test_iterations_counts_both_ends_and_every_step():
    student, teacher = draw(5, 60), draw(5, 60, seed=1)
    assert (solve_trust_region(student, teacher, 0.01, max_iterations=0).iterations == 2).all()
    assert (solve_trust_region(student, teacher, 0.01, max_iterations=1).iterations == 3).all()
    budget = torch.tensor([0.0, 0.01, 0.01, 0.01, INF])
    passes = solve_trust_region(student, teacher, budget).iterations.tolist()
    assert passes[0] == 2 and passes[4] == 3 and all(4 <= count <= 6 for count in passes[1:4])


def test_hard_rows_take_few_passes():
    # The teacher's favourite has a thousandth to a millionth of the student's mass: the variance explodes on the way
    student = torch.zeros(5, 300)
    student[:, 0] = torch.linspace(18, 9, 5)
    teacher = student.clone()
    teacher[:, 1] = teacher[:, 0] + 1
    for budget in (1e-3, 0.01, 0.05):
        assert (solve_trust_region(student, teacher, budget).iterations <= 5).all()
    # A teacher so near that the first sweep cannot tell whether it is feasible
    near = student + 0.003 * (teacher + 0.5 * draw(5, 300))
    solution = solve_trust_region(student, near, 3e-7)
    assert 0 < solution.feasible.sum() < 5 and (solution.iterations <= 4).all()


def test_rows_that_are_no_distribution_stay_visible():
    student, teacher = draw(7, 5), draw(7, 5, seed=1)
    student[0, 1], teacher[1, 1] = math.nan, math.nan
    student[2, 0], teacher[3, 0] = INF, INF
    student[4], teacher[5] = -INF, -INF
    for budget in (0.0, 0.1, INF):
        solution = solve_trust_region(student, teacher, budget)
        assert solution.weight[:6].isnan().all() and solution.kl[:6].isnan().all()
        assert not solution.feasible[:6].any()
        assert solution.weight[6].isfinite() and solution.kl[6].isfinite()


@pytest.mark.parametrize("budget", [0.0, 2e-5, 0.05, 4.0, INF])
@pytest.mark.parametrize("name", PAIRS)
def test_statistics(name, budget):
    student, teacher = PAIRS[name]()
    solution, kl_teacher, normalizer = solve_with_statistics(student, teacher, budget)
    for s, t, weight, kl, z in zip(
        student.tolist(),
        teacher.tolist(),
        *(c.tolist() for c in (solution.weight, kl_teacher, normalizer)),
        strict=True,
    ):
        # float32 logits carry a rounding error of their own size
        size = max(abs(x) for x in [*s, *t] if x > -INF)
        assert kl == pytest.approx(reference.path_teacher_kl(s, t, weight), rel=1e-4, abs=1e-6 * size)
        mixed = [(1 - weight) * a * (weight < 1) + weight * b for a, b in zip(s, t) if -INF not in (a, b)]
        mixed = {0.0: s, 1.0: t}.get(weight, mixed)
        top = max(mixed)
        assert z == pytest.approx(top + math.log(math.fsum(math.exp(x - top) for x in mixed)), abs=1e-6 * size)


@pytest.mark.parametrize("budget", [-1e-9, -1.0, math.nan, -INF])
def test_budgets_that_are_none(budget):
    with pytest.raises(ConfigError, match="`kl_budget` is .* Set it"):
        solve_trust_region(draw(1, 4), draw(1, 4), budget)


def test_refusals():
    student, teacher = draw(2, 4), draw(2, 4, seed=1)
    for rtol in (0.0, 1e-7, 0.2, math.nan):
        with pytest.raises(ConfigError, match="`rtol` is"):
            solve_trust_region(student, teacher, 0.1, rtol=rtol)
    with pytest.raises(ConfigError, match="`max_iterations` is -1"):
        solve_trust_region(student, teacher, 0.1, max_iterations=-1)
    with pytest.raises(ConfigError, match=r"\(2, 4\) and `teacher_logits` \(2, 3\).*align_vocab"):
        solve_trust_region(student, teacher[:, :3], 0.1)

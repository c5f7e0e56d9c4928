import math

import pytest
import torch

from tests import reference_trust_region as reference
from trl_blend.ops import solve_trust_region
from trl_blend.ops import trust_region as module


INF = math.inf
RTOL = 1e-3
BUDGETS = (1e-9, 1e-7, 2e-5, 1e-3, 0.05, 0.5, 4.0)


def draw(rows, vocab_size, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, vocab_size, generator=generator)


def random_pair(vocab_size):
    return draw(6, vocab_size), draw(6, vocab_size, seed=1)


def peaked_pair():
    student = draw(8, 300)
    student[:, 0] += torch.linspace(5, 30, 8)
    teacher = student + draw(8, 300, scale=1.0, seed=1)
    teacher[::2, 1] += 30.0  # what the student all but excludes, the teacher is sure of
    return student, teacher


def near_pair():
    student = draw(6, 200)
    noise = torch.tensor([1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 0.0])[:, None]
    return student, student + noise * draw(6, 200, seed=1) + torch.arange(6.0)[:, None]


def one_hot_pair():
    """Rows that are one-hot to float32: agreeing, opposed, against uniform, and with logits too wide for float32."""
    student, teacher = torch.zeros(7, 6), torch.zeros(7, 6)
    student[:4, 0] = torch.tensor([60.0, 60.0, 200.0, 2e4])
    teacher[:4, 0] = torch.tensor([80.0, 0.0, 0.0, 0.0])
    teacher[1:4, 1] = torch.tensor([60.0, 200.0, 2e4])
    teacher[4, 2] = 95.0
    student[5, 3] = 120.0
    student[6] = torch.tensor([0.0, -90.0, -95.0, -100.0, -110.0, -120.0])
    teacher[6] = torch.tensor([-40.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    return student, teacher


def excluding_pair():
    """`-inf` entries: in the teacher (little, half, nearly all of the student's mass), in the student, in both."""
    student, teacher = draw(8, 12), draw(8, 12, seed=1)
    student[0, 3], teacher[0, 3] = -9.0, -INF
    teacher[1, :6] = -INF
    teacher[2, student[2].topk(9).indices] = -INF
    student[3, 5] = -INF
    student[4, [0, 7]], teacher[4, [7, 8]] = -INF, -INF
    student[5, [1, 2]], teacher[5, [1, 2]] = -INF, -INF
    student[6, 1:], teacher[6, 2:] = -INF, -INF  # the student has one token
    student[7], teacher[7, 5] = teacher[7], -INF  # identical but for one token
    return student, teacher


def offset_pair():
    student = draw(4, 50)
    return student, student + 0.3 * draw(4, 50, seed=1) + torch.tensor([300.0, -2e3, 3e4, 1e-2])[:, None]


PAIRS = {
    "V=2": lambda: random_pair(2),
    "V=3": lambda: random_pair(3),
    "V=257": lambda: random_pair(257),
    "wide": lambda: (draw(6, 40, scale=40.0), draw(6, 40, scale=40.0, seed=1)),
    "peaked": peaked_pair,
    "near": near_pair,
    "one_hot": one_hot_pair,
    "excluding": excluding_pair,
    "offset": offset_pair,
}


def assert_solves_row(student, teacher, budget, weight, kl, feasible, rtol=RTOL):
    """Every promise of the docstring, in float64 at the weight that was returned."""
    assert 0.0 <= weight <= 1.0 and not math.isnan(kl)
    realised = reference.path_kl(student, teacher, weight)
    assert realised <= budget * (1 + rtol)
    assert kl == pytest.approx(realised, rel=0.1 * rtol, abs=1e-14)
    end = reference.path_kl(student, teacher, 1.0)
    assert feasible == (weight == 1.0)
    if not budget < end <= budget * (1 + rtol):
        assert feasible == (end <= budget)
    best = reference.largest_weight(student, teacher, budget)
    if feasible or best < 1e-15:
        assert feasible or weight <= best
        return
    floor = reference.path_kl(student, teacher, 1e-300)
    if 50.0 * weight * reference.path_slope(student, teacher, weight) >= realised - floor:
        assert weight == pytest.approx(best, rel=rtol)
    else:
        assert realised == pytest.approx(budget, rel=rtol)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", PAIRS)
def test_promises_hold_against_the_reference(name, budget):
    student, teacher = PAIRS[name]()
    solution = solve_trust_region(student, teacher, budget)
    assert all(column.shape == student.shape[:-1] for column in solution)
    for s, t, *row in zip(student.tolist(), teacher.tolist(), *(c.tolist() for c in solution[:3]), strict=True):
        assert_solves_row(s, t, budget, *row)


@pytest.mark.parametrize("rtol", [1e-1, 1e-4, 1e-6])
def test_other_tolerances(rtol):
    for student, teacher in (random_pair(30), excluding_pair()):
        for budget in (1e-5, 0.03, 1.0):
            solution = solve_trust_region(student, teacher, budget, rtol=rtol)
            for s, t, *row in zip(student.tolist(), teacher.tolist(), *(c.tolist() for c in solution[:3])):
                assert_solves_row(s, t, budget, *row, rtol=rtol)


def test_large_vocabulary():
    vocab_size = 151_936
    generator = torch.Generator().manual_seed(0)
    student = -1.1 * torch.arange(1, vocab_size + 1).log() + torch.randn(3, vocab_size, generator=generator)
    teacher = 1.2 * student + 0.8 * torch.randn(3, vocab_size, generator=generator)
    teacher[1, -20:] = -INF
    student[2, 1000:] = -40.0
    for budget in (2e-5, 0.01):
        solution = solve_trust_region(student, teacher, budget)
        assert (solution.iterations <= 6).all()
        for s, t, weight in zip(student.tolist(), teacher.tolist(), solution.weight.tolist(), strict=True):
            # Brackets the largest feasible weight to within rtol, without a bisection of 150,000-term loops
            assert 0.0 < weight < 1.0
            assert (
                reference.path_kl(s, t, weight * (1 - RTOL)) <= budget < reference.path_kl(s, t, weight * (1 + RTOL))
            )
            assert reference.path_kl(s, t, weight) <= budget * (1 + RTOL)


def test_budget_zero_is_the_student_and_a_feasible_teacher_the_teacher():
    for make in PAIRS.values():
        student, teacher = make()
        solution = solve_trust_region(student, teacher, 0.0)
        assert (solution.weight == 0).all() and (solution.kl == 0).all() and not solution.feasible.any()
        ends = torch.tensor([reference.path_kl(s, t, 1.0) for s, t in zip(student.tolist(), teacher.tolist())])
        solution = solve_trust_region(student, teacher, ends * (1 + 1e-7))
        # Below that the reference itself is rounding error
        assert (solution.weight == 1)[ends > 1e-12].all()
        assert (solve_trust_region(student, teacher, INF).weight == 1).all()
    same = draw(3, 9)
    assert (solve_trust_region(same, same, 1e-12).weight == 1).all()
    assert (solve_trust_region(same, same, 0.0).weight == 0).all()


def test_disjoint_supports_keep_the_student():
    student, teacher = draw(3, 8), draw(3, 8, seed=1)
    student[:, :4], teacher[:, 4:] = -INF, -INF
    for budget in (1e-6, 0.1, 100.0):
        solution = solve_trust_region(student, teacher, budget)
        assert (solution.weight == 0).all() and (solution.kl == 0).all() and not solution.feasible.any()
    solution = solve_trust_region(student, teacher, INF)
    assert (solution.weight == 1).all() and (solution.kl == INF).all()


def test_teacher_outside_the_student_is_approached_but_never_reached():
    student, teacher = draw(1, 8), draw(1, 8, seed=1)
    student[0, 3] = -INF
    solution = solve_trust_region(student, teacher, 100.0)
    assert solution.weight.item() == math.nextafter(1.0, 0.0) or solution.weight.item() == 1.0 - 2.0**-24
    assert not solution.feasible.any()
    assert solution.kl.item() == pytest.approx(
        reference.path_kl(student[0].tolist(), teacher[0].tolist(), 1 - 1e-12), rel=1e-4
    )
    assert solve_trust_region(student.double(), teacher, 100.0).weight.item() == math.nextafter(1.0, 0.0)


@pytest.mark.parametrize("name", ["V=2", "V=257", "peaked", "excluding", "wide"])
def test_monotone_in_the_budget(name):
    student, teacher = PAIRS[name]()
    budgets = torch.logspace(-7, 1.5, 120)
    weights = torch.stack([solve_trust_region(student, teacher, budget).weight for budget in budgets.tolist()])
    assert (weights[1:] >= weights[:-1] * (1 - RTOL)).all()
    # Steps of 17% in the budget are far above the tolerance: order is exact, except where the KL is flat
    strict = weights.diff(dim=0) >= 0
    assert strict.float().mean() > 0.99
    assert weights[0].mean() < 0.5 * weights[-1].mean()


def test_one_budget_per_row_and_any_leading_shape(monkeypatch):
    student, teacher = draw(6, 40).view(2, 3, 40), draw(6, 40, seed=1).view(2, 3, 40)
    budget = torch.tensor([[1e-3], [0.0]])
    whole = solve_trust_region(student, teacher, budget)
    assert whole.weight.shape == (2, 3) and (whole.weight[1] == 0).all()
    single = solve_trust_region(student[0, 1], teacher[0, 1], 1e-3)
    assert single.weight.shape == () and single.weight == whole.weight[0, 1]
    # The size of a block of rows is no part of the result
    monkeypatch.setattr(module, "_CPU_BLOCK", 40)
    for one, other in zip(solve_trust_region(student, teacher, budget), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    ignored = solve_trust_region(student, teacher, torch.tensor([[-1.0], [math.nan]]))
    assert (ignored.weight == 0).all()
    empty = solve_trust_region(torch.zeros(0, 5), torch.zeros(0, 5), 0.1)
    assert all(column.shape == (0,) for column in empty)


@pytest.mark.parametrize("budget", [0.001, 0.01, 0.05, 0.5])
def test_drafts_of_the_student_are_accepted_at_least_as_often_as_the_bound(budget):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(500, 12, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    weight = solve_trust_region(student, teacher, budget).weight[:, None]
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    blend = (student + weight * (teacher - student)).softmax(-1)
    accepted = torch.minimum(blend, student.exp()).sum(-1)
    bound = module.acceptance_bound(budget)
    assert bound == pytest.approx(1 - (budget / 2) ** 0.5) and accepted.min() >= bound - 1e-3
    # Not by much more: the bound is Pinsker's, which is tight for small budgets
    assert accepted.mean() < bound + 0.5 * (1 - bound)
    assert module.acceptance_bound(0.0) == 1.0 and module.acceptance_bound(3.0) == 0.0

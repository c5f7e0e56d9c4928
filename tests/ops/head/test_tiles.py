"""What the engine promises to every function: tiles and buffers are no part of a result, and no logit is too large."""

import pytest
import torch

from tests.ops.head.conftest import set_tiles
from tests.ops.head.functions import EOS, FUNCTIONS, N, V
from tests.ops.head.heads import gradients, leaves, random_head, to_double
from trl_blend.ops import LMHead, score_tokens, support_statistics
from trl_blend.ops.head.tiles import RunningSoftmax, RunningTopK, Scratch


every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
OPTIONS = {"bias": True, "logit_scale": 0.6, "softcap": 1.5}
every_option = pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])


@every_function
def test_results_do_not_depend_on_the_tiles(function, monkeypatch):
    student = random_head(N, 4, V, requires_grad=True, **OPTIONS)
    partner = function.partner(N, 6, V, bias=True, logit_scale=1.2, softcap=2.0)
    teacher, targets = random_head(N, 6, V), torch.arange(N)
    results = []
    for shape in [(1, 1), (2, 3), (N, V), (4096, 4096)]:
        set_tiles(monkeypatch, *shape)
        outputs = function.call(student, partner)
        grads = torch.autograd.grad(function.loss(outputs), leaves(student))
        statistics = support_statistics(student, teacher, targets, eos=EOS)
        results.append([*outputs, *grads, *score_tokens(student, targets, 4), *statistics])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-11, atol=1e-12)


@every_function
@every_option
def test_uninitialised_buffers_are_never_read(function, options):
    """Deterministic mode fills new memory with NaN."""
    student, partner = random_head(N, 4, V, requires_grad=True, **options), function.partner(N, 6, V, **options)
    torch.use_deterministic_algorithms(True)
    try:
        outputs = function.call(student, partner)
        grads = torch.autograd.grad(function.loss(outputs), leaves(student))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(tensor).all() for tensor in (*outputs, *grads))


@every_function
@pytest.mark.parametrize("shift", [0.0, -9000.0], ids=["large", "all very negative"])
@pytest.mark.usefixtures("small_tiles")
def test_extreme_logits_in_float32(function, shift):
    """Logits in the thousands, growing from tile to tile: exp() of any of them would overflow, or all would be 0."""
    student = random_head(N, 4, V, dtype=torch.float32, requires_grad=True)
    partner = function.partner(N, 5, V, dtype=torch.float32)
    student = student._replace(bias=(torch.arange(V) * 500.0 + shift).requires_grad_())
    if isinstance(partner, LMHead):
        partner = partner._replace(bias=torch.arange(V).flip(0) * 300.0 + shift)
    outputs = function.call(student, partner)
    exact = to_double(student)
    expected = function.expected(exact, to_double(partner) if isinstance(partner, LMHead) else partner)
    torch.testing.assert_close(tuple(x.double() for x in outputs), expected, rtol=1e-5, atol=1e-3)
    ones = [torch.ones(N)] * function.differentiable
    grads = gradients(outputs[: function.differentiable], leaves(student), ones)
    wanted = gradients(expected[: function.differentiable], leaves(exact), ones)
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("width", [1, 3, 50])
def test_running_statistics(width):
    """Of columns that come a few at a time, some rows of which begin with nothing but `-inf`."""
    logits = 4 * torch.randn(5, 23, dtype=torch.float64)
    logits[1, :7] = logits[2, 9] = -torch.inf
    scratch = Scratch(logits.device, torch.float64)
    softmax, total, best = RunningSoftmax(5, scratch), RunningSoftmax(5, scratch), RunningTopK(5, 4, scratch)
    dropped = [[] for _ in range(5)]
    for start in range(0, 23, width):
        tile = logits[:, start : start + width]
        columns, values = best.fold(slice(0, 5), tile, start, -tile)
        left = tile.scatter(1, columns, torch.nan)
        for row, (others, fallen) in enumerate(zip(left.tolist(), values.tolist())):
            dropped[row] += [value for value in others + fallen if value == value and value > -torch.inf]
        softmax.fold_(slice(0, 5), tile.clone(), entropy=True)
        total.fold_(slice(0, 5), tile.clone())
    logprobs = logits.log_softmax(1)
    torch.testing.assert_close(softmax.log_norm, logits.logsumexp(1))
    torch.testing.assert_close(total.log_norm, softmax.log_norm, rtol=0, atol=0)
    torch.testing.assert_close(softmax.entropy, torch.special.entr(logprobs.exp()).sum(1))
    values, columns = logits.topk(4, dim=1)
    assert (
        torch.equal(best.values, values) and torch.equal(best.columns, columns) and torch.equal(best.others, -values)
    )
    for row, rest in zip(logits.sort(dim=1, descending=True).values[:, 4:].tolist(), dropped):
        assert sorted(rest, reverse=True) == [value for value in row if value > -torch.inf]


def test_of_equal_entries_the_earlier_one_is_kept():
    scratch = Scratch(torch.device("cpu"), torch.float32)
    best = RunningTopK(1, 2, scratch)
    for start, tile in enumerate([[1.0], [2.0], [1.0], [2.0], [2.0]]):
        best.fold(slice(0, 1), torch.tensor([tile]), start)
    assert best.columns.tolist() == [[1, 3]]

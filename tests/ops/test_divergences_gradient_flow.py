"""Who gets a gradient from `reverse_kl`, in which dtype, and how the weights are gathered."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tests.ops.divergences import expected_reverse_kl, gradients
from tests.ops.heads import leaves, random_head, to_double
from trl_blend.ops import EosMap, LMHead, reverse_kl, support_statistics
from trl_blend.ops.head import tiles as tiling


N, V = 7, 11
EOS = EosMap(9, (1, 6))
SUPPORTS = pytest.mark.parametrize("support", [{"top_k": None}, {"top_k": 3}], ids=["full", "top-k"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "TOKEN_TILE", 3)
    monkeypatch.setattr(tiling, "VOCAB_TILE", 4)


@SUPPORTS
def test_nothing_flows_to_the_teacher(support):
    """Neither to its leaves nor into the graph of its backbone, which a zero gradient would already run."""
    student = random_head(N, 4, V, bias=True, requires_grad=True)
    leaf = random_head(N, 5, V, bias=True, requires_grad=True)
    reverse_kl(student, leaf, eos=EOS, veto_weight=0.4, **support).loss.sum().backward()
    assert all(tensor.grad is None for tensor in leaves(leaf))
    assert all(tensor.grad.abs().sum() > 0 for tensor in leaves(student))

    backbone, calls = nn.Linear(3, 3).double(), []
    hidden, weight = backbone(torch.randn(N, 3).double()), backbone(torch.randn(V, 3).double())
    for tensor in (hidden, weight):
        tensor.register_hook(calls.append)
    reverse_kl(student, LMHead(hidden, weight), **support).loss.sum().backward()
    assert calls == []
    assert all(parameter.grad is None for parameter in backbone.parameters())


@SUPPORTS
def test_no_graph_when_only_the_teacher_requires_grad(support):
    student, teacher = random_head(N, 4, V), random_head(N, 5, V, requires_grad=True)
    assert not any(value.requires_grad for value in reverse_kl(student, teacher, **support))
    assert not any(value.requires_grad for value in support_statistics(teacher, student, torch.arange(N)))


@SUPPORTS
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_each_student_tensor_alone(support, trained):
    """LoRA trains the hidden states under a frozen output layer, for example."""
    student, teacher = random_head(N, 4, V, bias=True, requires_grad=True), random_head(N, 5, V)
    reverse_kl(student, teacher, eos=EOS, **support).loss.sum().backward()
    alone = LMHead(
        *(tensor.detach().requires_grad_(name == trained) for name, tensor in zip(LMHead._fields, student[:3]))
    )
    reverse_kl(alone, teacher, eos=EOS, **support).loss.sum().backward()
    for name in ("hidden", "weight", "bias"):
        grad = getattr(alone, name).grad
        if name == trained:
            torch.testing.assert_close(grad, getattr(student, name).grad, rtol=0, atol=0)
        else:
            assert grad is None


@SUPPORTS
def test_a_head_shared_by_both_models_gets_the_student_gradient_only(support):
    """A LoRA student against its own base: one output layer, two hidden states."""
    student, base = random_head(N, 4, V, requires_grad=True), random_head(N, 4, V)
    shared = reverse_kl(student, base._replace(weight=student.weight), **support)
    copied = reverse_kl(student, base._replace(weight=student.weight.detach().clone()), **support)
    grads = [torch.autograd.grad(result.loss.sum(), leaves(student)) for result in (shared, copied)]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


@SUPPORTS
def test_second_derivatives_are_refused(support):
    student = random_head(N, 4, V, requires_grad=True)
    loss = reverse_kl(student, random_head(N, 4, V), **support).loss
    (grad,) = torch.autograd.grad(loss.square().sum(), student.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Half precision rounds the inputs alone: products, sums and the gradients of logits are float32. What is left is the
# rounding of the gradients that are returned, 8 bits in bfloat16 and 11 in float16.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@SUPPORTS
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("options", [{}, {"bias": True, "logit_scale": 0.7, "softcap": 3.0}], ids=["plain", "options"])
def test_dtypes(dtype, support, options):
    student = random_head(N, 16, V, dtype=dtype, requires_grad=True, **options)
    teacher = random_head(N, 8, V, dtype=dtype, **options)
    arguments = {"temperature": 0.9, "veto_weight": 0.4, "eos": EOS, **support}
    result = reverse_kl(student, teacher, **arguments)
    assert all(value.dtype == torch.float32 for value in result)
    exact = to_double(student)
    expected = expected_reverse_kl(exact, to_double(teacher), **arguments)
    torch.testing.assert_close(tuple(x.double() for x in result), expected, rtol=1e-5, atol=1e-5)
    tolerance = TOLERANCES[dtype]
    result.loss.sum().backward()
    wanted = gradients(expected[0], leaves(exact), torch.ones(N))
    for tensor, want in zip(leaves(student), wanted):
        assert tensor.grad.dtype == dtype
        scale = want.abs().max().item()
        torch.testing.assert_close(tensor.grad.double(), want, rtol=tolerance, atol=5e-6 * scale)


@SUPPORTS
def test_models_of_different_dtypes(support):
    """A bfloat16 teacher beside a float32 student."""
    student = random_head(N, 4, V, dtype=torch.float32, requires_grad=True)
    teacher = random_head(N, 5, V, dtype=torch.bfloat16)
    wide = teacher._replace(hidden=teacher.hidden.float(), weight=teacher.weight.float())
    result, expected = (reverse_kl(student, head, eos=EOS, **support) for head in (teacher, wide))
    torch.testing.assert_close(tuple(result), tuple(expected), rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(value.loss.sum(), leaves(student)) for value in (result, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


@SUPPORTS
def test_autocast_projects_in_its_dtype_and_returns_float32_gradients(support):
    student = random_head(N, 4, V, bias=True, dtype=torch.float32, requires_grad=True)
    teacher = random_head(N, 5, V, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = reverse_kl(student, teacher, eos=EOS, **support)
    low = student._replace(**{name: getattr(student, name).bfloat16() for name in ("hidden", "weight", "bias")})
    low_teacher = teacher._replace(hidden=teacher.hidden.bfloat16(), weight=teacher.weight.bfloat16())
    expected = reverse_kl(low, low_teacher, eos=EOS, **support)
    torch.testing.assert_close(tuple(result), tuple(expected), rtol=0, atol=0)
    grads = torch.autograd.grad(result.loss.sum(), leaves(student))
    wanted = torch.autograd.grad(expected.loss.sum(), [low.hidden, low.weight, low.bias])
    for grad, want in zip(grads, wanted):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad.bfloat16(), want, rtol=0, atol=0)


class Partitioned:
    """ZeRO-3 in miniature: parameters are empty except while gathered."""

    def __init__(self, *params):
        self.full = {id(param): param.data for param in params}
        self.entered: list[list[int]] = []
        for param in params:
            param.data = param.data.new_empty(0)

    @contextmanager
    def gather(self, *params):
        self.entered.append([id(param) for param in params])
        for param in params:
            param.data = self.full[id(param)]
        try:
            yield
        finally:
            for param in params:
                param.data = param.data.new_empty(0)


@SUPPORTS
def test_weights_are_gathered_in_forward_and_backward(support):
    student, teacher = random_head(N, 4, V, bias=True, requires_grad=True), random_head(N, 5, V + 3, bias=True)
    targets = torch.arange(N)
    expected = reverse_kl(student, teacher, eos=EOS, **support)
    wanted = torch.autograd.grad(expected.loss.sum(), leaves(student))
    wanted_statistics = tuple(support_statistics(student, teacher, targets, eos=EOS))

    parameters = [student.weight, student.bias, teacher.weight, teacher.bias]
    partitioned = Partitioned(*parameters)
    result = reverse_kl(student, teacher, eos=EOS, gather_parameters=partitioned.gather, **support)
    torch.testing.assert_close(tuple(result), tuple(expected), rtol=0, atol=0)
    # `.grad` of an empty parameter is DeepSpeed's business; what arrives at its hooks is the full gradient
    grads = torch.autograd.grad(result.loss.sum(), leaves(student))
    torch.testing.assert_close(grads, wanted, rtol=0, atol=0)
    ids = [id(parameter) for parameter in parameters]
    # The backward of the top-k support does not need the teacher
    assert partitioned.entered == [ids, ids if support["top_k"] is None else ids[:2]]

    statistics = support_statistics(student, teacher, targets, eos=EOS, gather_parameters=partitioned.gather)
    torch.testing.assert_close(tuple(statistics), wanted_statistics, rtol=0, atol=0)
    assert partitioned.entered[2:] == [ids]

"""Who gets a gradient from `mixed_log_probs`, in which dtype, and how the weights are gathered."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tests.ops.heads import expected_log_probs, leaves, random_head, to_double
from trl_blend.ops import LMHead, mixed_log_probs
from trl_blend.ops.head import tiles as tiling


SPACES = ["logits", "probs"]
N, V = 7, 11


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "TOKEN_TILE", 3)
    monkeypatch.setattr(tiling, "VOCAB_TILE", 4)


def total(result):
    return result.logps.sum() + result.entropy.sum()


@pytest.mark.parametrize("space", SPACES)
def test_nothing_flows_to_a_partner(space):
    """Neither to its leaves nor into the graph of its backbone, which a zero gradient would already run."""
    student = random_head(N, 4, V, requires_grad=True)
    leaf = random_head(N, 5, V, bias=True, requires_grad=True)
    backbone = nn.Linear(3, 3).double()
    backbone_calls = []
    hidden, weight = backbone(torch.randn(N, 3).double()), backbone(torch.randn(V, 3).double())
    for tensor in (hidden, weight):
        tensor.register_hook(backbone_calls.append)
    result = mixed_log_probs(student, [leaf, LMHead(hidden, weight)], [0.3, 0.2], torch.arange(N), space=space)
    total(result).backward()
    assert all(tensor.grad is None for tensor in (*leaves(leaf), *backbone.parameters()))
    assert backbone_calls == []
    assert all(tensor.grad.abs().sum() > 0 for tensor in leaves(student))


@pytest.mark.parametrize("space", SPACES)
def test_no_graph_when_only_partners_require_grad(space):
    student, partner = random_head(N, 4, V), random_head(N, 5, V, requires_grad=True)
    result = mixed_log_probs(student, [partner], [0.3], torch.arange(N), space=space)
    assert not result.logps.requires_grad
    assert not result.entropy.requires_grad


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_each_student_tensor_alone(space, trained):
    """LoRA trains the hidden states under a frozen output layer, for example."""
    student, partner = random_head(N, 4, V, bias=True, requires_grad=True), random_head(N, 5, V)
    targets = torch.randint(0, V, (N,))
    total(mixed_log_probs(student, [partner], [0.3], targets, space=space)).backward()
    alone = LMHead(
        *(tensor.detach().requires_grad_(name == trained) for name, tensor in zip(LMHead._fields, student[:3]))
    )
    total(mixed_log_probs(alone, [partner], [0.3], targets, space=space)).backward()
    for name in ("hidden", "weight", "bias"):
        grad = getattr(alone, name).grad
        if name == trained:
            torch.testing.assert_close(grad, getattr(student, name).grad, rtol=0, atol=0)
        else:
            assert grad is None


def test_a_head_shared_by_student_and_partner_gets_the_student_gradient_only():
    """A LoRA student against its own base: one output layer, two hidden states."""
    student, base = random_head(N, 4, V, requires_grad=True), random_head(N, 4, V)
    targets = torch.randint(0, V, (N,))
    shared = mixed_log_probs(student, [base._replace(weight=student.weight)], [0.3], targets)
    copied = mixed_log_probs(student, [base._replace(weight=student.weight.detach().clone())], [0.3], targets)
    grads = [torch.autograd.grad(total(result), leaves(student)) for result in (shared, copied)]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_second_derivatives_are_refused():
    student = random_head(N, 4, V, requires_grad=True)
    result = mixed_log_probs(student, [random_head(N, 4, V)], [0.3], torch.arange(N))
    (grad,) = torch.autograd.grad(result.logps.square().sum(), student.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Relative to gradients and values of order 1: bfloat16 rounds each logit (about 2) to 8 bits, float16 to 11
TOLERANCES = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("options", [{}, {"bias": True, "logit_scale": 0.7, "softcap": 3.0}], ids=["plain", "options"])
def test_dtypes(dtype, space, options):
    student = random_head(N, 16, V, dtype=dtype, requires_grad=True, **options)
    partner = random_head(N, 8, V, dtype=dtype, **options)
    targets = torch.randint(0, V, (N,))
    result = mixed_log_probs(student, [partner], [0.3], targets, temperature=0.9, space=space)
    assert result.logps.dtype == result.entropy.dtype == torch.float32
    total(result).backward()

    exact = to_double(student)
    expected = expected_log_probs(exact, [to_double(partner)], [0.3], targets, 0.9, space)
    (expected[0].sum() + expected[1].sum()).backward()
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(tuple(x.double() for x in result), expected, rtol=tolerance, atol=tolerance)
    for tensor, exact_tensor in zip(leaves(student), leaves(exact)):
        assert tensor.grad.dtype == dtype
        scale = exact_tensor.grad.abs().max().item()
        torch.testing.assert_close(tensor.grad.double(), exact_tensor.grad, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("space", SPACES)
def test_models_of_different_dtypes(space):
    """A bfloat16 teacher beside a float32 student: each projects in its own dtype, the sums are float32."""
    student = random_head(N, 4, V, dtype=torch.float32, requires_grad=True)
    partner = random_head(N, 5, V, dtype=torch.bfloat16)
    targets = torch.randint(0, V, (N,))
    result = mixed_log_probs(student, [partner], [0.3], targets, space=space)
    # The teacher's logits as it would compute them, handed over exactly through an identity weight
    logits = (partner.hidden @ partner.weight.T).float()
    expected = mixed_log_probs(student, [LMHead(logits, torch.eye(V))], [0.3], targets, space=space)
    torch.testing.assert_close(tuple(result), tuple(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(total(result), leaves(student)),
        torch.autograd.grad(total(expected), leaves(student)),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("space", SPACES)
def test_autocast_projects_in_its_dtype_and_returns_float32_gradients(space):
    student = random_head(N, 4, V, bias=True, dtype=torch.float32, requires_grad=True)
    partner = random_head(N, 5, V, dtype=torch.float32)
    targets = torch.randint(0, V, (N,))
    with torch.autocast("cpu", torch.bfloat16):
        result = mixed_log_probs(student, [partner], [0.3], targets, space=space)
    low = student._replace(**{name: getattr(student, name).bfloat16() for name in ("hidden", "weight", "bias")})
    low_partner = partner._replace(hidden=partner.hidden.bfloat16(), weight=partner.weight.bfloat16())
    expected = mixed_log_probs(low, [low_partner], [0.3], targets, space=space)
    torch.testing.assert_close(tuple(result), tuple(expected), rtol=0, atol=0)
    grads = torch.autograd.grad(total(result), leaves(student))
    wanted = torch.autograd.grad(total(expected), [low.hidden, low.weight, low.bias])
    for grad, want in zip(grads, wanted):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad.bfloat16(), want, rtol=0, atol=0)


class Partitioned:
    """ZeRO-3 in miniature: parameters are empty except while gathered."""

    def __init__(self, *params):
        self.full = {id(param): param.data for param in params}
        self.entered: list[list[int]] = []
        self.gathered: set[int] = set()
        for param in params:
            param.data = param.data.new_empty(0)

    @contextmanager
    def gather(self, *params):
        self.entered.append([id(param) for param in params])
        fresh = [param for param in params if id(param) not in self.gathered]
        for param in fresh:
            param.data = self.full[id(param)]
            self.gathered.add(id(param))
        try:
            yield
        finally:
            for param in fresh:
                param.data = param.data.new_empty(0)
                self.gathered.remove(id(param))


def head_parameters(head):
    return [tensor for tensor in (head.weight, head.bias) if tensor is not None]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_entropy_gradient", [False, True])
def test_weights_are_gathered_in_forward_and_backward(space, weight, with_entropy_gradient):
    student = random_head(N, 4, V, bias=True, requires_grad=True)
    partner = random_head(N, 5, V, bias=True)
    targets = torch.randint(0, V, (N,))

    def loss(gather=None):
        options = {} if gather is None else {"gather_parameters": gather}
        result = mixed_log_probs(student, [partner], [weight], targets, space=space, **options)
        return total(result) if with_entropy_gradient else result.logps.sum()

    expected = loss()
    wanted = torch.autograd.grad(expected, leaves(student))
    parameters = head_parameters(student) + head_parameters(partner)
    partitioned = Partitioned(*parameters)
    value = loss(partitioned.gather)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    assert partitioned.gathered == set()
    # `.grad` of an empty parameter is DeepSpeed's business; what arrives at its hooks is the full gradient
    grads = torch.autograd.grad(value, leaves(student))
    assert partitioned.gathered == set()
    torch.testing.assert_close(grads, wanted, rtol=0, atol=0)

    student_ids, partner_ids = ([id(p) for p in head_parameters(head)] for head in (student, partner))
    forward = student_ids + partner_ids * (weight > 0)
    # Without an entropy gradient, mixed probabilities need the student's distribution alone
    skips_partner = space == "probs" and weight == 0.3 and not with_entropy_gradient
    assert partitioned.entered == [forward, student_ids if skips_partner else forward]

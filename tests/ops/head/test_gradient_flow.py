"""Who gets a gradient from the functions of a student's output layer, in which dtype, and how weights are gathered."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tests.ops.head.functions import FUNCTIONS, WITH_PARTNER, N, V
from tests.ops.head.heads import gradients, leaves, random_head, to_double, with_leaves
from trl_blend.ops import LMHead, mixed_log_probs, support_statistics


pytestmark = pytest.mark.usefixtures("small_tiles")
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
every_partner = pytest.mark.parametrize("function", [FUNCTIONS[name] for name in WITH_PARTNER], ids=WITH_PARTNER)


def loss_and_grads(function, student, partner):
    loss = function.loss(function.call(student, partner))
    return loss, torch.autograd.grad(loss, leaves(student))


@every_partner
def test_nothing_flows_to_a_partner(function):
    """Neither to its leaves nor into the graph of its backbone, which a zero gradient would already run."""
    student = random_head(N, 4, V, bias=True, requires_grad=True)
    leaf = random_head(N, 5, V, bias=True, requires_grad=True)
    backbone, calls = nn.Linear(3, 3).double(), []
    hidden, weight = backbone(torch.randn(N, 3).double()), backbone(torch.randn(V, 3).double())
    for tensor in (hidden, weight):
        tensor.register_hook(calls.append)
    for partner in (leaf, LMHead(hidden, weight)):
        function.loss(function.call(student, partner)).backward()
    assert calls == []
    assert all(tensor.grad is None for tensor in (*leaves(leaf), *backbone.parameters()))
    assert all(tensor.grad.abs().sum() > 0 for tensor in leaves(student))


@every_partner
def test_no_graph_when_only_partners_require_grad(function):
    student, partner = random_head(N, 4, V), random_head(N, 5, V, requires_grad=True)
    assert not any(value.requires_grad for value in function.call(student, partner))


@every_function
def test_only_what_is_differentiable_has_a_graph(function):
    student, partner = random_head(N, 4, V, requires_grad=True), function.partner(N, 5, V)
    outputs = function.call(student, partner)
    assert [x.requires_grad for x in outputs] == [i < function.differentiable for i in range(len(outputs))]
    with torch.no_grad():
        assert not any(output.requires_grad for output in function.call(student, partner))


@every_function
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_each_student_tensor_alone(function, trained):
    """LoRA trains the hidden states under a frozen output layer, for example."""
    student, partner = random_head(N, 4, V, bias=True, requires_grad=True), function.partner(N, 5, V)
    function.loss(function.call(student, partner)).backward()
    alone = with_leaves(student, lambda tensor: tensor.detach().requires_grad_(tensor is getattr(student, trained)))
    function.loss(function.call(alone, partner)).backward()
    for name in ("hidden", "weight", "bias"):
        grad = getattr(alone, name).grad
        if name == trained:
            torch.testing.assert_close(grad, getattr(student, name).grad, rtol=0, atol=0)
        else:
            assert grad is None


@every_partner
def test_a_head_shared_by_both_models_gets_the_student_gradient_only(function):
    """A LoRA student against its own base: one output layer, two hidden states."""
    student, base = random_head(N, 4, V, requires_grad=True), random_head(N, 4, V)
    _, shared = loss_and_grads(function, student, base._replace(weight=student.weight))
    _, copied = loss_and_grads(function, student, base._replace(weight=student.weight.detach().clone()))
    torch.testing.assert_close(shared, copied, rtol=0, atol=0)


@every_function
def test_second_derivatives_are_refused(function):
    student = random_head(N, 4, V, requires_grad=True)
    output = function.call(student, function.partner(N, 4, V))[0]
    (grad,) = torch.autograd.grad(output.square().sum(), student.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@every_function
def test_no_tokens(function):
    """A micro-batch without labels still reaches the model."""
    student, partner = random_head(0, 4, V, bias=True, requires_grad=True), function.partner(0, 3, V)
    outputs = function.call(student, partner)
    assert all(output.shape == (0,) for output in outputs)
    function.loss(outputs).backward()
    for tensor in leaves(student):
        torch.testing.assert_close(tensor.grad, torch.zeros_like(tensor))


# Relative to values of order 1, and to the largest gradient. Where logits are rounded, those of about 2 have 8 bits in
# bfloat16 and 11 in float16; else it is the rounding of the gradients that are returned.
ROUNDED = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
EXACT = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@every_function
@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("options", [{}, {"bias": True, "logit_scale": 0.7, "softcap": 3.0}], ids=["plain", "options"])
def test_dtypes(function, dtype, options):
    student = random_head(N, 16, V, dtype=dtype, requires_grad=True, **options)
    partner = function.partner(N, 8, V, dtype=dtype, **options)
    outputs = function.call(student, partner)
    assert all(output.dtype == torch.float32 for output in outputs)
    exact = to_double(student)
    expected = function.expected(exact, to_double(partner) if isinstance(partner, LMHead) else partner)
    tolerance = ROUNDED[dtype] if function.rounds else 1e-5
    torch.testing.assert_close(tuple(x.double() for x in outputs), expected, rtol=tolerance, atol=tolerance)

    function.loss(outputs).backward()
    tolerance = (ROUNDED if function.rounds else EXACT)[dtype]
    wanted = torch.autograd.grad(function.loss(expected), leaves(exact))
    for tensor, want in zip(leaves(student), wanted):
        assert tensor.grad.dtype == dtype
        atol = (tolerance if function.rounds else 5e-6) * want.abs().max().item()
        torch.testing.assert_close(tensor.grad.double(), want, rtol=tolerance, atol=atol)


@every_partner
def test_models_of_different_dtypes(function):
    """A bfloat16 teacher beside a float32 student: each projects in its own dtype, the sums are float32."""
    student = random_head(N, 4, V, dtype=torch.float32, requires_grad=True)
    partner = random_head(N, 5, V, dtype=torch.bfloat16)
    # The teacher's logits as it would compute them, handed over exactly through an identity weight
    wide = partner.hidden.float() @ partner.weight.float().T
    logits = (partner.hidden @ partner.weight.T).float() if function.rounds else wide
    loss, grads = loss_and_grads(function, student, partner)
    expected, wanted = loss_and_grads(function, student, LMHead(logits, torch.eye(V)))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, wanted, rtol=1e-5, atol=1e-5)


@every_function
def test_autocast_projects_in_its_dtype_and_returns_float32_gradients(function):
    student = random_head(N, 4, V, bias=True, dtype=torch.float32, requires_grad=True)
    partner = function.partner(N, 5, V, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = function.call(student, partner)
    low = with_leaves(student, lambda tensor: tensor.bfloat16())
    low_partner = with_leaves(partner, lambda t: t.bfloat16()) if isinstance(partner, LMHead) else partner
    expected = function.call(low, low_partner)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    grads = torch.autograd.grad(function.loss(outputs), leaves(student))
    wanted = torch.autograd.grad(function.loss(expected), leaves(low))
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
            assert param.numel() == 0
            param.data = self.full[id(param)]
        try:
            yield
        finally:
            for param in params:
                param.data = param.data.new_empty(0)


def parameters(*heads):
    return [tensor for head in heads if isinstance(head, LMHead) for tensor in head[1:3] if tensor is not None]


def assert_gathered(loss, student, partner, in_backward, in_forward=True):
    """`loss(**options)` and its gradient do not change, and gather the partner where they are said to."""
    expected = loss()
    wanted = gradients([expected], leaves(student), [torch.ones(())])
    ids = [[id(parameter) for parameter in parameters(head)] for head in (student, partner)]
    partitioned = Partitioned(*parameters(student, partner))
    value = loss(gather_parameters=partitioned.gather)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    # `.grad` of an empty parameter is DeepSpeed's business; what arrives at its hooks is the full gradient
    grads = torch.autograd.grad(value, leaves(student))
    torch.testing.assert_close([grad.double() for grad in grads], wanted, rtol=0, atol=0)
    assert partitioned.entered == [ids[0] + ids[1] * in_forward, ids[0] + ids[1] * in_backward]
    assert all(parameter.numel() == 0 for parameter in parameters(student, partner))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_weights_are_gathered_in_forward_and_backward(name):
    function, student = FUNCTIONS[name], random_head(N, 4, V, bias=True, requires_grad=True)
    partner = function.partner(N, 5, V + 3 if name.startswith("reverse") else V, bias=True)
    # The backward of the student's top-k, or of sampled tokens, does not need the teacher
    in_backward = "top-k" not in name and "sampled" not in name
    assert_gathered(lambda **x: function.loss(function.call(student, partner, **x)), student, partner, in_backward)


@pytest.mark.parametrize("space", ["logits", "probs"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("differentiates_entropy", [False, True])
def test_partners_are_gathered_where_the_mixture_needs_them(space, weight, differentiates_entropy):
    student, partner = random_head(N, 4, V, bias=True, requires_grad=True), random_head(N, 5, V, bias=True)
    targets = torch.randint(0, V, (N,))

    def loss(**options):
        result = mixed_log_probs(student, [partner], [weight], targets, space=space, **options)
        return result.logps.sum() + (result.entropy.sum() if differentiates_entropy else 0.0)

    # Without an entropy gradient, mixed probabilities need the student's distribution alone
    skips_partner = space == "probs" and weight == 0.3 and not differentiates_entropy
    assert_gathered(loss, student, partner, weight > 0 and not skips_partner, in_forward=weight > 0)


def test_weights_are_gathered_once_for_support_statistics():
    student, teacher, targets = random_head(N, 4, V, bias=True), random_head(N, 5, V, bias=True), torch.arange(N)
    expected = tuple(support_statistics(student, teacher, targets))
    partitioned = Partitioned(*parameters(student, teacher))
    result = support_statistics(student, teacher, targets, gather_parameters=partitioned.gather)
    torch.testing.assert_close(tuple(result), expected, rtol=0, atol=0)
    assert partitioned.entered == [[id(parameter) for parameter in parameters(student, teacher)]]

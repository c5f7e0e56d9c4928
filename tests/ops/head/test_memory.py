"""The functions of `ops.head` never build an `(N, V)` tensor and project no more often than they say."""

import pytest
import torch

from tests.ops.head.conftest import set_tiles
from tests.ops.head.functions import EOS, FUNCTIONS
from tests.ops.head.heads import leaves, random_head
from tests.ops.head.recorder import Recorder
from trl_blend.ops import mixed_log_probs, reverse_kl, score_tokens, support_statistics


N, V, H = 96, 640, 4
TOKEN_TILE, VOCAB_TILE = 32, 64
TILES = (N // TOKEN_TILE) * (V // VOCAB_TILE)
TILE = TOKEN_TILE * VOCAB_TILE


@pytest.fixture(autouse=True)
def tile_sizes(monkeypatch):
    set_tiles(monkeypatch, TOKEN_TILE, VOCAB_TILE)


def record(loss):
    forward, backward = Recorder(), Recorder()
    with forward:
        value = loss()
    with backward:
        value.backward()
    return forward, backward


@pytest.mark.parametrize("options", [{}, {"bias": True, "logit_scale": 0.5, "softcap": 3.0}], ids=["plain", "options"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_no_tensor_has_the_size_of_the_logits(function, options, dtype):
    student = random_head(N, H, V, requires_grad=True, dtype=dtype, **options)
    partner = function.partner(N, H + 1, V - 9 if function.differentiable == 2 else V, dtype=dtype, **options)
    forward, backward = record(lambda: function.loss(function.call(student, partner)))
    assert max(forward.sizes) <= TILE  # the weights are not copied, concatenated or cast as a whole either
    assert max(backward.sizes) == V * H  # the gradient of the student's weight


def mixed(space, *, weight=0.3, entropy=True, differentiated=True):
    def loss(student, partner):
        targets = torch.randint(0, V, (N,))
        result = mixed_log_probs(student, [partner], [weight], targets, space=space, compute_entropy=entropy)
        return result.logps.sum() + (result.entropy.sum() if differentiated else 0)

    return loss


def divergence(**settings):
    return lambda student, teacher: reverse_kl(student, teacher, **settings).loss.sum()


def interpolated(target_weight=0.4, **settings):
    def loss(student, teacher):
        return reverse_kl(student, teacher, reference=teacher, target_weight=target_weight, **settings).loss.sum()

    return loss


# Projections per tile in the forward and in the backward, and buffers of the size of a tile in the backward. Without a
# student there is nothing to do in the backward.
PASSES = {
    "logits": (mixed("logits"), 2, 2, 2),
    "logits, entropy logged": (mixed("logits", differentiated=False), 2, 2, 1),
    "logits, no entropy": (mixed("logits", entropy=False, differentiated=False), 2, 2, 1),
    "probs": (mixed("probs"), 4, 2, 3),
    "probs, entropy logged": (mixed("probs", differentiated=False), 4, 1, 1),
    "probs, no entropy": (mixed("probs", entropy=False, differentiated=False), 2, 1, 1),
    "logits, student alone": (mixed("logits", weight=0.0), 1, 1, 2),
    "probs, student alone": (mixed("probs", weight=0.0), 1, 1, 2),
    "logits, partner alone": (mixed("logits", weight=1.0), 1, None, 0),
    "probs, partner alone": (mixed("probs", weight=1.0), 1, None, 0),
    "full": (divergence(), 2, 2, 3),
    "veto, eos": (divergence(veto_weight=0.4, eos=EOS), 2, 2, 3),
    "forward kl, eos": (divergence(forward_kl_entropy=1.0, eos=EOS), 2, 2, 3),
    "interpolated, eos": (interpolated(eos=EOS), 3, 3, 4),
    "interpolated, teacher alone": (interpolated(target_weight=1.0), 2, 2, 3),
    "interpolated on the top-k": (interpolated(top_k=8), 3, 1, 1),
    # The top-k needs the student alone
    "top-k": (divergence(top_k=8), 2, 1, 1),
    "veto on the top-k, eos": (divergence(veto_weight=0.4, top_k=8, eos=EOS), 2, 1, 1),
}


@pytest.mark.parametrize("name", PASSES)
def test_number_of_projections_and_buffers(name):
    loss, in_forward, in_backward, buffers = PASSES[name]
    student, partner = random_head(N, H, V, requires_grad=True), random_head(N, H, V)
    forward, backward = record(lambda: loss(student, partner))
    assert forward.projections == in_forward * TILES
    # Two more products per tile are the gradients of hidden states and weight
    assert backward.projections == (0 if in_backward is None else (in_backward + 2) * TILES)
    assert sum(size == TILE for size in backward.sizes) == buffers
    # At most the logits of both models, or a sum and a term of it, and their exponentials
    most = 3 + (name.startswith(("interpolated", "forward")))  # the reference's logits, or the difference of both
    assert sum(size == TILE for size in forward.sizes) <= most


@pytest.mark.parametrize("loss", [mixed("logits"), mixed("probs"), divergence()], ids=["logits", "probs", "reverse"])
def test_a_frozen_output_layer_costs_no_weight_gradient(loss):
    student, partner = random_head(N, H, V), random_head(N, H, V)
    student.hidden.requires_grad_()
    _, backward = record(lambda: loss(student, partner))
    assert max(backward.sizes) == TILE
    assert backward.projections == (2 + 1) * TILES


@pytest.mark.parametrize("top_k", [None, 6])
def test_scores(top_k):
    head, targets = random_head(N, H, V, dtype=torch.float32), torch.randint(0, V, (N,))
    with Recorder() as recorder:
        scores = score_tokens(head, targets, top_k)
    assert max(recorder.sizes) == TILE
    assert recorder.projections == TILES
    torch.testing.assert_close(scores.logps, (head.hidden @ head.weight.T).log_softmax(-1)[range(N), targets])


def test_support_statistics():
    student, teacher = random_head(N, H, V), random_head(N, H, V)
    with Recorder() as recorder:
        support_statistics(student, teacher, torch.randint(0, V, (N,)), eos=EOS)
    assert max(recorder.sizes) == TILE
    assert recorder.projections == 2 * TILES


def test_the_recorder_sees_materialised_logits():
    student, partner = random_head(N, H, V, requires_grad=True), random_head(N, H, V)
    targets = torch.randint(0, V, (N,))
    with Recorder() as recorder:
        logits, partner_logits = (head.hidden @ head.weight.T for head in (student, partner))
        mixture = (0.7 * logits + 0.3 * partner_logits).log_softmax(-1)
        logps = mixture.gather(1, targets[:, None]).squeeze(1)
        logps.sum().backward()
    assert max(recorder.sizes) == N * V
    assert all(tensor.grad is not None for tensor in leaves(student))
    torch.testing.assert_close(logps, mixed_log_probs(student, [partner], [0.3], targets).logps)

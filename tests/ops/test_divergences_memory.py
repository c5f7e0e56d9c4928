"""`reverse_kl` and `support_statistics` never build an `(N, V)` tensor and project no more often than they say."""

import pytest
import torch

from tests.ops.heads import random_head
from tests.ops.test_mixed_head_memory import Recorder
from trl_blend.ops import EosMap, reverse_kl, support_statistics
from trl_blend.ops.head import tiles as tiling


N, V, H, TOP_K = 96, 640, 4, 8
TOKEN_TILE, VOCAB_TILE = 32, 64
TILES = (N // TOKEN_TILE) * (V // VOCAB_TILE)
TILE = TOKEN_TILE * VOCAB_TILE
EOS = EosMap(3, (200, 600))
ARMS = {
    "full": {},
    "veto": {"veto_weight": 0.4},
    "top-k": {"top_k": TOP_K},
    "veto on the top-k, eos": {"veto_weight": 0.4, "top_k": TOP_K, "eos": EOS},
    "veto, eos": {"veto_weight": 0.4, "eos": EOS},
}


@pytest.fixture(autouse=True)
def tile_sizes(monkeypatch):
    monkeypatch.setattr(tiling, "TOKEN_TILE", TOKEN_TILE)
    monkeypatch.setattr(tiling, "VOCAB_TILE", VOCAB_TILE)


def record(student, teacher, arguments):
    forward, backward = Recorder(), Recorder()
    with forward:
        loss = reverse_kl(student, teacher, **arguments).loss.sum()
    with backward:
        loss.backward()
    return forward, backward


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("options", [{}, {"bias": True, "logit_scale": 0.5, "softcap": 3.0}], ids=["plain", "options"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_has_the_size_of_the_logits(arm, options, dtype):
    student = random_head(N, H, V, requires_grad=True, dtype=dtype, **options)
    teacher = random_head(N, H + 1, V + 9, dtype=dtype, **options)
    forward, backward = record(student, teacher, ARMS[arm])
    assert max(forward.sizes) == TILE  # the weights are not copied or cast as a whole either
    assert max(backward.sizes) == V * H  # the gradient of the student's weight


@pytest.mark.parametrize("arm", ARMS)
def test_number_of_projections_and_buffers(arm):
    student, teacher = random_head(N, H, V, requires_grad=True), random_head(N, H, V)
    forward, backward = record(student, teacher, ARMS[arm])
    assert forward.projections == 2 * TILES
    # Two more products per tile are the gradients of hidden states and weight. The top-k needs the student alone.
    reads_teacher = "top_k" not in ARMS[arm]
    assert backward.projections == (1 + reads_teacher + 2) * TILES
    assert sum(size == TILE for size in backward.sizes) == (3 if reads_teacher else 1)
    # The logits of both models and their exponentials; nothing else is ever as large as a tile
    assert sum(size == TILE for size in forward.sizes) == 3


def test_a_frozen_output_layer_costs_no_weight_gradient():
    student, teacher = random_head(N, H, V), random_head(N, H, V)
    student.hidden.requires_grad_()
    _, backward = record(student, teacher, {})
    assert max(backward.sizes) == TILE
    assert backward.projections == (2 + 1) * TILES


def test_support_statistics():
    student, teacher = random_head(N, H, V), random_head(N, H, V)
    recorder = Recorder()
    with recorder:
        support_statistics(student, teacher, torch.randint(0, V, (N,)), eos=EOS)
    assert max(recorder.sizes) == TILE
    assert recorder.projections == 2 * TILES


def test_the_recorder_sees_materialised_logits():
    student, teacher = random_head(N, H, V, requires_grad=True), random_head(N, H, V)
    with Recorder() as recorder:
        student_logprobs, teacher_logprobs = ((x.hidden @ x.weight.T).log_softmax(-1) for x in (student, teacher))
        loss = (student_logprobs.exp() * (student_logprobs - teacher_logprobs)).sum(-1)
        loss.sum().backward()
    assert max(recorder.sizes) == N * V
    torch.testing.assert_close(reverse_kl(student, teacher).loss, loss)

"""`mixed_log_probs` never builds an `(N, V)` tensor and projects no more often than it says."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.ops.heads import leaves, materialized_log_probs, random_head
from trl_blend.ops import mixed_log_probs
from trl_blend.ops.head import tiles as tiling


SPACES = ["logits", "probs"]
N, V, H = 96, 640, 4
TOKEN_TILE, VOCAB_TILE = 32, 64
TILES = (N // TOKEN_TILE) * (V // VOCAB_TILE)
TILE = TOKEN_TILE * VOCAB_TILE


class Recorder(TorchDispatchMode):
    """Records the size of every allocation and the number of calls of every operation."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        old = {x.untyped_storage().data_ptr() for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in old:
                self.sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return result

    @property
    def projections(self) -> int:
        return self.calls["mm"] + self.calls["addmm_"] + self.calls["addmm"]


@pytest.fixture(autouse=True)
def tile_sizes(monkeypatch):
    monkeypatch.setattr(tiling, "TOKEN_TILE", TOKEN_TILE)
    monkeypatch.setattr(tiling, "VOCAB_TILE", VOCAB_TILE)


def record(score, *, entropy_gradient):
    forward, backward = Recorder(), Recorder()
    with forward:
        result = score()
        loss = result.logps.sum() + (result.entropy.sum() if entropy_gradient else 0)
    with backward:
        loss.backward()
    return forward, backward


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("options", [{}, {"bias": True, "logit_scale": 0.5, "softcap": 3.0}], ids=["plain", "options"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_has_the_size_of_the_logits(space, options, dtype):
    student = random_head(N, H, V, requires_grad=True, dtype=dtype, **options)
    partners = [random_head(N, H + 1, V, dtype=dtype, **options), random_head(N, H, V - 9, dtype=dtype)]
    targets = torch.randint(0, V, (N,))
    forward, backward = record(
        lambda: mixed_log_probs(student, partners, [0.2, 0.3], targets, space=space), entropy_gradient=True
    )
    assert max(forward.sizes) == TILE  # the weights are not copied, concatenated or cast as a whole either
    assert max(backward.sizes) == V * H  # the gradient of the student's weight


@pytest.mark.parametrize("space", SPACES)
def test_a_frozen_output_layer_costs_no_weight_gradient(space):
    student, partner = random_head(N, H, V, dtype=torch.float32), random_head(N, H, V, dtype=torch.float32)
    student.hidden.requires_grad_()
    targets = torch.randint(0, V, (N,))
    _, backward = record(
        lambda: mixed_log_probs(student, [partner], [0.3], targets, space=space), entropy_gradient=True
    )
    assert max(backward.sizes) == TILE
    assert backward.projections == 2 * TILES + TILES


def test_the_recorder_sees_materialised_logits():
    student, partner = random_head(N, H, V, requires_grad=True), random_head(N, H, V)
    targets = torch.randint(0, V, (N,))
    recorder = Recorder()
    with recorder:
        logps = materialized_log_probs(student, [partner], [0.3], targets)
        logps.sum().backward()
    assert max(recorder.sizes) == N * V
    for tensor in leaves(student):
        tensor.grad = None
    torch.testing.assert_close(logps, mixed_log_probs(student, [partner], [0.3], targets).logps)


# space, weight of the partner, entropy computed, entropy differentiated -> projections per tile, forward and backward
PASSES = [
    ("logits", 0.3, True, True, 2, 2),
    ("logits", 0.3, False, False, 2, 2),
    ("probs", 0.3, True, True, 4, 2),
    ("probs", 0.3, True, False, 4, 1),
    ("probs", 0.3, False, False, 2, 1),
    ("logits", 0.0, True, True, 1, 1),
    ("probs", 0.0, True, True, 1, 1),
    ("logits", 1.0, True, True, 1, None),
    ("probs", 1.0, True, True, 1, None),
]


@pytest.mark.parametrize(
    ("space", "weight", "computed", "differentiated", "forward_passes", "backward_passes"), PASSES
)
def test_number_of_projections(space, weight, computed, differentiated, forward_passes, backward_passes):
    student, partner = random_head(N, H, V, requires_grad=True), random_head(N, H, V)
    targets = torch.randint(0, V, (N,))
    forward, backward = record(
        lambda: mixed_log_probs(student, [partner], [weight], targets, space=space, compute_entropy=computed),
        entropy_gradient=differentiated,
    )
    assert forward.projections == forward_passes * TILES
    # Two more products per tile are the gradients of hidden states and weight; without a student there is nothing
    assert backward.projections == (0 if backward_passes is None else (backward_passes + 2) * TILES)


@pytest.mark.parametrize(
    ("space", "differentiated", "buffers"), [("logits", False, 1), ("logits", True, 2), ("probs", True, 3)]
)
def test_number_of_buffers_in_the_backward(space, differentiated, buffers):
    student, partner = random_head(N, H, V, requires_grad=True), random_head(N, H, V)
    targets = torch.randint(0, V, (N,))
    _, backward = record(
        lambda: mixed_log_probs(student, [partner], [0.3], targets, space=space), entropy_gradient=differentiated
    )
    assert sum(size == TILE for size in backward.sizes) == buffers

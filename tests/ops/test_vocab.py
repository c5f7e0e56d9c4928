import math

import pytest
import torch

from tests import reference, reference_divergences
from trl_blend.errors import ConfigError
from trl_blend.ops import EosMap, align_vocab, canonicalize_eos, eos_map


@pytest.mark.parametrize("vocab_size", [1, 3, 5, 6, 9])
def test_truncates_or_pads_with_zero_probability(vocab_size):
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    aligned = align_vocab(logits, vocab_size)
    expected = torch.stack([reference.resize(row, vocab_size) for row in logits.view(6, 5)]).view(2, 3, -1)
    torch.testing.assert_close(aligned, expected, rtol=0, atol=0)


def test_same_size_is_the_input_itself():
    logits = torch.randn(2, 5)
    assert align_vocab(logits, 5) is logits


def test_gradient_reaches_the_kept_entries_only():
    logits = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    torch.log_softmax(align_vocab(logits, 3), -1)[0, 0].backward()
    p = reference.softmax(logits[0, :3].detach())
    torch.testing.assert_close(logits.grad[0], torch.tensor([1 - p[0], -p[1], -p[2], 0.0], dtype=torch.float64))
    logits.grad = None
    torch.log_softmax(align_vocab(logits, 7), -1)[0, 0].backward()
    assert torch.isfinite(logits.grad).all()


def test_padding_keeps_the_dtype():
    padded = align_vocab(torch.zeros(1, 2, dtype=torch.bfloat16), 3)
    assert padded.dtype == torch.bfloat16
    assert padded.tolist() == [[0.0, 0.0, -math.inf]]


def test_empty_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="`vocab_size` is 0"):
        align_vocab(torch.zeros(1, 2), 0)


# ---------------------------------------------------------------- the stop event


EOS = EosMap(4, (1, 6))


def canonical(logits, eos):
    """Log-probabilities of `(..., V)` logits, row by row."""
    rows = logits.reshape(-1, logits.shape[-1])
    ids = (eos.target, list(eos.merged))
    return torch.stack([reference_divergences.canonical_logprobs(row, 1.0, ids) for row in rows]).view(logits.shape)


@pytest.mark.parametrize(
    ("student", "teacher", "target", "expected"),
    [
        ([2], [5], None, EosMap(2, (5,))),
        ([2], [2], None, None),
        ([2, 7], [7, 2], None, None),
        ([2, 7], [2], None, EosMap(2, (7,))),
        ([2], [5, 2], None, EosMap(2, (5,))),
        ([2, 7], [5, 7, 9], None, EosMap(2, (7, 5, 9))),
        ([2, 7], [5], 7, EosMap(7, (2, 5))),
        ([2, 2], [2], None, None),
    ],
)
def test_eos_map(student, teacher, target, expected):
    assert eos_map(student, teacher, target) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [1]), r"`student_eos_ids` is \[\]. Pass at least one id"),
        (([1], []), r"`teacher_eos_ids` is \[\]"),
        (([1], [-1]), r"`teacher_eos_ids` is \[-1\]"),
        (([1, 2], [3], 3), r"`target` is 3. Choose one of the student's EOS ids, \[1, 2\]"),
    ],
)
def test_invalid_eos_ids_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        eos_map(*arguments)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
@pytest.mark.parametrize("eos", [EOS, EosMap(0, (7,)), EosMap(2, (0, 1, 3, 4, 5, 6, 7)), EosMap(5, (8, 900))])
def test_the_stop_event_has_one_coordinate(shape, eos):
    logits = torch.randn(shape, dtype=torch.float64)
    before = logits.clone()
    merged = canonicalize_eos(logits, eos)
    torch.testing.assert_close(torch.log_softmax(merged, -1), canonical(logits, eos), rtol=1e-13, atol=1e-13)
    # Raw logits keep their total mass, not only the probabilities
    torch.testing.assert_close(merged.logsumexp(-1), logits.logsumexp(-1), rtol=1e-13, atol=1e-13)
    inside = [token for token in eos.merged if token < 8]
    assert (merged[..., inside] == -math.inf).all()
    others = [token for token in range(8) if token not in (eos.target, *inside)]
    assert torch.equal(merged[..., others], logits[..., others])
    assert torch.equal(logits, before)
    torch.testing.assert_close(canonicalize_eos(merged, eos), merged, rtol=0, atol=0)


def test_models_that_differ_in_the_eos_token_only_become_equal():
    student = torch.randn(3, 8, dtype=torch.float64)
    teacher = student.clone()
    teacher[:, [1, 4]] = student[:, [4, 1]]
    merged, other = (torch.log_softmax(canonicalize_eos(x, eos_map([4], [1])), -1) for x in (student, teacher))
    torch.testing.assert_close(merged, other, rtol=1e-14, atol=1e-14)
    for row, other_row in zip(merged, other):
        assert reference.kl_divergence(row, other_row).item() == pytest.approx(0, abs=1e-14)


def test_gradients_of_the_stop_event():
    logits = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    finite = [token for token in range(8) if token not in EOS.merged]
    assert torch.autograd.gradcheck(lambda x: canonicalize_eos(x, EOS)[..., finite], (logits,))
    torch.log_softmax(canonicalize_eos(logits, EOS), -1)[:, 4].sum().backward()
    p = torch.softmax(logits.detach(), -1)
    expected = -p
    stop = [4, 1, 6]
    expected[:, stop] += p[:, stop] / p[:, stop].sum(-1, keepdim=True)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("impossible", [[1], [4], [1, 4], [1, 4, 6]])
def test_impossible_eos_tokens(impossible):
    logits = torch.randn(2, 8, dtype=torch.float64)
    logits[0, impossible] = -math.inf
    logits.requires_grad_()
    merged = canonicalize_eos(logits, EOS)
    torch.testing.assert_close(torch.log_softmax(merged, -1), canonical(logits, EOS).detach())
    probabilities = torch.softmax(merged, -1)
    (probabilities * torch.randn_like(probabilities)).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[0, impossible] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_stop_event_keeps_the_dtype(dtype):
    """Half precision is rounded once, at the end."""
    logits = torch.randn(64, 8).to(dtype)
    merged = canonicalize_eos(logits, EOS)
    assert merged.dtype == dtype
    exact = torch.log(logits[:, [4, 1, 6]].double().exp().sum(-1)).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 0
    torch.testing.assert_close(merged[:, 4], exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("target", [8, 9])
def test_a_target_outside_the_vocabulary_is_refused(target):
    with pytest.raises(ConfigError, match=f"EOS id is {target} but the vocabulary has 8 entries"):
        canonicalize_eos(torch.zeros(1, 8), EosMap(target, (1,)))

import math

import pytest
import torch

from tests import reference
from trl_blend.errors import ConfigError
from trl_blend.ops import align_vocab


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

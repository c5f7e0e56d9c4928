"""Vocabulary alignment between models that share a tokenizer but pad their output layers differently."""

import math

from torch import Tensor
from torch.nn import functional as F

from trl_blend.errors import ConfigError


def align_vocab(logits: Tensor, vocab_size: int) -> Tensor:
    """
    Truncate the last dimension to `vocab_size` entries, or pad it with `-inf` (probability 0).

    Checkpoints of one family pad their output layer to different sizes (Qwen2.5: 151,936 rows at 0.5B, 152,064 at 7B)
    while the tokenizer is the same: the surplus rows are never produced. After truncation the softmax runs over the
    entries that are left, so the distribution is renormalised. Not checked here: that the shared entries mean the same
    tokens.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`):
            Logits of one model.
        vocab_size (`int`):
            Size of the vocabulary to align to.

    Returns:
        `torch.Tensor` of shape `(..., vocab_size)`: The input itself where nothing changes. Gradients flow to the
        entries that are kept.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If `vocab_size` is not positive.
    """
    if vocab_size < 1:
        raise ConfigError(f"`vocab_size` is {vocab_size}. Pass the size of the student's output layer.")
    missing = vocab_size - logits.shape[-1]
    if missing > 0:
        return F.pad(logits, (0, missing), value=-math.inf)
    return logits[..., :vocab_size] if missing < 0 else logits

"""
Pure tensor operations: tensors in, tensors out.

Nothing here knows a model, a trainer, a tokenizer or a logger, and importing it loads neither transformers nor trl.
"""

from trl_blend.ops.head.layer import LMHead
from trl_blend.ops.head.mixed import MixedLogProbs, mixed_log_probs
from trl_blend.ops.head.reverse_kl import ReverseKL, SupportStatistics, reverse_kl, support_statistics
from trl_blend.ops.head.scores import TokenLogProbs, score_tokens
from trl_blend.ops.head.top_k import TopKDivergence, top_k_divergence
from trl_blend.ops.importance import (
    ImportanceSums,
    floored_log_ratio,
    importance_statistics,
    summarize_importance,
)
from trl_blend.ops.losses import (
    SampledTokenLoss,
    extrapolated_logps,
    iw_opd_weights,
    sampled_kl,
    sampled_token_loss,
    sequence_weights,
)
from trl_blend.ops.mixing import mix_logits, mix_probs, validate_weights
from trl_blend.ops.reduction import masked_mean, masked_sum
from trl_blend.ops.selection import tip_selection
from trl_blend.ops.trust_region import TrustRegionSolution, solve_trust_region
from trl_blend.ops.vocab import EosMap, align_vocab, canonicalize_eos, eos_map


__all__ = [
    "EosMap",
    "ImportanceSums",
    "LMHead",
    "MixedLogProbs",
    "ReverseKL",
    "SampledTokenLoss",
    "SupportStatistics",
    "TokenLogProbs",
    "TopKDivergence",
    "TrustRegionSolution",
    "align_vocab",
    "canonicalize_eos",
    "eos_map",
    "extrapolated_logps",
    "floored_log_ratio",
    "importance_statistics",
    "iw_opd_weights",
    "masked_mean",
    "masked_sum",
    "mix_logits",
    "mix_probs",
    "mixed_log_probs",
    "reverse_kl",
    "score_tokens",
    "sampled_kl",
    "sampled_token_loss",
    "sequence_weights",
    "solve_trust_region",
    "summarize_importance",
    "support_statistics",
    "tip_selection",
    "top_k_divergence",
    "validate_weights",
]

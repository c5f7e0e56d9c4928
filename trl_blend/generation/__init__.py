"""
What happens at one decoding step, for any Hugging Face causal language model.

* `rules`: [`BlendRule`] objects, (student logits, partner logits) -> behaviour logits and statistics.
* `partner`: drives a partner model with its own cache.
* `recording`: what a rollout leaves behind.
* `step`: one step from the logits of all models, the same for every engine.
* `processor`: the logits processor that ties the three together.
* `hooks`: [`blended_generation`], the context manager to use.
"""

from trl_blend.generation.hooks import BlendSession, blended_generation
from trl_blend.generation.partner import PartnerDecoder
from trl_blend.generation.processor import BlendLogitsProcessor
from trl_blend.generation.recording import RolloutRecord
from trl_blend.generation.rules import (
    BlendRule,
    BlendStep,
    ChernoffBlend,
    ContrastiveDecoding,
    LogitArithmetic,
    LogitMixing,
    ProbabilityMixing,
    SpeculativeKD,
    TrustRegion,
)


__all__ = [
    "BlendLogitsProcessor",
    "BlendRule",
    "BlendSession",
    "BlendStep",
    "ChernoffBlend",
    "ContrastiveDecoding",
    "LogitArithmetic",
    "LogitMixing",
    "PartnerDecoder",
    "ProbabilityMixing",
    "RolloutRecord",
    "SpeculativeKD",
    "TrustRegion",
    "blended_generation",
]

"""
What happens at one decoding step, for any Hugging Face causal language model.

* `rules`: [`BlendRule`] objects, (student logits, partner logits) -> behaviour logits and statistics.
* `trust_region_rules`: the rules of on-policy distillation, with one teacher.
* `partner`: drives a partner model with its own cache.
* `recording`: what a rollout leaves behind.
* `processor`: the logits processor that ties the three together.
* `hooks`: [`blended_generation`], the context manager to use.
"""

from .hooks import BlendSession, blended_generation
from .partner import PartnerDecoder
from .processor import BlendLogitsProcessor
from .recording import RolloutRecord
from .rules import BlendRule, BlendStep, LogitMixing, ProbabilityMixing
from .trust_region_rules import SpeculativeKD, TrustRegion


__all__ = [
    "BlendLogitsProcessor",
    "BlendRule",
    "BlendSession",
    "BlendStep",
    "LogitMixing",
    "PartnerDecoder",
    "ProbabilityMixing",
    "RolloutRecord",
    "SpeculativeKD",
    "TrustRegion",
    "blended_generation",
]

"""On-policy distillation with trust-region rollouts: configuration and trainer."""

from trl_blend.trainers.trust_region_opd.config import TrustRegionOPDConfig
from trl_blend.trainers.trust_region_opd.trainer import TrustRegionOPDTrainer


__all__ = ["TrustRegionOPDConfig", "TrustRegionOPDTrainer"]

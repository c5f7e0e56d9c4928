"""On-policy distillation with trust-region rollouts: configuration and trainer."""

from .config import TrustRegionOPDConfig
from .trainer import TrustRegionOPDTrainer


__all__ = ["TrustRegionOPDConfig", "TrustRegionOPDTrainer"]

"""On-policy distillation from stored teacher log-probabilities: configuration and trainer."""

from .config import OfflineOPDConfig
from .trainer import OfflineOPDTrainer


__all__ = ["OfflineOPDConfig", "OfflineOPDTrainer"]

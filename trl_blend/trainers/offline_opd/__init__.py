"""On-policy distillation from stored teacher log-probabilities: configuration and trainer."""

from trl_blend.trainers.offline_opd.config import OfflineOPDConfig
from trl_blend.trainers.offline_opd.trainer import OfflineOPDTrainer


__all__ = ["OfflineOPDConfig", "OfflineOPDTrainer"]

"""GRPO with logit mixing: configuration and trainer."""

from .config import LogitMixGRPOConfig
from .trainer import LogitMixGRPOTrainer


__all__ = ["LogitMixGRPOConfig", "LogitMixGRPOTrainer"]

"""GRPO with logit mixing: configuration and trainer."""

from trl_blend.trainers.logit_mix_grpo.config import LogitMixGRPOConfig
from trl_blend.trainers.logit_mix_grpo.trainer import LogitMixGRPOTrainer


__all__ = ["LogitMixGRPOConfig", "LogitMixGRPOTrainer"]

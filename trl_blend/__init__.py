"""
Trainers, decoding hooks and tensor operations that put a student and a teacher together at decoding time.

Public names are imported on first use (PEP 562), so `import trl_blend` and `import trl_blend.ops` load neither
`transformers` nor `trl`.

Example:

```python
from trl_blend import LogitMixGRPOConfig, LogitMixGRPOTrainer

trainer = LogitMixGRPOTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    teacher_model="Qwen/Qwen2.5-1.5B-Instruct",
    reward_funcs=reward,
    args=LogitMixGRPOConfig(output_dir="out", teacher_weight=0.3),
    train_dataset=dataset,
)
trainer.train()
```
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trl_blend._version import __version__


if TYPE_CHECKING:
    from trl_blend.consistency.check import check_teacher_consistency
    from trl_blend.consistency.provenance import TeacherProvenanceCallback, record_teacher
    from trl_blend.export.mixed_policy import export_mixed_policy
    from trl_blend.generation.hooks import blended_generation
    from trl_blend.generation.rules import (
        BlendRule,
        ChernoffBlend,
        ContrastiveDecoding,
        LogitArithmetic,
        LogitMixing,
        ProbabilityMixing,
        SpeculativeKD,
        TrustRegion,
    )
    from trl_blend.rollouts.collect import collect_rollouts
    from trl_blend.rollouts.config import RolloutConfig, ScoringConfig
    from trl_blend.rollouts.lightning import import_lightning_opd
    from trl_blend.rollouts.score import score_rollouts
    from trl_blend.rollouts.store import RolloutStore, load_rollouts, load_scored_rollouts
    from trl_blend.trainers.logit_mix_grpo import LogitMixGRPOConfig, LogitMixGRPOTrainer
    from trl_blend.trainers.offline_opd import OfflineOPDConfig, OfflineOPDTrainer
    from trl_blend.trainers.trust_region_opd import TrustRegionOPDConfig, TrustRegionOPDTrainer

_MODULE_OF = {
    "BlendRule": "trl_blend.generation.rules",
    "ChernoffBlend": "trl_blend.generation.rules",
    "ContrastiveDecoding": "trl_blend.generation.rules",
    "LogitArithmetic": "trl_blend.generation.rules",
    "LogitMixGRPOConfig": "trl_blend.trainers.logit_mix_grpo",
    "LogitMixGRPOTrainer": "trl_blend.trainers.logit_mix_grpo",
    "LogitMixing": "trl_blend.generation.rules",
    "OfflineOPDConfig": "trl_blend.trainers.offline_opd",
    "OfflineOPDTrainer": "trl_blend.trainers.offline_opd",
    "ProbabilityMixing": "trl_blend.generation.rules",
    "RolloutConfig": "trl_blend.rollouts.config",
    "RolloutStore": "trl_blend.rollouts.store",
    "ScoringConfig": "trl_blend.rollouts.config",
    "SpeculativeKD": "trl_blend.generation.rules",
    "TeacherProvenanceCallback": "trl_blend.consistency.provenance",
    "TrustRegion": "trl_blend.generation.rules",
    "TrustRegionOPDConfig": "trl_blend.trainers.trust_region_opd",
    "TrustRegionOPDTrainer": "trl_blend.trainers.trust_region_opd",
    "blended_generation": "trl_blend.generation.hooks",
    "check_teacher_consistency": "trl_blend.consistency.check",
    "collect_rollouts": "trl_blend.rollouts.collect",
    "export_mixed_policy": "trl_blend.export.mixed_policy",
    "import_lightning_opd": "trl_blend.rollouts.lightning",
    "load_rollouts": "trl_blend.rollouts.store",
    "load_scored_rollouts": "trl_blend.rollouts.store",
    "record_teacher": "trl_blend.consistency.provenance",
    "score_rollouts": "trl_blend.rollouts.score",
}

# Spelled out, not computed, so that type checkers and editors see it; a test holds it equal to `_MODULE_OF`.
__all__ = [
    "BlendRule",
    "ChernoffBlend",
    "ContrastiveDecoding",
    "LogitArithmetic",
    "LogitMixGRPOConfig",
    "LogitMixGRPOTrainer",
    "LogitMixing",
    "OfflineOPDConfig",
    "OfflineOPDTrainer",
    "ProbabilityMixing",
    "RolloutConfig",
    "RolloutStore",
    "ScoringConfig",
    "SpeculativeKD",
    "TeacherProvenanceCallback",
    "TrustRegion",
    "TrustRegionOPDConfig",
    "TrustRegionOPDTrainer",
    "__version__",
    "blended_generation",
    "check_teacher_consistency",
    "collect_rollouts",
    "export_mixed_policy",
    "import_lightning_opd",
    "load_rollouts",
    "load_scored_rollouts",
    "record_teacher",
    "score_rollouts",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next access does not come through here
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

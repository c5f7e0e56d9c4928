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
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .generation.hooks import blended_generation
    from .generation.rules import BlendRule, LogitMixing, ProbabilityMixing
    from .generation.trust_region_rules import SpeculativeKD, TrustRegion
    from .hub.mixed_policy import export_mixed_policy
    from .teacher.consistency import check_teacher_consistency
    from .teacher.lightning import import_lightning_opd
    from .teacher.provenance import TeacherProvenanceCallback, record_teacher
    from .teacher.rollouts import collect_rollouts
    from .teacher.scoring import score_rollouts
    from .teacher.store import RolloutStore, load_rollouts, load_scored_rollouts
    from .trainers.logit_mix_grpo import LogitMixGRPOConfig, LogitMixGRPOTrainer
    from .trainers.offline_opd import OfflineOPDConfig, OfflineOPDTrainer
    from .trainers.trust_region_opd import TrustRegionOPDConfig, TrustRegionOPDTrainer

try:
    __version__ = version("trl_blend")
except PackageNotFoundError:  # a checkout on the path that nobody installed
    __version__ = "0+unknown"

_MODULE_OF = {
    "BlendRule": "trl_blend.generation.rules",
    "LogitMixGRPOConfig": "trl_blend.trainers.logit_mix_grpo",
    "LogitMixGRPOTrainer": "trl_blend.trainers.logit_mix_grpo",
    "LogitMixing": "trl_blend.generation.rules",
    "OfflineOPDConfig": "trl_blend.trainers.offline_opd",
    "OfflineOPDTrainer": "trl_blend.trainers.offline_opd",
    "ProbabilityMixing": "trl_blend.generation.rules",
    "RolloutStore": "trl_blend.teacher.store",
    "SpeculativeKD": "trl_blend.generation.trust_region_rules",
    "TeacherProvenanceCallback": "trl_blend.teacher.provenance",
    "TrustRegion": "trl_blend.generation.trust_region_rules",
    "TrustRegionOPDConfig": "trl_blend.trainers.trust_region_opd",
    "TrustRegionOPDTrainer": "trl_blend.trainers.trust_region_opd",
    "blended_generation": "trl_blend.generation.hooks",
    "check_teacher_consistency": "trl_blend.teacher.consistency",
    "collect_rollouts": "trl_blend.teacher.rollouts",
    "export_mixed_policy": "trl_blend.hub.mixed_policy",
    "import_lightning_opd": "trl_blend.teacher.lightning",
    "load_rollouts": "trl_blend.teacher.store",
    "load_scored_rollouts": "trl_blend.teacher.store",
    "record_teacher": "trl_blend.teacher.provenance",
    "score_rollouts": "trl_blend.teacher.scoring",
}

# Spelled out, not computed, so that type checkers and editors see it; a test holds it equal to `_MODULE_OF`.
__all__ = [
    "BlendRule",
    "LogitMixGRPOConfig",
    "LogitMixGRPOTrainer",
    "LogitMixing",
    "OfflineOPDConfig",
    "OfflineOPDTrainer",
    "ProbabilityMixing",
    "RolloutStore",
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

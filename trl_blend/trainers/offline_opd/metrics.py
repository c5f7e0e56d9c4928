"""What an [`OfflineOPDTrainer`] measures of the stored tokens, none of which changes the training."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from trl_blend.ops.losses import sampled_kl
from trl_blend.rollouts.format import UNLIKELY_LOGP
from trl_blend.trainers._statistics import TokenMeans
from trl_blend.trainers.offline_opd.data import LOG_PROBS


class OfflineMetrics:
    """
    Metrics under `offline/…`, means over the tokens of all ranks since the last log.

    - `offline/advantage`, `offline/advantage_std`: of `log p_T - log p_θ` on the stored tokens;
    - `offline/reverse_kl`, `offline/drift_kl`: `KL(p_θ‖p_T)` and `KL(p_θ‖p_0)` at the visited prefixes, with `p_0` the
      student that drew the rollouts, both estimated by [`~trl_blend.ops.losses.sampled_kl`]. Where the data does not
      hold what they need they are left out;
    - `offline/divergence`: value of a top-k loss, or of the baseline, whose terms are not sampled;
    - `offline/importance_ratio`: ratio of the current student to the policy of the rollouts, with
      `importance_correction="token"`; 1 on average as long as the student stays where that policy reaches;
    - `offline/unlikely_share`: share of stored tokens to which the teacher gives less than `e^-10`.
    """

    def __init__(self) -> None:
        self._means = {"train": TokenMeans(), "eval": TokenMeans()}

    def add(self, mode: str, student_logps: Tensor, columns: dict[str, Tensor], mask: Tensor) -> None:
        """Add one micro-batch: everything of shape `(B, T)`."""
        means = self._means[mode]
        names = [name for name in LOG_PROBS if name in columns]
        # In one transfer to the CPU; not every device has float64
        own, *rows = torch.stack([student_logps.float(), *(columns[name] for name in names)])[:, mask].cpu()
        stored = dict(zip(names, rows, strict=True))
        values = {
            "advantage": (advantage := stored["teacher_logps"].double() - own.double()),
            "advantage_square": advantage.square(),
            "unlikely_share": (stored["teacher_logps"] < UNLIKELY_LOGP).double(),
        }
        for name, other in (("reverse_kl", "teacher_logps"), ("drift_kl", "student_logps")):
            if "rollout_logps" in stored and other in stored:
                values[name] = sampled_kl(own, stored[other], stored["rollout_logps"])
        for name, value in values.items():
            means.add(name, value, torch.ones_like(value, dtype=torch.bool))

    def add_mean(self, mode: str, name: str, values: Tensor, mask: Tensor) -> None:
        """Add values of shape `(B, T)` under a name of their own."""
        self._means[mode].add(name, values, mask)

    def pop(self, mode: str, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last call, under their names, added over the ranks: every one must call it."""
        means = self._means[mode].reduce(accelerator)
        if not means:
            return {}
        square = means.pop("advantage_square")
        means["advantage_std"] = math.sqrt(max(square - means["advantage"] ** 2, 0.0))
        return {f"offline/{name}": value for name, value in means.items()}

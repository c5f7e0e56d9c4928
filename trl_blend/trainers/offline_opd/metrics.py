"""What an [`OfflineOPDTrainer`] measures of the stored tokens, none of which changes the training."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch import Tensor

from ...ops.losses import sampled_kl
from .._statistics import TokenMeans


# Below this a token is one that the teacher would hardly ever write: e^-10 is 5 in 100,000
UNLIKELY = -10.0


class OfflineMetrics:
    """
    Metrics under `offline/…`, means over the tokens of all ranks since the last log.

    - `offline/advantage`, `offline/advantage_std`: of `log p_T - log p_θ` on the stored tokens;
    - `offline/reverse_kl`, `offline/drift_kl`: `KL(p_θ‖p_T)` and `KL(p_θ‖p_0)` at the visited prefixes, with `p_0` the
      student that drew the rollouts, both estimated by [`~trl_blend.ops.losses.sampled_kl`]. Where the data does not
      hold what they need they are left out;
    - `offline/divergence`: value of a top-k loss, whose terms are not sampled;
    - `offline/unlikely_share`: share of stored tokens to which the teacher gives less than `e^-10`;
    - `offline/tokens_per_second`: tokens of prompts and completions, without padding, of all ranks per second of
      training steps of this process. In training only.
    """

    def __init__(self) -> None:
        self._means = {"train": TokenMeans(), "eval": TokenMeans()}
        self._seconds = 0.0
        self._tokens = 0.0

    def add(self, mode: str, student_logps: Tensor, columns: dict[str, Tensor], mask: Tensor) -> None:
        """Add one micro-batch: everything of shape `(B, T)`."""
        means = self._means[mode]
        advantage = columns["teacher_logps"] - student_logps
        means.add("advantage", advantage, mask)
        means.add("advantage_square", advantage.double().square(), mask)
        means.add("unlikely_share", (columns["teacher_logps"] < UNLIKELY).double(), mask)
        rollout_logps = columns.get("rollout_logps")
        for name, other in (("reverse_kl", "teacher_logps"), ("drift_kl", "student_logps")):
            if rollout_logps is not None and other in columns:
                means.add(name, sampled_kl(student_logps, columns[other], rollout_logps), mask)

    def add_divergence(self, mode: str, loss: Tensor, mask: Tensor) -> None:
        """Add the values of a top-k loss, of shape `(B, T)`."""
        self._means[mode].add("divergence", loss, mask)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time one training step."""
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def pop(self, mode: str, accelerator: Accelerator, num_tokens: float | None = None) -> dict[str, float]:
        """
        Means since the last call, under their names. Every rank must call it.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            accelerator ([`~accelerate.Accelerator`]):
                To add over ranks with.
            num_tokens (`float`, *optional*):
                Tokens that all ranks have trained on so far.
        """
        means = self._means[mode].reduce(accelerator)
        if not means:
            return {}
        square = means.pop("advantage_square")
        means["advantage_std"] = math.sqrt(max(square - means["advantage"] ** 2, 0.0))
        if mode == "train" and num_tokens is not None and self._seconds:
            means["tokens_per_second"] = (num_tokens - self._tokens) / self._seconds
            self._seconds, self._tokens = 0.0, num_tokens
        return {f"offline/{name}": value for name, value in means.items()}

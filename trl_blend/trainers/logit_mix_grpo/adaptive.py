"""
Teacher weights that follow what the policies can do: Algorithm 2 of the logit-averaging paper
(https://huggingface.co/papers/2605.20555), and a decay that waits for the reward (our choice).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import TrainerCallback


logger = get_logger(__name__)

# Weight above which a student that solves (almost) nothing gets too little gradient to change that (our choice)
_STARVING_WEIGHT, _STARVING_ACCURACY = 0.8, 0.05


class NetGain(NamedTuple):
    """Shares of the validation prompts: right with mixing only minus right without only, and right with each."""

    net_gain: float
    mixed_accuracy: float
    student_accuracy: float


def net_gain(mixed_right: Sequence[bool], student_right: Sequence[bool]) -> NetGain:
    """Eq. 8 of the paper: the share that only the mixed policy answers right, minus that of only the student."""
    pairs = list(zip(mixed_right, student_right, strict=True))
    only_mixed = sum(mixed and not student for mixed, student in pairs) / len(pairs)
    only_student = sum(student and not mixed for mixed, student in pairs) / len(pairs)
    return NetGain(only_mixed - only_student, sum(mixed_right) / len(pairs), sum(student_right) / len(pairs))


def adaptive_weight(gain: float, scale: float, offset: float) -> float:
    """`sigmoid(scale · (net_gain − offset))`, Eq. 9 of the paper; `scale` and `offset` are our choice."""
    # The sigmoid as a hyperbolic tangent, which has no exponential that can overflow
    return 0.5 * (1 + math.tanh(0.5 * scale * (gain - offset)))


class RewardWeightCallback(TrainerCallback):
    """After an optimizer step whose rollouts had the reward that is asked for, let the weight fall by one step."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._reward = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.step_rewards:  # else the step was made on earlier rollouts
            # Every rank has the rewards of all
            self._reward = torch.cat(self.trainer.step_rewards).nanmean().item()
            self.trainer.step_rewards.clear()
        self.trainer.weight_steps += self._reward >= args.teacher_weight_min_reward


class AdaptiveWeightCallback(TrainerCallback):
    """
    After every `adaptive_interval` optimizer steps, decode the validation prompts with both policies and move the
    teacher weight. It runs before the checkpoint of that step is written, so the checkpoint holds the new weight.
    """

    def __init__(self, trainer: Any, validation_rows: list[dict[str, Any]]):
        self.trainer = trainer
        self.validation_rows = validation_rows
        self._warned = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.adaptive_interval:
            return
        trainer = self.trainer
        mixed = trainer.greedy_rewards(self.validation_rows, trainer.current_weights())
        student = trainer.greedy_rewards(self.validation_rows, (0.0,))
        gain = net_gain(self._right(mixed.rewards), self._right(student.rewards))
        weight = adaptive_weight(gain.net_gain, args.adaptive_scale, args.adaptive_offset)
        weight = min(weight, args.adaptive_max_weight)
        if weight > _STARVING_WEIGHT and gain.student_accuracy < _STARVING_ACCURACY and not self._warned:
            self._warned = True
            logger.warning(
                f"Step {state.global_step}: the adaptive teacher weight is {weight:.2f}, while the student solves "
                f"{gain.student_accuracy:.0%} of the validation prompts alone. It gets {1 - weight:.2f} of the "
                "gradient, so this is not likely to change. Set `adaptive_max_weight`, for instance to 0.5, or use "
                "`teacher_weight_schedule='linear'`."
            )
        # Every rank computed it from the same gathered rewards; the broadcast guards against rounding
        trainer.adaptive_weights = tuple(broadcast_object_list([weight]))
        metrics = {
            "adaptive/net_gain": gain.net_gain,
            "adaptive/mixed_accuracy": gain.mixed_accuracy,
            "adaptive/student_accuracy": gain.student_accuracy,
            "adaptive/next_teacher_weight": weight,
            "adaptive/decoded_tokens": float(mixed.num_tokens + student.num_tokens),
            "adaptive/seconds": mixed.seconds + student.seconds,
        }
        for name, value in metrics.items():
            trainer._metrics["train"][name].append(value)

    def _right(self, rewards: Tensor) -> list[bool]:
        total = (rewards.cpu() * self.trainer.reward_weights.cpu()).nansum(dim=1)
        # Weights such as .15 + .65 + .2 add up to a little less than 1 in float32
        return (total >= self.trainer.args.adaptive_success_threshold - 1e-5).tolist()

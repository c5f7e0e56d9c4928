"""Configuration of [`OfflineOPDTrainer`]."""

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from trl import SFTConfig

from trl_blend.errors import ConfigError
from trl_blend.trainers._options import (
    ABOVE_ZERO,
    Range,
    check_choices,
    check_ranges,
    check_run,
    refuse_selecting_by_loss,
    refuse_unread,
    set_direction,
    with_help,
)
from trl_blend.trainers._settings import TokensUnwritten


# Settings of the parent that have no meaning for rows of token ids with the teacher's log-probabilities, with the
# value that leaves them out and why
_FIXED: dict[str, tuple[Any, str]] = {
    "loss_type": ("nll", "the loss is `offline_loss`"),
    "label_smoothing_factor": (0.0, "the loss is `offline_loss`"),
    "assistant_only_loss": (False, "the loss is on the sampled completion"),
    "chat_template_path": (None, "the rows are token ids already; set the template before collecting rollouts"),
    "eos_token": (None, "the rows are token ids already; set it before collecting rollouts"),
    "dataset_text_field": ("text", "the rows are token ids already"),
    "truncation_mode": ("keep_start", "without its start a row has another context than the teacher scored"),
}
_RANGES: dict[str, Range] = {
    "importance_cap": (ABOVE_ZERO, math.inf, "positive and finite, or left out for no bound"),
    "reward_extrapolation": (1.0, math.inf, "finite and at least 1 (the paper takes 1.25; 1 is the teacher itself)"),
    "rescore_num_rows": (0, math.inf, "at least 0 (which scores no row)"),
    "max_policy_drift": (ABOVE_ZERO, math.inf, "positive and finite (nats per token), or left out for no bound"),
}


@with_help
@dataclass
class OfflineOPDConfig(TokensUnwritten, SFTConfig):
    r"""
    Configuration class for the [`OfflineOPDTrainer`].

    This class includes only the parameters that are specific to distillation from stored log-probabilities. For a full
    list of training arguments, please refer to the [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`]
    documentation.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the loss

        offline_loss (`str`, *optional*, defaults to `"auto"`):
            `"auto"` takes what was measured to work on our test-bed: `"top_k_reverse_kl"` on data scored with
            `top_k`, else the sampled token with `importance_correction="token"`; the run and its card say which.
            `"sampled_token"` is the paper's, which made the student forget its task there (Lightning OPD: minus the
            advantage `log p_T - log p_θ` of the current student, times `log p_θ`, on the stored token).
            `"top_k_reverse_kl"` or `"top_k_forward_kl"`: the divergence over the teacher's stored tokens and one
            event for all others, which has no sampling noise (our choice).
        importance_correction (`str`, *optional*):
            Only with `offline_loss="sampled_token"`: `"none"` there unless given (Lightning OPD), or `"token"`:
            multiply the loss of each token by the ratio of its probabilities under the current student and under the
            distribution it was drawn from. The expected gradient is then that of the reverse KL at the stored
            prefixes, see [`~trl_blend.ops.losses.sampled_token_loss`] (our choice).
        importance_cap (`float`, *optional*):
            Cap of that ratio. `None` means no cap.
        advantage_baseline (`str`, *optional*, defaults to `"none"`):
            Only with `offline_loss="sampled_token"` on data with the teacher's top tokens: `"none"`, or `"kl"`
            ([vOPD](https://huggingface.co/papers/2605.07865)): add `KL(p_θ‖p_T)` to the advantage, whose mean over
            tokens of the student then is closer to 0: less sampling noise. It is taken over the stored tokens and one
            event for all others, which is at most the whole (our choice). Wants `importance_correction="token"`,
            without which it only averages out as long as the student is the one that drew the rollouts.
        reward_extrapolation (`float`, *optional*, defaults to `1.0`):
            Only with `offline_loss="sampled_token"`: the `λ` of [G-OPD](https://huggingface.co/papers/2602.12125), 1
            or more. The advantage is `λ (log p_T - log p_ref) - (log p_θ - log p_ref)`, with the student that drew the
            rollouts as the reference, whose log-probabilities at temperature 1 are stored (`student_logps`): the
            target lies beyond the teacher. The paper takes 1.25. 1 is the teacher.
        loss_aggregation (`str`, *optional*, defaults to `"sequence"`):
            `"sequence"` (the reference's: mean over the tokens of each completion, then over completions) or
            `"token"` (mean over all tokens, as in [`~trl.DistillationTrainer`]).

        > Parameters that control the check of the teacher

        teacher_consistency (`str`, *optional*, defaults to `"strict"`):
            What a failed check of [`~trl_blend.check_teacher_consistency`] does, before anything is trained:
            `"strict"` (a mismatch, or missing provenance, is an error), `"warn"`, or `"off"` (nothing is checked).
        sft_teacher (`str`, *optional*):
            Name or folder of the teacher that the student was fine-tuned on, for a student that carries no
            `teacher_provenance.json`. It is taken as stated, and the model card says so.
        teacher_model_name_or_path (`str`, *optional*):
            Teacher to score `rescore_num_rows` rows with again. It is released before training; the loss needs none.
        teacher_model_revision (`str`, *optional*):
            Revision of that teacher.
        teacher_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments to load that teacher with, such as its `dtype`.
        rescore_num_rows (`int`, *optional*):
            Rows to score again. Defaults to 64 with `teacher_model_name_or_path`, and to 0 without.

        > Parameters that control drift

        max_policy_drift (`float`, *optional*):
            Bound on `offline/drift_kl`, the KL divergence in nats per token between the trained policy and the one
            that drew the rollouts. Compared at every log. `None` means no bound (our choice).
        policy_drift_action (`str`, *optional*, defaults to `"warn"`):
            What to do above `max_policy_drift`: `"warn"`, or `"stop"` training.

        > Parameters that control the data

        stream_rollouts (`bool`, *optional*, defaults to `False`):
            Read the shards of a store while training instead of preparing all rows before. Needs `max_steps`. With
            `shuffle_dataset=True` shards are shuffled, and rows within a buffer; with several processes each of them
            reads every shard and trains on its share of the rows.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`], those of the reference code where it has
    > one:
    > - `learning_rate`: Defaults to `2e-6` instead of `2e-5`.
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"`.
    > - `adam_beta2`: Defaults to `0.98` instead of `0.999`.
    > - `weight_decay`: Defaults to `0.1` instead of `0.0`.
    > - `num_train_epochs`: Defaults to `1` instead of `3`. The reference takes about 150 steps.
    > - `gradient_accumulation_steps`: Defaults to `32` instead of `1`: 256 rows per step, the reference's batch, for
    >   one process with `per_device_train_batch_size=8`. Divide it by the number of processes.
    > - `max_length`: Defaults to `None` instead of `1024`: the length of a row was bounded when it was collected.
    > - `shuffle_dataset`: Defaults to `False`, as there; [`~transformers.Trainer`] draws rows in random order anyway.
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    learning_rate: float = 2e-6
    lr_scheduler_type: str = "constant"
    adam_beta2: float = 0.98
    weight_decay: float = 0.1
    num_train_epochs: float = 1.0
    gradient_accumulation_steps: int = 32
    max_length: int | None = None

    # Loss
    offline_loss: Literal["auto", "sampled_token", "top_k_reverse_kl", "top_k_forward_kl"] = "auto"
    importance_correction: Literal["none", "token"] | None = None
    importance_cap: float | None = None
    advantage_baseline: Literal["none", "kl"] = "none"
    reward_extrapolation: float = 1.0
    loss_aggregation: Literal["sequence", "token"] = "sequence"

    # Teacher consistency
    teacher_consistency: Literal["strict", "warn", "off"] = "strict"
    sft_teacher: str | None = None
    teacher_model_name_or_path: str | None = None
    teacher_model_revision: str | None = None
    teacher_model_init_kwargs: dict[str, Any] | str | None = None
    rescore_num_rows: int | None = None

    # Drift
    max_policy_drift: float | None = None
    policy_drift_action: Literal["warn", "stop"] = "warn"

    # Data
    stream_rollouts: bool = False

    def __post_init__(self):
        for name, (value, reason) in _FIXED.items():
            if getattr(self, name) != value:
                raise ConfigError(f"`{name}={getattr(self, name)!r}` has no use here: {reason}. Leave `{name}` out.")
        check_choices(self)
        check_run(self)
        check_ranges(self, _RANGES)
        set_direction(self)
        super().__post_init__()
        self._check_parent_settings()
        self._check_rescoring()
        self._check_advantage()
        if self.offline_loss == "auto":
            refuse_unread(self, ("importance_correction", "importance_cap"), "offline_loss", "sampled_token")
        elif self.importance_correction is None:
            self.importance_correction = "none"
        if self.importance_correction == "token" and self.uses_top_k:
            raise ConfigError(
                f"`importance_correction={self.importance_correction!r}` has no use with `offline_loss="
                f"{self.offline_loss!r}`, whose terms are not sampled. Leave it out."
            )
        if self.importance_correction != "token":
            refuse_unread(self, ("importance_cap",), "importance_correction", "token")
        if self.max_policy_drift is None:
            refuse_unread(self, ("policy_drift_action",), "max_policy_drift")
        self._check_best_model()
        if self.stream_rollouts and self.max_steps <= 0:
            raise ConfigError(
                "`stream_rollouts=True` does not know the number of rows. Set `max_steps`, or `stream_rollouts=False`."
            )

    def _check_advantage(self):
        if self.offline_loss != "sampled_token":
            names = ("advantage_baseline", "reward_extrapolation")
            refuse_unread(self, names, "offline_loss", "sampled_token")
        if self.reward_extrapolation != 1.0 and self.advantage_baseline == "kl":
            raise ConfigError(
                f"`advantage_baseline='kl'` with `reward_extrapolation={self.reward_extrapolation}`: the baseline of "
                "that advantage needs the top tokens of the student that drew the rollouts, which are not stored. "
                "Leave one of them out."
            )

    def _check_best_model(self):
        if self.offline_loss == "sampled_token":
            refuse_selecting_by_loss(self, "sampled-token", "eval_offline/reverse_kl")

    def _check_parent_settings(self):
        if self.completion_only_loss is False:
            raise ConfigError(
                "`completion_only_loss=False`: the teacher's log-probabilities are those of the completion. Leave it "
                "out."
            )
        if (self.dataset_kwargs or {}).get("skip_prepare_dataset"):
            raise ConfigError(
                "`dataset_kwargs={'skip_prepare_dataset': True}` would leave the rows without labels and teacher "
                "columns. Drop it; rows that are prepared already are left as they are."
            )
        if (self.packing or self.eval_packing) and self.packing_strategy != "bfd":
            raise ConfigError(
                f"`packing_strategy={self.packing_strategy!r}` cuts rows in two, and the second part would be read "
                "without the context that the teacher scored it in. Use `packing_strategy='bfd'`."
            )
        if self.eval_packing and not self.packing:
            raise ConfigError(
                "`eval_packing=True` with `packing=False`: TRL would evaluate a pack as if it were one row, each part "
                "reading those before it. Set `packing=True` as well, or leave `eval_packing` out."
            )
        if self.packing and self.max_length is None:
            raise ConfigError("`packing=True` needs the length of a pack. Set `max_length`.")
        if self.padding_free and not self.packing and self.max_length is not None:
            raise ConfigError(
                f"`padding_free=True` with `max_length={self.max_length}` is refused by TRL unless rows are packed. "
                "Set `packing=True`, or leave `max_length` out."
            )

    def _check_rescoring(self):
        if not self.teacher_model_name_or_path:
            loading = ("teacher_model_revision", "teacher_model_init_kwargs")
            refuse_unread(self, loading, "teacher_model_name_or_path")
        if self.rescore_num_rows is None:
            self.rescore_num_rows = 64 if self.teacher_model_name_or_path else 0
        if self.rescore_num_rows and not self.teacher_model_name_or_path:
            raise ConfigError(
                f"`rescore_num_rows={self.rescore_num_rows}` needs a teacher. Set `teacher_model_name_or_path`."
            )
        if self.teacher_model_name_or_path and (not self.rescore_num_rows or self.teacher_consistency == "off"):
            setting = "rescore_num_rows=0" if not self.rescore_num_rows else "teacher_consistency='off'"
            raise ConfigError(
                f"`teacher_model_name_or_path={self.teacher_model_name_or_path!r}` is only used to score rows again, "
                f"which `{setting}` leaves out. Drop one of them: the loss needs no teacher."
            )
        if self.teacher_consistency == "off":
            refuse_unread(self, ("sft_teacher",), "teacher_consistency", "strict", "warn")

    def resolved(self, columns: Collection[str]) -> "OfflineOPDConfig":
        """
        This configuration with the loss that `offline_loss="auto"` stands for on data with these columns.

        Raises:
            [`~trl_blend.errors.ConfigError`]: If the data have neither the teacher's top tokens nor the
                log-probabilities that the rollouts were drawn with.
        """
        if self.offline_loss != "auto":
            return self
        args = copy.copy(self)
        if "teacher_topk_ids" in columns:
            args.offline_loss, args.importance_correction = "top_k_reverse_kl", "none"
        elif "rollout_logps" in columns:
            args.offline_loss, args.importance_correction = "sampled_token", "token"
        else:
            raise ConfigError(
                "`offline_loss='auto'` needs the teacher's most probable tokens (`trl-blend score --top_k 16`) or the "
                f"column `rollout_logps` (`trl-blend rollouts`), but the data have {', '.join(columns)}. Set "
                "`offline_loss='sampled_token'` for the paper's loss, which needs neither."
            )
        args._check_best_model()
        return args

    @property
    def uses_top_k(self) -> bool:
        """Whether the loss is a divergence over the teacher's top-k columns."""
        return self.offline_loss.startswith("top_k")

    @property
    def reads_top_k(self) -> bool:
        """Whether the loss reads the teacher's top-k columns."""
        return self.uses_top_k or self.advantage_baseline == "kl"

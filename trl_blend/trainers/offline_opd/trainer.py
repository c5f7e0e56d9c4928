"""On-policy distillation from teacher log-probabilities that were computed once, over the SFT student's rollouts."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from trl_blend.consistency.provenance import PROVENANCE_FILE
from trl_blend.consistency.report import ConsistencyReport
from trl_blend.models.identity import ModelIdentity
from trl_blend.models.own_logits import check_own_logits, fused_log_probs
from trl_blend.reports.names import shown_name
from trl_blend.rollouts.store import RolloutStore
from trl_blend.trainers import _cards, _partners
from trl_blend.trainers._data import RowsNeeded, check_data
from trl_blend.trainers._record import RunParts, model_part
from trl_blend.trainers._run import RunMixin, default_config
from trl_blend.trainers.offline_opd import checks, data, report
from trl_blend.trainers.offline_opd.config import OfflineOPDConfig
from trl_blend.trainers.offline_opd.forward import OfflineForward
from trl_blend.trainers.offline_opd.metrics import OfflineMetrics


logger = get_logger(__name__)

Rollouts = str | RolloutStore | list[str | RolloutStore] | Dataset | IterableDataset


class OfflineOPDTrainer(RunMixin, SFTTrainer):
    r"""
    Trainer for on-policy distillation without a live teacher.

    The training data are rollouts of the SFT student with the teacher's log-probability of every token, computed once.
    Each step is one forward and backward of the student, with the divergence over the teacher's most probable tokens
    where the data have them, else with the sampled token and its ratio. `offline_loss="sampled_token"` is the loss of
    [Lightning OPD](https://huggingface.co/papers/2604.13010),
    \\( -\mathrm{sg}[\log p_T(y_t) - \log p_\theta(y_t)] \log p_\theta(y_t) \\), see
    [`~trl_blend.ops.losses.sampled_token_loss`]. At the first step its gradient is that of live distillation on the
    same rollouts; afterwards the rollouts are those of the student that training started from, and `offline/drift_kl`
    says how far it has moved away.

    The method is only right where the teacher that scored the rollouts is the one whose samples the student was
    fine-tuned on (teacher consistency). The constructor checks this before a model is loaded, see
    [`~trl_blend.check_teacher_consistency`].

    With `offline_loss="sampled_token"` the loss is no divergence: it can rise while the student comes closer to the
    teacher. Read `offline/reverse_kl`, also to select a checkpoint: `metric_for_best_model="eval_offline/reverse_kl"`,
    or, of an evaluation set with a name, `"eval_<name>_offline/reverse_kl"`; the lowest is the best.

    Rows go through truncation, packing (`packing_strategy="bfd"`) and padding-free batches with their teacher columns.
    Left out on purpose: vision-language students, context and sequence parallelism, and packing that cuts rows.

    Example:

    ```python
    from trl_blend import OfflineOPDConfig, OfflineOPDTrainer

    trainer = OfflineOPDTrainer(
        model="my-sft",
        args=OfflineOPDConfig(output_dir="out"),
        train_dataset="scored",  # folder or Hub id, the output of `trl-blend score`
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student that drew the rollouts.
        args ([`OfflineOPDConfig`], *optional*):
            Configuration of this trainer.
        train_dataset (`str` or [`~trl_blend.RolloutStore`] or [`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Scored rollouts: folder or Hub id, an opened store, a list of stores, each with a teacher of its own, or
            rows with their columns. Rows that a trainer has prepared before are taken as they are; to check their
            teacher takes their store, as `rollout_store`.
        eval_dataset (same types, or a `dict` of them, *optional*):
            Scored rollouts to measure the loss and the metrics on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the student. Defaults to the one that belongs to `model`.
        rollout_store (`str`, [`~trl_blend.RolloutStore`] or a list of them, *optional*):
            Store or stores that the rows of a `train_dataset` given as a [`~datasets.Dataset`] were taken from: they
            carry their provenance.
        peft_config, **kwargs:
            See [`~trl.SFTTrainer`].

    Raises:
        [`~trl_blend.errors.ConfigError`]:
            If arguments are outside their range or contradict each other.
        [`~trl_blend.errors.StoreError`]:
            If the data cannot be trained on.
        [`~trl_blend.errors.ConsistencyError`]:
            If the teacher, the data and the student do not belong together, with `teacher_consistency="strict"`.
        [`~trl_blend.errors.UnsupportedError`]:
            If a combination would run but not correctly.
    """

    _tag_names = ["trl", "trl-blend", "offline-opd"]
    _name = "OfflineOPD"
    _paper = {
        "title": "Lightning OPD: Efficient Post-Training for Large Reasoning Models with Offline On-Policy "
        "Distillation",
        "id": "2604.13010",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{wu2026lightning,
                title        = {{Lightning OPD: Efficient Post-Training for Large Reasoning Models with Offline
                                On-Policy Distillation}},
                author       = {Yecheng Wu and Song Han and Hai Cai},
                year         = 2026,
                eprint       = {arXiv:2604.13010},
            }"""),
    }
    _template_name = "offline_opd.md"
    _tokenizer_options: Mapping[str, Any] = {}
    _panels = report.PANELS
    # A resumed run with other values of these does not continue the interrupted one
    _recorded = (
        "offline_loss",
        "importance_correction",
        "importance_cap",
        "advantage_baseline",
        "reward_extrapolation",
        "loss_aggregation",
        "packing",
        "max_length",
    )

    def __init__(
        self,
        model: "str | PreTrainedModel",
        args: OfflineOPDConfig | None = None,
        train_dataset: Rollouts | None = None,
        eval_dataset: Rollouts | dict[str, Rollouts] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        rollout_store: str | RolloutStore | list[str | RolloutStore] | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ):
        args = default_config(OfflineOPDConfig, model) if args is None else args
        checks.check_arguments(model, args, train_dataset, processing_class, peft_config, kwargs)
        self._vocab_size = _partners.student_rows(model, args)
        self.rollout_stores, train_rows = checks.open_rollouts(train_dataset, "train_dataset", args)
        if rollout_store is not None:
            self.rollout_stores, _ = checks.open_rollouts(rollout_store, "rollout_store", args)
        checks.check_several(self.rollout_stores, args)
        check_data(train_rows, None, args, self.rows_needed(args))
        columns = data.column_names(train_rows)
        self._loss_was_chosen, args = args.offline_loss == "auto", args.resolved(columns)
        checks.check_student_columns(args, columns)
        checks.warn_of_cut_rollouts(self.rollout_stores, args)
        checks.warn_of_long_rows(train_rows, args.max_length)
        prepared = self._prepare_dataset(train_rows, processing_class, args, args.packing, None, "train")
        scored = self.rollout_stores or [train_rows]
        found = checks.check_teachers(model, scored, args, processing_class)
        self._reports: list[ConsistencyReport] = found[0]
        self.consistency_report: ConsistencyReport | None = found[1]
        self._provenance = checks.find_provenance(model, args)
        self._offline_metrics = OfflineMetrics()
        self._eval_prefix = "eval"
        self._row_scale: float | torch.Tensor = 1.0
        super().__init__(
            model=model,
            args=args,
            train_dataset=prepared,
            eval_dataset=self._open_eval(eval_dataset, args),
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        checks.check_parallelism(self.accelerator)
        # Not through the argument, which the parent refuses with padding-free batches
        collator = self.data_collator
        self.data_collator = data.ScoredRolloutCollator(
            **{name: getattr(collator, name) for name in collator.__dataclass_fields__},
            loss_aggregation=args.loss_aggregation,
        )

    @property
    def rollout_store(self) -> RolloutStore | None:
        """The store of the training rows, where it is one."""
        return self.rollout_stores[0] if len(self.rollout_stores) == 1 else None

    def _open_eval(self, value: Any, args: OfflineOPDConfig, name: str = "eval_dataset") -> Any:
        if isinstance(value, dict):
            return {key: self._open_eval(one, args, f"{name}[{key!r}]") for key, one in value.items()}
        if value is None:
            return None
        stores, rows = checks.open_rollouts(value, name, args)
        checks.check_student_columns(args, data.column_names(rows), name)
        checks.check_eval_teachers(self.rollout_stores, stores, name, args)
        return rows

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        with args.distributed_state.main_process_first():
            return data.prepare(
                dataset,
                uses_top_k=args.reads_top_k,
                vocab_size=self._vocab_size,
                max_length=args.max_length,
                packing=packing,
                shuffle_seed=args.seed if args.shuffle_dataset else None,
                num_proc=args.dataset_num_proc,
                as_one_shard=args.world_size > 1,
            )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        names = (*data.LOG_PROBS, *data.TOP_K, data.ROW_WEIGHT)
        extra = [name for name in names if name not in self._signature_columns]
        self._signature_columns = [*self._signature_columns, *extra]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Evaluate on scored rollouts of any type that the constructor takes, see [`~transformers.Trainer`]."""
        keys = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if not (isinstance(eval_dataset, str) and eval_dataset in keys):
            eval_dataset = self._open_eval(eval_dataset, self.args)
        self._eval_prefix = metric_key_prefix
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """Predict on scored rollouts of any type that the constructor takes, see [`~transformers.Trainer`]."""
        rows = self._open_eval(test_dataset, self.args, "test_dataset")
        packing = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
        prepared = self._prepare_dataset(rows, self.processing_class, self.args, packing, None, "test")
        return super().predict(prepared, ignore_keys, metric_key_prefix)

    # Loss

    def compare_logits(self, model: Any) -> None:
        """The student's, in rows as they are batched; see [`RunMixin`]."""
        layout = "packed" if self.padding_free else "right_padded"
        check_own_logits(model, "model", fused_log_probs(model), layout=layout)

    def _get_num_items_in_batch(self, batch_samples, device):
        # The parent counts labels. What shares the loss here is the sum of the weights: completions, or tokens
        counted = []
        for batch in batch_samples:
            num_items = int(batch[data.WEIGHTS][:, 1:].sum().round())
            labels = torch.zeros(1, num_items, dtype=torch.long)
            # Counted as they are, whether or not transformers takes the model for one that shifts its labels
            counted.append({"labels": labels, "shift_labels": labels})
        self._row_scale = self._scale_of_rows(batch_samples, device)
        return super()._get_num_items_in_batch(counted, device)

    def _scale_of_rows(self, batches, device):
        """Items that share the loss, over the sum of their weights: with it, that sum is the divisor."""
        sums = [_weighted(batch) for batch in batches if data.ROW_WEIGHT in batch]
        if not sums:
            return 1.0
        items = torch.stack(sums).sum(0).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            items = self.accelerator.gather(items[None]).sum(0)
        return torch.where(items[1] > 0, items[0] / items[1], 0.0)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        names = [name for name in (*data.LOG_PROBS, *data.TOP_K, data.WEIGHTS) if name in inputs]
        columns = {name: inputs.pop(name) for name in names}
        mask = inputs["labels"][:, 1:] != -100
        scale: float | torch.Tensor = 1.0
        if num_items_in_batch is None:  # the parent divides by the number of tokens
            scale = mask.sum() / columns[data.WEIGHTS][:, 1:].sum().clamp(min=1.0)
        row_weights = inputs.pop(data.ROW_WEIGHT, None)
        if row_weights is not None and mode == "train":
            scale = scale * self._row_scale
            columns[data.WEIGHTS] = columns[data.WEIGHTS] * row_weights
        # The same in all stores
        scoring = (self.rollout_stores[0].manifest.scoring if self.rollout_stores else None) or {}
        forward = OfflineForward(model, columns, self.args, scale, scoring.get("vocab_size"))
        result = super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)
        self._offline_metrics.add(mode, forward.student_logps, forward.columns, mask)
        if forward.divergence is not None:
            self._offline_metrics.add_mean(mode, "divergence", forward.divergence, mask)
        if forward.ratio is not None:
            self._offline_metrics.add_mean(mode, "importance_ratio", forward.ratio, mask)
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs` with the collected metrics, see [`~transformers.Trainer.log`]."""
        mode = "train" if self.model.training else "eval"
        metrics = self._offline_metrics.pop(mode, self.accelerator)
        if mode == "train":
            logs.update(metrics)
            self._bound_drift(metrics.get("offline/drift_kl"))
        else:  # those of the parent have one name for all evaluation sets
            logs.update({f"{self._eval_prefix}_{name}": value for name, value in metrics.items()})
        super().log(logs, start_time)

    def _bound_drift(self, drift: float | None) -> None:
        bound = self.args.max_policy_drift
        if bound is None or drift is None or not drift > bound:
            return
        stops = self.args.policy_drift_action == "stop"
        logger.warning(
            f"Step {self.state.global_step}: `offline/drift_kl` is {drift:.3g}, above `max_policy_drift={bound}`: the "
            "stored rollouts no longer look like the student's. "
            + ("Training stops here. " if stops else "")
            + "Collect and score new rollouts with the trained student to go on."
        )
        self.control.should_training_stop = self.control.should_training_stop or stops

    # Checkpoints and card

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and beside it the record of its SFT teacher, see [`~transformers.Trainer.save_model`]."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            if self._provenance is not None:
                self._provenance.save(folder)
            else:  # of a former run
                Path(folder, PROVENANCE_FILE).unlink(missing_ok=True)

    @staticmethod
    def rows_needed(args: OfflineOPDConfig) -> RowsNeeded:
        """Rows without which there is no batch: one, unless an incomplete batch is dropped."""
        if not args.dataloader_drop_last:
            return RowsNeeded(1, "one row")
        rows = args.per_device_train_batch_size * args.world_size
        return RowsNeeded(rows, f"{rows} rows, and `dataloader_drop_last=True` leaves out what is less")

    def teacher_parts(self) -> list[dict[str, Any]]:
        """The teachers of the scores in the record."""
        recorded = [store.manifest.teacher for store in self.rollout_stores]
        teachers = [ModelIdentity.from_dict(fields) for fields in recorded if fields]
        return [
            model_part(
                shown_name(teacher.name).text or "a model in memory", teacher.weights and teacher.weights.sha256[:12]
            )
            for teacher in teachers
        ]

    def run_parts(self) -> RunParts:
        """What the run is made of, in words."""
        names = [teacher["name"] for teacher in self.teacher_parts()] or ["not recorded with the rollouts"]
        return report.run_parts(self.args, " and ".join(names), self._loss_was_chosen)

    def example_prompt(self, row: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
        """The prompt of a training row, from its token ids, see [`~trl_blend.trainers._cards.CardMixin`]."""
        labels = row["labels"]
        length = next((index for index, label in enumerate(labels) if label != -100), len(labels))
        return report.example_prompt(self.processing_class, row["input_ids"][:length])

    def card_fields(self) -> dict[str, Any]:
        """Fields of `model_cards/offline_opd.md`."""
        return report.card_fields(
            self.args,
            loss_was_chosen=self._loss_was_chosen,
            stores=self.rollout_stores,
            reports=self._reports,
            report=self.consistency_report,
            provenance=self._provenance,
            num_rows=_cards.num_rows(self.train_dataset),
            log_history=self.state.log_history,
            has_weights=data.ROW_WEIGHT in data.column_names(self.train_dataset),
        )


def _weighted(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Items of a batch that share the loss, and the sum of their rows' weights."""
    items = batch[data.WEIGHTS][:, 1:]
    return torch.stack([items.sum(), (items * batch[data.ROW_WEIGHT][:, 1:]).sum()])

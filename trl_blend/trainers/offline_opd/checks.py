"""What an [`OfflineOPDTrainer`] refuses before a model is loaded, and the check of the teacher."""

from itertools import combinations
from typing import Any

import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, ProcessorMixin

from trl_blend.consistency.check import check_teacher_consistency
from trl_blend.consistency.provenance import TeacherProvenance, read_provenance
from trl_blend.consistency.report import ConsistencyReport
from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.models.identity import ModelIdentity, compare_identities
from trl_blend.rollouts.engines.base import nucleus_settings
from trl_blend.rollouts.folders import describe
from trl_blend.rollouts.processes import on_main_process
from trl_blend.rollouts.store import RolloutStore
from trl_blend.trainers import _partners
from trl_blend.trainers.offline_opd.config import OfflineOPDConfig
from trl_blend.trainers.offline_opd.data import LOG_PROBS, ROW_WEIGHT, TOP_K, column_names, concatenate, is_prepared


logger = get_logger(__name__)


def check_arguments(
    model: Any,
    args: OfflineOPDConfig,
    train_dataset: Any,
    processing_class: Any,
    peft_config: Any,
    kwargs: dict[str, Any],
) -> None:
    """Check the constructor's arguments; the errors are those of the trainer."""
    if not isinstance(args, OfflineOPDConfig):
        raise ConfigError(f"`args` is a {type(args).__name__}. Pass an `OfflineOPDConfig`.")
    _partners.check_processing_class(processing_class)
    for name in ("data_collator", "compute_loss_func", "formatting_func"):
        if kwargs.get(name) is not None:
            raise ConfigError(f"`{name}` has no use here: the rows are token ids with a loss of their own. Drop it.")
    if args.stream_rollouts and isinstance(train_dataset, Dataset | IterableDataset):
        raise ConfigError(
            f"`stream_rollouts=True` reads the shards of a store, but `train_dataset` is a "
            f"{type(train_dataset).__name__}. Pass the store, or drop `stream_rollouts`."
        )
    if isinstance(processing_class, ProcessorMixin):
        raise UnsupportedError(
            "Vision-language students cannot be trained on stored rollouts, which hold no images. Pass a tokenizer, "
            "and a text model."
        )
    _partners.check_student_adapters(model, _partners.adapters_of(model, peft_config, args), args)


def check_several(stores: list[RolloutStore], args: OfflineOPDConfig) -> None:
    """Refuse what is said of one teacher where several stores are trained on."""
    number = len(stores)
    if number < 2:
        return
    if args.stream_rollouts:
        raise ConfigError(
            f"`stream_rollouts=True` reads one store after the other, and there are {number}: steps at the end would "
            "see one teacher alone. Drop `stream_rollouts`, or pass one store."
        )
    if args.teacher_model_name_or_path:
        raise ConfigError(
            f"`teacher_model_name_or_path={args.teacher_model_name_or_path!r}` scores rows of one store again, and "
            f"there are {number}. Leave it out, and check each store with `trl-blend inspect "
            "--teacher_model_name_or_path`."
        )
    if args.sft_teacher:
        raise ConfigError(
            f"`sft_teacher={args.sft_teacher!r}` names one teacher, and there are {number} stores. Record theirs "
            "beside the student: `trl-blend record-teacher`, and `--add` for the second and further ones."
        )


def check_parallelism(accelerator: Any) -> None:
    """Refuse what splits a row over processes: the per-token columns would not follow."""
    parallelism = accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise UnsupportedError(
            "Context and sequence parallelism split the rows, and the teacher's log-probabilities would not follow. "
            "Set `cp_size` and `sp_size` to 1; FSDP2 and DeepSpeed shard the model without that."
        )


def check_student_columns(args: OfflineOPDConfig, names: list[str], argument: str = "train_dataset") -> None:
    """Refuse a ratio to the rollouts' policy, or a bound on the drift, where the data do not know that policy."""
    bounds_drift = args.max_policy_drift is not None and argument == "train_dataset"
    needed = {
        "max_policy_drift": ("rollout_logps", "student_logps") if bounds_drift else (),
        "importance_correction": ("rollout_logps",) if args.importance_correction == "token" else (),
        # Not `rollout_logps`, which are those of the tempered and cut distribution
        "reward_extrapolation": ("student_logps",) if args.reward_extrapolation != 1.0 else (),
    }
    for setting, columns in needed.items():
        missing = [name for name in columns if name not in names]
        if missing:
            raise ConfigError(
                f"`{setting}={getattr(args, setting)!r}` needs the log-probabilities of the student that drew the "
                f"rollouts, but `{argument}` lacks {', '.join(missing)}. Leave it out, or collect with `trl-blend "
                "rollouts`."
            )


def warn_of_cut_rollouts(stores: list[RolloutStore], args: OfflineOPDConfig) -> None:
    """Say so where the ratio to the policy of the rollouts misses tokens that this policy could not draw."""
    cut = next((found for store in stores if (found := nucleus_settings(store.manifest.sampling or {}))), None)
    if args.importance_correction == "token" and cut:
        logger.warning(
            f"`importance_correction={args.importance_correction!r}` with rollouts that were sampled with {cut}: the "
            "tokens left out there never enter the loss, which is then not the whole reverse KL. Collect with "
            "`--temperature 1 --top_p 1` for that."
        )


def warn_of_long_rows(dataset: Any, max_length: int | None) -> None:
    """Say how many rows lose their end."""
    if max_length is None or not isinstance(dataset, Dataset) or "prompt_ids" not in dataset.column_names:
        return
    columns = ("prompt_ids", "completion_ids")
    batches = dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=1000)
    lengths = [pc.add(*(pc.list_value_length(table[name]) for name in columns)) for table in batches]
    cut = sum(pc.sum(pc.greater(batch, max_length)).as_py() or 0 for batch in lengths)
    if cut:
        logger.warning(
            f"{cut} of {len(dataset)} rows are longer than `max_length={max_length}` tokens: they lose their end, or "
            "are left out where nothing of the completion remains. Raise `max_length`, or leave it out."
        )


def open_rollouts(value: Any, name: str, args: OfflineOPDConfig) -> tuple[list[RolloutStore], Any]:
    """The stores behind the argument `name`, if there are any, and their rows, one store after the other."""
    value = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    if not isinstance(value, list | tuple):
        store, rows = _open_one(value, name, args)
        return ([] if store is None else [store]), rows
    if not value:
        raise ConfigError(f"`{name}` is an empty list. Pass the folder or Hub id of at least one store.")
    opened = [_open_one(one, f"{name}[{index}]", args) for index, one in enumerate(value)]
    stores = [store for store, _ in opened if store is not None]
    if len(stores) < len(opened):
        raise ConfigError(
            f"`{name}` is a list with a dataset in it. Pass a list of stores; rows without one are joined with "
            "`datasets.concatenate_datasets`, and their stores are the list `rollout_store`."
        )
    check_together(stores, [rows for _, rows in opened], name)
    return stores, concatenate([rows for _, rows in opened])


def check_together(stores: list[RolloutStore], datasets: list[Any], name: str) -> None:
    """Refuse stores whose rows cannot be in one batch, or are the same rollouts."""
    for first, second in combinations(stores, 2):
        routes = {(store.manifest.scoring or {}).get("route") for store in (first, second)}
        rollouts = {store.manifest.source.get("rollouts_digest") for store in (first, second)}
        same_rollouts = len(rollouts) == 1 and None not in rollouts and (len(routes) == 1 or None in routes)
        if same_rollouts or first.digest == second.digest:
            raise ConfigError(
                f"`{name}` has {first.name} and {second.name}, which hold the same rollouts: a row belongs to one "
                "teacher. Let each score its own (`trl-blend score --route`), or pass one of them."
            )
    described = [
        {
            "the columns": sorted({*LOG_PROBS, *TOP_K, ROW_WEIGHT} & set(column_names(rows))),
            **{entry: (store.manifest.scoring or {}).get(entry) for entry in ("top_k", "vocab_size")},
        }
        for store, rows in zip(stores, datasets, strict=True)
    ]
    for store, description in zip(stores, described, strict=True):
        for entry, value in description.items():
            if value != described[0][entry]:
                raise ConfigError(
                    f"`{name}` has stores whose rows cannot be in one batch: {entry} {described[0][entry]} in "
                    f"{stores[0].name}, and {value} in {store.name}. Collect and score them alike."
                )


def check_eval_teachers(
    trained: list[RolloutStore], evaluated: list[RolloutStore], name: str, args: OfflineOPDConfig
) -> None:
    """Say so where the argument `name` was scored by a teacher that no store of the training is of."""
    for store in evaluated if trained else []:
        sizes = [(one.manifest.scoring or {}).get("vocab_size") for one in (trained[0], store)]
        if args.reads_top_k and sizes[0] != sizes[1]:
            raise ConfigError(
                f"`{name}` holds {store.name}, scored over {sizes[1]} tokens, and the training rows over {sizes[0]}: "
                "the loss would be another one. Score it with the teacher of the training."
            )
        teachers = [ModelIdentity.from_dict(one.manifest.teacher or {}) for one in (store, *trained)]
        if all(compare_identities(teachers[0], other).relation == "different" for other in teachers[1:]):
            logger.warning(
                f"`{name}` holds {store.name}, scored by another teacher ({teachers[0].describe()}) than the training "
                "rows: its metrics are distances to that one."
            )


def _open_one(value: Any, name: str, args: OfflineOPDConfig) -> tuple[RolloutStore | None, Any]:
    if isinstance(value, str):
        value = RolloutStore.open(value)
    if isinstance(value, RolloutStore):
        if value.kind != "scored_rollouts":
            raise ConfigError(
                f"`{name}={value.name!r}` is {describe(value.folder)}. Score them first: "
                f"`trl-blend score --teacher_model_name_or_path ... --rollouts {value.name} --output_dir ...`."
            )
        # A flipped bit would only show in what the student learns
        on_main_process(args.distributed_state, value.verify)
        return value, value.dataset(streaming=args.stream_rollouts)
    if not isinstance(value, (Dataset, IterableDataset)):
        raise ConfigError(
            f"`{name}` is a {type(value).__name__}. Pass the folder or Hub id of scored rollouts, the "
            "`RolloutStore` of `load_scored_rollouts`, a list of these, or a `datasets.Dataset` of rows."
        )
    return None, value


def find_provenance(model: str | PreTrainedModel, args: OfflineOPDConfig) -> TeacherProvenance | None:
    """Record of the student's SFT teacher; none where there is none, or where nothing is checked and it is broken."""
    try:
        return read_provenance(model, revision=(args.model_init_kwargs or {}).get("revision"))
    except ConfigError:
        if args.teacher_consistency != "off":
            raise
        return None


def check_teachers(
    model: str | PreTrainedModel,
    scored: list[RolloutStore] | list[Dataset | IterableDataset],
    args: OfflineOPDConfig,
    processing_class: Any,
) -> tuple[list[ConsistencyReport], ConsistencyReport | None]:
    """
    Run the consistency check of each store on the main process, and act on the findings on all of them; nothing with
    `"off"`. Returns the report of each, and all of them as one.

    Raises:
        [`~trl_blend.errors.ConsistencyError`]:
            If a finding is an error and `teacher_consistency="strict"`.
    """
    if args.teacher_consistency == "off":
        return [], None
    if any(not isinstance(one, RolloutStore) and is_prepared(one) for one in scored):
        raise ConfigError(
            "`train_dataset` has rows that a trainer has prepared, of which prompts and completions cannot be told "
            "any more, and `teacher_consistency` checks these. Pass their store as `rollout_store`, or set "
            "`teacher_consistency='off'`."
        )
    reports = on_main_process(
        args.distributed_state, lambda: [_run_check(model, one, args, processing_class) for one in scored]
    )
    names = [getattr(one, "name", "the dataset") for one in scored]
    report = ConsistencyReport.of_stores(dict(zip(names, reports, strict=True)))
    if args.teacher_consistency == "strict":
        report.raise_if_failed()
    if not report.ok:
        logger.warning(f"Teacher consistency could not be established, going on as asked.\n{report}")
    elif report.warnings:
        logger.warning("The check of the rollouts warns:\n" + "\n".join(map(str, report.warnings)))
    return reports, report


def _run_check(model: Any, scored: Any, args: OfflineOPDConfig, processing_class: Any) -> ConsistencyReport:
    teacher = None
    if args.rescore_num_rows:
        teacher = _partners.load_partners([args.teacher_model_name_or_path], args)[0].to(args.device)
    return check_teacher_consistency(
        model,
        scored,
        teacher,
        sft_teacher=args.sft_teacher,
        processing_class=processing_class,
        revision=(args.model_init_kwargs or {}).get("revision"),
        num_rows=args.rescore_num_rows,
    )

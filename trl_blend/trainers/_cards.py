"""Model cards: what they say of a run is read from its trainer here, and written with the templates of each method."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from huggingface_hub import try_to_load_from_cache

from trl_blend import _compat
from trl_blend._version import __version__
from trl_blend.reports import cards, metadata
from trl_blend.reports.cards import CardTeacher, render
from trl_blend.reports.licences import Source, reminders
from trl_blend.reports.names import shown_name
from trl_blend.trainers import _reporting


CARD = "README.md"


@contextmanager
def method_card(template: str, **fields: Any) -> Iterator[str]:
    """
    Path of a card template with the method's fields filled in, for a trainer's `_template_file`.

    A template has two kinds of placeholders: `[[ field ]]` (and `[% if … %]`), filled in here, and TRL's own
    `{{ field }}`, which `create_model_card` fills in afterwards.

    Args:
        template (`str`):
            File name under `model_cards/`.
        **fields:
            Values of the method's placeholders. A missing one is an error.
    """
    text = render(template, fields)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / template
        path.write_text(text, encoding="utf-8")
        yield str(path)


def write_card(
    trainer: Any,
    write: Callable[..., None],
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> None:
    """
    Write the model card of a trainer: `write` is TRL's `create_model_card`, which reads the trainer's own template.

    Only the main process does anything.

    Args:
        trainer ([`~transformers.Trainer`]):
            One of this package's.
        write (`Callable`):
            The parent's `create_model_card`.
        model_name, dataset_name, tags:
            As there. A `dataset_name` that is no repository on the Hub is shown by its last part, without a link.
    """
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    kept = metadata.kept_metadata(folder / CARD)
    method = trainer.card_fields()
    fields = _fields(trainer, method, dataset_name) | {"license": kept.get("license")}
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    if fields["mixed"]:
        tags.append("custom_generate")
    with method_card(trainer._template_name, **fields) as path:
        trainer._template_file = _compat.card_template(path)
        write(
            model_name=model_name or folder.resolve().name,
            dataset_name=shown_name(dataset_name).hub_id,
            tags=tags,
        )
    metadata.complete_metadata(
        folder / CARD,
        base_model=shown_name(_base_name(trainer)).hub_id,
        is_adapter=fields["is_adapter"],
        # The adapter of a mixed policy is in a subfolder, which transformers finds through `mixing.json`
        library="peft" if fields["is_adapter"] and not fields["mixed"] else "transformers",
        kept=kept,
        eval_results=metadata.model_index(trainer.card_results),
    )


def _fields(trainer: Any, method: Mapping[str, Any], dataset_name: str | None) -> dict[str, Any]:
    """Every placeholder of the templates. `card_fields` of the trainer adds to these, or replaces them."""
    base, commit = _base_name(trainer), _commit(trainer.model.config, trainer.args.model_init_kwargs)
    sources = [Source("base model", base, commit), *method["sources"]]
    if dataset_name:
        sources.append(Source("dataset", dataset_name))
    curves = _reporting.write_curves(trainer)
    results = trainer.card_results
    adapter = _adapter(trainer)
    run = _settings(trainer, adapter) | dict(method["settings"])
    fields = {
        "config": trainer.args,
        "version": __version__,
        "peft_version": version("peft") if adapter else None,
        "base": cards.model_link(base, commit),
        "on_dataset": f" on {cards.model_link(dataset_name, kind='datasets/')}" if dataset_name else "",
        "is_adapter": bool(adapter),
        "chat": getattr(trainer.processing_class, "chat_template", None) is not None,
        "mixed": False,
        "what": _what(trainer, method, cards.model_link(base, commit), dataset_name, adapter),
        "comparison": cards.compare_with_paper(method["paper"], run),
        "curves": curves and curves.name,
        "before_after": results and cards.before_after_table(results),
        "before_after_text": _scores_text(results),
        "evaluation": cards.evaluation_table(trainer.state.log_history, method["result_metrics"]),
        "reminders": reminders(source for source in sources if source.name),
        "local_names": [*(source.name for source in sources), trainer.args.output_dir, *method.get("named", ())],
    }
    return fields | dict(method)


def _base_name(trainer: Any) -> str:
    return _compat.get_config_model_id(trainer.model.config) or ""


def _commit(config: Any, init_kwargs: Any, revision: str | None = None) -> str | None:
    """Commit that a model of the Hub was loaded from; the revision asked for, where nothing says it."""
    if isinstance(init_kwargs, dict):
        revision = init_kwargs.get("revision", revision)
    name = _compat.get_config_model_id(config)
    if getattr(config, "_commit_hash", None):
        return config._commit_hash
    # Newer versions of transformers do not keep it, but the Hub's cache does
    cached = try_to_load_from_cache(name, "config.json", revision=revision) if shown_name(name).hub_id else None
    return shown_name(Path(cached).parent).commit if isinstance(cached, str) else revision


def _scores_text(results: Mapping[str, Any] | None) -> str:
    if not results:
        return ""
    decoding = results.get("decoding")
    return f"{f'{decoding.capitalize()} decoding of' if decoding else 'On'} {results['prompts']} held-out prompts"


# -------------------- what was trained, on what, for how long


def _what(
    trainer: Any, method: Mapping[str, Any], base: str, dataset_name: str | None, adapter: str | None
) -> list[tuple[str, str]]:
    args, state = trainer.args, trainer.state
    weights = _dtype(trainer.model.dtype)
    half = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    arithmetic = f" weights, {half} arithmetic" if half and half != weights else ""
    data = cards.model_link(dataset_name, kind="datasets/") if dataset_name else "a dataset that was not named"
    rows = f"{method['data_rows']:,} {method['data_unit']} of " if method["data_rows"] else ""
    steps = f"{state.global_step:,} of {state.max_steps:,} optimizer steps" if state.max_steps > 0 else "not trained"
    epochs = f", {_number(float(f'{state.epoch:.3g}'), 'epoch')}" if state.epoch and rows else ""
    tokens = next((entry["num_tokens"] for entry in reversed(state.log_history) if "num_tokens" in entry), None)
    return [
        ("started from", base),
        ("trained weights", f"{adapter or 'all'}, {weights}{arithmetic}"),
        ("data", f"{rows}{data}"),
        ("length", f"{steps}{epochs}" + (f", {int(tokens):,} tokens" if tokens else "")),
        ("per step", method["per_step"]),
        ("seed", str(args.seed)),
    ]


def rows_per_step(args: Any) -> int:
    """Rows (rollouts) whose gradients make up one optimizer step, over all processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def rollouts_text(rollouts: int, per_prompt: int) -> str:
    """What a step is made of, in words."""
    return f"{rollouts:,} rollouts: {_number(rollouts // per_prompt, 'prompt')} with {per_prompt} each"


def num_rows(dataset: Any) -> int | None:
    """Rows of a dataset; `None` for a stream."""
    return None if dataset is None or isinstance(dataset, IterableDataset) else len(dataset)


def _adapter(trainer: Any) -> str | None:
    """The adapter that is trained, in words; `None` where all weights are."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not is_peft_model(model):
        return None
    config = model.peft_config[model.active_adapter]
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    kind = "LoRA" if kind == "LORA" else kind
    rank = f", rank {config.r}, alpha {config.lora_alpha}" if kind == "LoRA" else ""
    return f"{kind} on {_adapted_layers(model)}{rank}"


def _adapted_layers(model: Any) -> str:
    adapted, plain = set(), set()
    for name, module in model.named_modules():
        *parents, last = name.split(".")
        if hasattr(module, "base_layer"):
            adapted.add(last)
        elif isinstance(module, torch.nn.Linear) and last not in ("base_layer", "lm_head"):
            if not any(parent.startswith("lora_") for parent in parents):
                plain.add(last)
    return ", ".join(sorted(adapted)) if plain else "all linear layers"


def _settings(trainer: Any, adapter: str | None) -> dict[str, Any]:
    """Values of a run that a paper may be compared with: the configuration, and what follows from it."""
    args = trainer.args
    schedule, warmup = (
        args.lr_scheduler_type.value,
        args.get_warmup_steps(max(trainer.state.max_steps, args.max_steps, 1)),
    )
    optimizer = getattr(args.optim, "value", args.optim)
    return vars(args) | {
        "adapter": (adapter or "all weights").split(", rank")[0],
        "adam_betas": (args.adam_beta1, args.adam_beta2),
        "learning_rate_schedule": f"{schedule}, {warmup} warmup steps" if warmup else schedule,
        "length": _number(args.max_steps, "step") if args.max_steps > 0 else _number(args.num_train_epochs, "epoch"),
        "optimizer": "AdamW" if str(optimizer).startswith("adamw") else optimizer,
        "rows_per_step": rows_per_step(args),
        "steps": trainer.state.global_step,
    }


def _number(count: float, what: str) -> str:
    return f"{count:,g} {what}{'' if count == 1 else 's'}"


# -------------------- teachers


def live_teacher(partner: Any, args: Any) -> CardTeacher:
    """A teacher that was in memory: it is what the user named, and nothing compared its weights with a record."""
    name = _compat.get_config_model_id(partner.config)
    commit = _commit(partner.config, args.teacher_model_init_kwargs, args.teacher_model_revision)
    if not name:
        reason = "it was passed as a model in memory that does not say where it came from"
        return CardTeacher(None, None, _dtype(partner.dtype), "unknown", reason)
    known = "at this commit" if shown_name(name).hub_id and cards.is_commit(commit) else "its weights were not hashed"
    return CardTeacher(name, commit, _dtype(partner.dtype), "stated", f"loaded for this run under this name, {known}")


def base_teacher(trainer: Any) -> CardTeacher:
    """The base under the student's adapters, as its own teacher."""
    name = _base_name(trainer)
    commit = _commit(trainer.model.config, trainer.args.model_init_kwargs)
    reason = "the base that the adapters are trained on, with the adapters disabled"
    return CardTeacher(name, commit, _dtype(trainer.model.dtype), "stated" if name else "unknown", reason)


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")

"""Model cards of a run: what they say is read from its trainer here, and written with the templates of each method."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from huggingface_hub import try_to_load_from_cache
from transformers.trainer_utils import HubStrategy

from trl_blend import _compat
from trl_blend._version import __version__
from trl_blend.models.wrappers import AdapterConfig
from trl_blend.reports import cards, metadata
from trl_blend.reports.cards import CardTeacher, model_link
from trl_blend.reports.curves import CURVES_FILE, Panel, draw_curves, last_values
from trl_blend.reports.names import shown_name
from trl_blend.trainers._partners import teacher_arguments
from trl_blend.trainers._record import Stage, kept_by_the_optimizer


logger = get_logger(__name__)


class CardMixin:
    """The model card of a run, and the picture in it. A trainer sets `_template_name` and defines `card_fields`."""

    card_results: Mapping[str, Any] | None = None
    """
    Scores before and after training for the model card, set by whoever measured them: `rewards` (their names),
    `prompts` (number of held-out prompts), `before` and `after` (per policy, a mean and a standard error for each
    reward); optionally `before_step` (optimizer step of `before`, if not 0), `decoding` (`"greedy"`), and for the
    model index `dataset` (id on the Hub), `split` and `policy`, the one that is published.
    """

    started_from_adapter: tuple[str, str | None] | None = None
    """Name and revision of the adapter that training started from, where one was given by name."""

    _template_name: str
    _panels: tuple[Panel, ...]
    _stages: Sequence[Stage] = ()
    _card_arguments: dict[str, Any] | None = None  # of the last card of the run
    _is_running = False
    _drawn: tuple[int, Path | None] | None = None  # length of the log, and its picture

    def start_card(self) -> None:
        """Begin a run, whose cards go without a picture until it is over."""
        self._is_running, self._card_arguments = True, None

    def finish_card(self) -> None:
        """Draw the run that is over, and write the card of its last checkpoint again: it has the last log now."""
        self._is_running = False
        self.write_curves()
        if self._card_arguments is None:
            return
        try:
            self.create_model_card(**self._card_arguments)
        except Exception as error:  # whatever it is, the trained model is worth more than its card
            logger.warning(f"The card was not written again: {type(error).__name__}: {error}.")

    def card_fields(self) -> dict[str, Any]:
        """
        What the model card says of this trainer's method.

        Returns:
            `dict[str, Any]`: For all templates `paper_name`, `paper` (per setting, what the paper does), `settings`
            (values of the run that are not in its configuration), `choices`, `teachers`, `data_rows`, `data_unit`,
            `per_step`, `result_metrics` and `curves_text`; beside these the placeholders `[[ … ]]` of this trainer's
            own template, and in `named` further names that may be paths.
        """
        raise NotImplementedError

    def example_prompt(self, row: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
        """The prompt of a row of `train_dataset`, text or messages, for the usage in the card, if there is one."""
        return prompt_text(row.get("prompt"))

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write `README.md` from this trainer's template, see [`~transformers.Trainer.create_model_card`].

        A license or a language that somebody has set in the metadata of the present one is kept; without one, the
        license that the base model's own card states is passed on, where that card is on this machine. A
        `dataset_name` that is no repository on the Hub is shown by its last part, without a link.
        """
        if not self.is_world_process_zero():
            return
        self._card_arguments = {"model_name": model_name, "dataset_name": dataset_name, "tags": tags}
        folder = Path(self.args.output_dir)
        card = folder / "README.md"
        base, commit = _base_of(self)
        kept = metadata.kept_metadata(card, shown_name(base).hub_id)
        if "license" not in kept:
            kept |= metadata.base_license(base, commit)
        fields = self._all_card_fields(dataset_name)
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        if fields["mixed"]:
            tags.append("custom_generate")
        with tempfile.TemporaryDirectory() as template_folder:
            template = Path(template_folder, self._template_name)
            template.write_text(cards.render(self._template_name, fields), encoding="utf-8")
            self._template_file = _compat.card_template(str(template))
            super().create_model_card(
                model_name=model_name or folder.resolve().name,
                dataset_name=shown_name(dataset_name).hub_id,
                tags=tags,
            )
        metadata.complete_metadata(
            card,
            base_model=shown_name(base).hub_id,
            is_adapter=fields["is_adapter"],
            # The adapter of a mixed policy is in a subfolder, which transformers finds through `mixing.json`
            library="peft" if fields["is_adapter"] and not fields["mixed"] else "transformers",
            kept=kept,
            eval_results=metadata.model_index(self.card_results),
        )

    def _all_card_fields(self, dataset_name: str | None) -> dict[str, Any]:
        """Every placeholder of the templates. `card_fields` adds to these, or replaces them."""
        args, state, results, method = self.args, self.state, self.card_results, self.card_fields()
        base, commit = _base_of(self)
        start = model_link(base, commit)
        if self.started_from_adapter is not None:
            start = f"the adapter {model_link(*self.started_from_adapter)} on {start}"
        data = model_link(dataset_name, kind="datasets/") if dataset_name else ""
        rows = f"{method['data_rows']:,} {method['data_unit']} of " if method["data_rows"] else ""
        adapter = _adapter(self.accelerator.unwrap_model(self.model))
        settings = _settings(args, state, adapter) | kept_by_the_optimizer(self._stages) | method["settings"]
        # Drawing takes longer than a small model's step; a card that is pushed is looked at before the run is over
        draws = not self._is_running or (args.push_to_hub and args.hub_strategy != HubStrategy.END)
        curves = self.write_curves() if draws else None
        what = [
            ("started from", start),
            ("trained weights", _weights(args, self.model.dtype, adapter)),
            ("data", rows + (data or "a dataset that was not named")),
            ("length", _length(state, counts_epochs=bool(rows))),
            *_stages(self._stages),
            ("per step", method["per_step"]),
            ("seed", str(args.seed)),
        ]
        fields = {
            "config": args,
            "version": __version__,
            "peft_version": version("peft") if adapter else None,
            "base": start,
            "on_dataset": f" on {data}" if data else "",
            "is_adapter": bool(adapter),
            "mixed": False,
            "what": what,
            "example": _example(self),
            "comparison": cards.compare_with_paper(method["paper"], settings),
            "curves": curves and curves.name,
            "last_values": None if curves else last_values(state.log_history, self._panels),
            "before_after": results and cards.before_after_table(results),
            "before_after_text": _scores_text(results),
            "evaluation": cards.evaluation_table(state.log_history, method["result_metrics"]),
        }
        adapters = [self.started_from_adapter[0]] if self.started_from_adapter else []
        names = [base, *adapters, dataset_name, args.output_dir, *(teacher.name for teacher in method["teachers"])]
        return fields | method | {"local_names": names + method.get("named", [])}

    def write_curves(self) -> Path | None:
        """
        Draw what was logged so far into `output_dir/training_curves.png`; `None` where nothing is drawn. The main
        process draws. A failure is reported and loses nothing.
        """
        if not self.is_world_process_zero():
            return None
        path = Path(self.args.output_dir) / CURVES_FILE
        if self._drawn is not None and self._drawn[0] == len(self.state.log_history) and path.is_file():
            return self._drawn[1]
        try:
            drawn = draw_curves(self.state.log_history, self._panels, path, title=f"{self._name}: training")
        except Exception as error:  # whatever it is, the trained model is worth more than its picture
            logger.warning(
                f"The training curves were not drawn into {path}: {type(error).__name__}: {error}. Draw them from the "
                "`log_history` in a checkpoint's `trainer_state.json`, with `trl_blend.reports.curves.draw_curves("
                "log_history, trainer._panels, path)`."
            )
            return None
        self._drawn = len(self.state.log_history), path if drawn else None
        return self._drawn[1]


def student_name(trainer: Any) -> str:
    """Name or path of the model that training started from; empty if it was built in memory."""
    return _origin(trainer.model.config)[0]


def _base_of(trainer: Any) -> tuple[str, str | None]:
    """Name and commit of what was trained; of an adapter that was given by name, those of its base."""
    if trainer.started_from_adapter is None:
        return _origin(trainer.model.config, (trainer.args.model_init_kwargs or {}).get("revision"))
    model = trainer.accelerator.unwrap_model(trainer.model)
    return _origin(model.config, AdapterConfig.of_model(model).base_revision)


def _origin(config: Any, revision: str | None = None) -> tuple[str, str | None]:
    """Name of a model, and its commit on the Hub; the revision asked for, where nothing says the commit."""
    name = _compat.get_config_model_id(config) or ""
    if getattr(config, "_commit_hash", None):
        return name, config._commit_hash
    # Newer versions of transformers do not keep it, but the Hub's cache does
    cached = try_to_load_from_cache(name, "config.json", revision=revision) if shown_name(name).hub_id else None
    return name, shown_name(Path(cached).parent).commit if isinstance(cached, str) else revision


# -------------------- what was trained, on what, for how long


def _weights(args: Any, dtype: torch.dtype, adapter: str | None) -> str:
    weights, half = _dtype(dtype), "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    arithmetic = f" weights, {half} arithmetic" if half and half != weights else ""
    return f"{adapter or 'all'}, {weights}{arithmetic}"


def _length(state: Any, counts_epochs: bool) -> str:
    steps = f"{state.global_step:,} of {state.max_steps:,} optimizer steps" if state.max_steps > 0 else "not trained"
    epochs = f", {_number(float(f'{state.epoch:.3g}'), 'epoch')}" if state.epoch and counts_epochs else ""
    tokens = next((entry["num_tokens"] for entry in reversed(state.log_history) if "num_tokens" in entry), None)
    return f"{steps}{epochs}" + (f", {int(tokens):,} tokens" if tokens else "")


def _stages(stages: Sequence[Stage]) -> Iterator[tuple[str, str]]:
    """The steps that were made with other settings than those of this card, and which."""
    first = 1
    for stage in stages:
        yield f"steps {first} to {stage.last_step}", stage.text
        first = stage.last_step + 1


def rows_per_step(args: Any) -> int:
    """Rows (rollouts) whose gradients make up one optimizer step, over all processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def rollouts_text(rollouts: int, per_prompt: int) -> str:
    """What a step is made of, in words."""
    return f"{rollouts:,} rollouts: {_number(rollouts // per_prompt, 'prompt')} with {per_prompt} each"


def num_rows(dataset: Any) -> int | None:
    """Rows of a dataset; `None` for a stream."""
    return None if dataset is None or isinstance(dataset, IterableDataset) else len(dataset)


def _adapter(model: Any) -> str | None:
    """The adapter that is trained, in words; `None` where all weights are."""
    if not is_peft_model(model):
        return None
    config = model.peft_config[model.active_adapter]
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if kind != "LORA":
        return f"{kind} on {_adapted_layers(model)}"
    return f"LoRA on {_adapted_layers(model)}, rank {config.r}, alpha {config.lora_alpha}"


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


def _settings(args: Any, state: Any, adapter: str | None) -> dict[str, Any]:
    """Values of a run that a paper may be compared with: the configuration, and what follows from it."""
    schedule, warmup = args.lr_scheduler_type.value, args.get_warmup_steps(max(state.max_steps, args.max_steps, 1))
    optimizer = getattr(args.optim, "value", args.optim)
    return vars(args) | {
        "adapter": (adapter or "all weights").split(", rank")[0],
        "adam_betas": (args.adam_beta1, args.adam_beta2),
        "learning_rate_schedule": f"{schedule}, {warmup} warmup steps" if warmup else schedule,
        "length": _number(args.max_steps, "step") if args.max_steps > 0 else _number(args.num_train_epochs, "epoch"),
        "optimizer": "AdamW" if str(optimizer).startswith("adamw") else optimizer,
        "rows_per_step": rows_per_step(args),
        "steps": state.global_step,
    }


def _scores_text(results: Mapping[str, Any] | None) -> str:
    if not results:
        return ""
    decoding = results.get("decoding")
    return f"{f'{decoding.capitalize()} decoding of' if decoding else 'On'} {results['prompts']} held-out prompts"


def _number(count: float, what: str) -> str:
    return f"{count:,g} {what}{'' if count == 1 else 's'}"


# -------------------- an example

_LONGEST = 200


def _example(trainer: Any) -> str | list[dict[str, str]]:
    """A prompt to show the use of the model with: the first of the data, as far as it is text."""
    dataset = trainer.train_dataset
    found = trainer.example_prompt(dataset[0]) if isinstance(dataset, Dataset) and len(dataset) else None
    return found or cards.example_prompt(chat=getattr(trainer.processing_class, "chat_template", None) is not None)


def prompt_text(prompt: Any) -> str | list[dict[str, str]] | None:
    """A prompt as a card shows it, at most 200 characters of each message; `None` where it is not text."""
    if isinstance(prompt, str):
        return shortened(prompt)
    if not isinstance(prompt, list) or not all(isinstance(message.get("content"), str) for message in prompt):
        return None
    return [{"role": message["role"], "content": shortened(message["content"])} for message in prompt]


def shortened(text: str) -> str:
    """At most 200 characters of a text."""
    return text if len(text) <= _LONGEST else text[:_LONGEST].rstrip() + "…"


# -------------------- teachers


def teachers(trainer: Any) -> list[CardTeacher]:
    """The teachers of a run that has any; the student's own base where none was loaded."""
    pairs = zip(trainer.partners, trainer._given_teachers, strict=True)
    return [_live_teacher(partner, given, trainer.args) for partner, given in pairs] or [_base_teacher(trainer)]


def _live_teacher(partner: Any, given: Any, args: Any) -> CardTeacher:
    """A teacher that was in memory: it is what the user named, and nothing compared its weights with a record."""
    revision = teacher_arguments(args).get("revision")
    name, commit = _origin(partner.config, revision)
    if is_peft_model(partner):  # whose configuration is its base's
        name, commit = (given, revision) if isinstance(given, str) else ("", None)
    if not name:
        reason = "it was passed as a model in memory that does not say where it came from"
        return CardTeacher(None, None, _dtype(partner.dtype), "unknown", reason)
    known = "at this commit" if shown_name(name).hub_id and cards.is_commit(commit) else "its weights were not hashed"
    return CardTeacher(name, commit, _dtype(partner.dtype), "stated", f"loaded for this run under this name, {known}")


def _base_teacher(trainer: Any) -> CardTeacher:
    """The base under the student's adapters, as its own teacher."""
    name, commit = _base_of(trainer)
    reason = "the base that the adapters are trained on, with the adapters disabled"
    dtype = _dtype(trainer.model.dtype)
    return CardTeacher(name, commit, dtype, "stated" if name else "unknown", reason)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

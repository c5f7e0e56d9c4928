"""What every trainer of this package does around its training: card, checkpoints, pushes to the Hub, callbacks."""

import functools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, is_peft_model
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, has_length
from trl import RichProgressCallback

from trl_blend import _compat
from trl_blend._version import __version__
from trl_blend.consistency.provenance import PROVENANCE_FILE
from trl_blend.errors import ConfigError, EngineError, HubError, UnsupportedError
from trl_blend.export import former_export
from trl_blend.models.loading import naming_damage
from trl_blend.models.output_layer import give_bias
from trl_blend.reports.curves import progress_text
from trl_blend.reports.names import shown_name
from trl_blend.trainers import _cards, _partners, _record
from trl_blend.trainers._cards import CardMixin
from trl_blend.trainers._data import RowsNeeded, check_data, check_evaluation
from trl_blend.trainers._settings import guard_tokens


logger = get_logger(__name__)


class RunMixin(CardMixin):
    """
    In front of the TRL class among a trainer's bases. A trainer sets `_template_name`, `_panels` (what its plot and
    progress bar show, the method's own quantity first) and `_recorded` (the settings that a resumed run is compared
    in), and defines `card_fields`, `run_parts` and `rows_needed`.
    """

    _recorded: Sequence[str]
    partners: Sequence[Any] = ()
    """The teachers that are in memory."""
    _given_teachers: Sequence[Any] = ()
    """What the user passed for them."""

    mixed_policy_files: Any = None
    """What is saved beside the model to decode it with its teachers, if anything."""

    num_held_out: int | None = None
    """Rows that are kept from the training, for the line that a run starts with. Those of `eval_dataset` if unset."""

    _tokenizer_options: Mapping[str, Any] = {"padding_side": "left", "truncation_side": "left"}
    """How the parent loads a tokenizer by name."""

    def __init__(self, *, args: Any, model: Any, **kwargs: Any):
        guard_tokens(args)  # one may have been set since the config was made
        check_data(kwargs.get("train_dataset"), kwargs.get("eval_dataset"), args, self.rows_needed(args))
        check_evaluation(kwargs.get("eval_dataset"), args)
        if args.push_to_hub:
            prepare_repository(args)
        adapter = _partners.student_adapter(model, args)
        self.started_from_adapter = adapter and (model, (args.model_init_kwargs or {}).get("revision"))
        if adapter is None:
            with naming_damage(model, "model", revision=(args.model_init_kwargs or {}).get("revision")):
                super().__init__(args=args, model=model, **kwargs)
        else:
            loaded, kwargs["processing_class"] = _partners.load_student_adapter(
                model,
                args,
                kwargs.get("processing_class"),
                quantization_config=kwargs.pop("quantization_config", None),
                **self._tokenizer_options,
            )
            with patch.object(args, "model_init_kwargs", None):  # which the parent would warn of
                super().__init__(args=args, model=loaded, **kwargs)
        self._stages: list[_record.Stage] = []
        self._compared_logits = False
        give_bias(self.model)
        self.add_callback(GradientCheckCallback())
        self.add_callback(FiniteLogCallback())
        self.add_callback(MethodProgressCallback(self))
        self.add_callback(RunCallback(self))

    @staticmethod
    def rows_needed(args: Any) -> RowsNeeded:
        """Rows of `train_dataset` that one step takes at least."""
        raise NotImplementedError

    def run_parts(self) -> _record.RunParts:
        """What the run is made of, in words."""
        raise NotImplementedError

    # The record of a run

    def opening(self) -> str:
        """The line that a run starts with: student, teacher, rows, reward, method, and what is deployed in the end."""
        parts, state = self.run_parts(), self.state
        rows, held_out = _cards.num_rows(self.train_dataset), self.num_held_out
        if held_out is None:
            sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
            held_out = sum(_cards.num_rows(dataset) or 0 for dataset in sets.values())
        started = self.started_from_adapter[0] if self.started_from_adapter else _cards.student_name(self)
        name = shown_name(started).text or "a model in memory"
        clauses = [
            f"student {name}{' (adapter)' if is_peft_model(self.model) else ''}",
            f"teacher {parts.teacher}",
            f"{'a stream of' if rows is None else f'{rows:,}'} training rows",
            f"{held_out:,} held out" if held_out else "none held out",
            f"reward {parts.reward}" if parts.reward else "no reward",
            parts.method,
            f"deployed is {parts.deployed}",
        ]
        goes_on = f" It goes on after step {state.global_step}." if state.global_step else ""
        return f"{self._name}: {'; '.join(clauses)}.{goes_on}"

    def record(self) -> dict[str, Any]:
        """What the run is made of, for its checkpoints: names without folders, digests, settings."""
        names = (*self._recorded, *_record.SETTINGS)
        given = {name: getattr(self.args, name) for name in names}
        content = {
            "trainer": self._name,
            **self._fixed_parts,
            "reward": self.run_parts().reward,
            "settings": given | _record.kept_by_the_optimizer(self._stages),
        }
        return json.loads(json.dumps(content, default=str))

    @functools.cached_property
    def _fixed_parts(self) -> dict[str, Any]:
        """What no step of a run changes."""
        name = shown_name(_cards.student_name(self)).text or "a model in memory"
        base = None
        if is_peft_model(self.model):
            student = self.accelerator.unwrap_model(self.model)
            frozen = [one for one in student.named_parameters() if not one[1].requires_grad]
            base = _record.model_part(name, _record.weights_sample(frozen))
        data = _record.data_part(self.train_dataset)
        return {"student": name, "base": base, "teacher": self.teacher_parts(), "data": data}

    def teacher_names(self) -> list[str]:
        """The teachers in memory, as a card may show them."""
        names = []
        for partner, given in zip(self.partners, self._given_teachers):  # none is loaded where none takes part
            name = given if isinstance(given, str) else _compat.get_config_model_id(partner.config)
            names.append(shown_name(name).text or "a model in memory")
        return names

    def teacher_parts(self) -> list[dict[str, Any]]:
        """The teachers in the record."""
        partners = map(self.accelerator.unwrap_model, self.partners)
        digests = [_record.weights_sample(partner.named_parameters()) for partner in partners]
        return list(map(_record.model_part, self.teacher_names(), digests))

    def run_state(self) -> dict[str, Any]:
        """What a checkpoint of this trainer holds beside its parent's and the record; [`load_run_state`] reads it."""
        return {}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Go on with the `run_state` of a checkpoint."""

    # Log-probabilities

    def compare_logits(self, model: Any) -> None:
        """
        Refuse models whose log-probabilities would not be those of their own logits, see
        [`~trl_blend.models.own_logits.check_own_logits`]. `model` is the student as it is trained, wrapped.
        """

    def training_step(self, model, *args, **kwargs):
        self._compare_logits_once(model)
        return super().training_step(model, *args, **kwargs)

    def prediction_step(self, model, *args, **kwargs):
        self._compare_logits_once(model)
        return super().prediction_step(model, *args, **kwargs)

    def _compare_logits_once(self, model: Any) -> None:
        if not self._compared_logits:
            self._compared_logits = True
            with self.accelerator.autocast():
                self.compare_logits(model)

    # Files

    def write_run_state(self, folder: Path) -> None:
        """Write the record of the run into a checkpoint. The main process calls it."""
        _record.write_record(folder, self.record(), self._stages, self.run_state())

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._stages = []
        if checkpoint is None:
            return
        former = _record.read_record(Path(checkpoint))
        name = Path(checkpoint).name
        if former is None:
            self._stages = [_record.Stage(self.state.global_step, [])]
            logger.warning(f"{name} has no {_record.RECORD_FILE}: its settings were not compared with these.")
            return
        self._stages = _record.former_stages(former)
        if changed := _record.differences(former, self.record()):
            self._stages.append(_record.Stage(self.state.global_step, changed))
            listed = "; ".join(map(str, changed))
            logger.warning(f"Resuming with other settings than those of {name}: {listed}. What is given now is used.")
        self.load_run_state(former["state"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, see [`~transformers.Trainer.save_model`]. What an earlier run mixed there is removed."""
        if self.mixed_policy_files is None and self.args.should_save:
            former_export.clear(Path(output_dir or self.args.output_dir))
        super().save_model(output_dir, _internal_call)

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        self._last_loaded_step = -1  # an engine has the weights of the last step

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.write_run_state(Path(self._get_output_dir(trial=trial), folder))

    # Pushes to the Hub

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Save and upload, see [`~transformers.Trainer.push_to_hub`]. Where an upload fails, with an error of
        `huggingface_hub`, the model is saved in `output_dir`, and the next push sends what is missing.

        Raises:
            [`~trl_blend.errors.HubError`]: If a repository that `args.push_to_hub` did not announce cannot be created.
                The model is saved in `output_dir` then.
        """
        if self.hub_model_id is None and self.is_world_process_zero():
            try:
                self._create_repository(token, private)
            except Exception as error:
                self.save_model(_internal_call=True)  # the other processes are saving in the parent's `push_to_hub`
                saved = f"The model is saved in output_dir={self.args.output_dir!r}."
                raise HubError(f"{_refusal(self.args, error)} {saved}") from error
        pushed = super().push_to_hub(commit_message, blocking, token, revision, **kwargs)
        if isinstance(pushed, Future):
            pushed.add_done_callback(_warn_if_failed)
        return pushed

    def _create_repository(self, token: str | None, private: bool | None) -> None:
        # Only newer releases of transformers take `private` as an argument; all of them read the setting
        private = self.args.hub_private_repo if private is None else private
        with patch.object(self.args, "hub_private_repo", private):
            self.init_hf_repo(token=token)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.should_save and self.args.hub_strategy != HubStrategy.END:
            self.write_run_state(Path(checkpoint_folder))  # before the upload of the folder starts
            record = Path(checkpoint_folder, PROVENANCE_FILE)
            if record.is_file():  # goes along with the model, which transformers copies
                shutil.copy(record, self.args.output_dir)
            if self.mixed_policy_files is None:
                former_export.clear(Path(self.args.output_dir))
        self._report_failed_pushes("Training goes on.")
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._report_failed_pushes("Call `trainer.push_to_hub()` to send what is missing.")

    def _report_failed_pushes(self, goes_on: str) -> None:
        """
        Warn, once, of each push that failed in the background.

        transformers keeps the exceptions of these pushes to itself. They are no reason to stop a run: each checkpoint
        is pushed in full, and everything is on the disk.
        """
        pushes = getattr(self, "push_in_progress", None)
        if pushes is None:
            return
        failed = [job for job in pushes.jobs if _error_of(job) is not None]
        pushes.jobs = [job for job in pushes.jobs if job not in failed]
        for job in failed:
            said = _words(_error_of(job))
            logger.warning(f"Step {self.state.global_step}: a push of a checkpoint has failed. {said} {goes_on}")


def prepare_repository(args: Any) -> None:
    """
    Create the repository of a run and see whether it may be written to: before a model is loaded.

    Raises:
        [`~trl_blend.errors.HubError`]: On every process, if the main one is refused.
    """
    refusal, cause = None, None
    if args.process_index == 0:
        try:
            api = HfApi(token=args.hub_token, library_name="trl_blend", library_version=__version__)
            repo_id = api.create_repo(_repository(args), private=args.hub_private_repo, exist_ok=True).repo_id
            _check_write(api, repo_id)
            if args.hub_revision is not None:
                api.model_info(repo_id, revision=args.hub_revision)
        except Exception as error:  # the others wait for the outcome, whatever it is
            refusal, cause = f"{_refusal(args, error)} Nothing has been trained yet.", error
    (refusal,) = broadcast_object_list([refusal])
    if refusal is not None:
        raise HubError(refusal) from cause


def _check_write(api: HfApi, repo_id: str) -> None:
    """The client takes a repository that exists for created, whoever it belongs to."""
    try:
        api.auth_check(repo_id, write=True)
    except RepositoryNotFoundError:
        raise
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):  # another status: a Hub that has no such check
            raise


def _repository(args: Any) -> str:
    """As [`~transformers.Trainer.init_hf_repo`] names it."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def _refusal(args: Any, error: Exception) -> str:
    return f"`hub_model_id={_repository(args)!r}` cannot be pushed to. {_words(error)}"


def _words(error: BaseException | None) -> str:
    """What the client of the Hub said, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}."


def _error_of(job: Future) -> BaseException | None:
    return job.exception() if job.done() and not job.cancelled() else None


def _warn_if_failed(job: Future) -> None:
    if _error_of(job) is not None:
        logger.warning(f"A push with `blocking=False` has failed. {_words(_error_of(job))}")


class GradientCheckCallback(TrainerCallback):
    """
    Looks whether the weights that are to be trained got a gradient: at the first step, and at the first one after an
    evaluation. Not with DeepSpeed, which keeps gradients to itself. At every log it looks whether the gradient is a
    number; in float16 the scaler leaves out those that are not.

    Raises:
        [`~trl_blend.errors.UnsupportedError`]: If none of them got one.
        [`~trl_blend.errors.EngineError`]: If the norm of the gradient is NaN.
    """

    def __init__(self) -> None:
        self._looks = True

    def on_evaluate(self, args, state, control, **kwargs):
        self._looks = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not args.fp16 and math.isnan(float((logs or {}).get("grad_norm") or 0.0)):
            raise EngineError(
                f"Step {state.global_step}: the gradient is NaN, and so are the weights by now. The student or a "
                "teacher has no number for some token: check that their checkpoints are whole, or load them with "
                "`dtype='float32'` or `'bfloat16'`. The checkpoints before this step are as they were."
            )

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self._looks or args.deepspeed is not None or args.distributed_state.distributed_type == "DEEPSPEED":
            return
        self._looks = False
        trained = {name: weight.grad is None for name, weight in model.named_parameters() if weight.requires_grad}
        without = [name for name, is_missing in trained.items() if is_missing]
        if not without:
            return
        problem = (
            f"Step {state.global_step + 1}: {len(without)} of the {len(trained)} weights to be trained got no "
            f"gradient ({without[0]}, ...)"
        )
        if len(without) == len(trained):
            raise UnsupportedError(
                f"{problem}, so nothing is trained: some layer of the model does not pass it on. 4-bit layers that "
                "bitsandbytes packed for inference, on a CPU, are an example: load the model without quantization."
            )
        logger.warning(f"{problem} and are not trained. This is right only if no row makes use of them.")


class RunCallback(TrainerCallback):
    """
    Says what the run is when it starts, and refuses one without a step, which would leave an untrained model under the
    name of a trained one. Leaves picture and card of all of it when it ends, early or not.
    """

    def __init__(self, trainer: RunMixin):
        self.trainer = trainer
        self.first_step = 0

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.first_step = state.global_step
        if state.global_step >= state.max_steps:
            raise ConfigError(
                f"The checkpoint is of step {state.global_step}, and the run has {state.max_steps} steps: nothing is "
                "left to train. Raise `max_steps` or `num_train_epochs`, or use the checkpoint as it is."
            )
        if has_length(train_dataloader) and not len(train_dataloader):
            rows, needed = len(self.trainer.train_dataset), self.trainer.rows_needed(args)
            raise ConfigError(
                f"`train_dataset` has {rows} rows, which make no batch of {needed.rows} ({needed.because})."
            )
        self.trainer.record()  # before an engine merges adapters into their base and out again, which rounds it
        self.trainer.start_card()
        if state.is_world_process_zero:
            print(self.trainer.opening(), flush=True)

    def on_epoch_end(self, args, state, control, **kwargs):
        # Before a checkpoint of it is written. A stream that goes on from one may have ended there
        if control.should_training_stop and state.global_step == self.first_step:
            needed = self.trainer.rows_needed(args)
            raise ConfigError(
                f"The run ended after 0 of {state.max_steps - self.first_step} steps: `train_dataset` gave fewer rows "
                f"than one batch takes, {needed.rows} ({needed.because})."
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.finish_card()


class FiniteLogCallback(TrainerCallback):
    """Writes `None` for a number that is none into the log, whose JSON has no NaN and no infinity."""

    def on_log(self, args, state, control, **kwargs):
        entry = state.log_history[-1]
        for name, value in entry.items():
            if isinstance(value, float) and not math.isfinite(value):
                entry[name] = None


class MethodProgressCallback(TrainerCallback):
    """Shows the method's quantity, as last logged, on the training bar that another callback draws."""

    def __init__(self, trainer: RunMixin):
        self.trainer = trainer

    def on_log(self, args, state, control, logs=None, **kwargs):
        text = progress_text(logs or {}, self.trainer._panels)
        if not (text and state.is_world_process_zero):
            return
        for callback in self.trainer.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)  # there while training only
            if bar is None:
                continue
            if isinstance(callback, ProgressCallback):
                bar.set_postfix_str(text)
            elif isinstance(callback, RichProgressCallback):
                bar.update(callback.training_task, description=f"[blue]Training[/] {text}")


def default_config(config: type, model: str | PreTrainedModel) -> Any:
    """A config with the defaults, which names its output after the student and the method."""
    name = model if isinstance(model, str) else _compat.get_config_model_id(model.config)
    return config(f"{name.split('/')[-1]}-{config.__name__.removesuffix('Config')}")

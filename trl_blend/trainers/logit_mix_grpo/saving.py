"""What `objective="mixed"` saves: checkpoints that name the mixture, and folders that transformers alone decodes."""

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers.trainer_utils import HubStrategy

from trl_blend import _compat
from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.export import former_export, model_files
from trl_blend.export.policy_folder import Student, Weights, pinned, vocabulary_sha256, write_policy
from trl_blend.export.spec import SPEC_FILE, MixingSpec, ModelSource
from trl_blend.models.checkpoints import Checkpoint, find_checkpoint
from trl_blend.models.wrappers import AdapterConfig
from trl_blend.trainers import _partners


logger = get_logger(__name__)

_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.safetensors")
# Settings of loading a teacher after which its repository and commit are all there is to say: any other is copied
_OF_NO_MATTER = set(
    "attn_implementation device_map dtype local_files_only low_cpu_mem_usage max_memory revision token torch_dtype "
    "trust_remote_code use_safetensors".split()
)
# Settings of loading the student that lead elsewhere than its name and revision
_ELSEWHERE = {"cache_dir", "gguf_file", "subfolder", "variant"}


class MixedPolicyFiles:
    """
    What is written beside a student that the parent has saved: into a checkpoint a `mixing.json` that says what the
    student is mixed with, into any other folder what lets transformers decode the mixture.

    `model` is the student without wrappers, `partners` are the loaded teachers; `student` and `teachers` are what
    was given for them. Raises [`~trl_blend.errors.UnsupportedError`] for an adapter that could not be saved later: its
    base has no name and is sharded, or it has a name of its own.
    """

    def __init__(
        self,
        model: Any,
        partners: Sequence[Any],
        tokenizer: Any,
        args: Any,
        *,
        student: Any,
        teachers: Sequence[Any],
        is_sharded: bool,
    ) -> None:
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.is_adapter = is_peft_model(model)
        self._own_folders: set[Path] = set()
        # All of them found now: the cache may know another commit under the same name when they are written
        base = self._find_base(student) if self.is_adapter else None
        if self.is_adapter and base is None and is_sharded:
            raise UnsupportedError(
                "`model` is an adapter on a base that was built in memory, and the base is sharded, so a mixed policy "
                "could not be saved. Save the base to a folder first, and load it from there."
            )
        self._base_folder = None if base is None else base.folder.resolve()
        self._base_origin, self._base = _origin(base), pinned(base) or Weights(base, model)
        self._origins, self._references = [ModelSource(base=True)], [ModelSource(base=True)]
        if teachers:
            dtypes = [model_files.dtype_name(partner.dtype) for partner in partners]
            origins = [self._origin_of(teacher, base) for teacher in teachers]
            self._origins = [replace(origin, dtype=dtype) for origin, dtype in zip(origins, dtypes, strict=True)]
            self._references = [
                origin if origin.base or origin.repo_id else _Teacher(model=partner, dtype=origin.dtype)
                for origin, partner in zip(self._origins, partners, strict=True)
            ]
        if args.push_to_hub:
            self._warn_of_uploads()

    def record(self, checkpoint: Path, weights: tuple[float, ...], step: int) -> None:
        """Write the `mixing.json` of a checkpoint, for `trl-blend export` and for loading the best one."""
        adapter = base = None
        if self.is_adapter:
            adapter, base = ".", replace(self._base_origin, dtype=model_files.dtype_name(self.model.dtype))
            base = _relative(base, checkpoint)
        origins = tuple(_relative(origin, checkpoint) for origin in self._origins)
        vocabulary, space = vocabulary_sha256(self.tokenizer), self.args.mixing_space
        MixingSpec(weights, origins, space, vocabulary, adapter, base, step).write(checkpoint)

    def clear_former(self, folder: Path) -> None:
        """Take away what another run has mixed in a folder, before the student is put there."""
        if folder.resolve() not in self._own_folders:
            former_export.clear(folder, keep=self._base_folder)
            self._own_folders.add(folder.resolve())

    def finish(self, folder: Path, weights: tuple[float, ...], step: int, saved: Path | None = None) -> None:
        """Let a folder decode the mixture into which the parent has put the student, or copied it from `saved`."""
        if not any(path for pattern in _WEIGHTS for path in (saved or folder).glob(pattern)):
            former_export.clear(folder)
            logger.warning(f"{folder} holds sharded weights only, so it cannot be decoded: no {SPEC_FILE} is written.")
            return
        model, base = self.model, self._base if self.is_adapter else None
        dtype = model_files.dtype_name(model.dtype)
        student = Student(self.tokenizer, dtype, model.config, model.generation_config, base)
        write_policy(folder, student, self._references, weights, self.args.mixing_space, step)

    def _find_base(self, student: Any) -> Checkpoint | None:
        name = AdapterConfig.of_model(self.model).adapter_name
        if name != "default":
            raise UnsupportedError(
                f"The adapter of `model` is called {name!r}. transformers copies an adapter of that name neither to "
                "the Hub nor back from a checkpoint. Leave `adapter_name` out of `get_peft_model`."
            )
        load = (self.args.model_init_kwargs or {}) if isinstance(student, str) else {}
        is_known = isinstance(student, str) and not _ELSEWHERE & load.keys()
        revision = load.get("revision")
        if is_known and find_checkpoint(student, revision, local_files_only=True).is_adapter:
            revision = None  # the adapter's own
        return model_files.base_checkpoint(self.model, revision, is_known=is_known)

    def _origin_of(self, teacher: Any, base: Checkpoint | None) -> ModelSource:
        """Where a teacher can be had as it is: nowhere, if it was in memory or loaded with settings of its own."""
        load = _partners.teacher_arguments(self.args)
        if not isinstance(teacher, str) or load.keys() - _OF_NO_MATTER:
            return ModelSource()
        try:
            checkpoint = find_checkpoint(teacher, load.get("revision"), local_files_only=True)
        except ConfigError:
            return ModelSource()
        if base is not None and checkpoint.folder.resolve() == base.folder.resolve():
            return ModelSource(base=True)
        return ModelSource() if checkpoint.is_adapter else _origin(checkpoint)

    def _warn_of_uploads(self) -> None:
        single = len(self._references) == 1
        copied = {
            "teacher_model" if single else f"teacher_model[{index}]": reference.model
            for index, reference in enumerate(self._references)
            if isinstance(reference, Weights)
        }
        if self.is_adapter and isinstance(self._base, Weights):
            copied["the base of `model`"] = self.model
        if copied:
            sizes = [f"{name} ({_gigabytes(model):.2g} GB)" for name, model in copied.items()]
            logger.warning(
                f"`push_to_hub=True` uploads {', '.join(sizes)} too: only a model given by its Hub id can be referred "
                "to instead. Whoever may read the repository may read these."
            )


class MixedPolicySaving:
    """
    In front of the other bases: with `_mixture_files` set, what is saved and pushed is the mixture, and the student
    alone once the weight is 0.
    """

    _mixture_files: MixedPolicyFiles | None = None
    loaded_policy: MixingSpec | None = None
    """Mixture of the best checkpoint, once the student is that checkpoint's (`load_best_model_at_end`)."""
    args: Any
    state: Any

    @property
    def mixed_policy_files(self) -> MixedPolicyFiles | None:
        """What is saved beside the student at the teacher weight of the moment; `None` where it is 0."""
        weights: tuple[float, ...] = self.current_weights()  # type: ignore[attr-defined]
        return self._mixture_files if any(weights) else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, see [`~transformers.Trainer.train`]."""
        self.loaded_policy = None
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        best = Path(self.state.best_model_checkpoint)
        if self._mixture_files is not None and (best / SPEC_FILE).is_file():
            self.loaded_policy = MixingSpec.read(best)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the student, see [`~transformers.Trainer.save_model`]; with `objective="mixed"` so that transformers alone
        decodes the mixed policy from the folder, at the teacher weight of the moment. A checkpoint holds the student
        and a `mixing.json` with which `trl-blend export` does the same.
        """
        output = Path(self.args.output_dir)
        folder = output if output_dir is None else Path(output_dir)
        is_checkpoint = _internal_call and folder.resolve() != output.resolve()
        # The process that saves is the only one that writes; gathering the student is the parent's work
        files = self.mixed_policy_files if self.args.should_save else None
        if files is not None and is_checkpoint:
            former_export.clear(folder)
        elif files is not None:
            files.clear_former(folder)
            (folder / SPEC_FILE).unlink(missing_ok=True)  # until the end the folder refuses to be decoded
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if files is None or (folder / SPEC_FILE).is_file():  # with `push_to_hub` the parent has called this again
            return
        (files.record if is_checkpoint else files.finish)(folder, *self._mixture())

    def _mixture(self) -> tuple[tuple[float, ...], int]:
        """Teacher weights and optimizer step of the student as it is."""
        loaded = self.loaded_policy
        weights: tuple[float, ...] = self.current_weights()  # type: ignore[attr-defined]
        return weights, self.state.global_step if loaded is None else loaded.step

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        files = self.mixed_policy_files
        if files is None:
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]
            return
        checkpoint, output_dir = Path(checkpoint_folder), Path(self.args.output_dir)
        if self.args.should_save and self.args.hub_strategy != HubStrategy.END:
            files.clear_former(output_dir)
        # Not only the student: nothing is deleted from a repository, and an adapter at its top would lead transformers
        # past the code that the final push brings
        with _compat.before_upload(output_dir, lambda: files.finish(output_dir, *self._mixture(), checkpoint)):
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]


class _Teacher(Weights):
    """A teacher in memory; one that is an adapter is written merged into its base."""

    def save(self, folder: Path) -> None:
        model = self.model
        if is_peft_model(model):
            logger.warning("`teacher_model` is an adapter: the reference is saved with it merged into its base.")
            model = copy.deepcopy(model).merge_and_unload()
        model_files.save_model(model, folder)


def _origin(checkpoint: Checkpoint | None) -> ModelSource:
    if checkpoint is None:
        return ModelSource()
    return pinned(checkpoint) or ModelSource(path=str(checkpoint.folder.resolve()))


def _relative(source: ModelSource, checkpoint: Path) -> ModelSource:
    """With its folder as seen from a checkpoint, which may be pushed: not where it is on this machine."""
    if source.path is None:
        return source
    return replace(source, path=os.path.relpath(source.path, checkpoint.resolve()))


def _gigabytes(model: Any) -> float:
    return sum(p.element_size() * getattr(p, "ds_numel", p.numel()) for p in model.parameters()) / 1e9

"""What `objective="mixed"` saves: folders from which transformers alone decodes the mixed policy."""

import copy
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model

from trl_blend import _compat
from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.export import former_export, model_files
from trl_blend.export.spec import SPEC_FILE, MixingSpec, ModelSource
from trl_blend.models.checkpoints import Checkpoint, find_checkpoint
from trl_blend.models.fingerprint import fingerprint_tokenizer
from trl_blend.models.loading import find_tokenizer
from trl_blend.models.wrappers import AdapterConfig


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
    Adds to what the parent saves: `mixing.json` with the weight of the moment, `custom_generate/generate.py`, and the
    reference, which is written once per run, beside the checkpoints; theirs point at `../reference`.

    A teacher that was given as a Hub id is not written but pinned to the commit it was loaded from. Of an adapter,
    `output_dir` holds the files in `adapter/` (see [`~trl_blend.export_mixed_policy`] for the reason); a checkpoint
    keeps them where resuming looks for them.

    Args:
        trainer ([`LogitMixGRPOTrainer`]):
            Trainer with its partners.
        student (`str` or [`~transformers.PreTrainedModel`]):
            Its student as it was given.
        teachers (`list`):
            Its teachers as they were given.

    Raises:
        [`~trl_blend.errors.UnsupportedError`]:
            If the base of an adapter has no name and is sharded, so that it could not be saved later, or the adapter
            has a name of its own.
    """

    def __init__(self, trainer: Any, student: Any, teachers: list) -> None:
        self.trainer = trainer
        self.is_adapter = is_peft_model(trainer.model)
        self.base = self._find_base(student) if self.is_adapter else None
        sharded = trainer._dist.is_fsdp or trainer._dist.is_zero3
        if self.is_adapter and self.base is None and sharded:
            raise UnsupportedError(
                "`model` is an adapter on a base that was built in memory, and the base is sharded, so a mixed policy "
                "could not be saved. Save the base to a folder first, and load it from there."
            )
        self._teachers = teachers
        # Resolved now: the cache may know another commit under the same name when the first checkpoint is written
        self._pinned = [self._pin(teacher) for teacher in teachers]
        self._written: dict[Path, tuple[tuple[ModelSource, ...], ModelSource | None]] = {}
        self._former: MixingSpec | None = None
        if trainer.args.push_to_hub:
            self._warn_of_uploads()

    def start(self, folder: Path) -> None:
        """Before the parent writes: until `finish` the folder refuses to be decoded."""
        self._former = former_export.take_down(folder)
        model_files.add_code(folder)

    def finish(self, folder: Path) -> None:
        """After the parent has written the student."""
        if any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
            self._finish(folder)
        else:
            former_export.take_down(folder)
            logger.warning(f"{folder} holds sharded weights only, so it cannot be decoded: no {SPEC_FILE} is written.")
        former_export.remove_unnamed(self._former, folder)

    def _finish(self, folder: Path) -> None:
        # By the number too: `output_dir` itself may be called "checkpoint-…"
        within = Path(self.trainer.args.output_dir).resolve() in folder.resolve().parents
        is_checkpoint = within and re.fullmatch(r"checkpoint-\d+", folder.name) is not None
        references, base = self._references(folder.parent if is_checkpoint else folder)
        adapter, student = None, self._student()
        if self.is_adapter:
            model_files.write_adapter_root(folder, student.config, student.generation_config, student.dtype)
            adapter = "." if is_checkpoint else model_files.ADAPTER_FOLDER
            if not is_checkpoint:
                _move_adapter(folder)
        model_files.point_config_at_code(folder)
        loaded = self.trainer.loaded_policy
        spec = MixingSpec(
            weights=self.trainer.current_weights(),
            references=references,
            space=self.trainer.args.mixing_space,
            tokenizer_sha256=fingerprint_tokenizer(self.trainer.processing_class).parts["vocabulary"],
            adapter=adapter,
            base=base,
            step=self.trainer.state.global_step if loaded is None else loaded.step,
        )
        (spec.below("..") if is_checkpoint else spec).write(folder)

    def follow(self, checkpoint: Path, output_dir: Path) -> None:
        """Bring `output_dir`, into which the parent has copied the student of a checkpoint, up to that checkpoint."""
        former = former_export.take_down(output_dir)
        for name in model_files.BASE_CONFIGS:
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, output_dir / name)
        if (checkpoint / SPEC_FILE).is_file():
            spec = MixingSpec.read(checkpoint).below("")
            if spec.adapter is not None:
                _move_adapter(output_dir)
                spec = replace(spec, adapter=model_files.ADAPTER_FOLDER)
            model_files.add_code(output_dir)
            spec.write(output_dir)
        former_export.remove_unnamed(former, output_dir)

    def _student(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def _find_base(self, student: Any) -> Checkpoint | None:
        name = AdapterConfig.of_model(self.trainer.model).adapter_name
        if name != "default":
            raise UnsupportedError(
                f"The adapter of `model` is called {name!r}. transformers copies an adapter of that name neither to "
                "the Hub nor back from a checkpoint. Leave `adapter_name` out of `get_peft_model`."
            )
        load = (self.trainer.args.model_init_kwargs or {}) if isinstance(student, str) else {}
        is_known = isinstance(student, str) and not _ELSEWHERE & load.keys()
        return model_files.base_source(self.trainer.model, load.get("revision"), is_known=is_known)

    def _pin(self, teacher: Any) -> ModelSource | None:
        args = self.trainer.args
        load = {"revision": args.teacher_model_revision} | (args.teacher_model_init_kwargs or {})
        if not isinstance(teacher, str) or load.keys() - _OF_NO_MATTER:
            return None
        try:
            checkpoint = find_checkpoint(teacher, load["revision"], local_files_only=True)
        except ConfigError:
            return None
        if self.base is not None and checkpoint.folder.resolve() == self.base.folder.resolve():
            return ModelSource(base=True)
        if not checkpoint.in_hub or checkpoint.commit is None or checkpoint.is_adapter:
            return None
        return ModelSource(repo_id=teacher, commit=checkpoint.commit)

    def _warn_of_uploads(self) -> None:
        single = len(self.trainer.partners) == 1
        copied = {
            "teacher_model" if single else f"teacher_model[{index}]": partner
            for index, (partner, pinned) in enumerate(zip(self.trainer.partners, self._pinned, strict=True))
            if pinned is None
        }
        if self.is_adapter and (self.base is None or not self.base.in_hub or self.base.commit is None):
            copied["the base of `model`"] = self._student()
        if copied:
            sizes = [f"{name} ({_gigabytes(model):.2g} GB)" for name, model in copied.items()]
            logger.warning(
                f"`push_to_hub=True` uploads {', '.join(sizes)} to {self.trainer.hub_model_id!r} too: only a model "
                "given by its Hub id can be referred to instead. Whoever may read the repository may read these."
            )

    def _references(self, home: Path) -> tuple[tuple[ModelSource, ...], ModelSource | None]:
        """References of a `mixing.json` in `home`, and what the student's adapter is put on; written once."""
        home = home.resolve()
        if home not in self._written:
            self._written[home] = self._write_references(home)
        references, base = self._written[home]
        paths = [source.path for source in (*references, base) if source is not None and source.path is not None]
        if not all((home / path).is_dir() for path in paths):  # somebody tidied up
            self._written[home] = self._write_references(home)
        return self._written[home]

    def _write_references(self, home: Path) -> tuple[tuple[ModelSource, ...], ModelSource | None]:
        student_dtype = self._student().dtype
        sources = []
        for index, partner in enumerate(self.trainer.partners):
            pinned = self._pinned[index]
            dtype = None if partner.dtype == student_dtype else model_files.dtype_name(partner.dtype)
            if pinned is None:
                name = "reference" if len(self.trainer.partners) == 1 else f"reference_{index}"
                with _replacing(home / name) as folder:
                    model_files.save_model(_merged(partner), self._tokenizer(index), folder)
                pinned = model_files.folder_source(home / name, dtype)
            sources.append(pinned if pinned.base else replace(pinned, dtype=dtype))
        references = tuple(sources) or (ModelSource(base=True),)
        if not self.is_adapter:
            return references, None
        return references, self._write_base(home / ("reference" if any(r.base for r in references) else "base"))

    def _write_base(self, target: Path) -> ModelSource:
        if self.base is not None and self.base.in_hub and self.base.commit is not None:
            return ModelSource(repo_id=self.base.name, commit=self.base.commit)
        with _replacing(target) as folder:
            if self.base is None:
                model_files.save_base(self._student(), self.trainer.processing_class, folder)
            else:
                model_files.copy_checkpoint(self.base, folder)
        return model_files.folder_source(target, None)

    def _tokenizer(self, index: int) -> Any:
        tokenizer = find_tokenizer(self._teachers[index], "teacher_model")
        return tokenizer or self.trainer.processing_class  # built in memory: it reads the student's ids


class MixedPolicySaving:
    """In front of the other bases: with `mixed_policy_files` set, what is saved and pushed is the mixture."""

    mixed_policy_files: MixedPolicyFiles | None = None
    loaded_policy: MixingSpec | None = None
    """Mixture of the best checkpoint, once the student is that checkpoint's (`load_best_model_at_end`)."""
    args: Any
    state: Any

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, see [`~transformers.Trainer.train`]."""
        self.loaded_policy = None
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        best = Path(self.state.best_model_checkpoint)
        if self.mixed_policy_files is not None and (best / SPEC_FILE).is_file():
            self.loaded_policy = MixingSpec.read(best)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the student, see [`~transformers.Trainer.save_model`]; with `objective="mixed"` so that transformers alone
        decodes the mixed policy from the folder, at the teacher weight of the moment.
        """
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        # The process that saves is the only one that writes; gathering the student is the parent's work
        files = self.mixed_policy_files if self.args.should_save else None
        if files is not None:
            files.start(folder)
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if files is not None:
            files.finish(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        files = self.mixed_policy_files
        if files is None:
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]
            return
        checkpoint, output_dir = Path(checkpoint_folder), Path(self.args.output_dir)
        with _compat.before_upload(output_dir, lambda: files.follow(checkpoint, output_dir)):
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]


def _move_adapter(folder: Path) -> None:
    target = folder / model_files.ADAPTER_FOLDER
    target.mkdir(exist_ok=True)
    for name in model_files.ADAPTER_FILES:
        if (folder / name).is_file():
            os.replace(folder / name, target / name)


def _gigabytes(model: Any) -> float:
    return sum(p.element_size() * getattr(p, "ds_numel", p.numel()) for p in model.parameters()) / 1e9


def _merged(partner: Any) -> Any:
    """A partner without adapters: they are merged into a copy."""
    if not is_peft_model(partner):
        return partner
    logger.warning("`teacher_model` is an adapter: the reference is saved with the adapter merged into its base.")
    return copy.deepcopy(partner).merge_and_unload()


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `target` once it is complete."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)

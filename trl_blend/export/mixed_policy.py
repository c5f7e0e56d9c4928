"""`export_mixed_policy`: a student and its references as one directory that transformers alone can decode."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.export import model_files
from trl_blend.export.card import Part, write_policy_card
from trl_blend.export.spec import SPACES, SPEC_FILE, MixingSpec, ModelSource
from trl_blend.models.checkpoints import Checkpoint, find_checkpoint
from trl_blend.models.compatibility import check_tokenizers, check_vocab_sizes
from trl_blend.models.fingerprint import fingerprint_tokenizer
from trl_blend.models.loading import find_config, find_tokenizer
from trl_blend.ops.mixing import validate_weights


def export_mixed_policy(
    student: Any,
    reference: Any,
    teacher_weight: float | Sequence[float],
    output_dir: str | os.PathLike[str],
    *,
    mixing_space: str = "logits",
    processing_class: Any = None,
    student_revision: str | None = None,
    reference_revision: str | None = None,
    copy_reference: bool | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """
    Write a directory that decodes a mixed policy with transformers and torch alone, from a folder or from the Hub.

    It holds the student (an adapter: in `adapter/`), a model card, `mixing.json`, `custom_generate/generate.py` and,
    if the reference is copied, `reference/` (several: `reference_0/`, …). `mixing.json` is written last, so an
    interrupted export leaves a directory that refuses to be decoded.

    An adapter is put into a subfolder on purpose: with `adapter_config.json` at the top of a Hub repository,
    `AutoModelForCausalLM.from_pretrained` goes to the base model's repository and never sees this one's code.

    Args:
        student (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Hub id, folder or model; an adapter stays one.
        reference (`str`, [`~transformers.PreTrainedModel`], a list of them, or `None`):
            Frozen model(s) with the student's tokenizer. `None`, or the name of the adapter's base: the student's own
            base with its adapter disabled, of which one copy is loaded.
        teacher_weight (`float` or `Sequence[float]`):
            Weight of each reference, in `[0, 1]`, at most 1 together. 0 decodes the plain student and loads no
            reference.
        output_dir (`str` or `os.PathLike`):
            A directory that is new or empty.
        mixing_space (`str`, *optional*, defaults to `"logits"`):
            `"logits"` or `"probs"`, as in [`LogitMixGRPOConfig`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the student, by default the one it comes with.
        student_revision, reference_revision (`str`, *optional*):
            Branch, tag or commit of a Hub id.
        copy_reference (`bool`, *optional*):
            Whether to copy the reference into the directory. By default a Hub id is pinned to its commit, anything
            else copied.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether a reference's tokenizer may run code of its own to be compared. Models, and a student's tokenizer,
            with code of their own are refused.

    Returns:
        `Path`: `output_dir`.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If an argument is outside its range, or a model cannot be found.
        [`~trl_blend.errors.TokenizerMismatchError`]: If a reference maps an id to another token than the student.
        [`~trl_blend.errors.UnsupportedError`]: If a model cannot be exported faithfully.

    Example:

    ```python
    from trl_blend import export_mixed_policy

    export_mixed_policy("out/student", "Qwen/Qwen2.5-1.5B-Instruct", 0.3, "out/mixed")
    ```
    """
    weights = validate_weights(
        teacher_weight if isinstance(teacher_weight, Sequence) else (teacher_weight,), "teacher_weight"
    )
    if mixing_space not in SPACES:
        raise ConfigError(f"`mixing_space={mixing_space!r}` is unknown. Choose one of {', '.join(SPACES)}.")
    references = list(reference) if isinstance(reference, (list, tuple)) else [reference]
    if len(weights) != len(references):
        raise ConfigError(
            f"`teacher_weight={list(weights)}` has {len(weights)} value(s) for {len(references)} reference(s). Give "
            "one weight per reference."
        )
    output = Path(output_dir)
    load = {"trust_remote_code": trust_remote_code or None}
    one = _described(student, "student", student_revision, processing_class, load)
    if not type(one.tokenizer).__module__.startswith("transformers."):
        raise UnsupportedError(_TOKENIZER_CODE.format(type(one.tokenizer).__name__))
    if copy_reference is False and one.adapter is not None and not (one.base and one.base.in_hub and one.base.commit):
        raise ConfigError(_NOT_PINNED.format("student", "its base is no Hub id"))
    others = []
    for index, item in enumerate(references):
        name = "reference" if len(references) == 1 else f"reference[{index}]"
        others.append(_described_reference(item, name, reference_revision, one, load, copy_reference))
    _check_output(output, [one, *others])
    return _write(one, others, weights, mixing_space, output, copy_reference)


_ADAPTER = (
    "`{}` is an adapter. Merge it into its base (`merge_and_unload()`) and pass the merged model; the student's own "
    "base is `reference=None`."
)
_NOT_PINNED = "`copy_reference=False` pins a Hub id to its commit, but `{}`: {}. Leave `copy_reference` out."

_TOKENIZER_CODE = (
    "The tokenizer of `student` ({}) runs code of its own, and a mixed policy runs no code but its generate.py. Pass "
    "a `processing_class` that transformers knows."
)


@dataclass
class _Model:
    """One of the models: a checkpoint or a model in memory, and what is known of it before anything is written."""

    argument: str
    config: Any
    tokenizer: Any
    checkpoint: Checkpoint | None = None
    model: Any = None
    base: Checkpoint | None = None  # of an adapter
    is_base: bool = False  # the reference is the student's own base

    @property
    def adapter(self) -> Any:
        """The checkpoint or model, if it is an adapter."""
        if self.checkpoint is not None:
            return self.checkpoint if self.checkpoint.is_adapter else None
        return self.model if getattr(self.model, "peft_config", None) else None

    @property
    def part(self) -> Part:
        """As the card names it."""
        if self.checkpoint is not None:
            return Part(self.checkpoint.name, self.checkpoint.commit, self.is_base)
        return Part(getattr(self.config, "_name_or_path", "") or "", is_base=self.is_base)

    @property
    def dtype(self) -> str:
        return model_files.dtype_name(self.model.dtype if self.model is not None else self.config.dtype)


def _described(item: Any, argument: str, revision: str | None, tokenizer: Any, load: dict[str, Any]) -> _Model:
    if not isinstance(item, (str, os.PathLike)):
        if revision is not None:
            raise ConfigError(f"`{argument}_revision={revision!r}` is for a Hub id, but `{argument}` is a model.")
        config = find_config(item, argument)
        found = _Model(
            argument, config, tokenizer or find_tokenizer(item, argument, required=True, **load), model=item
        )
        if found.adapter is not None and argument != "student":
            raise UnsupportedError(_ADAPTER.format(argument))
        found.base = model_files.base_source(item) if found.adapter is not None else None
    else:
        checkpoint = find_checkpoint(os.fspath(item), revision)
        spec = checkpoint.folder / SPEC_FILE
        if spec.is_file() and (argument != "student" or MixingSpec.read(checkpoint.folder).adapter is not None):
            raise ConfigError(
                f"`{argument}={checkpoint.name!r}` is a mixed policy itself, which is no single model. Pass one "
                "of the models it is mixed from."
            )
        if checkpoint.is_adapter and argument != "student":
            raise UnsupportedError(_ADAPTER.format(argument))
        name = str(checkpoint.folder)
        config = find_config(name, argument, **load)
        tokenizer = tokenizer or find_tokenizer(name, argument, required=True, **load)
        found = _Model(argument, config, tokenizer, checkpoint=checkpoint)
        if checkpoint.is_adapter:
            settings = model_files.AdapterConfig.of_folder(checkpoint.folder)
            found.base = find_checkpoint(settings.base_name or "", settings.base_revision)
    if not type(found.config).__module__.startswith("transformers."):
        raise UnsupportedError(
            f"`{argument}` ({type(found.config).__name__}) runs code of its own, and a mixed policy runs no code but "
            "its generate.py. Use a model that transformers knows."
        )
    return found


def _described_reference(
    item: Any, argument: str, revision: str | None, student: _Model, load: dict[str, Any], copy: bool | None
) -> _Model:
    if item is None or _is_base_of(item, revision, student):
        model_files.check_base_is_reference(student.checkpoint if student.model is None else student.model)
        return _Model(argument, student.config, student.tokenizer, is_base=True)
    tokenizer = None
    if not isinstance(item, (str, os.PathLike)) and not getattr(item.config, "_name_or_path", ""):
        tokenizer = student.tokenizer  # built in memory: it reads the student's ids or nothing
    found = _described(item, argument, revision, tokenizer, load)
    if item is student.model:
        raise ConfigError(f"`{argument}` is `student` itself. Pass another model.")
    if copy is False and (found.checkpoint is None or not found.checkpoint.in_hub or not found.checkpoint.commit):
        raise ConfigError(_NOT_PINNED.format(argument, "it is no Hub id"))
    check_tokenizers(student.tokenizer, found.tokenizer, partner_name=argument)
    rows = [one.config.get_text_config().vocab_size for one in (student, found)]
    check_vocab_sizes(*rows, len(student.tokenizer), partner_name=argument)
    return found


def _is_base_of(item: Any, revision: str | None, student: _Model) -> bool:
    if not isinstance(item, (str, os.PathLike)) or student.base is None:
        return False
    return find_checkpoint(os.fspath(item), revision).folder.resolve() == student.base.folder.resolve()


def _check_output(output: Path, models: list[_Model]) -> None:
    for one in models:
        if one.checkpoint is not None and output.resolve() == one.checkpoint.folder.resolve():
            raise ConfigError(f"`output_dir={str(output)!r}` is the folder of `{one.argument}`. Choose another.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"`output_dir={str(output)!r}` is not empty. Remove it, if it is a former export (one without {SPEC_FILE} "
            "was interrupted), or choose another."
        )


def _write(
    student: _Model,
    references: list[_Model],
    weights: tuple[float, ...],
    space: str,
    output: Path,
    copy: bool | None,
) -> Path:
    model_files.add_code(output)  # first: without `mixing.json` it refuses to decode
    _write_student(student, output)
    base = None
    if student.adapter is not None:
        shared = any(reference.is_base for reference in references)
        base = _base(student, output / ("reference" if shared else "base"), copy)
    sources = []
    for index, reference in enumerate(references):
        if reference.is_base:
            sources.append(ModelSource(base=True))
        else:
            name = "reference" if len(references) == 1 else f"reference_{index}"
            sources.append(_source(reference, output / name, copy, student.dtype))
    tokenizer_sha256 = fingerprint_tokenizer(student.tokenizer).parts["vocabulary"]
    adapter = None if base is None else model_files.ADAPTER_FOLDER
    write_policy_card(
        output,
        student.part,
        [reference.part for reference in references],
        weights,
        space,
        is_adapter=adapter is not None,
        has_chat_template=bool(student.tokenizer.chat_template),
    )
    MixingSpec(weights, tuple(sources), space, tokenizer_sha256, adapter, base).write(output)
    return output


def _write_student(student: _Model, output: Path) -> None:
    adapter, folder = student.adapter, output / model_files.ADAPTER_FOLDER
    if adapter is None and student.checkpoint is not None:
        model_files.copy_checkpoint(student.checkpoint, output)
    elif adapter is None:
        model_files.save_model(student.model, student.tokenizer, output)
    else:
        generation_config = GenerationConfig()
        if student.checkpoint is not None:
            model_files.copy_adapter(student.checkpoint, folder)
            for checkpoint in (student.base, student.checkpoint):
                if checkpoint is not None and (checkpoint.folder / "generation_config.json").is_file():
                    generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
        else:
            model_files.save_adapter(student.model, folder)
            generation_config = student.model.generation_config
        model_files.write_adapter_root(output, student.config, generation_config, student.dtype)
    student.tokenizer.save_pretrained(output)
    model_files.point_config_at_code(output)


def _base(student: _Model, folder: Path, copy: bool | None) -> ModelSource:
    if student.base is None:
        model_files.save_base(student.model, student.tokenizer, folder)
        return model_files.folder_source(folder, None)
    return _source(_Model("student", student.config, student.tokenizer, student.base), folder, copy, student.dtype)


def _source(model: _Model, folder: Path, copy: bool | None, student_dtype: str) -> ModelSource:
    dtype = None if model.dtype == student_dtype else model.dtype
    checkpoint = model.checkpoint
    if checkpoint is not None and checkpoint.in_hub and checkpoint.commit and not copy:
        return ModelSource(repo_id=checkpoint.name, commit=checkpoint.commit, dtype=dtype)
    if checkpoint is not None:
        model_files.copy_checkpoint(checkpoint, folder)
        if not (folder / "tokenizer_config.json").is_file():
            model.tokenizer.save_pretrained(folder)
    else:
        model_files.save_model(model.model, model.tokenizer, folder)
    return model_files.folder_source(folder, dtype)

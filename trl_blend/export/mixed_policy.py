"""`export_mixed_policy`: a student and its references as one directory that transformers alone can decode."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.export import model_files
from trl_blend.export.card import Part, write_policy_card
from trl_blend.export.policy_folder import Student, Weights, pinned, write_policy
from trl_blend.export.spec import SPEC_FILE, MixingSpec, ModelSource, check_mixture
from trl_blend.models.checkpoints import Checkpoint, find_checkpoint, inner_folder
from trl_blend.models.compatibility import check_tokenizers, check_vocab_sizes
from trl_blend.models.loading import find_config, find_tokenizer, model_class
from trl_blend.models.wrappers import AdapterConfig, what_changes_the_base


def export_mixed_policy(
    student: Any,
    reference: Any,
    teacher_weight: float | Sequence[float] | None,
    output_dir: str | os.PathLike[str],
    *,
    mixing_space: str | None = None,
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

    A training checkpoint of [`LogitMixGRPOTrainer`] with `objective="mixed"` has a `mixing.json` that says what it was
    mixed with: reference, weight and space are those, unless they are given.

    Args:
        student (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Hub id, folder or model; an adapter stays one.
        reference (`str`, [`~transformers.PreTrainedModel`], a list of them, or `None`):
            Frozen model(s) with the student's tokenizer. `None`: what `mixing.json` in the student's folder names;
            without that file, or for the name of the adapter's base, the student's own base with its adapter
            disabled, of which one copy is loaded.
        teacher_weight (`float` or `Sequence[float]`, or `None`):
            Weight of each reference, in `[0, 1]`, at most 1 together; with `mixing_space="arithmetic"` any numbers. 0
            decodes the plain student and loads no reference. `None`: what `mixing.json` in the student's folder says.
        output_dir (`str` or `os.PathLike`):
            A directory that is new or empty.
        mixing_space (`str`, *optional*):
            `"logits"`, `"probs"` or `"arithmetic"`, as in [`LogitMixGRPOConfig`]. Defaults to what `mixing.json` in
            the student's folder says, `"logits"` without that file.
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
    output = Path(output_dir)
    load = {"trust_remote_code": trust_remote_code or None}
    one = _described(student, "student", student_revision, processing_class, load)
    if not type(one.tokenizer).__module__.startswith("transformers."):
        raise UnsupportedError(_TOKENIZER_CODE.format(type(one.tokenizer).__name__))
    recorded = one.recorded
    if teacher_weight is None:
        if recorded is None:
            raise ConfigError(
                f"`teacher_weight` is not given, and there is no {SPEC_FILE} beside `student` to say it."
            )
        teacher_weight = recorded.weights
    space = mixing_space or (recorded.space if recorded else "logits")
    given: list[Any] = list(reference) if isinstance(reference, (list, tuple)) else [reference]
    if recorded is not None and reference is None:
        given = list(recorded.references)
    given_weights = teacher_weight if isinstance(teacher_weight, Sequence) else (teacher_weight,)
    weights = check_mixture(given_weights, len(given), space)
    others = []
    for index, item in enumerate(given):
        name = "reference" if len(given) == 1 else f"reference[{index}]"
        others.append(_described_reference(item, name, reference_revision, one, load))
    sources = [_source(other, copy_reference) for other in others]
    base = None
    if one.is_adapter:
        base = _source(replace(one, checkpoint=one.base), copy_reference)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"`output_dir={str(output)!r}` is not empty. Remove it, if it is a former export (one without {SPEC_FILE} "
            "was interrupted), or choose another."
        )
    _write_student(one, output)
    write_policy_card(
        output,
        one.part,
        [other.part for other in others],
        weights,
        space,
        is_adapter=one.is_adapter,
        has_chat_template=bool(one.tokenizer.chat_template),
    )
    described = Student(one.tokenizer, one.dtype, one.config, _generation_config(one), base)
    write_policy(output, described, sources, weights, space, recorded.step if recorded else None)
    return output


_ADAPTER = (
    "`{}` is an adapter. Merge it into its base (`merge_and_unload()`) and pass the merged model; the student's own "
    "base is `reference=None`."
)
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
    dtype: str
    is_adapter: bool = False
    checkpoint: Checkpoint | None = None
    model: Any = None
    base: Checkpoint | None = None  # of an adapter
    is_base: bool = False  # the reference is the student's own base
    recorded: MixingSpec | None = None  # what `mixing.json` in the student's folder says

    @property
    def part(self) -> Part:
        """As the card names it."""
        if self.checkpoint is not None:
            return Part(self.checkpoint.name, self.checkpoint.commit, self.is_base)
        return Part(getattr(self.config, "_name_or_path", "") or "", is_base=self.is_base)


def _described(item: Any, argument: str, revision: str | None, tokenizer: Any, load: dict[str, Any]) -> _Model:
    checkpoint, model = None, item
    if isinstance(item, (str, os.PathLike)):
        checkpoint, model = find_checkpoint(os.fspath(item), revision), None
    elif revision is not None:
        raise ConfigError(f"`{argument}_revision={revision!r}` is for a Hub id, but `{argument}` is a model.")
    is_adapter = bool(getattr(model, "peft_config", None)) if checkpoint is None else checkpoint.is_adapter
    if is_adapter and argument != "student":
        raise UnsupportedError(_ADAPTER.format(argument))
    recorded = None if checkpoint is None else _recorded(checkpoint, argument)
    base = None
    if is_adapter:
        base = model_files.base_checkpoint(model) if checkpoint is None else _base_of(checkpoint, recorded)
    named = base if checkpoint is not None and is_adapter else checkpoint
    if named is not None and model_files.holds_policy(named.folder):  # whose student is wanted
        config = model_files.student_config(named.folder)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(named.folder, trust_remote_code=False)
    else:
        config = find_config(model if named is None else str(named.folder), argument, **load)
    if not type(config).__module__.startswith("transformers."):
        raise UnsupportedError(
            f"`{argument}` ({type(config).__name__}) runs code of its own, and a mixed policy runs no code but its "
            "generate.py. Use a model that transformers knows."
        )
    _check_decodes(config, argument)
    if checkpoint is not None and is_adapter:
        _check_not_resized(checkpoint, argument, config, revision, load)
    if tokenizer is None:
        own = checkpoint is not None and (checkpoint.folder / "tokenizer_config.json").is_file()
        named = checkpoint if own else named  # an adapter may have been saved without one
        tokenizer = find_tokenizer(model if named is None else str(named.folder), argument, required=True, **load)
    dtype = model_files.dtype_name(config.dtype if model is None else model.dtype)
    if base is not None and recorded is not None and recorded.base is not None:
        dtype = recorded.base.dtype or dtype
    return _Model(argument, config, tokenizer, dtype, is_adapter, checkpoint, model, base, recorded=recorded)


def _check_not_resized(
    adapter: Checkpoint, argument: str, base: Any, revision: str | None, load: dict[str, Any]
) -> None:
    """Refuse an adapter with other vocabulary rows than its base: whoever decodes the policy does not resize that."""
    configs = find_config(adapter.name, argument, revision=revision, **load), base
    own, rows = (config.get_text_config().vocab_size for config in configs)
    if own != rows:
        raise UnsupportedError(
            f"`{argument}={adapter.name!r}` is an adapter with {own} vocabulary rows, its base has {rows}: whoever "
            "decodes the policy puts it on the base as it is. Merge it (`merge_and_unload()`) and export the merged "
            "model."
        )


def _check_decodes(config: Any, argument: str) -> None:
    """Refuse what transformers could not load again as the model that it is to be."""
    architecture = (config.architectures or [""])[0]
    if argument == "student" and type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedError(
            f"`student` is a {type(config).__name__.removesuffix('Config')} model, which `AutoModelForCausalLM` does "
            "not load, so nobody could decode the mixed policy. Export its text model, or mix it the other way round: "
            "as the reference."
        )
    named = getattr(transformers, architecture, None)
    if named is not None and not named.can_generate() and not config.tie_word_embeddings:
        raise UnsupportedError(
            f"`{argument}` was saved from a {architecture}, which has no language-model head, so that the mixed "
            "policy would be decoded with random numbers. Pass one that was saved with its head."
        )
    if model_class(config) is AutoModelForCausalLM and type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedError(
            f"`{argument}` is a {type(config).__name__.removesuffix('Config')} model, which transformers does not "
            "load as a language model. Use one that `AutoModelForCausalLM` loads."
        )


def _recorded(checkpoint: Checkpoint, argument: str) -> MixingSpec | None:
    """What `mixing.json` in a checkpoint says, if there is one."""
    if not (checkpoint.folder / SPEC_FILE).is_file():
        return None
    spec = MixingSpec.read(checkpoint.folder)
    if argument != "student" or spec.adapter not in (None, "."):
        raise ConfigError(
            f"`{argument}={checkpoint.name!r}` is a mixed policy itself, which is no single model. Pass one of the "
            "models it is mixed from."
        )
    return spec


def _base_of(adapter: Checkpoint, recorded: MixingSpec | None) -> Checkpoint:
    """What an adapter is put on: the base of its training where that is recorded, else as PEFT names it."""
    if recorded is not None and recorded.base is not None:
        return find_checkpoint(*_locate(recorded.base, adapter, "base", "the model with its adapter as `student`"))
    settings = AdapterConfig.of_folder(adapter.folder)
    if not settings.base_name:
        raise ConfigError(
            f"`student={adapter.name!r}` is an adapter that does not name its base. Pass the loaded model."
        )
    return find_checkpoint(settings.base_name, settings.base_revision)


def _locate(source: ModelSource, student: Checkpoint, what: str, remedy: str) -> tuple[str, str | None]:
    """Name and revision of a model that `mixing.json` in the student's folder names."""
    if source.repo_id is not None:
        return source.repo_id, source.commit
    folder = None if source.path is None else inner_folder(student, source.path)
    if folder is None or not folder.is_dir():
        where = "it was a model in memory" if folder is None else f"{folder} is not there"
        raise ConfigError(
            f"`student={student.name!r}` was mixed with a {what} that its {SPEC_FILE} cannot lead to: {where}. Pass "
            f"{remedy}."
        )
    return str(folder), None


def _described_reference(
    item: Any, argument: str, revision: str | None, student: _Model, load: dict[str, Any]
) -> _Model:
    dtype = None
    if isinstance(item, ModelSource):  # of `mixing.json` in the student's folder
        assert student.checkpoint is not None
        dtype = item.dtype or student.dtype
        recorded, (item, revision) = item, (None, None)
        if not recorded.base:
            item, revision = _locate(recorded, student.checkpoint, "reference", f"`{argument}`")
    if item is None or _is_base_of(item, revision, student):
        _check_base_is_reference(student)
        return _Model(argument, student.config, student.tokenizer, student.dtype, is_base=True)
    tokenizer = None
    if not isinstance(item, (str, os.PathLike)) and not getattr(item.config, "_name_or_path", ""):
        tokenizer = student.tokenizer  # built in memory: it reads the student's ids or nothing
    found = _described(item, argument, revision, tokenizer, load)
    found.dtype = dtype or found.dtype
    if item is student.model:
        raise ConfigError(f"`{argument}` is `student` itself. Pass another model.")
    check_tokenizers(student.tokenizer, found.tokenizer, partner_name=argument)
    rows, others = (one.config.get_text_config().vocab_size for one in (student, found))
    check_vocab_sizes(rows, others, student.tokenizer, partner_name=argument)
    return found


def _check_base_is_reference(student: _Model) -> None:
    """Check that an adapter left its base as it was, so that the base is what the student started from."""
    if not student.is_adapter:
        raise UnsupportedError(
            "`reference=None` means the base of an adapter, and `student` has none. Pass the reference: a name, a "
            "folder or a model."
        )
    if student.checkpoint is None:
        settings = [config.to_dict() for config in student.model.peft_config.values()]
    else:
        path = student.checkpoint.folder / "adapter_config.json"
        settings = [json.loads(path.read_text(encoding="utf-8"))]
    for changed_by in filter(None, map(what_changes_the_base, settings)):
        raise UnsupportedError(
            f"The adapter of `student` has `{changed_by}`, which changes the base's own weights. Pass the reference "
            "as a model of its own."
        )


def _is_base_of(item: Any, revision: str | None, student: _Model) -> bool:
    if not isinstance(item, (str, os.PathLike)) or student.base is None:
        return False
    return find_checkpoint(os.fspath(item), revision).folder.resolve() == student.base.folder.resolve()


def _source(model: _Model, copy: bool | None) -> ModelSource | Weights:
    """What is written of a reference or a base: its name, where that is pinned, or its weights."""
    if model.is_base:
        return ModelSource(base=True)
    named = None if copy else pinned(model.checkpoint, model.dtype)
    if named is None and copy is False:
        what = "the base of `student`" if model.argument == "student" else f"`{model.argument}`"
        raise ConfigError(
            f"`copy_reference=False` pins a Hub id to its commit, but {what} is no Hub id. Leave `copy_reference` out."
        )
    return named or Weights(model.checkpoint, model.model, model.dtype)


def _write_student(student: _Model, output: Path) -> None:
    if student.checkpoint is not None:
        copy = model_files.copy_adapter if student.is_adapter else model_files.copy_checkpoint
        copy(student.checkpoint, output)
    elif student.is_adapter:
        model_files.save_adapter(student.model, output)
    else:
        model_files.save_model(student.model, output)
    student.tokenizer.save_pretrained(output)


def _generation_config(student: _Model) -> GenerationConfig:
    """That of the checkpoint, of an adapter without one that of its base."""
    if student.model is not None:
        return student.model.generation_config
    for checkpoint in (student.checkpoint, student.base):
        if checkpoint is not None and (checkpoint.folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(checkpoint.folder)
    return GenerationConfig()

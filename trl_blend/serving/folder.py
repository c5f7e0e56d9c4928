"""What an exported mixed policy is a blend of, as an engine reads it."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.export.model_files import student_config
from trl_blend.export.spec import SPEC_FILE, MixingSpec, ModelSource
from trl_blend.generation.rules import mixing_rule
from trl_blend.models.checkpoints import Checkpoint, find_checkpoint, inner_folder
from trl_blend.models.limits import eos_token_ids, num_token_ids
from trl_blend.serving.arguments import overrides_of
from trl_blend.serving.blend import Blend, Partner


def blend_of_folder(name: str, revision: str | None = None) -> tuple[list[Partner], Blend]:
    """
    Partners and blend of a mixed policy that [`~trl_blend.export_mixed_policy`] wrote, whose student is the engine's
    model. Rows that are no tokens, which the `generate.py` of the folder does not draw, are not drawn either.

    Args:
        name (`str`):
            Folder or Hub id.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If it holds no mixed policy.
        [`~trl_blend.errors.UnsupportedError`]: If its student is an adapter, which has no weights of its own.
    """
    checkpoint, spec = _read(name, revision)
    partners = [_partner(source, checkpoint) for source in spec.references]
    if not any(spec.weights):
        return partners, Blend()
    return partners, Blend(mixing_rule(spec.space, spec.weights), vocab_size=_num_tokens(checkpoint.folder))


def student_of_folder(name: str, revision: str | None = None) -> Any:
    """
    Configuration of the student of a mixed policy.

    Args:
        name, revision:
            See [`blend_of_folder`].
    """
    return student_config(find_checkpoint(name, revision).folder)


def config_of_folder(name: str, revision: str | None = None) -> Any:
    """
    Configuration of a mixed policy as an engine reads it: that of its student, with the architecture of a blend, and
    the largest number of experts of a reference that has some.

    Args:
        name, revision:
            See [`blend_of_folder`].

    Raises:
        See [`blend_of_folder`].
    """
    checkpoint, spec = _read(name, revision)
    config = student_config(checkpoint.folder)
    config.update(overrides_of([_partner(source, checkpoint) for source in spec.references]))
    return config


def _read(name: str, revision: str | None) -> tuple[Checkpoint, MixingSpec]:
    checkpoint = find_checkpoint(name, revision)
    spec = MixingSpec.read(checkpoint.folder)
    if spec.adapter is not None:
        raise UnsupportedError(
            f"The student of {name!r} is an adapter, and an engine loads whole models. Merge it into its base "
            "(`merge_and_unload()`) and export the merged model, with the base as `reference`."
        )
    return checkpoint, spec


def _num_tokens(folder: Path) -> int:
    # Not `find_tokenizer`: what looks for one model refuses a mixed policy
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    declares = (folder / "generation_config.json").is_file()
    ends = eos_token_ids(GenerationConfig.from_pretrained(folder)) if declares else ()
    return num_token_ids(tokenizer, ends)


def _partner(source: ModelSource, student: Checkpoint) -> Partner:
    if source.repo_id is not None:
        return Partner(source.repo_id, source.commit, source.dtype)
    if source.path is None:
        raise ConfigError(
            f"{SPEC_FILE} of {student.name!r} leads to no reference: it was a model in memory. Export the policy with "
            "`reference`."
        )
    return Partner(str(inner_folder(student, source.path)), None, source.dtype)

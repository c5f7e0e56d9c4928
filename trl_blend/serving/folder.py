"""What an exported mixed policy is a blend of, as an engine reads it."""

from typing import Any

from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.export.model_files import student_config
from trl_blend.export.spec import SPEC_FILE, MixingSpec, ModelSource
from trl_blend.generation.rules import mixing_rule
from trl_blend.models.checkpoints import Checkpoint, find_checkpoint
from trl_blend.serving.arguments import overrides_of
from trl_blend.serving.blend import Blend, Partner


def blend_of_folder(name: str, revision: str | None = None) -> tuple[list[Partner], Blend]:
    """
    Partners and blend of a mixed policy that [`~trl_blend.export_mixed_policy`] wrote, whose student is the engine's
    model.

    Args:
        name (`str`):
            Folder or Hub id.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If it holds no mixed policy.
        [`~trl_blend.errors.UnsupportedError`]: If its student is an adapter, which has no weights of its own.
    """
    checkpoint = find_checkpoint(name, revision)
    spec = MixingSpec.read(checkpoint.folder)
    if spec.adapter is not None:
        raise UnsupportedError(
            f"The student of {name!r} is an adapter, and an engine loads whole models. Merge it into its base "
            "(`merge_and_unload()`) and export the merged model, with the base as `reference`."
        )
    partners = [_partner(source, checkpoint) for source in spec.references]
    return partners, Blend(mixing_rule(spec.space, spec.weights) if any(spec.weights) else None)


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
    partners, _ = blend_of_folder(name, revision)
    config = student_of_folder(name, revision)
    config.update(overrides_of(partners))
    return config


def _partner(source: ModelSource, student: Checkpoint) -> Partner:
    if source.repo_id is not None:
        return Partner(source.repo_id, source.commit, source.dtype)
    if source.path is None:
        raise ConfigError(
            f"{SPEC_FILE} of {student.name!r} leads to no reference: it was a model in memory. Export the policy with "
            "`reference`."
        )
    return Partner(str((student.folder / source.path).resolve()), None, source.dtype)

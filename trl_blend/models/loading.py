"""Loading a causal language model by name or folder, adapters and 4-bit weights included, and what comes before it."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from trl_blend import _compat
from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.models.compatibility import check_partner_model


DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class LoadOptions:
    """
    How a model is loaded by name.

    Args:
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `"auto"` (the checkpoint's), `"bfloat16"`, `"float16"` or `"float32"`.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether to quantize the weights to 4 bits (NF4, computed in bfloat16) with bitsandbytes.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the checkpoint.

    Raises:
        [`~trl_blend.errors.ConfigError`]: For an unknown dtype, or 4-bit weights without bitsandbytes.
    """

    revision: str | None = None
    dtype: str = "auto"
    load_in_4bit: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"`dtype={self.dtype!r}` is unknown. Choose one of {', '.join(DTYPES)}.")
        if self.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "`load_in_4bit=True` needs bitsandbytes, which is not installed. Run `pip install bitsandbytes`, or "
                "load in `dtype='bfloat16'`."
            )

    @property
    def weights(self) -> str:
        """What the forward pass computes with, as one word."""
        return "4bit" if self.load_in_4bit else self.dtype

    @property
    def hub(self) -> dict[str, Any]:
        """Arguments of every `from_pretrained`."""
        return _given({"revision": self.revision, "trust_remote_code": self.trust_remote_code or None})


def check_not_loaded(model: Any, argument: str, options: LoadOptions) -> None:
    """
    Refuse options of loading for a model that is loaded already.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If one is set.
    """
    for name, default in vars(LoadOptions()).items():
        value = getattr(options, name)
        if value != default and not isinstance(model, str):
            raise ConfigError(
                f"`{name}={value!r}` says how to load `{argument}` by name, but a loaded {type(model).__name__} was "
                f"given. Drop `{name}`, or pass the name."
            )


def find_config(model: str | PreTrainedModel, argument: str, **options: Any) -> PretrainedConfig:
    """
    Configuration of a model; for an adapter, that of its base.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model.
        argument (`str`):
            Name of the argument that holds it, for the error message.
        options:
            Of `from_pretrained`, such as `revision`. `None` counts as not given.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is no such model.
        [`~trl_blend.errors.UnsupportedError`]: If it is an encoder-decoder model.
    """
    config: Any = None
    if not isinstance(model, str):
        check_partner_model(model, argument)
        config = model.config
    else:
        adapter = _adapter_config(model, argument, **options)
        name = model if adapter is None else adapter.base_model_name_or_path
        # The revision is that of the adapter
        kept = {} if adapter is not None else options
        try:
            config = AutoConfig.from_pretrained(name, **_given(kept))
        except (OSError, ValueError) as error:
            raise _not_found(name, argument, error) from error
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"`{argument}` is an encoder-decoder model (model_type={config.model_type!r}), which does not continue a "
            "token sequence. Use a decoder-only causal language model."
        )
    return config


def find_tokenizer(model: str | PreTrainedModel, argument: str, **options: Any) -> PreTrainedTokenizerBase:
    """
    Tokenizer of a model.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is none.
    """
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    if not name:
        raise ConfigError(
            f"`{argument}` was built in memory and has no tokenizer of its own. Pass `processing_class`, the "
            "tokenizer that the prompts are written in."
        )
    try:
        return AutoTokenizer.from_pretrained(name, **_given(options))
    except (OSError, ValueError) as error:
        raise _not_found(name, argument, error, "tokenizer") from error


def find_eos_token_ids(model: str | PreTrainedModel, tokenizer: Any, **options: Any) -> list[int]:
    """
    Every token that ends a completion: those of the model's generation configuration, and the tokenizer's.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is none.
    """
    if isinstance(model, str):
        try:
            generation = GenerationConfig.from_pretrained(model, **_given(options))
        except (OSError, ValueError):
            generation = GenerationConfig()
    else:
        generation = getattr(model, "generation_config", None) or GenerationConfig()
    found = generation.eos_token_id
    ids = list(found) if isinstance(found, Sequence) else [found]
    ids = sorted({token for token in [*ids, tokenizer.eos_token_id] if token is not None})
    if not ids:
        raise ConfigError(
            "Neither the tokenizer nor generation_config.json names an end-of-sequence token, so that every rollout "
            "would run to `max_new_tokens`. Set `tokenizer.eos_token`."
        )
    return ids


def load_model(
    model: str | PreTrainedModel, argument: str, options: LoadOptions, device: torch.device | None = None
) -> PreTrainedModel:
    """
    A frozen causal language model in evaluation mode, whole on one device. A loaded one is returned as it is.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or `peft.PeftModel`):
            Folder, Hub id, or a model. A folder or id of a PEFT adapter is put on its base.
        argument (`str`):
            Name of the argument that holds it, for the error messages.
        options ([`LoadOptions`]):
            How to load it.
        device (`torch.device`, *optional*):
            Where to put it, the CPU by default.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is no such model.
        [`~trl_blend.errors.UnsupportedError`]: If it is not a decoder-only language model.
    """
    if not isinstance(model, str):
        check_partner_model(model, argument)
        return model
    kwargs: dict[str, Any] = {
        "dtype": options.dtype,
        "trust_remote_code": options.trust_remote_code,
        "device_map": device,
    }
    if options.load_in_4bit:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    revision = _given({"revision": options.revision})
    adapter = _adapter_config(model, argument, **revision)
    base, base_revision = (model, revision) if adapter is None else (adapter.base_model_name_or_path, {})
    try:
        loaded: Any = _compat.load_replicated(base, **kwargs, **base_revision)
    except OSError as error:
        raise _not_found(base, argument, error) from error
    if adapter is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, model, **revision)
    check_partner_model(loaded, argument)
    return loaded.requires_grad_(False).eval()


def _adapter_config(model: str, argument: str, **options: Any) -> Any:
    """PEFT configuration of an adapter's folder or id, `None` for any other model."""
    try:
        found = cached_file(
            model,
            "adapter_config.json",
            revision=options.get("revision"),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError) as error:
        raise _not_found(model, argument, error) from error
    if found is None:
        return None
    try:
        from peft import PeftConfig
    except ImportError:
        raise ConfigError(
            f"`{argument}={model!r}` is a PEFT adapter, and peft is not installed. Run `pip install trl_blend[peft]`."
        ) from None
    config = PeftConfig.from_pretrained(os.path.dirname(found))
    if not config.base_model_name_or_path:
        raise ConfigError(
            f"`{argument}={model!r}` is a PEFT adapter that does not name its base. Merge it (`merge_and_unload`), or "
            "pass the loaded model."
        )
    return config


def _not_found(name: str, argument: str, error: Exception, what: str = "model") -> ConfigError:
    return ConfigError(
        f"`{argument}={name!r}` is neither a folder with a {what} nor one that can be had from the Hub. Correct the "
        f"path or the id. ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    )


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}

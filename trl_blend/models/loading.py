"""The one way from a name to a configuration, a tokenizer and a causal language model, adapters included."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_blend.errors import ConfigError, TrlBlendError, UnsupportedError
from trl_blend.models.checkpoints import Checkpoint, check_files, missing_model, read_json, weight_tensors
from trl_blend.models.compatibility import check_decoder_only, check_partner_model
from trl_blend.models.limits import eos_token_ids
from trl_blend.models.weights import layout_of
from trl_blend.models.wrappers import AdapterConfig


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
    Configuration of a causal language model; for an adapter, that of its base, with as many vocabulary rows as the
    adapter was trained with.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Folder, Hub id, or the model.
        argument (`str`):
            Name of the argument that holds it, for the error messages.
        options:
            Of `from_pretrained`, such as `revision`. `None` counts as not given. The revision of an adapter is that
            of its own files; the one of its base is in its configuration.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is no such model, or its files are damaged.
        [`~trl_blend.errors.UnsupportedError`]: If it is not a decoder-only language model.
    """
    if not isinstance(model, str):
        check_partner_model(model, argument)
        return model.config
    options = _given(options)
    *above, (name, of_base) = _places(model, argument, options)
    with _named_errors(name, argument, of_base):
        config = AutoConfig.from_pretrained(name, **of_base)
    check_decoder_only(config, argument)
    if above:
        rows = _vocabulary_rows(model, argument, options, config)
        config.get_text_config().vocab_size = rows
    return config


def find_adapter(model: str | PreTrainedModel, argument: str, **options: Any) -> AdapterConfig | None:
    """
    Settings of the adapter that a name or a model in memory stands for; `None` where it stands for a whole model. The
    arguments are those of [`find_config`].

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is no model of that name.
    """
    if not isinstance(model, str):
        return AdapterConfig.of_model(model)
    found = _file(model, "adapter_config.json", argument, _given(options))
    return None if found is None else AdapterConfig.of_folder(Path(found).parent)


def find_tokenizer(
    model: str | PreTrainedModel, argument: str, *, required: bool = False, **options: Any
) -> PreTrainedTokenizerBase | None:
    """
    Tokenizer beside a model, or beside the one that a model in memory was loaded from; for an adapter that was saved
    without one, that of its base. `None` where there is none, as for a model built in memory. The other arguments are
    those of [`find_config`].

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is no model of that name, its tokenizer cannot be read, or there is
            none and it is `required`.
    """
    tokenizer = None
    if isinstance(model, str):
        tokenizer = _named_tokenizer(model, argument, _given(options))
    elif name := getattr(model.config, "_name_or_path", None):
        with suppress(ConfigError):  # the name may be of another machine
            tokenizer = _named_tokenizer(name, argument, _given(options))
    if tokenizer is None and required:
        what = f"{model!r} has no tokenizer" if isinstance(model, str) else "was built in memory and has no tokenizer"
        raise ConfigError(
            f"`{argument}` {what} of its own. Pass `processing_class`, the tokenizer that the prompts are written in."
        )
    return tokenizer


def find_generation_config(model: str | PreTrainedModel, argument: str, **options: Any) -> GenerationConfig | None:
    """
    Generation configuration of a model; for an adapter without one, that of its base. `None` where there is none. The
    arguments are those of [`find_config`].

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is no model of that name.
    """
    if not isinstance(model, str):
        return getattr(model, "generation_config", None)
    for name, settings in _places(model, argument, _given(options)):
        if _file(name, "generation_config.json", argument, settings) is not None:
            with _named_errors(name, argument, settings):
                return GenerationConfig.from_pretrained(name, **settings)
    return None


def find_eos_token_ids(model: str | PreTrainedModel, tokenizer: Any, **options: Any) -> list[int]:
    """
    Every token that ends a completion: those of the model's generation configuration, and the tokenizer's.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is none.
    """
    declared = find_generation_config(model, "model", **options)
    ids = sorted({*eos_token_ids(declared), *eos_token_ids(tokenizer)})
    if not ids:
        raise ConfigError(
            "Neither the tokenizer nor generation_config.json names an end-of-sequence token, so that every rollout "
            "would run to `max_completion_length`. Set `tokenizer.eos_token`."
        )
    return ids


def load_model(
    model: str | PreTrainedModel, argument: str, options: LoadOptions, device: torch.device | None = None
) -> PreTrainedModel:
    """
    A causal language model, whole on one device, by default the CPU, see [`load_frozen`]. One that is loaded already
    is returned as it is.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is no such model.
        [`~trl_blend.errors.UnsupportedError`]: If it is not a decoder-only language model.
    """
    if not isinstance(model, str):
        check_partner_model(model, argument)
        return model
    arguments = options.hub | {"dtype": options.dtype, "device_map": device}
    if options.load_in_4bit:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return load_frozen(model, argument, **arguments)


def load_frozen(name: str, argument: str, **arguments: Any) -> PreTrainedModel:
    """
    Load a model by name with all of its weights on every process, without gradients and in evaluation mode. An adapter
    is put on its base. `arguments` are those of `from_pretrained`, as they are: `dtype=None` is the checkpoint's.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is no such model, its files are damaged, or weights are missing.
        [`~trl_blend.errors.UnsupportedError`]: If it is not a decoder-only language model.
    """
    from trl_blend import _compat  # imports trl, which finding a configuration does not need

    loaded = _load(name, argument, _compat.load_replicated, arguments, is_trainable=False)
    check_partner_model(loaded, argument)
    return loaded.requires_grad_(False).eval()


def load_trainable_adapter(name: str, argument: str, **arguments: Any) -> PreTrainedModel:
    """
    Load an adapter by name on its base, to go on training it: the adapter has gradients and the base has none. It is
    what [`~peft.AutoPeftModelForCausalLM`] loads with `is_trainable=True`, as a trainer of TRL loads a base. Arguments
    and errors are those of [`load_frozen`].
    """
    from trl_blend import _compat

    return _load(name, argument, _compat.create_model_from_path, arguments, is_trainable=True)


def _load(
    name: str, argument: str, create: Callable[..., Any], arguments: dict[str, Any], is_trainable: bool
) -> PreTrainedModel:
    *above, (base, of_base) = _places(name, argument, arguments)
    own = of_files(of_base) | _given({"trust_remote_code": of_base.get("trust_remote_code")})
    with _named_errors(base, argument, of_base):
        config = AutoConfig.from_pretrained(base, **own)
        # Found here, because TRL would look it up without the revision
        architecture = model_class(config)
        loaded: Any
        loaded, info = create(base, architecture=architecture, output_loading_info=True, **of_base)
    if info["missing_keys"]:
        raise ConfigError(
            f"`{argument}={name!r}` lacks {len(info['missing_keys'])} weights of a {type(loaded).__name__}, such as "
            f"{min(info['missing_keys'])!r}, which would be random numbers. Save or fetch it again; if it is another "
            "kind of model, pass one that was saved with its language-model head."
        )
    if not above:
        return loaded
    from peft import PeftModel

    rows = _vocabulary_rows(name, argument, arguments, config)
    if rows != loaded.get_input_embeddings().weight.shape[0]:
        loaded.resize_token_embeddings(rows, mean_resizing=False)  # the new rows are the adapter's
    with _named_errors(name, argument, arguments), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(loaded, name, is_trainable=is_trainable, **of_files(arguments))


def model_class(config: PretrainedConfig) -> Any:
    """The class of a configuration's checkpoint, if that is a language model; else the one that is of this kind."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is not None and hasattr(named, "can_generate") and named.can_generate():
        return named
    known = getattr(config, "auto_map", None) or {}
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if auto_class.__name__ in known or type(config) in auto_class._model_mapping:
            return auto_class
    return AutoModelForCausalLM


_ATTENTION = {
    "sdpa": "_supports_sdpa",
    "flex_attention": "_supports_flex_attn",
    "flash_attention_2": "_supports_flash_attn",
    "flash_attention_3": "_supports_flash_attn",
}


def supports_attention(config: PretrainedConfig, implementation: str) -> bool:
    """Whether the class of a checkpoint has an attention implementation; yes, where that is not known."""
    return bool(getattr(model_class(config), _ATTENTION.get(implementation, ""), True))


def _vocabulary_rows(name: str, argument: str, options: dict[str, Any], config: PretrainedConfig) -> int:
    """
    Vocabulary rows of a base with its adapter: those of the base, unless the adapter holds rows of its own or trains
    tokens beyond them. Then the base has been resized before it was trained, and PEFT expects the same again.
    """
    rows = config.get_text_config().vocab_size
    found = _file(name, "adapter_config.json", argument, options)
    assert found is not None
    for file in ("adapter_model.safetensors", "adapter_model.bin"):
        _file(name, file, argument, options)
    folder = Path(found).parent
    tensors = weight_tensors(Checkpoint(name, folder, None, False, True), "adapter_model")
    tied = layout_of(config).tied
    layers = {layer.split(".")[-2] for layer in (*tied, *tied.values())}  # such as `lm_head` and `embed_tokens`
    for tensor, read in tensors.items():
        parts = tensor.split(".")
        if layers.isdisjoint(parts):
            continue
        if "lora_embedding_A" in parts:
            return read().shape[1]
        if "lora_B" in parts or (parts[-1] == "weight" and not any(part.startswith("lora_") for part in parts)):
            return read().shape[0]
    fields = AdapterConfig.of_folder(folder).fields
    trained = fields.get("trainable_token_indices") or fields.get("token_indices") or []
    if isinstance(trained, dict):
        trained = [token for tokens in trained.values() for token in tokens]
    if max(trained, default=0) < rows:
        return rows
    tokenizer = _named_tokenizer(name, argument, options)
    return max(max(trained) + 1, 0 if tokenizer is None else len(tokenizer))


def base_of_adapter(name: str, argument: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """Name and options of the model that an adapter is put on; those given for a model that is none."""
    *_, base = _places(name, argument, options)
    return base


def _places(name: str, argument: str, options: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a model's files are looked for, and with which options: its own place; for an adapter, then its base's."""
    _check_place(name, argument, options)
    yield name, options
    found = _file(name, "adapter_config.json", argument, options)
    if found is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            f"`{argument}={name!r}` is a PEFT adapter, and peft is not installed. Run `pip install trl_blend[peft]`."
        )
    adapter = AdapterConfig.of_folder(Path(found).parent)
    if not adapter.base_name:
        raise ConfigError(
            f"`{argument}={name!r}` is a PEFT adapter that does not name its base. Merge it (`merge_and_unload`), or "
            "pass the loaded model."
        )
    of_base = {key: value for key, value in options.items() if key not in ("revision", "subfolder")}
    of_base |= _given({"revision": adapter.base_revision})
    _check_place(adapter.base_name, argument, of_base)
    yield adapter.base_name, of_base


def _check_place(name: str, argument: str, options: dict[str, Any]) -> None:
    """Refuse settings that cannot be read, of which transformers passes over some, and mixtures."""
    found = [_file(name, file, argument, options) for file in ("config.json", "generation_config.json")]
    for path in filter(None, found):
        with _named(name, argument):
            check_files(Path(path).parent)
    if found[0] is not None and leads_to_policy(read_json(Path(found[0]))):
        raise UnsupportedError(
            f"`{argument}={name!r}` is a mixed policy of several models, which only decodes: it has no "
            "log-probabilities to train or to score with. Pass one of the models that its mixing.json names; for its "
            "student alone, load it with `AutoModelForCausalLM` and `trust_remote_code=True` and save that elsewhere."
        )


MIXED_POLICY = "custom_generate/generate.MixedPolicy"
"""Class in the `auto_map` of an exported mixed policy."""


def leads_to_policy(config: Mapping[str, Any]) -> bool:
    """Whether the content of `config.json` names the code of a mixed policy, in its own repository or in another."""
    codes = (config.get("auto_map") or {}).values()
    return any(str(code).rpartition("--")[2] == MIXED_POLICY for code in codes)


@contextmanager
def _named(name: str, argument: str) -> Iterator[None]:
    """Let the error of a file say which argument led to it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"`{argument}={name!r}` cannot be read: {error}") from error


@contextmanager
def _named_errors(name: str, argument: str, options: dict[str, Any]) -> Iterator[None]:
    """One error for whatever reading a model raises: which file is damaged, or else what was said."""
    try:
        yield
    except (TrlBlendError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        _check_thoroughly(name, argument, options)
        if isinstance(error, OSError):
            raise missing_model(name, error, argument, options.get("revision")) from error
        said = f"{type(error).__name__}: {error}".splitlines()
        raise ConfigError(f"`{argument}={name!r}` cannot be loaded: {' '.join(said[:2])}") from error


@contextmanager
def naming_damage(model: str | PreTrainedModel, argument: str, **options: Any) -> Iterator[None]:
    """Let whatever is raised while others load a model by name say which of its files is damaged, if one is."""
    try:
        yield
    except TrlBlendError:
        raise
    except Exception:
        if isinstance(model, str):
            _check_thoroughly(model, argument, _given(options))
        raise


def _check_thoroughly(name: str, argument: str, options: dict[str, Any]) -> None:
    for file in ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json"):
        if (path := _file(name, file, argument, options)) is not None:
            with _named(name, argument):
                check_files(Path(path).parent, thoroughly=True)
            return


def _named_tokenizer(model: str, argument: str, options: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    # Without a tokenizer's files `AutoTokenizer` makes an empty one of the architecture's own kind
    files = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
    for name, settings in _places(model, argument, options):
        if any(_file(name, file, argument, settings) is not None for file in files):
            with _named_errors(name, argument, settings):
                return AutoTokenizer.from_pretrained(name, **settings)
    return None


def _file(name: str, file: str, argument: str, options: dict[str, Any]) -> str | None:
    """Path of a file of a model; `None` where it has no such file, or nothing says it without the Hub."""
    where = of_files(options)
    if Path(name).is_dir():
        path = Path(name, where.get("subfolder", ""), file)
        return str(path) if path.is_file() else None
    try:
        return hf_hub_download(name, file, **where)
    except (RemoteEntryNotFoundError, GatedRepoError):
        return None
    except LocalEntryNotFoundError as error:
        # Not on this disk. The Hub failed, unless it was not asked, or has said before that there is none
        if constants.HF_HUB_OFFLINE or where.get("local_files_only") or _is_known_to_lack(name, file, where):
            return None
        raise missing_model(name, error.__cause__ or error, argument, options.get("revision")) from error
    except (HTTPError, OSError, ValueError) as error:
        raise missing_model(name, error, argument, options.get("revision")) from error


def _is_known_to_lack(name: str, file: str, where: dict[str, Any]) -> bool:
    path = f"{where['subfolder']}/{file}" if where.get("subfolder") else file
    return try_to_load_from_cache(name, path, where.get("cache_dir"), where.get("revision")) is not None


def of_files(options: dict[str, Any]) -> dict[str, Any]:
    """The options that say which files are meant."""
    names = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
    return {name: options[name] for name in names if options.get(name) is not None}


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}

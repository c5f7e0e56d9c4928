"""Configurations of the two commands that make a store: sampling its rollouts, and scoring them."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from trl_blend.errors import ConfigError, nearest


Config = TypeVar("Config", bound="StoreConfig")


@dataclass
class StoreConfig:
    """
    What collecting and scoring have in common: the folder, how a model is loaded, and how the command runs.

    Args:
        output_dir (`str`):
            Folder of the store: new, empty, or begun with the same settings, which is then continued.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `"auto"` (the checkpoint's), `"bfloat16"`, `"float16"` or `"float32"`.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether to quantize the weights with bitsandbytes.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the checkpoint.
        vllm_server_base_url (`str`, *optional*):
            Root URL of a running vLLM server of the model. For rollouts it has to be started with
            `--logprobs-mode processed_logprobs`.
        vllm_concurrency (`int`, *optional*, defaults to `64`):
            Requests at once.
        logps_dtype (`str`, *optional*):
            `"float16"` or `"float32"`, for the stored log-probabilities. Defaults to `"float16"`, and when scoring to
            that of the rollouts.
        identify (`bool`, *optional*, defaults to `True`):
            Whether to record which model it is (its weights are read once). Without, the teacher's consistency cannot
            be verified.
        repair (`bool`, *optional*, defaults to `False`):
            Whether to verify what is there and redo what is bad.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to show no progress bar.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a value is outside its range, or contradicts another.
    """

    output_dir: str
    dtype: str = "auto"
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    vllm_server_base_url: str | None = None
    vllm_concurrency: int = 64
    logps_dtype: str | None = None
    identify: bool = True
    repair: bool = False
    disable_tqdm: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        self._check_positive("vllm_concurrency")
        if self.logps_dtype not in (None, "float16", "float32"):
            raise ConfigError(f"`logps_dtype={self.logps_dtype!r}` is unknown. Choose float16 or float32.")

    @property
    def engine(self) -> str:
        """Name of the engine, one of [`~trl_blend.rollouts.engines.base.ENGINES`]."""
        return "transformers" if self.vllm_server_base_url is None else "vllm-server"

    def _check_types(self) -> None:
        """Values of the command line have their types; those of a call may have any."""
        for name, hint in get_type_hints(type(self)).items():
            value, kinds = getattr(self, name), [get_origin(kind) or kind for kind in get_args(hint) or (hint,)]
            if isinstance(value, os.PathLike) and str in kinds:
                value = os.fspath(value)
                setattr(self, name, value)
            numbers = {int: Integral, float: Real}
            fits = isinstance(value, tuple(numbers.get(kind, kind) for kind in kinds))
            if not fits or (isinstance(value, bool) and bool not in kinds):
                wanted = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
                raise ConfigError(f"`{name}={value!r}` is of type {type(value).__name__}. Pass {wanted}.")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}={getattr(self, name)}` must be at least 1.")

    def _read_json(self, name: str) -> None:
        """A mapping may be given as text, which is how the command line has it."""
        text = getattr(self, name)
        if not isinstance(text, str):
            return
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"`{name}={text!r}` is not JSON: {error}.") from None
        if not isinstance(value, dict):
            raise ConfigError(f"`{name}={text!r}` is not a JSON object. Write '{{\"name\": value}}'.")
        setattr(self, name, value)


@dataclass
class RolloutConfig(StoreConfig):
    """
    Configuration of [`~trl_blend.collect_rollouts`]: which prompts, and what is sampled, with the paper's defaults.

    Its fields are the options of `trl-blend rollouts`. It has those of [`~trl_blend.rollouts.config.StoreConfig`], and
    these.

    Args:
        model_name_or_path (`str`, *optional*):
            The student: folder or Hub id. Required, unless a model is passed.
        model_revision (`str`, *optional*):
            Branch, tag or commit of the student on the Hub.
        dataset_name (`str`, *optional*):
            Prompts: a `.json`, `.jsonl`, `.parquet` or `.csv` file, folder or Hub id. Required, if none are passed.
        dataset_config (`str`, *optional*):
            Configuration of a dataset on the Hub.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split of a dataset that is read by name.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the prompts, text or messages.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of the chat template.
        temperature (`float`, *optional*, defaults to `0.7`):
            Sampling temperature, more than 0.
        top_p (`float`, *optional*, defaults to `0.9`):
            Mass of the nucleus, in `(0, 1]`.
        top_k (`int`, *optional*, defaults to `0`):
            Number of most probable tokens to sample from, 0 for all.
        min_p (`float`, *optional*):
            Smallest probability relative to the most probable token, in `[0, 1]`.
        max_completion_length (`int`, *optional*, defaults to `4096`):
            Length limit of a completion in tokens.
        num_rollouts_per_prompt (`int`, *optional*, defaults to `1`):
            Completions of every prompt.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.
        batch_size (`int`, *optional*, defaults to `32`):
            Completions drawn at once by transformers. It decides which random numbers a row gets, so it has to stay
            the same when a collection is continued.
        rows_per_shard (`int`, *optional*, defaults to `256`):
            Rows of a file; what a kill can cost at most, per process.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether to sample with a vLLM engine in this process.
        vllm_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of `vllm.LLM`, such as `{"max_model_len": 8192}`.
    """

    model_name_or_path: str | None = field(default=None, metadata={"required": True})
    model_revision: str | None = None
    dataset_name: str | None = field(default=None, metadata={"required": True})
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    prompt_column: str = "prompt"
    chat_template_kwargs: dict[str, Any] | str | None = None
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    min_p: float | None = None
    max_completion_length: int = 4096
    num_rollouts_per_prompt: int = 1
    seed: int = 0
    batch_size: int = 32
    rows_per_shard: int = 256
    use_vllm: bool = False
    vllm_kwargs: dict[str, Any] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.temperature < float("inf"):
            raise ConfigError(
                f"`temperature={self.temperature}` must be more than 0: a greedy completion is no sample of the "
                "policy. Use a low temperature such as 0.1."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"`top_p={self.top_p}` must be in (0, 1]. Use 1.0 to sample from all tokens.")
        if self.top_k < 0:
            raise ConfigError(f"`top_k={self.top_k}` must be at least 0. Use 0 to sample from all tokens.")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise ConfigError(f"`min_p={self.min_p}` must be in [0, 1]. Use None to leave it off.")
        self._check_positive("max_completion_length", "num_rollouts_per_prompt", "batch_size", "rows_per_shard")
        self._read_json("chat_template_kwargs")
        self._read_json("vllm_kwargs")
        if self.use_vllm and self.vllm_server_base_url is not None:
            raise ConfigError(
                "`use_vllm=True` samples in this process and "
                f"`vllm_server_base_url={self.vllm_server_base_url!r}` on a server. Set one."
            )
        if self.vllm_kwargs and not self.use_vllm:
            raise ConfigError(
                "`vllm_kwargs` are arguments of the engine in this process. Set `use_vllm=True`, or drop them."
            )

    @property
    def engine(self) -> str:
        return "vllm" if self.use_vllm else super().engine

    @property
    def revision(self) -> str | None:
        """Revision of the model that the engine runs."""
        return self.model_revision


@dataclass
class ScoringConfig(StoreConfig):
    """
    Configuration of [`~trl_blend.score_rollouts`]: which rollouts, which teacher, and how much of it is kept.

    Its fields are the options of `trl-blend score`. It has those of [`~trl_blend.rollouts.config.StoreConfig`], and
    these.

    Args:
        rollouts (`str`, *optional*):
            The rollouts: folder, or dataset repository on the Hub. Required, unless they are passed.
        rollouts_revision (`str`, *optional*):
            Branch, tag or commit of the rollouts on the Hub.
        teacher_model_name_or_path (`str`, *optional*):
            The teacher: folder or Hub id. Required, unless a model is passed. With a server, it is only read for its
            identity.
        teacher_model_revision (`str`, *optional*):
            Branch, tag or commit of the teacher on the Hub.
        route (`str`, *optional*):
            Score only the rows with this text in their column `route`, which comes from the prompts. All by default.
        top_k (`int`, *optional*, defaults to `16`):
            Number of teacher tokens to keep at every position, with the mass of the rest; the sampled token is always
            one of them. 0 or `None` scores the sampled token only, which no top-k loss can be trained on.
        tokens_per_batch (`int`, *optional*, defaults to `16384`):
            Padded tokens of one forward pass. Changes nothing but rounding, and may change when scoring is continued.
    """

    rollouts: str | None = field(default=None, metadata={"required": True})
    rollouts_revision: str | None = None
    teacher_model_name_or_path: str | None = field(default=None, metadata={"required": True})
    teacher_model_revision: str | None = None
    route: str | None = None
    top_k: int | None = 16
    tokens_per_batch: int = 16384

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("tokens_per_batch")
        if self.top_k is not None and self.top_k < 0:
            raise ConfigError(f"`top_k={self.top_k}` must be at least 0. Use 0 to score the sampled token only.")
        self.top_k = self.top_k or None

    @property
    def revision(self) -> str | None:
        """Revision of the model that the engine runs."""
        return self.teacher_model_revision


def make_config(
    kind: type[Config], args: Config | str | os.PathLike[str] | None, settings: Mapping[str, Any]
) -> Config:
    """
    The configuration of a call: a whole one, or its fields as keyword arguments, with `args` as the output folder.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is no folder, both are given, a name is unknown, or a value is out
            of range.
    """
    if isinstance(args, kind):
        if settings:
            raise ConfigError(f"{sorted(settings)} and a whole `{kind.__name__}` were passed. Set them in it.")
        return args
    if args is not None and not isinstance(args, str | os.PathLike):
        raise ConfigError(
            f"`args` is a {type(args).__name__}. Pass a `{kind.__name__}`, or the folder of the store with the "
            "settings as keyword arguments."
        )
    values = {} if args is None else {"output_dir": args}
    known = {entry.name for entry in fields(kind)}
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(
                f"`{name}={value!r}` is no setting{nearest(name, known) or '.'} `{kind.__name__}` lists them all."
            )
        if name in values:
            raise ConfigError(f"`{name}` is given twice, the second time as `{name}={value!r}`. Drop one.")
        values[name] = value
    if "output_dir" not in values:
        raise ConfigError(f"`args` is missing. Pass the folder of the store, or `{kind.__name__}(output_dir=...)`.")
    return kind(**values)


def passed_or_named(passed: Any, argument: str, args: Any, option: str) -> tuple[Any, str]:
    """
    What was passed to a function, or else what its configuration names, and what to call it in an error.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If it is both or neither.
    """
    named = getattr(args, option)
    if passed is not None and named is not None:
        raise ConfigError(f"`{argument}` was passed, and `{option}={named!r}` names another. Drop one of them.")
    if passed is None and named is None:
        raise ConfigError(f"`{option}` is missing. Set it, or pass `{argument}`.")
    return (passed, argument) if named is None else (named, option)

"""
Decodes a mixed policy: the model of this repository (the student) and frozen reference models, token by token.

    model = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True)
    model.generate(**inputs)                                                     # either
    model.generate(**inputs, custom_generate=repository, trust_remote_code=True)  # or, for a student loaded otherwise

What there is to audit: this file reads `mixing.json` beside it (weights, space, references), loads the references from
this repository (every file compared with its SHA-256) or from the Hub (pinned to a commit), and puts one logits
processor in front of those that `generate` gets. It writes no file, opens no connection but the Hub client's
downloads, and runs no other code of a repository. It needs torch, transformers 5.10 or later, and peft if the student
is an adapter. The same file is in every export of `trl_blend`; nothing of that package is needed to run it.

Mixed are next-token logits, `(1 - sum(w)) * student + sum(w_i * reference_i)` with `"space": "logits"`, or the
probabilities with `"space": "probs"` (each model divided by the temperature first); with `"space": "arithmetic"`,
`student + sum(w_i * reference_i)` of logits, with weights of any sign. Temperature, top-k, top-p and the caller's own
processors then act on the mixture. Only `generate` mixes: `forward` is the student's, with a warning.
"""

import functools
import hashlib
import inspect
import json
import math
import os
import re
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import cached_file


SCHEMA_VERSION = 1
TRANSFORMERS = (5, 10)  # the oldest release that this is made for
HUB_OPTIONS = ("cache_dir", "local_files_only", "proxies", "revision", "token")
_SIGNATURE = inspect.signature(GenerationMixin.generate)
# Tensors that the references get too, or that do not concern them; any other would reach the student alone
_SHARED_TENSORS = {"input_ids", "attention_mask", "negative_prompt_ids", "negative_prompt_attention_mask"}


class MixedPolicyError(RuntimeError):
    """The mixture cannot be decoded. Never an OSError: transformers takes one for a repository without this file."""


if tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2])) < TRANSFORMERS:
    raise MixedPolicyError(
        f"A mixed policy needs transformers {'.'.join(map(str, TRANSFORMERS))}, and {transformers.__version__} is "
        "installed. Run `pip install -U transformers`."
    )


class Repository(NamedTuple):
    """Where `mixing.json` and `reference/` are: an absolute folder, or a Hub id with its commit and access options."""

    name: str
    options: dict[str, Any]

    @classmethod
    def of(cls, name: str, options: dict[str, Any]) -> "Repository":
        options = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
        if os.path.isdir(name):
            return cls(os.path.realpath(name), {})
        # transformers copies this file of a Hub repository into a folder named after the commit
        commit = Path(__file__).parents[1].name
        if not re.fullmatch("[0-9a-f]{40}", commit):
            raise MixedPolicyError(
                f"The mixed policy was loaded from the folder {name!r}, which is not there (any more), seen from "
                f"{os.getcwd()!r}. Load it again from where it is now."
            )
        return cls(name, options | {"revision": commit})

    def __reduce__(self) -> tuple[Any, ...]:
        # `model.generate` holds this: a saved model has no token in it
        return Repository, (self.name, {key: value for key, value in self.options.items() if key != "token"})

    def file(self, name: str) -> Path:
        try:
            return Path(cached_file(self.name, name, **self.options))
        except OSError as error:
            raise MixedPolicyError(
                f"{name!r} is missing from the mixed policy {self.name!r}, or cannot be had ({error}). Without it the "
                "policy cannot be decoded: restore the file, export or download the repository again; for a private "
                "repository or another cache pass `token` or `cache_dir` to `from_pretrained` or `generate`."
            ) from error

    def folder(self, source: dict[str, Any]) -> str:
        """Folder of the files listed in `source`, each compared with its recorded SHA-256."""
        for name, expected in source["files"].items():
            path = self.file(f"{source['path']}/{name}")
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                raise MixedPolicyError(
                    f"The reference was changed: {path} has SHA-256 {found[:12]}..., and {expected[:12]}... is "
                    "recorded in mixing.json. Restore the file, or export the policy again with this reference."
                )
        return str(path.parent)


class MixedPolicyConfig:
    """
    What `AutoConfig.from_pretrained(repository, trust_remote_code=True)` finds through `config.json`, whose model type
    transformers does not know: without this class the student alone would be loaded, and nothing would say so.
    """

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> Any:
        """The student's configuration, which leads to the class below."""
        caller = sys._getframe(1).f_back  # of AutoConfig
        if caller is not None and caller.f_globals.get("__name__") == "vllm.transformers_utils.config":
            raise MixedPolicyError(
                "vLLM decodes this mixed policy where `trl_blend` is installed, and only there. Run `pip install "
                "trl_blend` in its environment; `--trust-remote-code` is then not needed."
            )
        content, kwargs = PretrainedConfig.get_config_dict(name, **kwargs)
        shared = {key: content[key] for key in ("architectures", "auto_map")}
        student = content["student"] | shared | {key: content[key] for key in content if key.startswith("_")}
        return CONFIG_MAPPING[content["student_type"]].from_dict(student, **kwargs)

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Called by transformers; there is nothing to register, the configuration is of another class."""


class MixedPolicy:
    """What `AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True)` finds through `config.json`."""

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, config: Any, **kwargs: Any) -> Any:
        """The student, an ordinary transformers model, with `generate` replaced by the one below."""
        if kwargs.get("subfolder"):
            raise MixedPolicyError(
                f"`subfolder={kwargs['subfolder']!r}` would load a student from there and mix as {str(name)!r} says. "
                "Load that folder by its own path; of a Hub repository, fetch it first with `hf download`."
            )
        repository = Repository.of(str(name), kwargs)
        spec = _read_spec(repository)
        del config.auto_map  # a copy that is saved elsewhere has no such file
        config.architectures = None
        kwargs.update(trust_remote_code=False)
        adapter = spec["adapter"]
        if adapter is not None:
            kwargs.pop("adapter_kwargs", None)
            name, kwargs = _located(repository, spec["base"], kwargs)
            own = GenerationConfig.from_pretrained(repository.name, **repository.options)
            kwargs.setdefault("generation_config", own)
        loaded = AutoModelForCausalLM.from_pretrained(name, *args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if adapter is not None:
            repository.file(f"{adapter}/adapter_model.safetensors")
            model.load_adapter(str(repository.file(f"{adapter}/adapter_config.json").parent))
        model.generate = functools.partial(generate, model=model, _repository=repository)
        model.register_forward_pre_hook(_warn_of_forward)
        return loaded

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Called by transformers; there is nothing to register, the class loads other classes."""


def generate(*args: Any, model: Any, _repository: Repository | None = None, **kwargs: Any) -> Any:
    """`model.generate(*args, **kwargs)` of the mixture; see [`~transformers.GenerationMixin.generate`]."""
    named, loaded_here = kwargs.pop("custom_generate", None), _repository is not None
    if _repository is None:
        caller = sys._getframe(1)
        if caller.f_code is inspect.unwrap(GenerationMixin.generate).__code__:
            # With `custom_generate=repository`, transformers calls this function without saying which repository
            named = caller.f_locals.get("custom_generate")
        _repository = Repository.of(str(named or model.name_or_path), kwargs)
    elif named is not None and Repository.of(str(named), kwargs).name != _repository.name:
        raise MixedPolicyError(f"`custom_generate={named!r}`: this model already decodes {_repository.name!r}.")
    given = {option: kwargs.pop(option, None) for option in (*HUB_OPTIONS, "trust_remote_code")}
    if given["token"] is not None and _repository.options:  # a model that was pickled or copied has lost its own
        _repository = _repository._replace(options=_repository.options | {"token": given["token"]})
    mixtures = _MIXTURES.setdefault(model, {})
    if _repository.name not in mixtures:
        mixtures[_repository.name] = _load_mixture(model, _repository, loaded_here)
    mixture = mixtures[_repository.name]

    arguments = dict(_SIGNATURE.bind(model, *args, **kwargs).arguments)
    del arguments["self"]
    arguments.update(arguments.pop("kwargs", {}))
    if mixture.references:
        processor = _processor(model, mixture, arguments)
        # First among the caller's processors, so that those act on the mixture
        arguments["logits_processor"] = LogitsProcessorList([processor, *(arguments.get("logits_processor") or [])])
    decoding = _DECODING.set(True)
    try:
        return type(model).generate(model, **arguments)
    finally:
        _DECODING.reset(decoding)


_DECODING: ContextVar[bool] = ContextVar("_DECODING", default=False)


def _warn_of_forward(model: Any, args: Any) -> None:
    """Whoever calls the model itself, to score or to train, has the student alone."""
    if not _DECODING.get():
        warnings.warn(
            "The logits of a mixed policy's forward pass are those of its student alone: only `generate` mixes.",
            stacklevel=2,
        )


# Loading and verifying


class Mixture(NamedTuple):
    """References with their weights, those of weight 0 left out; `None` is the student without its adapters."""

    space: str
    references: list[Any]
    weights: list[float]
    num_tokens: int  # rows of a model beyond it are padding and no tokens


_MIXTURES: "weakref.WeakKeyDictionary[Any, dict[str, Mixture]]" = weakref.WeakKeyDictionary()


def _read_spec(repository: Repository) -> dict[str, Any]:
    spec = json.loads(repository.file("mixing.json").read_text(encoding="utf-8"))
    if spec.get("schema_version") != SCHEMA_VERSION:
        raise MixedPolicyError(
            f"mixing.json of {repository.name!r} has schema_version {spec.get('schema_version')!r}, and this "
            f"generate.py reads {SCHEMA_VERSION}. Take both from the same export."
        )
    weights, references = spec["weights"], spec["references"]
    if spec["space"] == "arithmetic":
        in_range = all(map(math.isfinite, weights))
    else:
        in_range = all(0.0 <= weight <= 1.0 for weight in weights) and math.fsum(weights) <= 1.0 + 1e-9
    if not in_range or len(weights) != len(references) or spec["space"] not in ("logits", "probs", "arithmetic"):
        raise MixedPolicyError(
            f"mixing.json of {repository.name!r} has weights {weights} for {len(references)} reference(s) and space "
            f"{spec['space']!r}. It needs one weight in [0, 1] per reference, at most 1 together, and 'logits' or "
            "'probs', or any weights and 'arithmetic'. Export the policy again."
        )
    return spec


def _load_mixture(student: Any, repository: Repository, loaded_here: bool) -> Mixture:
    spec = _read_spec(repository)
    active = [(entry, weight) for entry, weight in zip(spec["references"], spec["weights"], strict=True) if weight]
    num_tokens = _checked_tokens(spec, repository) if active else 0
    ends = student.generation_config.eos_token_id
    num_tokens = max([num_tokens, *(end + 1 for end in ([ends] if isinstance(ends, int) else ends or ()))])
    references = [
        _check_base(student, repository, loaded_here) if entry.get("base") else _load(entry, student, repository)
        for entry, _ in active
    ]
    return Mixture(spec["space"], references, [weight for _, weight in active], num_tokens)


def _checked_tokens(spec: dict[str, Any], repository: Repository) -> int:
    """One more than the largest id of the tokenizer, which is the one of the export."""
    repository.file("tokenizer_config.json")
    tokenizer = AutoTokenizer.from_pretrained(repository.name, trust_remote_code=False, **repository.options)
    vocabulary = tokenizer.get_vocab()
    text = json.dumps(vocabulary, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    if hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() != spec["tokenizer_sha256"]:
        raise MixedPolicyError(
            f"The tokenizer of {repository.name!r} was changed: its ids are not those that the student and the "
            "reference share. Restore its files, or export the policy again."
        )
    return max(vocabulary.values()) + 1


def _check_base(student: Any, repository: Repository, loaded_here: bool) -> None:
    layers = _adapter_layers(student)
    if not loaded_here or not layers or any(getattr(layer, "merged", False) for layer in layers):
        raise MixedPolicyError(
            f"The reference of {repository.name!r} is the student's own base without its adapter, and this model is "
            "not known to be that base with that adapter, unmerged. Load it with "
            f"`AutoModelForCausalLM.from_pretrained({repository.name!r}, trust_remote_code=True)`."
        )


def _load(entry: dict[str, Any], student: Any, repository: Repository) -> Any:
    dtype = getattr(torch, entry["dtype"]) if entry["dtype"] else student.dtype
    spread = len(set((getattr(student, "hf_device_map", None) or {}).values())) > 1
    name, kwargs = _located(repository, entry, {key: v for key, v in repository.options.items() if key != "revision"})
    kwargs.update(device_map="auto" if spread else None, trust_remote_code=False)
    try:
        config = AutoConfig.from_pretrained(name, **{key: v for key, v in kwargs.items() if key != "device_map"})
        model_class = _class_of(config)
        attention = student.config._attn_implementation
        if getattr(model_class, _ATTENTION.get(attention, ""), True):  # else its own default
            kwargs.update(attn_implementation=attention)
        model, found = model_class.from_pretrained(name, dtype=dtype, output_loading_info=True, **kwargs)
    except OSError as error:
        raise MixedPolicyError(
            f"The reference {name!r} of the mixed policy {repository.name!r} cannot be had ({error}). Without it the "
            "policy cannot be decoded: see that its Hub repository can be reached, or fetch it before going offline."
        ) from error
    if found["missing_keys"]:
        raise MixedPolicyError(
            f"The reference {name!r} of the mixed policy {repository.name!r} lacks weights, such as "
            f"{min(found['missing_keys'])!r}. Export the policy again with a whole reference."
        )
    return model.requires_grad_(False).eval()


_ATTENTION = {
    "sdpa": "_supports_sdpa",
    "flex_attention": "_supports_flex_attn",
    "flash_attention_2": "_supports_flash_attn",
    "flash_attention_3": "_supports_flash_attn",
}


def _class_of(config: Any) -> Any:
    """The class that a language model was saved from, which need not be one that `AutoModelForCausalLM` knows."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    return named if named is not None and named.can_generate() else AutoModelForCausalLM


def _located(repository: Repository, source: dict[str, Any], kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name of a model and arguments to load it with: a verified folder, or a Hub id pinned to its commit."""
    if source.get("repo_id"):
        return source["repo_id"], kwargs | {"revision": source["commit"]}
    return repository.folder(source), {key: value for key, value in kwargs.items() if key not in HUB_OPTIONS}


# Decoding


class MixtureProcessor(LogitsProcessor):
    """Replaces the student's scores by those of the mixture, times the temperature that `generate` divides by."""

    def __init__(self, mixture: Mixture, followers: list["Follower"], temperature: float) -> None:
        self.mixture, self.followers, self.temperature = mixture, followers, temperature

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        models = [scores, *(follower.step(input_ids).to(scores) for follower in self.followers)]
        # What the smallest model has no row for is no token either
        rows = min([self.mixture.num_tokens, *(one.shape[-1] for one in models)])
        forbidden = scores[:, :rows] == -math.inf  # by `generate`
        models = [one[:, :rows].masked_fill(forbidden, -math.inf) / self.temperature for one in models]
        missing = (0, scores.shape[-1] - rows)
        return torch.nn.functional.pad(_mix(self.mixture, models) * self.temperature, missing, value=-math.inf)


def _mix(mixture: Mixture, models: list[torch.Tensor]) -> torch.Tensor:
    rest = 1.0 if mixture.space == "arithmetic" else 1.0 - math.fsum(mixture.weights)
    weights = [rest if rest > 1e-9 else 0.0, *mixture.weights]
    # A model of weight 0 is left out: 0 * -inf would be NaN. Half precision has too few bits to average in.
    models = [one if one.dtype == torch.float64 else one.float() for one in models]
    terms = [(one, weight) for one, weight in zip(models, weights, strict=True) if weight]
    if mixture.space == "probs":
        return torch.stack([one.log_softmax(dim=-1) + math.log(weight) for one, weight in terms]).logsumexp(dim=0)
    total = functools.reduce(torch.add, [one * weight for one, weight in terms])
    # What one model excludes is excluded, whatever the sign of its weight
    excluded = functools.reduce(torch.logical_or, [one == -math.inf for one, _ in terms])
    return total.masked_fill(excluded, -math.inf)


class Follower:
    """Lets a reference read along: the prompt first, then one token per step, with a key-value cache of its own."""

    def __init__(self, model: Any, mask: torch.Tensor, *, without_adapters: bool) -> None:
        self.model, self.mask = model, mask
        self.disabled = _adapter_layers(model) if without_adapters else []
        self.state: dict[str, Any] | None = None

    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        model, first = self.model, self.state is None
        input_ids = input_ids.to(model.device)
        if self.state is None:
            self.state = self._prepared(input_ids)
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=None if first else 1, is_first_iteration=first, **self.state
        )
        with _adapters_disabled(self.disabled):
            outputs = model(**inputs, return_dict=True)
        self.state = model._update_model_kwargs_for_generation(outputs, self.state)
        return outputs.logits[:, -1].clone()

    def _prepared(self, input_ids: torch.Tensor) -> dict[str, Any]:
        rows = self.model.get_input_embeddings().num_embeddings
        if int(input_ids.max()) >= rows:
            raise MixedPolicyError(f"Token id {int(input_ids.max())} of the prompt is beyond the reference's {rows}.")
        mask = self.mask.to(input_ids.device)
        state: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
        state["position_ids"] = self.model._prepare_position_ids_for_generation(input_ids, state)
        if bool(mask.all()):
            state["attention_mask"] = None  # no padding: the causal mask is enough, and faster
        if self.model._supports_logits_to_keep():
            state["logits_to_keep"] = 1
        self.model._prepare_cache_for_generation(
            GenerationConfig(use_cache=True), state, GenerationMode.SAMPLE, *input_ids.shape
        )
        return state


def _adapter_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "_disable_adapters")]


@contextmanager
def _adapters_disabled(layers: list[Any]) -> Iterator[None]:
    saved = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, saved, strict=True):
            layer._disable_adapters = value


def _processor(student: Any, mixture: Mixture, arguments: dict[str, Any]) -> MixtureProcessor:
    """The processor of one call of `generate`, after refusing what would not decode the mixture."""
    named = {*_SIGNATURE.parameters, "tokenizer", "assistant_tokenizer"}
    settings, inputs = student._prepare_generation_config(
        arguments.get("generation_config"), **{name: v for name, v in arguments.items() if name not in named}
    )
    mode = settings.get_generation_mode(arguments.get("assistant_model"))
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH) or settings.cache_implementation == "paged":
        mode_name = "paged attention" if settings.cache_implementation == "paged" else mode.value.replace("_", " ")
        raise MixedPolicyError(
            f"A mixed policy cannot be decoded by {mode_name}. Use sampling or greedy search, one beam "
            "(`num_beams=1`), without an assistant."
        )
    foreign = [name for name, v in inputs.items() if isinstance(v, torch.Tensor) and name not in _SHARED_TENSORS]
    foreign += [name for name, v in inputs.items() if isinstance(v, Cache) and v.get_seq_length() > 0]
    if foreign:
        raise MixedPolicyError(
            f"{foreign} would reach the student and not the reference. A mixed policy decodes whole prompts, given as "
            "`input_ids` and `attention_mask`."
        )
    prompt = arguments.get("inputs")
    prompt = inputs.get("input_ids") if prompt is None else prompt
    if prompt is None or prompt.dim() != 2:
        raise MixedPolicyError("A mixed policy needs a prompt: pass `input_ids` of shape (batch, length).")
    mask = inputs.get("attention_mask")
    if mask is None:  # what `generate` infers
        student._prepare_special_tokens(settings, kwargs_has_attention_mask=True, device=prompt.device)
        mask = student._prepare_attention_mask_for_generation(prompt, settings, {})
    mask = mask.repeat_interleave(settings.num_return_sequences or 1, dim=0)
    followers = []
    for reference in mixture.references:
        is_base = reference is None
        if not is_base and getattr(reference, "hf_device_map", None) is None:
            reference.to(student.device)  # the student may have moved since the last call
        followers.append(Follower(student if is_base else reference, mask, without_adapters=is_base))
    temperature = settings.temperature if settings.do_sample and settings.temperature is not None else 1.0
    return MixtureProcessor(mixture, followers, temperature)

"""The vLLM model that holds every model of a blend as a tower, and whose logits are those of the blend."""

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, VllmConfig
from vllm.config.utils import replace
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import get_model_architecture, initialize_model
from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings
from vllm.model_executor.models.interfaces import has_inner_state, supports_mrope, supports_multimodal
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_config, get_hf_text_config
from vllm.utils.torch_utils import set_default_torch_dtype

from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.generation.step import blend_step
from trl_blend.ops.vocab import align_vocab
from trl_blend.serving import ARCHITECTURE
from trl_blend.serving.blend import Blend, Partner
from trl_blend.serving.folder import blend_of_folder, student_of_folder
from trl_blend.serving.statistics import RunningSums, row_statistics


class BlendForCausalLM(nn.Module):
    """
    Student and partners as towers of one model, each built by vLLM itself. vLLM does everything else as for any model:
    paged caches of all towers, batching, sampling, log-probabilities.

    `forward` runs the towers on the same tokens and returns their hidden states side by side; `compute_logits` blends
    the logits that the towers make of them. Tokens that a tower has no row for are never drawn. What to blend with is
    set between two generations. Weights without a prefix are the student's, so a trainer that sends its own reaches
    the student and nothing else.

    Args:
        vllm_config (`VllmConfig`):
            Settings of the engine, those of the student's tower. The partners and the first blend are in `trl_blend`
            of the configuration, see [`~trl_blend.serving.arguments.engine_arguments`], else in the `mixing.json` of
            an exported mixed policy.
        prefix (`str`, *optional*, defaults to `""`):
            Prefix of the names of the student's layers.

    Attributes:
        partners (`list[Partner]`): What the towers `partner_0`, `partner_1`, … were built from.
        blend ([`~trl_blend.serving.blend.Blend`]): What is drawn from.
        sums ([`~trl_blend.serving.statistics.RunningSums`]): Statistics of what was drawn, where `blend.records`.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If neither names any partners.
        [`~trl_blend.errors.UnsupportedError`]: With pipeline parallelism, and for a model with another input than
            tokens (images, prompt embeddings) or another state than a cache of keys and values.
    """

    # vLLM builds and loads the draft model of an engine right after its model
    _newest: Callable[[], "BlendForCausalLM | None"] = staticmethod(lambda: None)

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        # The draft model comes with the configuration of the whole. It is a student
        if prefix.startswith("draft_model"):
            draft_model = _tower(_student_config(vllm_config), "the draft model", prefix)
            engine = cls._newest()
            if engine is not None and engine._source == _source(vllm_config):
                _share(draft_model, engine.student)
            return draft_model
        return super().__new__(cls)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        given = getattr(model_config.hf_config, "trl_blend", None)
        if given is None:
            self.partners, self.blend = blend_of_folder(model_config.model, model_config.revision)
        else:
            self.partners = [Partner(**partner) for partner in given["partners"]]
            self.blend = Blend.from_dict(given["blend"])
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise UnsupportedError(
                f"`pipeline_parallel_size={vllm_config.parallel_config.pipeline_parallel_size}`: the stages of models "
                "of different depths do not line up. Use `tensor_parallel_size`."
            )
        partners = [
            _partner_config(vllm_config, partner, f"partner_{index}") for index, partner in enumerate(self.partners)
        ]
        student = _student_config(vllm_config)
        self._configs = [student, *partners]  # of all towers
        self.student = _tower(student, "the student", prefix)
        for index, config in enumerate(partners):
            name = f"partner_{index}"
            # One integer in the name of a layer is its depth: the tower's is joined to a word
            with set_model_tag(name), set_default_torch_dtype(config.model_config.dtype):
                setattr(self, name, _tower(config, f"`partners[{index}]`", name))
        configs = [config.model_config for config in self._configs]
        self._dtypes = [config.dtype for config in configs]
        self._widths = [config.get_hidden_size() for config in configs]
        sizes = [config.get_vocab_size() for config in configs]
        # Rows of a larger, padded vocabulary are no tokens, and a partner could not read them back
        self._vocab_size, self._num_tokens = sizes[0], min(sizes)
        # Which tokens end a completion. CUDA graphs read it where it is, so it is changed in place
        self.register_buffer("_stops", torch.zeros(sizes[0], dtype=torch.bool), persistent=False)
        self._source, self._loaded = _source(vllm_config), False
        # A draft, or a request, may hold a token that a partner has no row for. It reads another one there, which
        # CUDA graphs read where it is: the lookup would end the engine. Such a draft is then refused
        clamps = self._num_tokens < self._vocab_size
        known = torch.zeros(vllm_config.scheduler_config.max_num_batched_tokens, dtype=torch.int32) if clamps else None
        self.register_buffer("_known", known, persistent=False)
        # In a list, whose modules are not this model's own
        self._drafting: list[nn.Module] = []
        # Graphs are captured with every tower, whatever is blended at first
        self._runs_partners = True
        self.sums = RunningSums()
        type(self)._newest = weakref.ref(self)

    @property
    def _partner_towers(self) -> list[nn.Module]:
        return [getattr(self, f"partner_{index}") for index in range(len(self.partners))]

    def set_blend(self, blend: Blend) -> None:
        """
        Draw from another blend from here on. Without a rule the partners do not run, where no captured CUDA graph of
        the whole model runs them; what they have not seen is missing in their caches, so that prefixes must not be
        reused when a rule comes back. Statistics begin anew.

        Raises:
            [`~trl_blend.errors.ConfigError`]: If the rule has weights for another number of partners.
        """
        weights = getattr(blend.rule, "weights", None)
        if weights is not None and len(weights) != len(self.partners):
            raise ConfigError(
                f"`rule` has {len(weights)} weight(s) for an engine with {len(self.partners)} partner(s). Give one "
                "weight per partner."
            )
        self.blend, self._runs_partners = blend, blend.rule is not None
        self.sums = RunningSums(self.sums.drafts)  # another rule has other statistics
        self._stops.zero_()
        if stops := [token for token in blend.stop_token_ids if token < self._vocab_size]:
            self._stops[torch.tensor(stops, device=self._stops.device)] = True

    def lead(self, draft_model: nn.Module) -> None:
        """
        Let the draft model of the engine take each weight that the student takes from here on, if it is the student
        too and does not hold the same tensors. Statistics are then those of the rows that tokens were drawn from,
        which `sums.settle` has to be told.
        """
        self.sums.drafts = True
        pairs = _same_parameters(draft_model, self.student)
        self._drafting = [draft_model] if any(own.data_ptr() != one.data_ptr() for own, one in pairs) else []

    # What vLLM calls

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.student.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states of all towers and whether the token ends a completion, of shape `(N, sum of widths + 1)`."""
        if input_ids is None or inputs_embeds is not None:
            raise UnsupportedError(
                "A prompt came as embeddings, which are in the student's own space. Send tokens (`prompt_token_ids`)."
            )
        hidden = [self.student(input_ids, positions)]
        if self._runs_partners:
            known = input_ids
            if self._known is not None:
                known = torch.clamp(input_ids, max=self._num_tokens - 1, out=self._known[: len(input_ids)])
            hidden += [tower(known, positions) for tower in self._partner_towers]
        else:
            hidden += [hidden[0].new_zeros(len(hidden[0]), width) for width in self._widths[1:]]
        return torch.cat([*hidden, self._stops[input_ids][:, None].to(hidden[0])], dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The blend's logits times its temperature, of shape `(N, V)`; `None` on a device that draws nothing."""
        *hidden, ended = hidden_states.split([*self._widths, 1], dim=-1)
        student = self._logits(self.student, 0, hidden[0])
        blend = self.blend
        partners = (
            [self._logits(tower, index, hidden[index]) for index, tower in enumerate(self._partner_towers, start=1)]
            if blend.rule is not None
            else []
        )
        if student is None:
            return None
        tokens = self._num_tokens if blend.vocab_size is None else min(self._num_tokens, blend.vocab_size)
        if blend.rule is None:
            return align_vocab(align_vocab(student, tokens), self._vocab_size)
        settings = {"temperature": blend.temperature, "eos": blend.eos, "vocab_size": tokens}
        step, partners = blend_step(blend.rule, student, partners, **settings)
        if blend.records:
            self.sums.add_step(row_statistics(step, partners), ended.squeeze(-1) != 0)
        return step.logits * blend.temperature

    def _logits(self, tower: nn.Module, index: int, hidden: Tensor) -> Tensor | None:
        logits = tower.compute_logits(hidden.to(self._dtypes[index]).contiguous())
        return None if logits is None else logits.float()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the student; the partners, each with its own loader, at the first call."""
        if self._drafting:
            weights = list(weights)
            self._drafting[0].load_weights(weights)
        loaded = {f"student.{name}" for name in self.student.load_weights(weights)}
        if not self._loaded:
            self._loaded = True
            for index, (tower, config) in enumerate(zip(self._partner_towers, self._configs[1:], strict=True)):
                get_model_loader(config.load_config).load_weights(tower, config.model_config)
                loaded |= {f"partner_{index}.{name}" for name, _ in tower.named_parameters()}
            # As vLLM does for a model with one output layer: where a checkpoint repeats a tied one, the weights of the
            # embedding are all that a trainer sends
            for tower, config in zip([self.student, *self._partner_towers], self._configs, strict=True):
                maybe_retie_word_embeddings(tower, config.model_config)
        return loaded

    def load_partner_weights(self, index: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load a partner from weights in memory, under the names of its checkpoint."""
        self._partner_towers[index].load_weights(weights)


def _tower(config: VllmConfig, name: str, prefix: str) -> nn.Module:
    architecture, _ = get_model_architecture(config.model_config)
    needs = {
        "images or other inputs beside tokens": supports_multimodal(architecture),
        "positions of several dimensions": supports_mrope(architecture),
        "a recurrent state": has_inner_state(architecture),
        "an encoder": config.model_config.is_encoder_decoder,
    }
    for need, needed in needs.items():
        if needed:
            raise UnsupportedError(
                f"{name} ({config.model_config.model}, {architecture.__name__}) has {need}, which blended decoding in "
                "vLLM does not pass on. Use a text model with attention only, or decode with transformers."
            )
    return initialize_model(vllm_config=config, prefix=prefix)


def _source(vllm_config: VllmConfig) -> tuple[Any, ...]:
    """What the student of an engine and a draft model of it that is the same have in common."""
    layers = vllm_config.compilation_config.static_forward_context  # of one engine
    return id(layers), vllm_config.model_config.model, vllm_config.model_config.revision


def _same_parameters(draft_model: nn.Module, student: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The parameters of both in pairs; none where one has others."""
    own, theirs = (dict(model.named_parameters(remove_duplicate=False)) for model in (draft_model, student))
    pairs = [(own[name], theirs[name]) for name in own.keys() & theirs.keys()]
    same = all((a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) for a, b in pairs)
    return pairs if own.keys() == theirs.keys() and same else []


def _share(draft_model: nn.Module, student: nn.Module) -> None:
    """
    Let a draft model that is not loaded yet hold the tensors of the student, which is: loading writes the same weights
    into them. Not where vLLM lays them out anew after loading, as quantized ones, or experts, and would do so twice.
    """
    modules = (module for model in (draft_model, student) for module in model.modules())
    plain = (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    if all(type(getattr(module, "quant_method", None)) in plain for module in modules):
        for own, one in _same_parameters(draft_model, student):
            own.data = one.data


def _student_config(vllm_config: VllmConfig) -> VllmConfig:
    """The engine's settings without what `engine_arguments` added to those of the checkpoint."""
    model_config = copy.deepcopy(vllm_config.model_config)
    own = get_config(
        model_config.hf_config_path or model_config.model,
        model_config.trust_remote_code,
        model_config.revision,
        model_config.code_revision,
        model_config.config_format,
        token=model_config.hf_token,
    )
    if own.architectures == [ARCHITECTURE]:
        own = student_of_folder(model_config.model, model_config.revision)
    config = model_config.hf_config
    for name in ("architectures", "trl_blend", "num_experts"):
        if hasattr(own, name):
            setattr(config, name, getattr(own, name))
        elif hasattr(config, name):
            delattr(config, name)
    if not config.architectures:
        raise ConfigError(
            f"The configuration of {model_config.model!r} names no `architectures`, so vLLM cannot tell what it is. "
            "Save the model with `save_pretrained`, which writes them."
        )
    model_config.hf_text_config = get_hf_text_config(config)
    model_config.model_arch_config = model_config.get_model_arch_config()
    return _submodel(vllm_config, model_config)


def _partner_config(vllm_config: VllmConfig, partner: Partner, name: str) -> VllmConfig:
    engine, load_config = vllm_config.model_config, vllm_config.load_config
    try:
        model_config = ModelConfig(
            model=partner.model,
            revision=partner.revision,
            trust_remote_code=partner.trust_remote_code,
            dtype=partner.dtype or engine.dtype,
            tokenizer=engine.tokenizer,
            max_model_len=engine.max_model_len,
            seed=engine.seed,
            enforce_eager=engine.enforce_eager,
            model_impl=engine.model_impl,
        )
    except ValueError as error:
        if "max_model_len" not in str(error):
            raise
        raise ConfigError(
            f"{partner.model!r} reads fewer tokens than the {engine.max_model_len} that the engine is to read. Lower "
            "`max_model_len` (of a trainer: `vllm_max_model_length`)."
        ) from error
    if "bitsandbytes" in (model_config.quantization, load_config.load_format):
        own_format = "bitsandbytes" if model_config.quantization == "bitsandbytes" else "auto"
        load_config = replace(load_config, load_format=own_format)
    quantization = VllmConfig.get_quantization_config(model_config, load_config)
    if quantization is not None:  # it names layers as the checkpoint does
        quantization.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"": f"{name}."}))
    cache_config = copy.copy(vllm_config.cache_config)  # whose window is that of layers that name none: the student's
    cache_config.sliding_window = _window(model_config)
    changes = {"quant_config": quantization, "load_config": load_config, "cache_config": cache_config}
    return _submodel(vllm_config, model_config, **changes)


def _window(model_config: ModelConfig) -> int | None:
    """The sliding window of all layers of a model, as vLLM finds it for its own; `None` where a layer has none."""
    kinds = getattr(model_config.hf_text_config, "layer_types", None)
    every = kinds is None or all(kind == "sliding_attention" for kind in kinds)
    return model_config.get_sliding_window() if every else None


def _submodel(vllm_config: VllmConfig, model_config: ModelConfig, **changes: Any) -> VllmConfig:
    """Settings of a tower. The engine's own are verified already, and shared: nothing here may change them."""
    model_config.is_submodel_config = True
    return replace(vllm_config, model_config=model_config, **changes)

"""The settings that an engine of vLLM is started with, so that it holds a student and its partners."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.models.loading import find_config
from trl_blend.serving import ARCHITECTURE
from trl_blend.serving.blend import Blend, Partner
from trl_blend.serving.worker import EXTENSION


OLDEST_VLLM = "0.31.0"
# Where configurations keep their number of experts, as vLLM looks for it
_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")


@dataclass(frozen=True)
class Overrides:
    """
    `hf_overrides` of an engine that drafts: vLLM changes the configuration of the draft model too by those that are
    callable, so that [`~trl_blend.serving.model.BlendForCausalLM`] builds it, of the student's own tensors.
    """

    values: dict[str, Any]

    def __call__(self, config: Any) -> Any:
        config.update(self.values)
        return config


def engine_arguments(
    partners: Sequence[Partner], blend: Blend, *, draft_model: str | None = None, draft_tokens: Sequence[int] = ()
) -> dict[str, Any]:
    """
    Arguments of `vllm.LLM` beside those of the student, which an engine that blends is started with. Without drafts
    `hf_overrides` is, as JSON, the option `--hf-overrides` of `vllm serve`.

    The student is the engine's model, with its settings: dtype, quantization, tensor parallelism, context length.

    Args:
        partners (`Sequence[Partner]`):
            Models beside the student, in the order of the rule's weights.
        blend ([`~trl_blend.serving.blend.Blend`]):
            What to draw from at first. The engine measures its memory with it.
        draft_model (`str`, *optional*):
            The student, as `vllm.LLM` is given it.
        draft_tokens (`Sequence[int]`, *optional*, defaults to `()`):
            How many tokens the student draws ahead before all models look at them together, the largest number last;
            of several [`~trl_blend.serving.drafts.schedule_drafts`] says which. Tokens of the blend are drawn
            all the same: vLLM accepts each with the probability that makes it one of them, else draws another
            ([speculative sampling](https://huggingface.co/papers/2211.17192)). The engine holds a second cache of the
            student, and its weights once more only where it is quantized or has experts.

    Returns:
        `dict`: `hf_overrides`, `worker_extension_cls` and `sleep_preserve_parameter_names` (a sleeping engine drops
        weights that its trainer sends again: those of the student); with drafts `speculative_config`.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there is no partner, or the configuration of one cannot be read.
        [`~trl_blend.errors.UnsupportedError`]: If vLLM is older than what this was run with.
    """
    check_version()
    if not partners:
        raise ConfigError("`partners` is empty. Name at least one model beside the student.")
    content = {"partners": [asdict(partner) for partner in partners], "blend": blend.to_dict()}
    arguments: dict[str, Any] = {
        "hf_overrides": {**overrides_of(partners), "trl_blend": content},
        "worker_extension_cls": EXTENSION,
        "sleep_preserve_parameter_names": [f"partner_{index}.*" for index in range(len(partners))],
    }
    if draft_tokens:
        arguments["hf_overrides"] = Overrides(arguments["hf_overrides"])
        arguments["speculative_config"] = speculation = {
            "method": "draft_model",
            "model": draft_model,
            "num_speculative_tokens": draft_tokens[-1],
            "draft_sample_method": "probabilistic",  # a most likely token would be accepted with its own probability
        }
        if len(draft_tokens) > 1:  # by the number of requests: vLLM prepares for each, and the table is overwritten
            by_requests = [(requests, requests, number) for requests, number in enumerate(draft_tokens, start=1)]
            speculation["num_speculative_tokens_per_batch_size"] = by_requests
    return arguments


def overrides_of(partners: Sequence[Partner]) -> dict[str, Any]:
    """What the configuration of the student has to say of its partners before vLLM builds anything."""
    overrides: dict[str, Any] = {"architectures": [ARCHITECTURE]}
    experts = max((_experts_of(partner) for partner in partners), default=0)
    if experts:  # vLLM prepares for experts where the engine's own configuration has some
        overrides["num_experts"] = experts
    return overrides


def check_version() -> None:
    """Refuse a vLLM that blended decoding was never run with: its model interface changes between releases."""
    try:
        installed = version("vllm")
    except PackageNotFoundError:
        raise ConfigError(
            "vLLM, which draws blended rollouts with `use_vllm=True`, is not installed. Run `pip install "
            "trl_blend[vllm]`, or set `use_vllm=False`."
        ) from None
    if Version(installed) < Version(OLDEST_VLLM):
        raise UnsupportedError(
            f"Blended decoding needs vLLM {OLDEST_VLLM} or newer, and {installed} is installed. Upgrade it, or decode "
            "with transformers (`use_vllm=False`)."
        )


def num_experts(config: Any) -> int:
    """Experts of a layer, 0 of a model without any."""
    return next((count for name in _EXPERTS if (count := getattr(config.get_text_config(), name, None))), 0)


def _experts_of(partner: Partner) -> int:
    hub = {"revision": partner.revision, "trust_remote_code": partner.trust_remote_code or None}
    hub = {name: value for name, value in hub.items() if value is not None}
    return num_experts(find_config(partner.model, "teacher_model", **hub))

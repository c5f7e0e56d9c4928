"""The entry point of vLLM's plugin group `vllm.general_plugins`, loaded by every process of every engine."""

ARCHITECTURE = "TrlBlendForCausalLM"
"""Name that `architectures` of a configuration has to hold for vLLM to build a blend."""


def register() -> None:
    """Tell vLLM where the architecture is. Nothing of it is loaded before an engine asks for it."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, "trl_blend.serving.model:BlendForCausalLM")

"""The entry point of vLLM's plugin group `vllm.general_plugins`, loaded by every process of every engine."""

ARCHITECTURE = "TrlBlendForCausalLM"
"""Name that `architectures` of a configuration has to hold for vLLM to build a blend."""


CONFIG_FORMAT = "trl_blend"
"""Value of vLLM's `config_format` for an exported mixed policy, whose configuration has its student's inside."""


def register() -> None:
    """Tell vLLM where the architecture and the format are. Nothing is loaded before an engine asks for one of them."""
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import register_config_parser
    from vllm.transformers_utils.config_parser_base import ConfigParserBase

    class MixedPolicyParser(ConfigParserBase):
        """Reads the configuration of the student of an exported mixed policy, without the code in the folder."""

        def parse(self, model, trust_remote_code, revision=None, code_revision=None, **kwargs):
            from trl_blend.serving.folder import student_of_folder

            config = student_of_folder(str(model), revision)
            return config.to_dict(), config

    ModelRegistry.register_model(ARCHITECTURE, "trl_blend.serving.model:BlendForCausalLM")
    register_config_parser(CONFIG_FORMAT)(MixedPolicyParser)

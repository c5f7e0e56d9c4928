"""The entry point of vLLM's plugin group `vllm.general_plugins`, loaded by every process of every engine."""

from trl_blend.serving import ARCHITECTURE


def register() -> None:
    """Tell vLLM of the architecture, and which folders have it. Nothing is loaded before an engine asks for one."""
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import HFConfigParser, register_config_parser
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    class ConfigParser(HFConfigParser):
        """
        vLLM's own, but for an exported mixed policy, whose configuration it could only read by running the code beside
        it. That is not registered with transformers, where others would be given a student without its teachers.
        """

        def parse(self, model, trust_remote_code, revision=None, code_revision=None, **kwargs):
            content = get_hf_file_to_dict("config.json", model, revision) or {}
            if any(str(code).endswith("generate.MixedPolicy") for code in (content.get("auto_map") or {}).values()):
                from trl_blend.serving.folder import config_of_folder

                config = config_of_folder(str(model), revision)
                return config.to_dict(), config
            return super().parse(model, trust_remote_code, revision, code_revision, **kwargs)

    ModelRegistry.register_model(ARCHITECTURE, "trl_blend.serving.model:BlendForCausalLM")
    register_config_parser("hf")(ConfigParser)

"""The entry point of vLLM's plugin group `vllm.general_plugins`, loaded by every process of every engine."""

from trl_blend.serving import ARCHITECTURE


def register() -> None:
    """Tell vLLM of the architecture, and which folders have it. Nothing is loaded before an engine asks for one."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.transformers_utils.config import HFConfigParser, register_config_parser
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    class ConfigParser(HFConfigParser):
        """
        vLLM's own, but for an exported mixed policy, whose configuration it could only read by running the code beside
        it. That is not registered with transformers, where others would be given a student without its teachers.
        """

        def parse(self, model, trust_remote_code, revision=None, code_revision=None, **kwargs):
            content = get_hf_file_to_dict("config.json", model, revision) or {}
            if content.get("auto_map"):
                from trl_blend.models.loading import leads_to_policy

                if leads_to_policy(content):
                    from trl_blend.serving.folder import config_of_folder

                    config = config_of_folder(str(model), revision)
                    return config.to_dict(), config
            return super().parse(model, trust_remote_code, revision, code_revision, **kwargs)

    class BlendConfig(VerifyAndUpdateConfig):
        """What vLLM asks where the engine's settings are put together, before it starts a process."""

        @staticmethod
        def verify_and_update_config(vllm_config):
            if vllm_config.speculative_config is not None and vllm_config.device_config.device_type == "cpu":
                check_rejection_sampler()

    MODELS_CONFIG_MAP[ARCHITECTURE] = BlendConfig
    ModelRegistry.register_model(ARCHITECTURE, "trl_blend.serving.model:BlendForCausalLM")
    register_config_parser("hf")(ConfigParser)


def check_rejection_sampler() -> None:
    """
    Refuse drafts on a CPU where vLLM's sampler of them reads whatever is in memory, as that of 0.31 does: its stand-in
    for a kernel of Triton writes into a copy.

    Raises:
        [`~trl_blend.errors.UnsupportedError`]: If it does.
    """
    import torch
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON
    from vllm.utils import cpu_triton_utils

    from trl_blend.errors import UnsupportedError

    if HAS_TRITON:
        return
    current_platform.import_kernels()
    expanded, values, ends = torch.zeros(3), torch.tensor([2.0, 3.0]), torch.tensor([2, 3], dtype=torch.int32)
    cpu_triton_utils._expand_kernel_impl(expanded, values, ends, 0, 0)
    if expanded.tolist() != [2.0, 2.0, 3.0]:
        raise UnsupportedError(
            "This vLLM draws wrong tokens from drafts on a CPU. Leave `vllm_draft_tokens` (`--speculative-config`) "
            "out, or draw on a GPU."
        )

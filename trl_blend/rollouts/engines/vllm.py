"""Rollouts with a vLLM engine in this process."""

import importlib.util
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from trl_blend.errors import ConfigError
from trl_blend.models.limits import context_length, vocabulary_rows
from trl_blend.models.loading import find_config
from trl_blend.rollouts.config import RolloutConfig
from trl_blend.rollouts.engines.base import (
    OnRows,
    Rollout,
    SamplingSettings,
    about_row,
    drawn_completion,
    load_options,
)
from trl_blend.rollouts.engines.vllm_server import check_by_name, request_settings, scores_of_prompt_logprobs


_OURS = {"model", "revision", "dtype", "trust_remote_code"}
_OURS |= {"logprobs_mode", "enable_prefix_caching", "generation_config"}
# What a machine has to offer, which may be another one when a collection is continued
_OF_THE_MACHINE = {
    "cpu_offload_gb",
    "disable_custom_all_reduce",
    "disable_log_stats",
    "distributed_executor_backend",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "pipeline_parallel_size",
    "tensor_parallel_size",
}
_NOT_RECORDED = {"download_dir", "hf_token"}


class VllmEngine:
    """
    Draws whole shards: one pass draws the completions, a second one, a prefill of prompt and completion, gives
    `student_logps`. Every row has its own seed.

    Rows do not depend on each other but for rounding: the engine's kernels may round otherwise in another batch. Of
    `vllm_kwargs`, those that say how much memory the engine takes and how many devices may change when a collection is
    continued; all others may not. See [`~trl_blend.rollouts.engines.base.Engine`] for the arguments.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If vLLM is not installed, in several processes, for a loaded model or 4-bit
            weights, or if `vllm_kwargs` holds what is set here.
    """

    max_batch: int | None = None

    def __init__(self, model: str, argument: str, args: RolloutConfig) -> None:
        self._options = load_options(args)
        check_by_name(model, argument, self._options)
        self._model, self._kwargs = model, args.vllm_kwargs or {}
        if ours := sorted(_OURS & self._kwargs.keys()):
            raise ConfigError(f"`vllm_kwargs` holds {ours}, which follow from the other settings. Drop them.")
        config = find_config(model, argument, **self._options.hub)
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError("`use_vllm=True` needs vLLM, which is not installed. Run `pip install trl_blend[vllm]`.")
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1:
            raise ConfigError(
                f"`use_vllm=True` in {processes} processes: vLLM starts its own. Start one process, with "
                "`vllm_kwargs={'tensor_parallel_size': ...}`, or use a server (`vllm_server_base_url`)."
            )
        self._rows = vocabulary_rows(config)
        context = self._kwargs.get("max_model_len") or context_length(config)
        # The prefill that scores a completion generates a token
        self.max_length = None if context is None else context - 1
        self.description = {"name": "vllm", "vllm": version("vllm")}
        self.settings: dict[str, Any] = {}
        given = {name: value for name, value in self._kwargs.items() if name not in _NOT_RECORDED}
        if given:
            self.description["vllm_kwargs"] = json.dumps(given, default=str)  # a call may hold what JSON does not
            given = json.loads(self.description["vllm_kwargs"])
        if deciding := {name: value for name, value in given.items() if name not in _OF_THE_MACHINE}:
            self.settings["vllm_kwargs"] = deciding

    def load(self, device: torch.device | None, sampling: SamplingSettings | None = None) -> None:
        """Start the engine; vLLM chooses the devices."""
        from vllm import LLM

        self.sampling = sampling
        self.llm = LLM(
            model=self._model,
            revision=self._options.revision,
            dtype=self._options.dtype,
            trust_remote_code=self._options.trust_remote_code,
            # Log-probs of what was sampled from; a cached prefix would leave out prompt log-probs
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=False,
            generation_config="vllm",
            **self._kwargs,
        )

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int], on_rows: OnRows | None = None
    ) -> list[Rollout]:
        """One rollout per prompt, in order, each with its own seed."""
        from vllm import SamplingParams

        settings = {"logprobs": 0, "detokenize": False, **request_settings(self.sampling, self._rows)}
        if "logit_bias" in settings:
            settings["logit_bias"] = {int(token): bias for token, bias in settings["logit_bias"].items()}
        drawing = [SamplingParams(seed=seed, **settings) for seed in seeds]
        drawn = []
        for row, result in enumerate(self._generate(prompt_ids, drawing)):
            output = result.outputs[0]
            entries = [found.get(token) for found, token in zip(output.logprobs, output.token_ids, strict=True)]
            values = [getattr(entry, "logprob", None) for entry in entries]
            with about_row(row):
                drawn.append(drawn_completion(output.token_ids, values, self.sampling))
        prefill = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        sequences = [[*prompt, *tokens] for prompt, (tokens, _, _) in zip(prompt_ids, drawn, strict=True)]
        rollouts = []
        for row, result in enumerate(self._generate(sequences, prefill)):
            tokens, logps, ended = drawn[row]
            found = result.prompt_logprobs[len(prompt_ids[row]) :]
            entries = [{token: entry.logprob for token, entry in position.items()} for position in found]
            with about_row(row):
                own = scores_of_prompt_logprobs(entries, tokens, None, self.sampling.vocab_size).logps.tolist()
            rollouts.append(Rollout(tokens, logps, own, truncated=not ended))
        if on_rows is not None:
            on_rows(len(rollouts))
        return rollouts

    def _generate(self, prompt_ids: Sequence[Sequence[int]], params: Any) -> list[Any]:
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        return self.llm.generate(prompts, params, use_tqdm=False)

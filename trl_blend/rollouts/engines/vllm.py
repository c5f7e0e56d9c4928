"""Rollouts with a vLLM engine in this process."""

from collections.abc import Sequence
from typing import Any

from trl_blend.errors import ConfigError
from trl_blend.models.loading import LoadOptions
from trl_blend.rollouts.engines.base import OnRows, Rollout, SamplingSettings, cut_at_eos
from trl_blend.rollouts.engines.vllm_server import request_settings, scores_of_prompt_logprobs


_OURS = (
    "model",
    "revision",
    "dtype",
    "trust_remote_code",
    "logprobs_mode",
    "enable_prefix_caching",
    "generation_config",
)


class VllmRolloutEngine:
    """
    Samples whole shards: one pass draws the completions, a second one, a prefill of prompt and completion, gives
    `student_logps`. Every row has its own seed.

    Rows do not depend on each other but for rounding: the engine's kernels may round otherwise in another batch.

    Args:
        model (`str`):
            Folder or Hub id.
        sampling ([`~trl_blend.rollouts.engines.base.SamplingSettings`]):
            What is sampled.
        eos_token_ids (`Sequence[int]`):
            Tokens that end a completion.
        options ([`~trl_blend.models.loading.LoadOptions`]):
            How to load it.
        vllm_kwargs (`dict[str, Any]`):
            Further arguments of `vllm.LLM`.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If `vllm_kwargs` holds one that is set here.
    """

    max_batch: int | None = None

    def __init__(
        self,
        model: str,
        sampling: SamplingSettings,
        eos_token_ids: Sequence[int],
        options: LoadOptions,
        vllm_kwargs: dict[str, Any],
    ) -> None:
        check_vllm_kwargs(vllm_kwargs)
        from vllm import LLM

        self.sampling = sampling
        self.eos_token_ids = list(eos_token_ids)
        self.llm = LLM(
            model=model,
            revision=options.revision,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
            # Log-probs of what was sampled from; a cached prefix would leave out prompt log-probs
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=False,
            generation_config="vllm",
            **vllm_kwargs,
        )

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int], on_rows: OnRows | None = None
    ) -> list[Rollout]:
        """One rollout per prompt, in order, each with its own seed."""
        from vllm import SamplingParams

        drawing = [
            SamplingParams(
                seed=seed,
                logprobs=0,
                stop_token_ids=self.eos_token_ids,
                detokenize=False,
                **request_settings(self.sampling),
            )
            for seed in seeds
        ]
        outputs = self._generate(prompt_ids, drawing)
        drawn = []
        for output in outputs:
            tokens = list(output.token_ids)
            end, ended = cut_at_eos(tokens, self.eos_token_ids)
            logps = [row[token].logprob for row, token in zip(output.logprobs, tokens, strict=True)]
            drawn.append((tokens[:end], [min(float(z), 0.0) for z in logps[:end]], ended))
        prefill = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        sequences = [[*prompt, *tokens] for prompt, (tokens, _, _) in zip(prompt_ids, drawn, strict=True)]
        results = self.llm.generate([{"prompt_token_ids": ids} for ids in sequences], prefill, use_tqdm=False)
        rollouts = []
        for prompt, (tokens, logps, ended), result in zip(prompt_ids, drawn, results, strict=True):
            rows = [
                {token: entry.logprob for token, entry in row.items()} for row in result.prompt_logprobs[len(prompt) :]
            ]
            own = scores_of_prompt_logprobs(rows, tokens, None).logps.tolist()
            rollouts.append(Rollout(tokens, logps, own, truncated=not ended))
        if on_rows is not None:
            on_rows(len(rollouts), sum(len(rollout.completion_ids) for rollout in rollouts))
        return rollouts

    def _generate(self, prompt_ids: Sequence[Sequence[int]], params: Any) -> list[Any]:
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        return [result.outputs[0] for result in self.llm.generate(prompts, params, use_tqdm=False)]


def check_vllm_kwargs(vllm_kwargs: dict[str, Any]) -> None:
    """
    Refuse arguments of `vllm.LLM` that are set here.

    Raises:
        [`~trl_blend.errors.ConfigError`]: At the first one.
    """
    for name in _OURS:
        if name in vllm_kwargs:
            raise ConfigError(
                f"`vllm_kwargs` holds {name}={vllm_kwargs[name]!r}, which follows from the other settings. Drop it."
            )

"""One collection of rollouts: what is sampled from what, shard by shard."""

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from trl_blend.errors import ConfigError
from trl_blend.teacher import workers
from trl_blend.teacher.columns import row_key
from trl_blend.teacher.loading import LoadOptions, find_eos_token_ids, load_model
from trl_blend.teacher.local_rollouts import LocalRolloutEngine
from trl_blend.teacher.manifest import Manifest
from trl_blend.teacher.progress import Progress
from trl_blend.teacher.prompts import PromptScan, PromptTokens
from trl_blend.teacher.sampling import Rollout, RolloutEngine, SamplingSettings, row_seed
from trl_blend.teacher.vllm_engine import VllmRolloutEngine, check_vllm_kwargs
from trl_blend.teacher.vllm_server import VllmServer


@dataclass
class RolloutPlan:
    """
    Everything that decides which rows a shard holds and how they are drawn.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The student.
        load ([`~trl_blend.teacher.loading.LoadOptions`]):
            How to load it.
        sampling ([`~trl_blend.teacher.sampling.SamplingSettings`]):
            What is sampled.
        source ([`~trl_blend.teacher.prompts.PromptTokens`]):
            The prompts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the student.
        rows_per_shard (`int`):
            Rows of a shard, as far as prompts stay whole.
        batch_size (`int`):
            Completions drawn at once by transformers.
        server ([`~trl_blend.teacher.vllm_server.VllmServer`], *optional*):
            Where to sample.
        vllm_kwargs (`dict[str, Any]`, *optional*):
            Arguments of a vLLM engine in this process, which then samples.
    """

    model: str | PreTrainedModel
    load: LoadOptions
    sampling: SamplingSettings
    source: PromptTokens
    tokenizer: Any
    rows_per_shard: int
    batch_size: int
    server: VllmServer | None = None
    vllm_kwargs: dict[str, Any] | None = None

    @cached_property
    def scan(self) -> PromptScan:
        """One pass over all prompts."""
        return self.source.scan(self.prompts_per_shard)

    @cached_property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a completion."""
        return find_eos_token_ids(self.model, self.tokenizer, revision=self.load.revision)

    @property
    def engine_name(self) -> str:
        """As in the manifest."""
        return "vllm-server" if self.server else "transformers" if self.vllm_kwargs is None else "vllm"

    @property
    def prompts_per_shard(self) -> int:
        """All samples of a prompt are in one shard."""
        return max(1, self.rows_per_shard // self.sampling.num_rollouts_per_prompt)

    def bounds(self, index: int) -> tuple[int, int]:
        """First prompt of a shard and the one after its last."""
        start = index * self.prompts_per_shard
        return start, min(start + self.prompts_per_shard, len(self.source))

    def num_rows(self, index: int) -> int:
        """Rows of a shard."""
        start, stop = self.bounds(index)
        return (stop - start) * self.sampling.num_rollouts_per_prompt

    def check_lengths(self, context: int | None, extra: int = 0) -> None:
        """Refuse prompts that leave no room for a completion and `extra` tokens more, before anything is loaded."""
        longest, room = self.scan.longest, self.sampling.max_new_tokens + extra
        if context is None or longest + room <= context:
            return
        remedy = "Drop the longest prompts"
        if context > longest + extra:
            remedy = f"Set `max_new_tokens={context - longest - extra}` or less, or drop the longest prompts"
        raise ConfigError(
            f"Row {self.scan.longest_row} of the prompts has {longest} tokens. With "
            f"`max_new_tokens={self.sampling.max_new_tokens}` that is more than the model's context of {context}"
            f"{' (one token is left for scoring)' if extra else ''}. {remedy}."
        )

    def manifest(self, state: PartialState, identify: bool, logps_dtype: str, prompts: str) -> Manifest:
        """What is going to be written. Reads the weights once, for the identity."""
        student = None
        if identify:
            student = workers.on_main_process(
                state,
                lambda: workers.identify(self.model, "model", tokenizer=self.tokenizer, revision=self.load.revision),
            )
        engine = self.engine_name
        settings = {
            **self.sampling.to_dict(),
            **workers.identity_settings("student", student, self.model),
            "engine": engine,
            "dtype": self.load.weights,
            "eos_token_ids": self.eos_token_ids,
            "rows_per_shard": self.rows_per_shard,
            "prompts": self.scan.digest,
        }
        if engine == "transformers":
            settings["batch_size"] = self.batch_size
        return Manifest(
            kind="rollouts",
            settings=settings,
            planned_shards=len(self.scan.digests),
            logps_dtype=logps_dtype,
            sampling={**self.sampling.to_dict(), "eos_token_ids": self.eos_token_ids},
            engine=self.server.engine if self.server else workers.engine_versions(engine),
            student=student,
            source={"prompts": prompts, "num_prompts": len(self.source), "digest": self.scan.digest},
        )

    def build_engine(self, state: PartialState) -> RolloutEngine:
        """Loads the model."""
        if self.server:
            return self.server.rollout_engine(self.sampling, self.eos_token_ids)
        if self.vllm_kwargs is not None:
            return VllmRolloutEngine(self.model, self.sampling, self.eos_token_ids, self.load, self.vllm_kwargs)
        model = load_model(self.model, "model", self.load, state.device)
        pad_token_id = self.tokenizer.pad_token_id
        pad_token_id = self.eos_token_ids[0] if pad_token_id is None else pad_token_id
        return LocalRolloutEngine(model, self.sampling, self.eos_token_ids, pad_token_id, self.batch_size)

    def sample(self, engine: RolloutEngine, index: int, progress: Progress) -> dict[str, list[Any]]:
        """Columns of a shard: its prompts in order, the samples of a prompt side by side."""
        start, stop = self.bounds(index)
        samples = self.sampling.num_rollouts_per_prompt
        prompts = [ids for ids in self.source.ids(start, stop) for _ in range(samples)]
        seeds = [row_seed(self.sampling.seed, start * samples + row) for row in range(len(prompts))]
        rollouts: dict[int, Rollout] = {}
        # Prompts of similar length share a batch: less padding
        order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row))
        size = engine.max_batch or len(order)
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            drawn = engine.sample([prompts[row] for row in batch], [seeds[row] for row in batch], progress.update)
            rollouts.update(zip(batch, drawn, strict=True))
        rows = [rollouts[row] for row in range(len(prompts))]
        return {
            "key": [row_key(ids, row % samples) for row, ids in enumerate(prompts)],
            "prompt_ids": prompts,
            **{name: [getattr(rollout, name) for rollout in rows] for name in Rollout._fields},
        }


def check_engine(
    model: Any, load: LoadOptions, use_vllm: bool, server_url: str | None, vllm_kwargs: dict[str, Any] | None
) -> None:
    """
    Refuse settings of the engine that contradict each other or cannot be met.

    Raises:
        [`~trl_blend.errors.ConfigError`]: At the first one.
    """
    if use_vllm and server_url is not None:
        raise ConfigError(
            f"`use_vllm=True` samples in this process and `vllm_server_url={server_url!r}` on a server. Set one."
        )
    if vllm_kwargs and not use_vllm:
        raise ConfigError(
            "`vllm_kwargs` are arguments of the engine in this process. Set `use_vllm=True`, or drop them."
        )
    if not (use_vllm or server_url):
        return
    if not isinstance(model, str):
        raise ConfigError(
            f"vLLM loads the model by name, but `model` is a loaded {type(model).__name__}. Pass a name."
        )
    if load.load_in_4bit:
        raise ConfigError("`load_in_4bit=True` is for transformers. Give vLLM a quantized checkpoint instead.")
    check_vllm_kwargs(vllm_kwargs or {})
    if use_vllm and importlib.util.find_spec("vllm") is None:
        raise ConfigError("`use_vllm=True` needs vLLM, which is not installed. Run `pip install trl_blend[vllm]`.")


def check_one_process(state: PartialState) -> None:
    """
    Refuse a vLLM engine in each of several processes: it starts its own.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If there are several.
    """
    if state.num_processes > 1:
        raise ConfigError(
            f"`use_vllm=True` in {state.num_processes} processes: vLLM starts its own. Start one process, with "
            "`vllm_kwargs={'tensor_parallel_size': ...}`, or use a server (`vllm_server_url`)."
        )

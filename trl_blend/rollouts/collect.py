"""
Collecting rollouts of the student, with the log-probabilities of what was sampled from. Killed at any point and
started again, the result is the same row for row.
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_blend.errors import ConfigError
from trl_blend.models.loading import (
    LoadOptions,
    check_not_loaded,
    find_config,
    find_eos_token_ids,
    find_tokenizer,
    load_model,
)
from trl_blend.rollouts import processes
from trl_blend.rollouts.engines.base import Rollout, RolloutEngine, SamplingSettings, row_seed
from trl_blend.rollouts.engines.local import LocalRolloutEngine, context_length
from trl_blend.rollouts.engines.vllm import VllmRolloutEngine, check_vllm_kwargs
from trl_blend.rollouts.engines.vllm_server import VllmServer
from trl_blend.rollouts.format import Manifest, row_key
from trl_blend.rollouts.progress import Progress
from trl_blend.rollouts.prompts import PromptScan, PromptTokens, describe_dataset, load_prompts
from trl_blend.rollouts.store import RolloutStore


def collect_rollouts(
    model: str | PreTrainedModel,
    prompts: str | os.PathLike[str] | Dataset | Sequence[Any],
    output_dir: str | os.PathLike[str],
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 0,
    min_p: float | None = None,
    max_new_tokens: int = 4096,
    num_rollouts_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    rows_per_shard: int = 256,
    logps_dtype: str = "float16",
    prompt_column: str = "prompt",
    dataset_config: str | None = None,
    dataset_split: str = "train",
    chat_template_kwargs: dict[str, Any] | None = None,
    model_revision: str | None = None,
    dtype: str = "auto",
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
    use_vllm: bool = False,
    vllm_kwargs: dict[str, Any] | None = None,
    vllm_server_url: str | None = None,
    vllm_concurrency: int = 64,
    identify: bool = True,
    repair: bool = False,
    show_progress: bool = True,
) -> RolloutStore:
    """
    Sample completions of every prompt and write them as a store of rollouts.

    Every row holds the token ids (never text), the log-probability of each token under the distribution that it was
    sampled from, and under the model at temperature 1. The same command started again goes on where it stopped; under
    `accelerate launch` or `torchrun` the shards are split over the processes. Which rows a shard holds and how they
    are drawn follows from the settings, so that the number of processes and any interruption change nothing.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or `peft.PeftModel`):
            The student: folder, Hub id or model.
        prompts (`str`, [`~datasets.Dataset`] or `list`):
            Prompts, text or messages. See [`~trl_blend.rollouts.prompts.load_prompts`].
        output_dir (`str` or `os.PathLike`):
            Folder of the store: new, empty, or begun by the same call.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the student, by default the one beside the model.
        temperature, top_p, top_k, min_p, max_new_tokens, num_rollouts_per_prompt, seed:
            What is sampled, see [`~trl_blend.rollouts.engines.base.SamplingSettings`].
        batch_size (`int`, *optional*, defaults to `32`):
            Completions drawn at once by transformers. It decides which random numbers a row gets, so it has to stay
            the same when a collection is continued.
        rows_per_shard (`int`, *optional*, defaults to `256`):
            Rows of a file; what a kill can cost at most, per process.
        logps_dtype (`str`, *optional*, defaults to `"float16"`):
            `"float16"` or `"float32"`, for the stored log-probabilities.
        prompt_column, dataset_config, dataset_split:
            Where the prompts are in the dataset.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of the chat template.
        model_revision, dtype, load_in_4bit, trust_remote_code:
            How to load the model, see [`~trl_blend.models.loading.LoadOptions`].
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether to sample with a vLLM engine in this process.
        vllm_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of `vllm.LLM`, such as `tensor_parallel_size`.
        vllm_server_url (`str`, *optional*):
            Root URL of a running vLLM server of `model`, started with `--logprobs-mode processed_logprobs`.
        vllm_concurrency (`int`, *optional*, defaults to `64`):
            Requests at once.
        identify (`bool`, *optional*, defaults to `True`):
            Whether to record which model it is (its weights are read once). Without, the teacher's consistency cannot
            be verified.
        repair (`bool`, *optional*, defaults to `False`):
            Whether to verify what is there and redo what is bad.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether the main process shows a progress bar.

    Returns:
        [`~trl_blend.rollouts.store.RolloutStore`]: The finished store.

    Raises:
        [`~trl_blend.errors.ConfigError`]: If a setting is out of range, contradicts another, or differs from those
            that the store was begun with. Raised before the model is loaded.
        [`~trl_blend.errors.StoreError`]: If the store is broken, being written by another process, or the disk full.
        [`~trl_blend.errors.UnsupportedError`]: If the model cannot generate.
    """
    sampling = SamplingSettings(temperature, top_p, top_k, min_p, max_new_tokens, num_rollouts_per_prompt, seed)
    load = LoadOptions(model_revision, dtype, load_in_4bit, trust_remote_code)
    check_not_loaded(model, "model", load)
    check_engine(model, load, use_vllm, vllm_server_url, vllm_kwargs)
    processes.check_numbers(
        logps_dtype, batch_size=batch_size, rows_per_shard=rows_per_shard, vllm_concurrency=vllm_concurrency
    )
    processes.check_output_dir(output_dir)

    config = find_config(model, "model", **load.hub)
    tokenizer = processing_class or find_tokenizer(model, "model", required=True, **load.hub)
    dataset = load_prompts(prompts, column=prompt_column, config=dataset_config, split=dataset_split)
    source = PromptTokens(dataset, tokenizer, prompt_column, chat_template_kwargs)
    plan = RolloutPlan(model, load, sampling, source, tokenizer, rows_per_shard, batch_size)
    plan.check_lengths(context_length(config))
    state = processes.processes()
    if vllm_server_url is not None:
        plan.server = VllmServer(vllm_server_url, model, argument="model", concurrency=vllm_concurrency)
        plan.check_lengths(plan.server.max_model_len, extra=1)
    elif use_vllm:
        plan.vllm_kwargs = vllm_kwargs or {}
        plan.check_lengths(plan.vllm_kwargs.get("max_model_len") or context_length(config), extra=1)
        check_one_process(state)

    manifest = plan.manifest(state, identify, logps_dtype, describe_dataset(prompts))
    writer = processes.open_writer(state, output_dir, manifest, repair)
    digests = plan.scan.digests
    own = processes.own_shards(state, len(digests))
    todo = [index for index in own if not writer.done(index, digests[index])]
    if todo:
        engine = plan.build_engine(state)
        rows = [plan.num_rows(index) for index in own]
        done = sum(rows) - sum(plan.num_rows(index) for index in todo)
        with Progress("rollouts", sum(rows), done, show=show_progress and state.is_main_process) as progress:
            for index in todo:
                writer.write(index, plan.sample(engine, index, progress), digests[index])
                writer.update_manifest()
    processes.finish(writer, len(digests))
    return RolloutStore.open(output_dir)


@dataclass
class RolloutPlan:
    """
    Everything that decides which rows a shard holds and how they are drawn.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The student.
        load ([`~trl_blend.models.loading.LoadOptions`]):
            How to load it.
        sampling ([`~trl_blend.rollouts.engines.base.SamplingSettings`]):
            What is sampled.
        source ([`~trl_blend.rollouts.prompts.PromptTokens`]):
            The prompts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the student.
        rows_per_shard (`int`):
            Rows of a shard, as far as prompts stay whole.
        batch_size (`int`):
            Completions drawn at once by transformers.
        server ([`~trl_blend.rollouts.engines.vllm_server.VllmServer`], *optional*):
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
            student = processes.on_main_process(
                state,
                lambda: processes.identify(self.model, "model", tokenizer=self.tokenizer, revision=self.load.revision),
            )
        engine = self.engine_name
        settings = {
            **self.sampling.to_dict(),
            **processes.identity_settings("student", student, self.model),
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
            engine=self.server.engine if self.server else processes.engine_versions(engine),
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

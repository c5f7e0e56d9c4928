"""
Collecting rollouts of the student, with the log-probabilities of what was sampled from. Killed at any point and
started again, the result is the same row for row.
"""

import os
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_blend.teacher import workers
from trl_blend.teacher.loading import LoadOptions, check_not_loaded, find_config, find_tokenizer
from trl_blend.teacher.local_engine import context_length
from trl_blend.teacher.progress import Progress
from trl_blend.teacher.prompts import PromptTokens, describe_dataset, load_prompts
from trl_blend.teacher.rollout_plan import RolloutPlan, check_engine, check_one_process
from trl_blend.teacher.sampling import SamplingSettings
from trl_blend.teacher.store import RolloutStore
from trl_blend.teacher.vllm_server import VllmServer


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
            Prompts, text or messages. See [`~trl_blend.teacher.prompts.load_prompts`].
        output_dir (`str` or `os.PathLike`):
            Folder of the store: new, empty, or begun by the same call.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the student, by default the one beside the model.
        temperature, top_p, top_k, min_p, max_new_tokens, num_rollouts_per_prompt, seed:
            What is sampled, see [`~trl_blend.teacher.sampling.SamplingSettings`].
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
            How to load the model, see [`~trl_blend.teacher.loading.LoadOptions`].
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
        [`~trl_blend.teacher.store.RolloutStore`]: The finished store.

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
    workers.check_numbers(
        logps_dtype, batch_size=batch_size, rows_per_shard=rows_per_shard, vllm_concurrency=vllm_concurrency
    )
    workers.check_output_dir(output_dir)

    config = find_config(model, "model", **load.hub)
    tokenizer = processing_class or find_tokenizer(model, "model", **load.hub)
    dataset = load_prompts(prompts, column=prompt_column, config=dataset_config, split=dataset_split)
    source = PromptTokens(dataset, tokenizer, prompt_column, chat_template_kwargs)
    plan = RolloutPlan(model, load, sampling, source, tokenizer, rows_per_shard, batch_size)
    plan.check_lengths(context_length(config))
    state = workers.processes()
    if vllm_server_url is not None:
        plan.server = VllmServer(vllm_server_url, model, argument="model", concurrency=vllm_concurrency)
        plan.check_lengths(plan.server.max_model_len, extra=1)
    elif use_vllm:
        plan.vllm_kwargs = vllm_kwargs or {}
        plan.check_lengths(plan.vllm_kwargs.get("max_model_len") or context_length(config), extra=1)
        check_one_process(state)

    manifest = plan.manifest(state, identify, logps_dtype, describe_dataset(prompts))
    writer = workers.open_writer(state, output_dir, manifest, repair)
    digests = plan.scan.digests
    own = workers.own_shards(state, len(digests))
    todo = [index for index in own if not writer.done(index, digests[index])]
    if todo:
        engine = plan.build_engine(state)
        rows = [plan.num_rows(index) for index in own]
        done = sum(rows) - sum(plan.num_rows(index) for index in todo)
        with Progress("rollouts", sum(rows), done, show=show_progress and state.is_main_process) as progress:
            for index in todo:
                writer.write(index, plan.sample(engine, index, progress), digests[index])
                writer.update_manifest()
    workers.finish(writer, len(digests))
    return RolloutStore.open(output_dir)

"""
Every method of TRL, transformers and accelerate that this package overrides or calls although nobody promises to keep
it, with its parameters when this package was written. Where one is used, `grep` says.

Parameters are written by name: `name=` has a default, `*` and `**` collect the rest. Where the releases that
`pyproject.toml` allows differ, there is a line for each form, the oldest first.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any


SEAMS = {
    "trl.GRPOTrainer.__init__": (
        "self, model, reward_funcs=, args=, train_dataset=, eval_dataset=, processing_class=, "
        "reward_processing_classes=, callbacks=, optimizers=, quantization_config=, peft_config=, tools=, "
        "rollout_func=, environment_factory="
    ),
    "trl.GRPOTrainer._generate_and_score_completions": "self, inputs",
    "trl.GRPOTrainer._generate_single_turn": (
        "self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images="
    ),
    "trl.GRPOTrainer._generate": "self, prompts",
    "trl.GRPOTrainer._calculate_rewards": "self, inputs, prompts, completions, completion_ids_list",
    "trl.GRPOTrainer._log_completion_extra": "self, column, values",
    "trl.GRPOTrainer._get_per_token_logps_and_entropies": (
        "self, model, input_ids, attention_mask, logits_to_keep, batch_size=, compute_entropy=, compute_aux_loss=,"
        " pixel_values=, image_grid_thw=, num_images=, pixel_attention_mask=, spatial_shapes=, num_tiles=, "
        "image_sizes=, token_type_ids=, mm_token_type_ids=, image_position_ids="
    ),
    "trl.GRPOTrainer._compute_loss": "self, model, inputs",
    "trl.GRPOTrainer.prediction_step": "self, model, inputs, prediction_loss_only, ignore_keys=",
    "trl.GRPOTrainer._save_checkpoint": "self, model, trial",
    "trl.GRPOTrainer._load_optimizer_and_scheduler": "self, checkpoint",
    "trl.GRPOTrainer.create_model_card": "self, model_name=, dataset_name=, tags=",
    "trl.GRPOTrainer._get_output_dir": "self, trial",
    "trl.DistillationTrainer.__init__": (
        "self, model, teacher_model=, args=, train_dataset=, eval_dataset=, processing_class=, callbacks=, "
        "optimizers=, quantization_config=, peft_config=, tools="
    ),
    "trl.DistillationTrainer._generate_and_score_completions": "self, inputs",
    "trl.DistillationTrainer._generate_single_turn": "self, prompt_ids, images, multimodal_fields, has_tool_images=",
    "trl.DistillationTrainer.compute_loss": "self, model, inputs, return_outputs=, num_items_in_batch=",
    "trl.DistillationTrainer._compute_loss": "self, unwrapped_student, inputs, num_items_in_batch",
    "trl.DistillationTrainer._get_last_hidden_state": (
        "self, unwrapped_model, input_ids, attention_mask, logits_to_keep, pixel_values=, image_grid_thw=, "
        "pixel_attention_mask=, spatial_shapes=, image_sizes=, token_type_ids=, mm_token_type_ids=, "
        "image_position_ids="
    ),
    "trl.DistillationTrainer._get_train_sampler": "self, dataset=",
    "trl.DistillationTrainer.get_train_dataloader": "self",
    "trl.DistillationTrainer.log": "self, logs, start_time=",
    "trl.DistillationTrainer._save_checkpoint": "self, model, trial",
    "trl.DistillationTrainer._load_optimizer_and_scheduler": "self, checkpoint",
    "trl.DistillationTrainer.create_model_card": "self, model_name=, dataset_name=, tags=",
    "trl.DistillationTrainer._get_output_dir": "self, trial",
    "trl.trainer.distillation_trainer._chunked_divergence_loss": (
        "student_hidden_states, teacher_hidden_states, student_lm_head_weight, teacher_lm_head_weight, "
        "completion_mask, beta, num_items_in_batch=, student_lm_head_bias=, teacher_lm_head_bias=, "
        "student_logit_scale=, teacher_logit_scale=, student_final_logit_softcapping=, "
        "teacher_final_logit_softcapping=, temperature="
    ),
    "trl.trainer.distillation_trainer.RepeatSampler": (
        "data_source, mini_repeat_count, batch_size=, repeat_count=, shuffle=, seed="
    ),
    "trl.trainer.distillation_trainer.repeat_iterable_dataset": (
        "dataset, mini_repeat_count, batch_size=, repeat_count="
    ),
    "trl.generation.vllm_generation.VLLMGeneration.generate": "self, prompts, images, num_generations, profiler=",
    "trl.generation.vllm_generation.VLLMGeneration.sync_weights": "self",
    "trl.generation.vllm_generation.VLLMGeneration._init_vllm": "self",
    "trl.generation.vllm_client.VLLMClient._post": "self, url, **kwargs",
    "trl.generation.vllm_client.VLLMClient.reset_prefix_cache": "self",
    "trl.SFTTrainer.__init__": (
        "self, model, args=, data_collator=, train_dataset=, eval_dataset=, processing_class=, compute_loss_func=,"
        " compute_metrics=, callbacks=, optimizers=, optimizer_cls_and_kwargs=, preprocess_logits_for_metrics=, "
        "quantization_config=, peft_config=, formatting_func="
    ),
    "trl.SFTTrainer._prepare_dataset": "self, dataset, processing_class, args, packing, formatting_func, dataset_name",
    "trl.SFTTrainer._set_signature_columns_if_needed": "self",
    "trl.SFTTrainer._get_num_items_in_batch": "self, batch_samples, device",
    "trl.SFTTrainer.evaluation_loop": (
        "self, dataloader, description, prediction_loss_only=, ignore_keys=, metric_key_prefix="
    ),
    "trl.SFTTrainer.evaluate": "self, eval_dataset=, ignore_keys=, metric_key_prefix=",
    "trl.SFTTrainer.predict": "self, test_dataset, ignore_keys=, metric_key_prefix=",
    "trl.SFTTrainer.compute_loss": "self, model, inputs, return_outputs=, num_items_in_batch=",
    "trl.SFTTrainer.training_step": "self, *args, **kwargs",
    "trl.SFTTrainer.log": "self, logs, start_time=",
    "trl.SFTTrainer.save_model": "self, output_dir=, _internal_call=",
    "trl.SFTTrainer.create_model_card": "self, model_name=, dataset_name=, tags=",
    "trl.SFTTrainer._save_checkpoint": "self, model, trial",
    "trl.SFTTrainer._get_output_dir": "self, trial",
    "transformers.Trainer.init_hf_repo": ("self, token=", "self, token=, private="),
    "transformers.Trainer.push_to_hub": (
        "self, commit_message=, blocking=, token=, revision=, **kwargs",
        "self, commit_message=, blocking=, token=, revision=, private=, **kwargs",
    ),
    "transformers.Trainer._push_from_checkpoint": "self, checkpoint_folder",
    "transformers.Trainer._finish_current_push": "self",
    "trl.trainer.sft_trainer.DataCollatorForLanguageModeling.__init__": (
        "self, pad_token_id, padding_free=, return_position_ids=, pad_to_multiple_of=, return_tensors="
    ),
    "trl.trainer.sft_trainer.DataCollatorForLanguageModeling.torch_call": "self, examples",
    "trl.pack_dataset": "dataset, seq_length, strategy=, map_kwargs=",
    "trl.trainer.utils._ChunkedLogProbFunction.forward": (
        "ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=, logit_scale=, outputs="
    ),
    "trl.trainer.utils.add_fused_lm_head": "model, temperature=, cast_lm_head_to_fp32=, outputs=",
    "trl.trainer.utils.maybe_gather_lm_head_ctx": "*params",
    "trl.trainer.utils.get_config_model_id": "config",
    "trl.trainer.utils.get_callable_name": "func",
    "trl.trainer.utils.print_prompt_completions_sample": (
        "prompts, completions, rewards, advantages, step, num_samples=, extra="
    ),
    "trl.trainer.utils.create_model_from_path": "model_id, architecture=, **kwargs",
    "transformers.Trainer.save_model": "self, output_dir=, _internal_call=",
    "transformers.Trainer.train": "self, resume_from_checkpoint=, trial=, ignore_keys_for_eval=",
    "transformers.Trainer._load_best_model": "self",
    "transformers.GenerationMixin.load_custom_generate": (
        "self, pretrained_model_name_or_path=, trust_remote_code=, **kwargs"
    ),
    "transformers.dynamic_module_utils.get_class_from_dynamic_module": (
        "class_reference, pretrained_model_name_or_path, cache_dir=, force_download=, proxies=, token=, revision=,"
        " local_files_only=, repo_type=, code_revision=, **kwargs"
    ),
    "transformers.utils.cached_file": "path_or_repo_id, filename, **kwargs",
    "transformers.integrations.peft.PeftAdapterMixin.load_adapter": (
        "self, peft_model_id=, adapter_name=, peft_config=, adapter_state_dict=, low_cpu_mem_usage=, "
        "is_trainable=, hotswap=, local_files_only=, adapter_kwargs=, load_config=, **kwargs"
    ),
    "transformers.GenerationMixin.generate": (
        "self, inputs=, generation_config=, logits_processor=, stopping_criteria=, prefix_allowed_tokens_fn=, "
        "synced_gpus=, assistant_model=, streamer=, negative_prompt_ids=, negative_prompt_attention_mask=, "
        "custom_generate=, **kwargs"
    ),
    "transformers.GenerationMixin._prepare_generation_config": "self, generation_config, **kwargs",
    "transformers.GenerationMixin._prepare_special_tokens": (
        "self, generation_config, kwargs_has_attention_mask=, device=",
        "self, generation_config, kwargs_has_attention_mask=, device=, batch_size=",
    ),
    "transformers.GenerationMixin._prepare_attention_mask_for_generation": (
        "self, inputs_tensor, generation_config, model_kwargs"
    ),
    "transformers.GenerationMixin.prepare_inputs_for_generation": tuple(
        f"self, input_ids, next_sequence_length=, {cache}=, attention_mask=, inputs_embeds=, is_first_iteration=, "
        "**kwargs"
        for cache in ("past_key_values", "cache")
    ),
    "transformers.GenerationMixin._update_model_kwargs_for_generation": (
        "self, outputs, model_kwargs, is_encoder_decoder=, num_new_tokens="
    ),
    "transformers.GenerationMixin._prepare_position_ids_for_generation": "self, inputs_tensor, model_kwargs",
    "transformers.GenerationMixin._supports_logits_to_keep": "self",
    "transformers.GenerationMixin._prepare_cache_for_generation": (
        "self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length"
    ),
    "transformers.GenerationConfig.get_generation_mode": "self, assistant_model=",
    "accelerate.Accelerator.prepare_model": "self, model, device_placement=, evaluation_mode=",
    "accelerate.utils.broadcast_object_list": "object_list, from_process=",
}

GRPO_ATTRIBUTES = (
    "_dist _is_vlm _metrics _pending_extra_logs _pending_metrics eos_token_ids epsilon_high epsilon_low "
    "generation_config generation_kwargs importance_sampling_level model_wrapped ref_model reward_weights temperature"
    " vllm_importance_sampling_correction"
).split()
"""Attributes of a `GRPOTrainer` instance that this package reads or replaces."""

DISTILLATION_ATTRIBUTES = (
    "_dist _is_vlm _logs _metrics _tokenizer eos_token_ids generation_config generation_kwargs log_completions"
    " model_wrapped teacher_model temperature use_vllm"
).split()
"""The same of a `DistillationTrainer` instance."""


def resolve(path: str) -> Any:
    """The object that a dotted path names."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


def parameters(function: Callable[..., Any]) -> str:
    """Parameters of a function in the notation of [`SEAMS`]."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(
        stars.get(one.kind, "") + one.name + ("" if one.default is one.empty else "=")
        for one in inspect.signature(function).parameters.values()
    )

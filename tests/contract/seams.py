"""
Every method of TRL, transformers and accelerate that this package overrides or calls although nobody promises to keep
it, with its parameters and the part of this package that would break.

Parameters are written by name: `name=` has a default, `*` and `**` collect the rest.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple


class Seam(NamedTuple):
    """
    Args:
        parameters (`str`):
            Parameters of the method when this package was written.
        users (`str`):
            Who in this package relies on them.
    """

    parameters: str
    users: str


_TRAINER = "trainers/logit_mix_grpo/trainer.py (override)"
_GREEDY = "trainers/logit_mix_grpo/greedy.py"
_OPD = "trainers/trust_region_opd/trainer.py (override)"
_REPEATS = "_compat.py (repeated_prompts)"
_ENGINE = "trainers/trust_region_opd/trainer.py (_generate_single_turn, with `use_vllm`)"
_RUN = "trainers/_run.py (RunMixin)"
_SAVING = "trainers/logit_mix_grpo/saving.py (MixedPolicySaving)"
_OFFLINE = "trainers/offline_opd/trainer.py (override)"
_ROWS = "trainers/offline_opd/data.py"
_PARTNER = "generation/partner.py (PartnerDecoder)"
_HOOKS = "generation/hooks.py (_BlendedGenerate)"
_EXPORT = "hub/custom_generate/generate.py (which runs without this package)"

SEAMS = {
    "trl.GRPOTrainer.__init__": Seam(
        "self, model, reward_funcs=, args=, train_dataset=, eval_dataset=, processing_class=, "
        "reward_processing_classes=, callbacks=, optimizers=, quantization_config=, peft_config=, tools=, "
        "rollout_func=, environment_factory=",
        _TRAINER,
    ),
    "trl.GRPOTrainer._generate_and_score_completions": Seam("self, inputs", _TRAINER),
    "trl.GRPOTrainer._generate_single_turn": Seam(
        "self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=", _TRAINER
    ),
    "trl.GRPOTrainer._generate": Seam("self, prompts", _GREEDY),
    "trl.GRPOTrainer._calculate_rewards": Seam("self, inputs, prompts, completions, completion_ids_list", _GREEDY),
    "trl.GRPOTrainer._log_completion_extra": Seam("self, column, values", _TRAINER),
    "trl.GRPOTrainer._get_per_token_logps_and_entropies": Seam(
        "self, model, input_ids, attention_mask, logits_to_keep, batch_size=, compute_entropy=, compute_aux_loss=, "
        "pixel_values=, image_grid_thw=, num_images=, pixel_attention_mask=, spatial_shapes=, num_tiles=, "
        "image_sizes=, token_type_ids=, mm_token_type_ids=, image_position_ids=",
        _TRAINER,
    ),
    "trl.GRPOTrainer._compute_loss": Seam("self, model, inputs", _TRAINER),
    "trl.GRPOTrainer.prediction_step": Seam("self, model, inputs, prediction_loss_only, ignore_keys=", _TRAINER),
    "trl.GRPOTrainer._save_checkpoint": Seam("self, model, trial", _RUN),
    "trl.GRPOTrainer._load_optimizer_and_scheduler": Seam("self, checkpoint", _TRAINER),
    "trl.GRPOTrainer.create_model_card": Seam("self, model_name=, dataset_name=, tags=", _TRAINER),
    "trl.GRPOTrainer._get_output_dir": Seam("self, trial", _RUN),
    "trl.DistillationTrainer.__init__": Seam(
        "self, model, teacher_model=, args=, train_dataset=, eval_dataset=, processing_class=, callbacks=, "
        "optimizers=, quantization_config=, peft_config=, tools=",
        _OPD,
    ),
    "trl.DistillationTrainer._generate_and_score_completions": Seam("self, inputs", _OPD),
    "trl.DistillationTrainer._generate_single_turn": Seam(
        "self, prompt_ids, images, multimodal_fields, has_tool_images=", _OPD
    ),
    "trl.DistillationTrainer.compute_loss": Seam("self, model, inputs, return_outputs=, num_items_in_batch=", _OPD),
    "trl.DistillationTrainer._compute_loss": Seam("self, unwrapped_student, inputs, num_items_in_batch", _OPD),
    "trl.DistillationTrainer._get_last_hidden_state": Seam(
        "self, unwrapped_model, input_ids, attention_mask, logits_to_keep, pixel_values=, image_grid_thw=, "
        "pixel_attention_mask=, spatial_shapes=, image_sizes=, token_type_ids=, mm_token_type_ids=, "
        "image_position_ids=",
        _OPD,
    ),
    "trl.DistillationTrainer._get_train_sampler": Seam("self, dataset=", _OPD),
    "trl.DistillationTrainer.get_train_dataloader": Seam("self", _OPD),
    "trl.DistillationTrainer.log": Seam("self, logs, start_time=", _OPD),
    "trl.DistillationTrainer._save_checkpoint": Seam("self, model, trial", _RUN),
    "trl.DistillationTrainer._load_optimizer_and_scheduler": Seam("self, checkpoint", _OPD),
    "trl.DistillationTrainer.create_model_card": Seam("self, model_name=, dataset_name=, tags=", _OPD),
    "trl.DistillationTrainer._get_output_dir": Seam("self, trial", _RUN),
    "trl.trainer.distillation_trainer._chunked_divergence_loss": Seam(
        "student_hidden_states, teacher_hidden_states, student_lm_head_weight, teacher_lm_head_weight, "
        "completion_mask, beta, num_items_in_batch=, student_lm_head_bias=, teacher_lm_head_bias=, "
        "student_logit_scale=, teacher_logit_scale=, student_final_logit_softcapping=, "
        "teacher_final_logit_softcapping=, temperature=",
        "_compat.py (divergence_function)",
    ),
    "trl.trainer.distillation_trainer.RepeatSampler": Seam(
        "data_source, mini_repeat_count, batch_size=, repeat_count=, shuffle=, seed=", _REPEATS
    ),
    "trl.trainer.distillation_trainer.repeat_iterable_dataset": Seam(
        "dataset, mini_repeat_count, batch_size=, repeat_count=", _REPEATS
    ),
    "trl.generation.vllm_generation.VLLMGeneration.generate": Seam(
        "self, prompts, images, num_generations, profiler=", _ENGINE
    ),
    "trl.generation.vllm_generation.VLLMGeneration.sync_weights": Seam("self", _ENGINE),
    "trl.SFTTrainer.__init__": Seam(
        "self, model, args=, data_collator=, train_dataset=, eval_dataset=, processing_class=, compute_loss_func=, "
        "compute_metrics=, callbacks=, optimizers=, optimizer_cls_and_kwargs=, preprocess_logits_for_metrics=, "
        "quantization_config=, peft_config=, formatting_func=",
        _OFFLINE,
    ),
    "trl.SFTTrainer._prepare_dataset": Seam(
        "self, dataset, processing_class, args, packing, formatting_func, dataset_name", _OFFLINE
    ),
    "trl.SFTTrainer._set_signature_columns_if_needed": Seam("self", _OFFLINE),
    "trl.SFTTrainer._get_num_items_in_batch": Seam("self, batch_samples, device", _OFFLINE),
    "trl.SFTTrainer.evaluate": Seam("self, eval_dataset=, ignore_keys=, metric_key_prefix=", _OFFLINE),
    "trl.SFTTrainer.compute_loss": Seam("self, model, inputs, return_outputs=, num_items_in_batch=", _OFFLINE),
    "trl.SFTTrainer.training_step": Seam("self, *args, **kwargs", _OFFLINE),
    "trl.SFTTrainer.log": Seam("self, logs, start_time=", _OFFLINE),
    "trl.SFTTrainer.save_model": Seam("self, output_dir=, _internal_call=", _OFFLINE),
    "trl.SFTTrainer.create_model_card": Seam("self, model_name=, dataset_name=, tags=", _OFFLINE),
    "trl.SFTTrainer._save_checkpoint": Seam("self, model, trial", _RUN),
    "trl.SFTTrainer._get_output_dir": Seam("self, trial", _RUN),
    "transformers.Trainer.init_hf_repo": Seam("self, token=, private=", _RUN),
    "transformers.Trainer.push_to_hub": Seam(
        "self, commit_message=, blocking=, token=, revision=, private=, **kwargs", _RUN
    ),
    "transformers.Trainer._push_from_checkpoint": Seam("self, checkpoint_folder", _RUN),
    "transformers.Trainer._finish_current_push": Seam("self", _RUN),
    "trl.trainer.sft_trainer.DataCollatorForLanguageModeling.__init__": Seam(
        "self, pad_token_id, padding_free=, return_position_ids=, pad_to_multiple_of=, return_tensors=", _ROWS
    ),
    "trl.trainer.sft_trainer.DataCollatorForLanguageModeling.torch_call": Seam("self, examples", _ROWS),
    "trl.pack_dataset": Seam("dataset, seq_length, strategy=, map_kwargs=", _ROWS),
    "trl.trainer.utils._ChunkedLogProbFunction.forward": Seam(
        "ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=, logit_scale=, "
        "outputs=",
        "_compat.py (fused_log_prob_function)",
    ),
    "trl.trainer.utils.add_fused_lm_head": Seam("model, temperature=, cast_lm_head_to_fp32=, outputs=", "_compat.py"),
    "trl.trainer.utils.maybe_gather_lm_head_ctx": Seam("*params", "_compat.py (gather_lm_head)"),
    "trl.trainer.utils.get_config_model_id": Seam("config", "_compat.py"),
    "trl.trainer.utils.get_callable_name": Seam("func", "_compat.py"),
    "trl.trainer.utils.print_prompt_completions_sample": Seam(
        "prompts, completions, rewards, advantages, step, num_samples=, extra=",
        "_compat.py (for trainers/trust_region_opd/completions.py)",
    ),
    "trl.trainer.utils.create_model_from_path": Seam(
        "model_id, architecture=, **kwargs", "_compat.py (load_replicated)"
    ),
    "transformers.Trainer.save_model": Seam("self, output_dir=, _internal_call=", f"{_RUN}, {_SAVING}"),
    "transformers.Trainer.train": Seam("self, resume_from_checkpoint=, trial=, ignore_keys_for_eval=", _SAVING),
    "transformers.Trainer._load_best_model": Seam("self", _SAVING),
    "transformers.GenerationMixin.load_custom_generate": Seam(
        "self, pretrained_model_name_or_path=, trust_remote_code=, **kwargs", _EXPORT
    ),
    "transformers.dynamic_module_utils.get_class_from_dynamic_module": Seam(
        "class_reference, pretrained_model_name_or_path, cache_dir=, force_download=, proxies=, token=, revision=, "
        "local_files_only=, repo_type=, code_revision=, **kwargs",
        _EXPORT,
    ),
    "transformers.utils.cached_file": Seam("path_or_repo_id, filename, **kwargs", _EXPORT),
    "transformers.integrations.peft.PeftAdapterMixin.load_adapter": Seam(
        "self, peft_model_id=, adapter_name=, peft_config=, adapter_state_dict=, low_cpu_mem_usage=, is_trainable=, "
        "hotswap=, local_files_only=, adapter_kwargs=, load_config=, **kwargs",
        _EXPORT,
    ),
    "transformers.GenerationMixin.generate": Seam(
        "self, inputs=, generation_config=, logits_processor=, stopping_criteria=, prefix_allowed_tokens_fn=, "
        "synced_gpus=, assistant_model=, streamer=, negative_prompt_ids=, negative_prompt_attention_mask=, "
        "custom_generate=, **kwargs",
        _HOOKS,
    ),
    "transformers.GenerationMixin._prepare_generation_config": Seam("self, generation_config, **kwargs", _HOOKS),
    "transformers.GenerationMixin._prepare_special_tokens": Seam(
        "self, generation_config, kwargs_has_attention_mask=, device=, batch_size=", _HOOKS
    ),
    "transformers.GenerationMixin._prepare_attention_mask_for_generation": Seam(
        "self, inputs_tensor, generation_config, model_kwargs", _HOOKS
    ),
    "transformers.GenerationMixin.prepare_inputs_for_generation": Seam(
        "self, input_ids, next_sequence_length=, past_key_values=, attention_mask=, inputs_embeds=, "
        "is_first_iteration=, **kwargs",
        _PARTNER,
    ),
    "transformers.GenerationMixin._update_model_kwargs_for_generation": Seam(
        "self, outputs, model_kwargs, is_encoder_decoder=, num_new_tokens=", _PARTNER
    ),
    "transformers.GenerationMixin._prepare_position_ids_for_generation": Seam(
        "self, inputs_tensor, model_kwargs", _PARTNER
    ),
    "transformers.GenerationMixin._supports_logits_to_keep": Seam("self", _PARTNER),
    "transformers.GenerationMixin._prepare_cache_for_generation": Seam(
        "self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length", _PARTNER
    ),
    "transformers.GenerationConfig.get_generation_mode": Seam(
        "self, assistant_model=", "generation/hooks.py (_check_decoding)"
    ),
    "accelerate.Accelerator.prepare_model": Seam(
        "self, model, device_placement=, evaluation_mode=", "trainers/logit_mix_grpo/trainer.py (_prepare_partners)"
    ),
    "accelerate.utils.broadcast_object_list": Seam(
        "object_list, from_process=", "trainers/logit_mix_grpo/adaptive.py (AdaptiveWeightCallback)"
    ),
}

TRAINER_ATTRIBUTES = {
    "_dist": "trainers/logit_mix_grpo/trainer.py (_prepare_partners)",
    "_is_vlm": "trainers/logit_mix_grpo/trainer.py (__init__)",
    "_metrics": _GREEDY,
    "_pending_extra_logs": _GREEDY,
    "_pending_metrics": _GREEDY,
    "epsilon_high": "trainers/logit_mix_grpo/trainer.py (_importance_clip)",
    "epsilon_low": "trainers/logit_mix_grpo/trainer.py (_importance_clip)",
    "generation_config": _GREEDY,
    "generation_kwargs": _GREEDY,
    "importance_sampling_level": "trainers/logit_mix_grpo/trainer.py (_log_importance)",
    "model_wrapped": "trainers/logit_mix_grpo/trainer.py (_generate_single_turn)",
    "ref_model": "trainers/logit_mix_grpo/trainer.py (_is_student)",
    "reward_weights": "trainers/logit_mix_grpo/adaptive.py",
    "temperature": "trainers/logit_mix_grpo/trainer.py (_prepare_partners)",
}
"""Attributes of a `GRPOTrainer` instance, and who in this package reads or replaces them."""

DISTILLATION_ATTRIBUTES = {
    "_dist": "trainers/trust_region_opd/trainer.py (uses_own_divergence)",
    "_is_vlm": "trainers/trust_region_opd/checks.py (check_loaded)",
    "_logs": "trainers/trust_region_opd/completions.py (CompletionsTable)",
    "_metrics": "trainers/trust_region_opd/diagnostics.py (_log)",
    "_tokenizer": "trainers/trust_region_opd/checks.py (find_eos_map)",
    "eos_token_ids": "trainers/trust_region_opd/checks.py (find_eos_map)",
    "generation_config": "trainers/trust_region_opd/temperature.py (warmed_up_sampling)",
    "generation_kwargs": "trainers/trust_region_opd/temperature.py (warmed_up_sampling)",
    "log_completions": "trainers/trust_region_opd/completions.py (CompletionsTable)",
    "log_unique_prompts": "trainers/trust_region_opd/completions.py (CompletionsTable)",
    "max_completion_length": "trainers/trust_region_opd/completions.py (CompletionsTable)",
    "model_wrapped": "trainers/trust_region_opd/trainer.py (_generate_single_turn)",
    "num_completions_to_print": "trainers/trust_region_opd/completions.py (CompletionsTable)",
    "teacher_model": "trainers/trust_region_opd/trainer.py (_prepare_teacher)",
    "temperature": "trainers/trust_region_opd/temperature.py (sampling_temperature)",
    "use_vllm": "trainers/trust_region_opd/trainer.py (_decoding_with_transformers)",
}
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
    """Parameters of a function in the notation of [`Seam`]."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(
        stars.get(one.kind, "") + one.name + ("" if one.default is one.empty else "=")
        for one in inspect.signature(function).parameters.values()
    )

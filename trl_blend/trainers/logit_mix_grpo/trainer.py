"""GRPO on rollouts that student and teacher decode together."""

import copy
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import GRPOTrainer

from trl_blend import _compat
from trl_blend.generation.hooks import blended_generation
from trl_blend.generation.recording import RolloutRecord
from trl_blend.generation.rules import BlendRule, LogitMixing, ProbabilityMixing
from trl_blend.models.wrappers import adapter_layers, evaluation_mode
from trl_blend.ops.importance import ImportanceSums
from trl_blend.reports import cards
from trl_blend.schedules import make_schedule
from trl_blend.trainers import _cards, _partners
from trl_blend.trainers._run import RunMixin
from trl_blend.trainers._statistics import TokenMeans
from trl_blend.trainers.logit_mix_grpo import report
from trl_blend.trainers.logit_mix_grpo.adaptive import AdaptiveWeightCallback
from trl_blend.trainers.logit_mix_grpo.checks import check_arguments, check_student, warn_of_few_prompts
from trl_blend.trainers.logit_mix_grpo.config import LogitMixGRPOConfig
from trl_blend.trainers.logit_mix_grpo.greedy import GreedyRewards, greedy_rewards
from trl_blend.trainers.logit_mix_grpo.importance import importance_clip, log_importance
from trl_blend.trainers.logit_mix_grpo.mixed_forward import MixedForward
from trl_blend.trainers.logit_mix_grpo.report import PANELS
from trl_blend.trainers.logit_mix_grpo.saving import MixedPolicyFiles, MixedPolicySaving
from trl_blend.trainers.logit_mix_grpo.state import load_state, save_state


class LogitMixGRPOTrainer(MixedPolicySaving, RunMixin, GRPOTrainer):
    r"""
    Trainer for GRPO with a teacher (or frozen SFT reference) mixed into every decoding step.

    Tokens are drawn from \\( p_{mix} = \mathrm{softmax}(z_{mix} / \tau) \\) with
    \\( z_{mix} = (1 - \sum_i w_i)\, z_S + \sum_i w_i z_i \\) (Eq. 1 of the logit-averaging paper). With
    `objective="mixed"` the GRPO objective, ratio included, is that of \\( p_{mix} \\), with gradient through
    \\( z_S \\) only. With `objective="student"` it is that of the student alone, and the denominator of the ratio is
    the probability that the token was drawn with.

    Every `loss_type` and `importance_sampling_level` of [`~trl.GRPOTrainer`] works: this class changes what
    log-probabilities are computed, not the loss. At weight 0 it is `GRPOTrainer`, bit for bit.

    Left out on purpose: sampling with vLLM or continuous batching while the weight is positive, and vision-language
    students, whose partner would need the image features at each step. Both are refused. A partner is held in full by
    every process, also under FSDP2 and ZeRO-3.

    Example:

    ```python
    from trl_blend import LogitMixGRPOConfig, LogitMixGRPOTrainer

    trainer = LogitMixGRPOTrainer(
        model="Qwen/Qwen2.5-1.5B-Instruct",
        teacher_model="my-org/Qwen2.5-1.5B-SFT",
        reward_funcs=reward,
        args=LogitMixGRPOConfig(output_dir="out", teacher_weight=0.3),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student to train, see [`~trl.GRPOTrainer`].
        teacher_model (`str` or [`~transformers.PreTrainedModel`] or a `list` of them, *optional*):
            Frozen partner(s) with the student's tokenizer. `None` with PEFT means the student's own base, adapters
            disabled: one set of weights, no second copy.
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            See [`~trl.GRPOTrainer`].
        args ([`LogitMixGRPOConfig`], *optional*):
            Configuration of this trainer.
        train_dataset, eval_dataset, processing_class, peft_config, **kwargs:
            See [`~trl.GRPOTrainer`]. With `teacher_weight_schedule="adaptive"`, `eval_dataset` holds the validation
            prompts.

    Raises:
        [`~trl_blend.errors.ConfigError`]:
            If arguments are outside their range or contradict each other.
        [`~trl_blend.errors.TokenizerMismatchError`]:
            If a teacher's tokenizer maps an id to another token than the student's.
        [`~trl_blend.errors.UnsupportedError`]:
            If a combination would run but not correctly.
    """

    _tag_names = ["trl", "trl-blend", "logit-mix-grpo"]
    _name = "LogitMixGRPO"
    _paper = {
        "title": "Complementing reinforcement learning with SFT through logit averaging in the post training of LLMs",
        "id": "2605.20555",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{gan2026complementing,
                title        = {{Complementing reinforcement learning with SFT through logit averaging in the post
                                training of LLMs}},
                author       = {Xingwei Gan and Ying Zhu},
                year         = 2026,
                eprint       = {arXiv:2605.20555},
            }"""),
    }
    _template_name = "logit_mix_grpo.md"
    _panels = PANELS

    def __init__(
        self,
        model: "str | PreTrainedModel",
        teacher_model: "_partners.Teacher" = None,
        reward_funcs: Any = None,
        args: LogitMixGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        *,
        peft_config: Any = None,
        **kwargs: Any,
    ):
        if args is None:
            model_id = model if isinstance(model, str) else _compat.get_config_model_id(model.config)
            args = LogitMixGRPOConfig(f"{model_id.split('/')[-1]}-LogitMixGRPO")
        teachers = _partners.as_list(teacher_model)
        check_arguments(
            model,
            teachers,
            args,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            rollout_func=kwargs.get("rollout_func"),
            uses_tools=bool(kwargs.get("tools")) or kwargs.get("environment_factory") is not None,
        )
        self.partners: list[nn.Module] = []
        self.adaptive_weights: tuple[float, ...] = tuple(args.teacher_weight)
        self._policy_weights: tuple[float, ...] = (0.0,) * len(args.teacher_weight)
        self._generating = False
        self._recording = True
        self._eval_policy: str = args.objective
        self._panels = report.panels(len(args.teacher_weight))
        self._rollout_means = TokenMeans()
        self._latest_logps: Tensor | None = None
        self.importance_sums: ImportanceSums | None = None
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        self._schedules = [
            make_schedule(args.teacher_weight_schedule, weight, args.teacher_weight_decay_steps)
            for weight in (args.teacher_weight if args.teacher_weight_schedule != "adaptive" else [])
        ]
        if not args.mixes:
            return
        check_student(self, teachers)
        self._prepare_partners(teachers)
        if args.objective == "mixed":
            self.mixed_policy_files = MixedPolicyFiles(
                self.accelerator.unwrap_model(self.model),
                self.partners,
                self.processing_class,
                args,
                student=model,
                teachers=teachers,
                is_sharded=self._dist.is_fsdp or self._dist.is_zero3,
            )
        if args.teacher_weight_schedule == "adaptive":
            rows = list(islice(iter(eval_dataset), args.adaptive_num_prompts))
            warn_of_few_prompts(len(rows), args.adaptive_num_prompts)
            self.add_callback(AdaptiveWeightCallback(self, rows))

    def _prepare_partners(self, teachers: list) -> None:
        attention = self.model.config._attn_implementation
        like_student = {"dtype": self.model.dtype, "attn_implementation": attention, "device_map": None}
        for partner in _partners.load_partners(teachers, self.args, like_student):
            if self.args.objective == "mixed":
                base = partner.get_base_model() if is_peft_model(partner) else partner
                _compat.add_fused_lm_head(base, self.temperature, self.args.cast_lm_head_to_fp32)
            self.partners.append(_partners.prepare_partner(partner, self.accelerator))
        if self.args.mixing_space == "probs":
            missing = _partners.token_ids_without_partner(self.model, self.partners)
            if missing:  # a teacher could not read them back
                missing += self.generation_kwargs.get("suppress_tokens") or []
                self.generation_config.suppress_tokens = self.generation_kwargs["suppress_tokens"] = missing

    # Weights

    def current_weights(self) -> tuple[float, ...]:
        """Teacher weights of the next generation batch; of the best checkpoint, once that is loaded."""
        if self.loaded_policy is not None:
            return self.loaded_policy.weights
        if self.args.teacher_weight_schedule == "adaptive":
            return self.adaptive_weights
        return tuple(schedule(self.state.global_step) for schedule in self._schedules)

    def _suffix(self, index: int) -> str:
        return f"_{index}" if len(self.args.teacher_weight) > 1 else ""

    def _rule(self, weights: tuple[float, ...]) -> BlendRule:
        return (LogitMixing if self.args.mixing_space == "logits" else ProbabilityMixing)(weights)

    @contextmanager
    def policy(self, weights: tuple[float, ...], *, generating: bool = False, recording: bool = True) -> Iterator:
        """Weights that decoding and scoring inside the context use."""
        saved = self._policy_weights, self._generating, self._recording
        self._policy_weights, self._generating, self._recording = weights, generating, recording
        try:
            yield
        finally:
            self._policy_weights, self._generating, self._recording = saved

    # Generation

    def _generate_and_score_completions(self, inputs):
        if not self.args.mixes:
            return super()._generate_and_score_completions(inputs)
        self._rollout_means = TokenMeans()  # an earlier call that raised may have left some
        mode = "train" if self.model.training else "eval"
        weights = self.current_weights()
        if mode == "eval" and self._eval_policy == "student":
            weights = (0.0,) * len(weights)
        for index, weight in enumerate(weights):
            self._log_completion_extra(f"teacher_weight{self._suffix(index)}", [weight] * len(inputs))
        with self.policy(weights, generating=True):
            output = super()._generate_and_score_completions(inputs)
        output["teacher_weight"] = [weights] * len(inputs)
        if self.args.objective == "student" and any(weights):
            output["old_per_token_logps"] = output["sampling_per_token_logps"]
        for index, weight in enumerate(weights):
            self._metrics[mode][f"mixing/teacher_weight{self._suffix(index)}"].append(weight)
        for name, value in self._rollout_means.reduce(self.accelerator).items():
            self._metrics[mode][f"mixing/{name}"].append(value)
        return output

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
        turn = (prompt_ids, images, multimodal_fields, num_generations)
        if not any(self._policy_weights):
            return super()._generate_single_turn(*turn, **kwargs)
        student = self.accelerator.unwrap_model(self.model_wrapped)
        rule = self._rule(self._policy_weights)
        with (
            evaluation_mode(student),  # dropout would draw tokens from another policy than the one that is scored
            blended_generation(student, self.partners or None, rule, record=self._recording) as session,
        ):
            completion_ids, logps = super()._generate_single_turn(*turn, **kwargs)
        if not self._recording:
            return completion_ids, logps
        record = session.records[-1]
        lengths = [len(ids) for ids in completion_ids]
        self._collect_rollout_means(record, lengths)
        return completion_ids, [row[:n] for row, n in zip(record.behavior_logps.tolist(), lengths, strict=True)]

    def _collect_rollout_means(self, record: RolloutRecord, lengths: list[int]) -> None:
        logps = record.behavior_logps
        mask = torch.arange(logps.size(1), device=logps.device) < torch.tensor(lengths, device=logps.device)[:, None]
        for name, values in record.statistics.items():
            self._rollout_means.add(name, values, mask)
        for index, values in enumerate(record.teacher_logps.view(-1, *logps.shape)):
            self._rollout_means.add(f"teacher_logp{self._suffix(index)}", values, mask & values.isfinite())

    def greedy_rewards(self, rows: list[dict[str, Any]], weights: tuple[float, ...]) -> GreedyRewards:
        """Decode `rows` greedily at the given teacher weights and reward the completions, see [`greedy_rewards`]."""
        return greedy_rewards(self, rows, weights)

    # Scoring

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        mixed, weights = self.args.objective == "mixed", self._policy_weights
        if any(weights) and self._is_student(model):
            if mixed:
                unwrapped = self.accelerator.unwrap_model(model)
                model = MixedForward(model, self.partners, weights, self.args.mixing_space, unwrapped)
            elif self._generating:
                # The old log-probs of `objective="student"` are those recorded while decoding: no forward is needed
                return torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device), None, None
        output = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        self._latest_logps = output[0].detach()
        return output

    def _is_student(self, model: nn.Module) -> bool:
        """Whether `model` is the policy, rather than TRL's KL reference (its own model, or other PEFT adapters)."""
        if model is self.ref_model:
            return False
        layers: list[Any] = adapter_layers(self.accelerator.unwrap_model(model))
        return not any(layer._disable_adapters or "ref" in layer.active_adapters for layer in layers[:1])

    def _compute_loss(self, model, inputs):
        weights = inputs["teacher_weight"][0] if "teacher_weight" in inputs else (0.0,)
        if self.args.objective == "mixed" or not any(weights):
            with self.policy(weights):
                return super()._compute_loss(model, inputs)
        with self.policy(weights), importance_clip(self):
            loss = super()._compute_loss(model, inputs)
        log_importance(self, inputs, self._latest_logps)
        return loss

    # Evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if not self.args.mixes:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        policies = ["mixed", "student"] if self.args.eval_policy == "both" else [self.args.eval_policy]
        deployed = self.args.objective if self.args.objective in policies else policies[0]
        collected, result = self._metrics["eval"], None
        for policy in policies:
            self._eval_policy, self._metrics["eval"] = policy, defaultdict(list)
            output = super().prediction_step(model, copy.copy(inputs), prediction_loss_only, ignore_keys)
            for name, values in self._metrics["eval"].items():
                collected[f"{policy}/{name}"].extend(values)
                if policy == deployed:
                    collected[name].extend(values)
            result = output if policy == deployed else result
        self._metrics["eval"] = collected
        return result

    # Checkpoints and card

    def write_run_state(self, folder: Path) -> None:
        """Write the teacher weights and the settings of the mixture into a checkpoint."""
        save_state(self, folder)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_state(self, Path(checkpoint))

    def card_fields(self) -> dict[str, Any]:
        """Fields of `model_cards/logit_mix_grpo.md`."""
        args, rollouts = self.args, _cards.rows_per_step(self.args)
        weights = self.current_weights() if args.mixes else (0.0,)
        teachers = [_cards.live_teacher(partner, self.args) for partner in self.partners]
        if args.mixes and not teachers:
            teachers = [_cards.base_teacher(self.model, self.args)]
        averages = args.objective == "mixed"
        rewards = zip(self.reward_func_names, self.reward_weights.tolist(), strict=True)
        return {
            "paper_name": "the logit-averaging paper" if averages else "logit fusion",
            "paper": report.paper_values(args),
            "settings": {"prompts_per_step": rollouts // self.num_generations},
            "choices": report.choices(args),
            "teachers": teachers,
            "data_rows": _cards.num_rows(self.train_dataset),
            "data_unit": "prompts",
            "per_step": _cards.rollouts_text(rollouts, self.num_generations),
            "result_metrics": r"((mixed|student)/)?(reward|rewards/.+/mean)",
            "curves_text": "The teacher weight, rewards and other metrics against the optimizer step",
            "mixed": averages and args.mixes,  # where `MixedPolicyFiles` are written
            "still_mixes": any(weights),
            "last_weights": [f"{weight:.4g}" for weight in weights],
            "rewards": ", ".join(f"{cards.code(name)} ({weight:g})" for name, weight in rewards),
        }

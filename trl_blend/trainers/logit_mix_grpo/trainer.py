"""GRPO on rollouts that student and teacher decode together."""

import copy
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import GRPOTrainer

from trl_blend import _compat
from trl_blend.generation.hooks import blended_generation
from trl_blend.generation.recording import RolloutRecord
from trl_blend.generation.rules import BlendRule
from trl_blend.generation.settings import without_sampling
from trl_blend.models.limits import vocabulary_rows
from trl_blend.models.output_layer import OutputLayers, find_plain_outputs, plain_outputs
from trl_blend.models.own_logits import check_own_logits, fused_log_probs
from trl_blend.models.wrappers import adapter_layers, evaluation_mode
from trl_blend.ops.importance import (
    ImportanceSums,
    floored_log_ratio,
    importance_statistics,
    summarize_importance,
)
from trl_blend.ops.reduction import masked_mean
from trl_blend.serving.statistics import OF_DRAFTS
from trl_blend.trainers import _cards, _engine, _partners
from trl_blend.trainers._data import RowsNeeded, check_prompt_columns
from trl_blend.trainers._greedy import own_share
from trl_blend.trainers._record import RunParts
from trl_blend.trainers._run import RunMixin, default_config
from trl_blend.trainers._statistics import TokenMeans
from trl_blend.trainers.logit_mix_grpo import checks, report
from trl_blend.trainers.logit_mix_grpo.adaptive import AdaptiveWeightCallback, RewardWeightCallback
from trl_blend.trainers.logit_mix_grpo.config import LogitMixGRPOConfig
from trl_blend.trainers.logit_mix_grpo.mixed_forward import MixedForward
from trl_blend.trainers.logit_mix_grpo.saving import MixedPolicyFiles, MixedPolicySaving


# A resumed run with other values of these does not continue the interrupted one: all options but those that name the
# teacher, which is compared itself, and those of evaluation and engine
_OTHERS = ("teacher_model_", "eval_policy", "vllm_")
_OF_THE_PARENT = (
    *("loss_type", "importance_sampling_level", "scale_rewards", "beta", "epsilon", "epsilon_high", "delta"),
    *("num_generations", "num_iterations", "temperature", "max_completion_length"),
)
_RECORDED = [name for name in LogitMixGRPOConfig.__annotations__ if not name.startswith(_OTHERS)] + [*_OF_THE_PARENT]


class GreedyRewards(NamedTuple):
    """
    Rewards of one greedy decode.

    Args:
        rewards (`torch.Tensor` of shape `(N, F)`):
            Reward of each row by each reward function, NaN where a function returned `None`. Equal on every rank.
        num_tokens (`int`):
            Tokens decoded by all ranks together.
        seconds (`float`):
            Wall time on this rank.
    """

    rewards: Tensor
    num_tokens: int
    seconds: float


class LogitMixGRPOTrainer(MixedPolicySaving, RunMixin, GRPOTrainer):
    r"""
    Trainer for GRPO with a teacher (such as the SFT model) mixed into every decoding step.

    Tokens are drawn from \\( p_{mix} = \mathrm{softmax}(z_{mix} / \tau) \\) with
    \\( z_{mix} = (1 - \sum_i w_i)\, z_S + \sum_i w_i z_i \\) (Eq. 1 of the logit-averaging paper), or as another
    `mixing_space` says. With `objective="mixed"` the GRPO objective, ratio included, is that of \\( p_{mix} \\), with
    gradient through \\( z_S \\) only. With `objective="student"` it is that of the student alone, and the denominator
    of the ratio is the probability that the token was drawn with.

    Every `loss_type` and `importance_sampling_level` of [`~trl.GRPOTrainer`] works: this class changes what
    log-probabilities are computed, not the loss. (With `objective="student"`, `"cispo"`, `"sapo"` and `"vespo"` treat
    ratios themselves and need `is_clip_mode="ppo"`.) At weight 0 it is `GRPOTrainer`, bit for bit.

    With `use_vllm=True` the engine holds the teachers beside the student and draws the mixed rollouts. Left out on
    purpose: continuous batching of transformers while the weight is positive, and vision-language students, whose
    teacher would need the image features at each step. Both are refused. A teacher is held in full by every process,
    also under FSDP2 and ZeRO-3.

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
            Frozen teacher(s) with the student's tokenizer. Defaults to `args.teacher_model_name_or_path`. Neither of
            them, with PEFT, means the student's own base, adapters disabled: one set of weights, no second copy.
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
    _recorded = _RECORDED
    engine = property(_engine.of_trainer)

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
        args = default_config(LogitMixGRPOConfig, model) if args is None else args
        teachers = _partners.given_teachers(teacher_model, args)
        checks.check_arguments(
            model,
            teachers,
            args,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            rollout_func=kwargs.get("rollout_func"),
            uses_tools=bool(kwargs.get("tools")) or kwargs.get("environment_factory") is not None,
        )
        if kwargs.get("environment_factory") is None:  # which may bring the prompts
            check_prompt_columns(train_dataset, eval_dataset, processing_class)
        self.partners: list[nn.Module] = []
        self._plain_outputs: OutputLayers = []
        self._given_teachers = teachers
        self.adaptive_weights: tuple[float, ...] = tuple(args.teacher_weight)
        self.step_rewards: list[Tensor] = []
        self.weight_steps = 0
        self._rule: BlendRule | None = None
        self._num_tokens: int | None = None
        self._generating = False
        self._recording = True
        self._eval_policy: str = args.objective
        self._panels = report.panels(len(args.teacher_weight))
        self._rollout_means = TokenMeans()
        self._latest_logps: Tensor | None = None
        self._importance_sums: dict[str, ImportanceSums] = {}  # an evaluation comes between two logs of the training
        self._floored_batch: dict[str, Any] | None = None
        with _engine.blended_engine(args, teachers, args.rule_at(0), blends=args.mixes, partners_stop=args.decays):
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
        if not args.mixes:
            return
        checks.check_student(self.model, args, is_vision_language=self._is_vlm)
        if not teachers:
            _partners.check_base_as_reference(self.model, self._dist, args)
        self._prepare_teachers(teachers)
        if args.objective == "mixed":
            self._mixture_files = MixedPolicyFiles(
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
            checks.warn_of_few_prompts(len(rows), args.adaptive_num_prompts)
            self.add_callback(AdaptiveWeightCallback(self, rows))
        elif args.teacher_weight_schedule == "reward":
            self.add_callback(RewardWeightCallback(self))

    def _prepare_teachers(self, teachers: list) -> None:
        attention = self.model.config._attn_implementation
        like_student = {"dtype": self.model.dtype, "attn_implementation": attention, "device_map": None}
        for partner in _partners.load_partners(teachers, self.args, like_student):
            if self.args.objective == "mixed":
                base = partner.get_base_model() if is_peft_model(partner) else partner
                _compat.add_fused_lm_head(base, self.temperature, self.args.cast_lm_head_to_fp32)
            self.partners.append(_partners.prepare_partner(partner, self.accelerator))
        self._num_tokens = _partners.num_tokens(self.model, self._tokenizer)
        if self.args.objective == "mixed":
            self._plain_outputs = find_plain_outputs(self.partners, "teacher_model")
        if self.engine is not None:  # which never draws what a teacher could not read back
            self.engine.send_partners(_engine.in_memory(self.model, teachers, self.partners))
        elif self.args.mixing_space == "probs":
            missing = _partners.token_ids_without_partner(self.model, self.partners)
            if missing:  # a teacher could not read them back
                missing += self.generation_kwargs.get("suppress_tokens") or []
                self.generation_config.suppress_tokens = self.generation_kwargs["suppress_tokens"] = missing

    def current_weights(self) -> tuple[float, ...]:
        """Teacher weights of the next generation batch; of the best checkpoint, once that is loaded."""
        if self.loaded_policy is not None:
            return self.loaded_policy.weights
        if self.args.teacher_weight_schedule == "adaptive":
            return self.adaptive_weights
        waits = self.args.teacher_weight_schedule == "reward"
        return self.args.weights_at(self.weight_steps if waits else self.state.global_step)

    def policy(
        self, weights: tuple[float, ...], *, generating: bool = False, recording: bool = True
    ) -> AbstractContextManager[Any]:
        """Teacher weights that decoding and scoring inside the context use."""
        rule = self.args.rule_of(weights)
        return patch.multiple(self, _rule=rule, _generating=generating, _recording=recording)

    def _suffix(self, index: int) -> str:
        return f"_{index}" if len(self.args.teacher_weight) > 1 else ""

    # Rollouts

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
        with self.policy(weights, generating=True), self._engine_correction(weights):
            output = super()._generate_and_score_completions(inputs)
        output["teacher_weight"] = [weights] * len(inputs)
        if self.args.objective == "student" and any(weights):
            logps = output["sampling_per_token_logps"]
            if (unknown := logps.isnan()).any():  # to vLLM: without them there is no ratio
                output["tool_mask"] = output.get("tool_mask", torch.ones_like(output["completion_mask"])) * ~unknown
            output["old_per_token_logps"] = logps.nan_to_num()
        for index, weight in enumerate(weights):
            self._metrics[mode][f"mixing/teacher_weight{self._suffix(index)}"].append(weight)
        for name, value in self._rollout_means.reduce(self.accelerator).items():
            self._metrics[mode][f"mixing/{name}"].append(value)
        return output

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.args.mixes:
            training = self.model.training
            total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
            total[rewards.isnan().all(dim=1)] = torch.nan  # scored by none, and left out of the metric `reward` too
            prompts_of_batch = total.view(-1, self.num_generations if training else self.num_generations_eval)
            share = (prompts_of_batch > 0).any(dim=1).float().mean().item()
            self._metrics["train" if training else "eval"]["mixing/rewarded_prompts"].append(share)
            if training and self.args.teacher_weight_schedule == "reward":
                self.step_rewards.append(total)
        return rewards

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
        turn = (prompt_ids, images, multimodal_fields, num_generations)
        student = self.accelerator.unwrap_model(self.model_wrapped)
        if self.engine is not None or self._rule is not None:
            _partners.check_prompt_ids(prompt_ids, student, self.partners, self._tokenizer)
        if self.engine is not None:
            return self._draw_with_engine(self.engine, *turn, **kwargs)
        if self._rule is None:
            return super()._generate_single_turn(*turn, **kwargs)
        with (
            evaluation_mode(student),  # dropout would draw tokens from another policy than the one that is scored
            blended_generation(
                student, self.partners or None, self._rule, vocab_size=self._num_tokens, record=self._recording
            ) as session,
        ):
            completion_ids, logps = super()._generate_single_turn(*turn, **kwargs)
        if not self._recording:
            return completion_ids, logps
        record = session.records[-1]
        lengths = [len(ids) for ids in completion_ids]
        self._collect_rollout_means(record, lengths)
        return completion_ids, [row[:n] for row, n in zip(record.behavior_logps.tolist(), lengths, strict=True)]

    def _draw_with_engine(self, engine: "_engine.BlendedVLLMGeneration", *turn: Any, **kwargs: Any) -> tuple:
        tokens = None if self._rule is None and self.model.training else self._num_tokens
        engine.set_rule(self._rule, self.eos_token_ids, vocab_size=tokens, records=self._recording)
        drawn = super()._generate_single_turn(*turn, **kwargs)
        if self._rule is None or not self._recording:
            return drawn
        sums = engine.take_statistics()
        names = {"kl_behavior_student": "kl_behavior_student"}
        names |= {f"teacher_logp_{i}": f"teacher_logp{self._suffix(i)}" for i in range(len(self.args.teacher_weight))}
        names |= {name: name for name in OF_DRAFTS if name in sums}
        for name, logged in names.items():
            self._rollout_means.add_sum(logged, sums[name].total, sums[name].count)
        return drawn

    def _collect_rollout_means(self, record: RolloutRecord, lengths: list[int]) -> None:
        mask = record.mask_of(lengths)
        for name, values in record.statistics.items():
            self._rollout_means.add(name, values, mask)
        for index, values in enumerate(record.teacher_logps):
            self._rollout_means.add(f"teacher_logp{self._suffix(index)}", values, mask & values.isfinite())

    def greedy_rewards(
        self, rows: list[dict[str, Any]], weights: tuple[float, ...], progress: Callable[..., Any] = iter
    ) -> GreedyRewards:
        """
        Decode `rows` greedily at the given teacher weights and reward the completions.

        The rows are split over the ranks. The student is in evaluation mode, nothing is drawn from the random
        generators, no metric or completion is logged, and no token is counted as trained on. As always with greedy
        decoding, models are mixed at temperature 1; for `mixing_space="probs"` the most likely token depends on that.

        Args:
            rows (`list[dict]`):
                Rows of a dataset, as for training. Every rank passes the same ones.
            weights (`tuple[float, ...]`):
                Weight of each teacher: all 0 is the student alone, 1 (except in arithmetic) the teacher alone.
            progress (`Callable`, *optional*):
                Wraps the batches as `tqdm` does.

        Returns:
            [`GreedyRewards`]: The rewards, and what they cost.
        """
        started, ranks = time.perf_counter(), self.accelerator.num_processes
        chunk = max(self.args.generation_batch_size // ranks, 1) * ranks
        rewards, tokens = [], torch.zeros((), dtype=torch.long, device=self.accelerator.device)
        student = self.accelerator.unwrap_model(self.model_wrapped)
        with self._decoding_greedily(), self.policy(weights, recording=False), evaluation_mode(student):
            for start in progress(range(0, len(rows), chunk)):
                part = rows[start : start + chunk]
                mine = own_share(part, self.accelerator)
                prompts = [row["prompt"] for row in mine]
                _, completion_ids, _, completions, *_ = self._generate(prompts)
                gathered = super()._calculate_rewards(mine, prompts, completions, completion_ids)
                rewards.append(gathered[: len(part)])
                tokens += sum(map(len, completion_ids))
        num_tokens = int(self.accelerator.reduce(tokens, reduction="sum"))
        return GreedyRewards(torch.cat(rewards), num_tokens, time.perf_counter() - started)

    @contextmanager
    def _decoding_greedily(self) -> Iterator[None]:
        """Greedy settings; logs and counters are put back on exit."""
        saved_logs = self._metrics, self.state.num_input_tokens_seen
        saved_generations, self.num_generations_eval = self.num_generations_eval, 1  # the prompts are all different
        self._metrics = {mode: defaultdict(list) for mode in saved_logs[0]}
        try:
            with _engine.greedy(self.vllm_generation) if self.use_vllm else self._transformers_greedy():
                yield
        finally:
            self._metrics, self.state.num_input_tokens_seen = saved_logs
            self.num_generations_eval = saved_generations
            # Reward functions may have logged extra columns and metrics for rows that are not part of the run
            self._pending_extra_logs.clear()
            self._pending_metrics.clear()

    def _transformers_greedy(self) -> AbstractContextManager[Any]:
        settings = without_sampling(self.generation_kwargs) | {"do_sample": False}
        if self._num_tokens is not None:  # the other rows are no tokens
            padding = range(self._num_tokens, vocabulary_rows(self.model))
            settings["suppress_tokens"] = [*(settings.get("suppress_tokens") or ()), *padding]
        config = GenerationConfig(**settings, disable_compile=True)
        return patch.multiple(self, generation_kwargs=settings, generation_config=config)

    def _engine_correction(self, weights: tuple[float, ...]) -> AbstractContextManager[Any]:
        """
        Leave out TRL's correction for the difference between engine and trainer where the ratio has the engine's own
        probabilities in its denominator: `objective="student"`, while tokens come from the mixture.
        """
        if self.args.objective != "student" or not any(weights):
            return nullcontext()
        return patch.object(self, "vllm_importance_sampling_correction", False)

    # Loss

    def compare_logits(self, model: Any) -> None:
        """The student's and, where the objective is that of the mixture, the teachers'; see [`RunMixin`]."""
        if not self.args.mixes:
            return
        check_own_logits(model, "model", fused_log_probs(model), layout="left_padded")
        if self.args.objective == "mixed":
            for partner in self.partners:
                with plain_outputs(self._plain_outputs):
                    check_own_logits(partner, "teacher_model", fused_log_probs(partner), layout="left_padded")
        if not self.partners:
            check_own_logits(
                model, "teacher_model", fused_log_probs(model), layout="left_padded", disable_adapters=True
            )

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if self._rule is not None and self._is_student(model):
            if self.args.objective == "mixed":
                unwrapped = self.accelerator.unwrap_model(model)
                space = self.args.mixing_space
                model = MixedForward(model, self.partners, self._rule.weights, space, unwrapped, self._num_tokens)
            elif self._generating:
                # The old log-probs of `objective="student"` are those recorded while decoding: no forward is needed
                return torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device), None, None
        with plain_outputs(self._plain_outputs):
            output = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        self._latest_logps = output[0].detach()
        if self._floored_batch is not None:
            self._floor_ratios(self._floored_batch)
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
        batch = copy.copy(inputs)
        with self.policy(weights), self._importance_clip(batch), self._engine_correction(weights):
            loss = super()._compute_loss(model, batch)
        self._log_importance(inputs)
        return loss

    def _floor_ratios(self, batch: dict[str, Any]) -> None:
        """Move the recorded log-probs of a batch so that TRL's ratio to them is that of [`floored_log_ratio`]."""
        log_ratio, advantages = self._latest_logps - batch["old_per_token_logps"], batch["advantages"]
        if self.importance_sampling_level == "sequence":
            log_ratio = masked_mean(log_ratio, self._loss_mask(batch), dim=-1).unsqueeze(1)
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        floored = floored_log_ratio(log_ratio, advantages, self.args.is_clip_max)
        batch["old_per_token_logps"] = batch["old_per_token_logps"] + log_ratio - floored

    @staticmethod
    def _loss_mask(batch: dict[str, Any]) -> Tensor:
        return batch["completion_mask"] * batch.get("tool_mask", 1)

    @contextmanager
    def _importance_clip(self, batch: dict[str, Any]) -> Iterator[None]:
        r"""
        Turn TRL's clipped surrogate into \\( -rA \\) (`"none"`, and `"floor"` with a ratio of its own) or
        \\( -\min(r, c)A \\) (`"max"`), by its own bounds: without a lower bound, and with the upper bound and `delta`
        at \\( c \\), both arms of its minimum are equal.

        Source: logit fusion, reference code. `"ppo"` leaves TRL's clipping as it is.
        """
        args = self.args
        if args.is_clip_mode == "ppo":
            yield
            return
        cap = args.is_clip_max if args.is_clip_mode == "max" else None
        bounds = {"epsilon_low": float("inf"), "epsilon_high": float("inf") if cap is None else cap - 1}
        floored = batch if args.is_clip_mode == "floor" else None
        with patch.multiple(self, **bounds, _floored_batch=floored), patch.object(args, "delta", cap):
            yield

    def _log_importance(self, inputs: dict[str, Any]) -> None:
        """Log the ratio of the latest log-probabilities to the recorded ones, over the tokens of all ranks."""
        sums = importance_statistics(
            self._latest_logps - inputs["old_per_token_logps"],
            self._loss_mask(inputs),
            level=self.importance_sampling_level,
            clip_max=self._ratio_cap(),
            behavior_logps=inputs["old_per_token_logps"],
            advantages=inputs["advantages"],
        )
        total = _combined(self.accelerator.gather(torch.stack(sums).float()[None]))
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        if "importance/ratio_mean" in metrics:
            total = _combined(torch.stack([torch.stack(self._importance_sums[mode]), torch.stack(total)]))
        self._importance_sums[mode] = total
        # One value for everything since the last log: TRL would otherwise average maxima and shares of micro-batches
        for name, value in summarize_importance(total).items():
            metrics[f"importance/{name}"] = [value]

    def _ratio_cap(self) -> float | None:
        """Ratio above which the loss no longer grows with it; `None` where the loss has no such bound."""
        args = self.args
        if args.loss_type == "cispo":
            return self.epsilon_high
        if args.loss_type in ("sapo", "vespo") or args.is_clip_mode == "none":
            return None
        return 1 + self.epsilon_high if args.is_clip_mode == "ppo" else args.is_clip_max

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

    def run_state(self) -> dict[str, Any]:
        """Where the weight of a checkpoint stands, where that does not follow from its step."""
        return {"adaptive_weights": self.adaptive_weights, "weight_steps": self.weight_steps}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Go on with the weight of a checkpoint."""
        self.adaptive_weights, self.weight_steps = tuple(state["adaptive_weights"]), state["weight_steps"]

    @staticmethod
    def rows_needed(args: LogitMixGRPOConfig) -> RowsNeeded:
        """Prompts of one generation batch."""
        rollouts, group = args.generation_batch_size, args.num_generations
        return RowsNeeded(rollouts // group, f"{rollouts} rollouts, `num_generations={group}` for each prompt")

    def run_parts(self) -> RunParts:
        """What the run is made of, in words."""
        teachers = ", ".join(self.teacher_names()) or "the student's own base"
        rewards = zip(self.reward_func_names, self.reward_weights.tolist(), strict=True)
        return report.run_parts(self.args, teachers, list(rewards))

    def card_fields(self) -> dict[str, Any]:
        """Fields of `model_cards/logit_mix_grpo.md`."""
        return report.card_fields(
            self.args,
            teachers=_cards.teachers(self) if self.args.mixes else [],
            weights=self.current_weights() if self.args.mixes else (0.0,),
            rewards=list(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True)),
            num_prompts=_cards.num_rows(self.train_dataset),
        )


def _combined(sums: Tensor) -> ImportanceSums:
    """Sums of several batches, `(n, 7)`, as those of one."""
    return ImportanceSums(*sums.sum(dim=0))._replace(ratio_max=sums[:, 3].max())
